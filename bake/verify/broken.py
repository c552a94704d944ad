"""Broken plans, run in the place of the sound one: what a verification has to tell from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from bake.checkpoints import Checkpoint
from bake.checkpoints.planned import PlannedTensor, base_rows
from bake.families import Layout
from bake.sites import Site
from bake.tiles import row_count
from bake.verify import controls
from bake.verify.controls import Control, Spoiling
from bake.verify.evidence import ControlRun
from bake.verify.limits import Limits
from bake.verify.metrics import mean_kl
from bake.verify.plan_measure import PlanMeasure, measure_of
from bake.verify.runner import Runner
from bake.verify.runs import Batch, Trace, batches_of

FEW = 2
"""Prompts that broken plans are run on."""


@dataclass(frozen=True, eq=False)
class BrokenPlans:
    """What breaks the plan of one verification, and runs it.

    Where stand-ins were fitted, every one of them is forgotten once: each says what it is worth.
    A relocated plan is judged by what it loses of the effect, beside which one tensor of one block
    may be little: all readers, all writers or all norms are broken at once. The others are run on
    the first few prompts, which are enough to tell them.
    """

    runner: Runner
    sites: Sequence[Site]
    """Stream sites to record."""
    limits: Limits
    """With the runs of base and reference in float64."""
    whole: Trace | None
    """The sound plan in float64 over all prompts; None where broken ones are run on a few."""

    @property
    def fitted(self) -> bool:
        """Whether the plan's stand-ins were fitted."""
        return self.runner.inputs.artifact.fitted is not None

    @cached_property
    def measure(self) -> PlanMeasure:
        """How the plan is judged."""
        return measure_of(self.limits, self.runner.inputs.nulled)

    @cached_property
    def tensors(self) -> Mapping[str, PlannedTensor]:
        """What the plan changes, by name."""
        return self.runner.inputs.planned.model.tensors

    @cached_property
    def spoiling(self) -> Spoiling:
        """What mistakes are made of."""
        inputs, planned = self.runner.inputs, self.tensors
        rows = partial(base_rows, inputs.base, planned)
        tied = inputs.untied
        return Spoiling(planned, rows, _planned_rows(planned, inputs.base), tied)

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """What broken plans are run on."""
        runner = self.runner
        return (
            runner.batches if self.whole is not None else batches_of(runner.transcript.tokens[:FEW])
        )

    @cached_property
    def sound(self) -> Trace:
        """The planned model over these batches: in others the same tokens round apart."""
        if self.whole is not None:
            return self.whole
        name, double = "planned model, first prompts", torch.float64
        return self.runner.trace(name, "planned", double, batches=self.batches, sites=self.sites)

    @cached_property
    def roles(self) -> Mapping[str, str]:
        """Which tensors are broken together, by name."""
        layout = self.runner.inputs.layout
        relocated = self.limits.exactness == "relocated"
        return _roles(layout) if relocated and layout is not None else {}

    def runs(self) -> list[ControlRun]:
        """Return broken plans whose change the prompts reach, one of each kind."""
        inputs, planned = self.runner.inputs, self.tensors
        in_base, tied = inputs.base.tensors.__contains__, self.spoiling.tied
        found: list[ControlRun] = []
        for group in controls.groups_of(planned, in_base, tied, inputs.planned.model.digest):
            kind = group[0].kind
            if kind == controls.BLOCK:
                continue  # a mistake of files
            if kind == controls.TIED and self.limits.exactness == "nulling":
                continue  # the head reads the stream and writes nothing to it
            every = self.fitted and not inputs.streamed
            each = len(group) if every and kind in (controls.TENSOR, controls.BIAS) else 1
            found += controls.sample([self._apart(group)], each, partial(self.run, group))
        return found

    def _apart(self, group: Sequence[Control]) -> list[Control]:
        """Return the controls of a kind, one of those that are broken together."""
        seen = {self.roles.get(x.tensor, x.tensor): x for x in reversed(group)}
        return [x for x in group if seen[self.roles.get(x.tensor, x.tensor)] is x]

    def run(self, group: Sequence[Control], control: Control) -> ControlRun | None:
        """Return what a broken plan says, or None where nothing of it is broken.

        Args:
            group: the controls of one kind.
            control: one of them.
        """
        name, tensor = f"control: {control.kind}, {control.tensor}", control.tensor
        # Of a bias that is zero nothing can be forgotten, and a config flag may demand dozens.
        if control.kind == controls.BIAS and self._is_sound(control):
            return None
        role = self.roles.get(tensor)
        spoiled = [x for x in group if x == control or (role and self.roles.get(x.tensor) == role)]
        trace = self.runner.trace(
            name,
            "planned",
            torch.float64,
            batches=self.batches,
            sites=self.sites,
            tensors={one.tensor: controls.values(self.spoiling, one) for one in spoiled},
        )
        # An expert that no token is sent to cannot be seen to be wrong: take the next.
        if torch.equal(trace.logits, self.sound.logits):
            return None
        hooked = self.limits.evidence.hooked.logits[: len(trace.logits)]
        return ControlRun(
            control.kind,
            tensor if len(spoiled) == 1 else f"{tensor} and {len(spoiled) - 1} other {role}",
            value=self.measure.missed(trace),
            limit=self.measure.limit,
            moved=self.measure.moved(trace, self.sound),
            enough=self.measure.enough,
            kl=mean_kl(hooked, trace.logits) if self.fitted else None,
        )

    def _is_sound(self, control: Control) -> bool:
        spoiled = controls.values(self.spoiling, control)()
        return torch.equal(spoiled, self.tensors[control.tensor].value())


def _roles(layout: Layout) -> dict[str, str]:
    """Return which tensors read the stream, which write it, and which are its norms' gains."""
    norms = [layout.final_norm, *(norm for branch in layout.branches for norm in branch.norms)]
    gains = {norm.weight: "norms" for norm in norms if norm.weight is not None}
    reads = {x.weight: "readers" for branch in layout.branches for x in branch.reads}
    writes = {x.weight: "writers" for branch in layout.branches for x in branch.writes}
    return gains | reads | writes


def _planned_rows(
    planned: Mapping[str, PlannedTensor], base: Checkpoint
) -> Callable[[str, int, int], Tensor]:
    def read(name: str, start: int, stop: int) -> Tensor:
        if name not in planned:
            return base.read_rows(name, start, stop).to(torch.float64)
        value = planned[name].value()
        return value.reshape(row_count(value.shape), -1)[start:stop]

    return read
