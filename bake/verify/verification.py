"""``Verification``: what is asked of one, as a value."""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from bake.artifact.schema import Gate
from bake.errors import InputError, UsageError
from bake.verify.artifact import Baked
from bake.verify.prompts import lines_of
from bake.verify.runtimes.registry import Runtimes, serving
from bake.verify.scores import scorer
from bake.verify.stored.beside import base_beside
from bake.verify.tasks import check_harness
from bake.verify.tokenizer import has_tokenizer

CPU = "cpu"
"""The device map that names the processor."""
PASSAGES = 8
"""The fewest passages of a gate's text."""

Remark = Callable[[str], None]
"""Told in a few words what is being done."""


@dataclass(frozen=True, slots=True, eq=False)
class Verification:
    """An artifact to verify, and how."""

    artifact: Path
    """A folder that ``bake export`` or ``bake merge`` wrote."""
    _: KW_ONLY
    base: str | None = None
    """The base model's folder or Hub id; as recorded when None."""
    prompts: Sequence[Sequence[int]] | Path | None = None
    """Token ids, or a file of texts; when None, bake's own prompts where the artifact has a
    tokenizer, and random tokens of several lengths where it has none. The tokenizer of what is no
    checkpoint is that of the base."""
    longest: int | None = None
    """Tokens of each text; of bake's own prompts 64 when None, of a file's all of them."""
    family: Path | None = None
    """A table of the user's own; that of the record when None, where the export used one."""
    assume_harmless: Sequence[str] = ()
    """Keys of the base's config that no table knows and the user takes to change nothing, beside
    those that the record names."""
    adapter: Path | None = None
    """Of a merge, the adapter's folder, where it has moved since."""
    gguf: Path | None = None
    """The base's GGUF that the artifact was made from, where it does not lie beside artifact or
    base."""
    streamed: bool | None = None
    """Hold one block in memory at a time; when None, where memory asks for it."""
    device_map: str | None = None
    """As transformers takes it, for machines with accelerators; when None, what is in float32 goes
    to a GPU that has room for it, and what is in float64 to the processor."""
    most_kl: float | None = None
    """What KL(hooked ‖ baked) may be of KL(hooked ‖ base), for an approximate plan; what the recipe
    asks for when None."""
    runtimes: Runtimes | None = None
    """Which runtimes serve the artifact as well."""
    generate: int | None = None
    """Greedy tokens after each prompt; when None, 16 with the model in memory, none streamed, since
    every token reads the whole model again."""
    scores: Sequence[str] = ()
    """What to score the generated text by, see ``bake.verify.scores``."""
    text: Path | None = None
    """Held-out text for the perplexity, one passage a line; the recipe's own when None."""
    gate: bool = True
    """Whether the recipe's limits on side effects are measured."""
    as_system: bool = False
    """Whether to hook the edits as their own systems do as well, at their positions and on their
    conditions."""
    tasks: Path | None = None
    """A folder of tasks of lm-evaluation-harness, beside those that it knows."""
    resume: Path | None = None
    """A folder for finished runs, so that an interrupted verification is taken up."""
    remark: Remark = lambda text: None
    """Told what is begun; a text that is indented tells of a part."""
    expect: Callable[[int], None] = lambda count: None
    """Told how many remarks there are to be, without those of parts."""

    def check(self, artifact: Baked) -> None:
        """Refuse what would be ignored for an artifact, or be found wrong hours later.

        Raises:
            UsageError: an option has no meaning for this artifact or beside another one, or no
                runtime is named for what only a runtime loads.
            InputError: a score cannot be had, or the gate's text is too short.
            RuntimeMissing: a runtime is not installed where it is said to be.
        """
        kind, where = artifact.kind, str(artifact.path)
        if self.runtimes is not None:
            self.runtimes.check(kind)
            self.runtimes.find(kind, base=base_beside(artifact) is not None)
        if self.most_kl is not None and not 0 < self.most_kl < math.inf:
            raise UsageError(
                f"--most-kl is {self.most_kl:g}", fix="name a share above 0, for example 0.05"
            )
        if self.adapter is not None and not artifact.merged:
            raise UsageError(f"--adapter is for a merge, and this is a {kind}", where=where)
        if self.family is not None and artifact.merged:
            raise UsageError("--family is for edits: a merge needs no table", where=where)
        if self.device_map not in (None, CPU) and self.streamed:
            raise UsageError(
                f"--device {self.device_map} and --stream exclude each other",
                why="a streamed model is on the processor",
                fix="leave one of them out; --device cpu and --stream agree",
            )
        if not artifact.carrier.checkpoint:
            self._check_served(kind, where)
        if self.as_system:
            self._check_as_system(artifact)
        for spec in self.scores:
            scorer(spec)
        limits = artifact.record.verify
        if limits is not None and limits.gate is not None and self.gate:
            self._check_gate(limits.gate, artifact)

    def _check_gate(self, gate: Gate, artifact: Baked) -> None:
        """Refuse what leaves a limit of the gate unmeasured, or measured on something else."""
        where = str(artifact.path)
        if not artifact.carrier.checkpoint:
            raise UsageError(
                f"the recipe's gate is measured on checkpoints, and this is a {artifact.kind}",
                where=where,
                fix="leave it out with --no-gate; `bake push` then asks for --ungated",
            )
        if gate.perplexity is not None and self.text is not None:
            raise UsageError(
                "the gate limits the perplexity on the recipe's own text, and --text names another",
                where=where,
                fix="leave --text out, or the gate with --no-gate",
            )
        if not has_tokenizer(artifact.path):
            raise InputError(
                "the recipe's gate is on texts, and the artifact has no tokenizer",
                where=where,
                fix="add the base's tokenizer to it, or leave the gate out with --no-gate",
            )
        limits = artifact.record.verify
        text = None if limits is None else limits.text
        if gate.perplexity is not None and text is not None:
            passages = len(lines_of(text.text))
            if passages < PASSAGES:
                raise InputError(
                    f"the gate's text holds {passages} passages, one a line",
                    where=text.file,
                    why="a passage is one observation, and an interval over so few says little",
                    fix=f"export again with {PASSAGES} passages or more",
                )
        for spec in gate.scores:
            scorer(spec)
        if gate.tasks:
            check_harness()

    def _check_as_system(self, artifact: Baked) -> None:
        """Refuse to hook what nothing is known of."""
        if not any(edit.own is not None for edit in artifact.edits):
            raise UsageError(
                "--as-system hooks edits as their own systems do, and none says how that is",
                where=str(artifact.path),
                why="always and at every token is what a verification hooks anyway",
                fix="give positions, normalize or gate in [directions.NAME] of the recipe, and "
                "export it again",
            )

    def _check_served(self, kind: str, where: str) -> None:
        """Refuse what is for checkpoints, of an artifact that runtimes alone load."""
        given = {"score": self.scores or None, "text": self.text}
        for name, value in given.items():
            if value is not None:
                raise UsageError(
                    f"--{name} is for checkpoints, and this is a {kind}, which a runtime serves",
                    where=where,
                )
        if self.runtimes is None:
            names = ", ".join(serving(kind))
            raise UsageError(
                f"a {kind} is verified in a runtime that loads it",
                where=where,
                why=None if names else "no runtime that bake can ask loads one",
                fix=f"name one with --runtime: {names}" if names else None,
            )
