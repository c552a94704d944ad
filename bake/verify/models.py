"""Load a model for a comparison: whole, as any user loads it, or one block at a time.

A streamed model is the same class from transformers with its parameters on the meta device. Each
part reads its tensors when it is called and lets go of them when it returns, so that memory holds
one block, whatever the size of the model; everything between the blocks (masks, rotary positions,
the sum of the branches) is transformers' own code.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bake.checkpoints import Checkpoint, TensorInfo
from bake.checkpoints.config import CONFIG
from bake.checkpoints.planned import PlannedModel
from bake.edits import Edit
from bake.errors import InputError, first_line
from bake.families import Layout, fit
from bake.positions import Spoken
from bake.sites import Site
from bake.steer import steered
from bake.verify.observe import Observed, observed
from bake.verify.streamed import Wrap, stream, stream_wrapped
from bake.verify.units import Unit, load_units, stream_blocks, units_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Softcapped attention exists in eager mode only, and grouped expert kernels take no float64.
LOADING = {"attn_implementation": "eager", "experts_implementation": "eager"}

Values = Mapping[str, Callable[[], Tensor]]
"""Returns each tensor's value, by name."""


@dataclass(slots=True, eq=False)
class Live:
    """A model that can be run, with the checkpoint that it was loaded from."""

    model: "PreTrainedModel"
    units: tuple[Unit, ...]
    """Its parts, as they were before anything was put into it."""
    layout: Layout | None
    """Where edits hook it; None for a merge, which has none and needs no table."""
    checkpoint: Checkpoint
    streamed: bool
    planned: Values = field(default_factory=dict)
    """Of a planned model, the values that no file holds."""
    overrides: Values = field(default_factory=dict)
    """What stands in for either inside ``replaced``."""
    stale: frozenset[str] = frozenset()
    """Tensors whose parameters still hold what stood in for them."""

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens; a streamed one holds no parameter that says so."""
        found: torch.device = torch.device("cpu") if self.streamed else self.model.device
        return found

    def read(self, name: str) -> Tensor:
        """Return a tensor of the checkpoint, or what stands in for it."""
        found = self.overrides.get(name) or self.planned.get(name)
        return self.checkpoint.read(name) if found is None else found()

    def under(
        self, edits: Sequence[Edit], *, as_system: Spoken | None = None
    ) -> AbstractContextManager[None]:
        """Run under edits as hooks inside the context; none for the model as it is."""
        if not edits:
            return nullcontext()
        assert self.layout is not None, "only what a table describes is hooked"
        return steered(self.model, self.layout, edits, as_system=as_system)

    def observed(
        self, keep: Tensor, record: Observed, *, sites: Sequence[Site], writes: bool
    ) -> AbstractContextManager[None]:
        """Record activations inside the context, as ``observe.observed`` does."""
        if not (sites or writes):
            return nullcontext()
        blocks = stream_blocks(self.model) if self.layout is None else self.layout.live_blocks
        return observed(
            self.model, blocks, keep, record, layout=self.layout, sites=sites, writes=writes
        )

    @contextmanager
    def replaced(self, tensors: Values) -> Iterator[None]:
        """Run with other values in some tensors inside the context.

        Their own come back with the next use, which may put yet others there: see ``restore``.
        """
        before, self.stale = self.stale, self.stale | tensors.keys()
        self.overrides = dict(tensors)
        try:
            self._reload(before | tensors.keys())
            self.stale = frozenset(tensors)
            yield
        finally:
            self.overrides = {}

    def restore(self) -> None:
        """Give every parameter the value that is its own."""
        self._reload(self.stale)
        self.stale = frozenset()

    def _reload(self, names: Set[str]) -> None:
        """Give the parameters that some tensors fill their values anew."""
        # Of a streamed model the rest alone, which is first: a part is read when it is called.
        own = self.units[:1] if self.streamed else self.units
        units = [unit for unit in own if not names.isdisjoint(unit.held)]
        # A class that holds the experts of a block as one takes them all or none.
        only = lambda unit: unit.held if unit.stacked else names  # noqa: E731
        load_units(self.model, units, self.read, only=only)


def layout_of(checkpoint: Checkpoint, family: Path | None = None) -> Layout:
    """Return the layout of a checkpoint, from its config and headers.

    Args:
        checkpoint: the base or the baked one.
        family: a table of the user's own; it is used where it is for the checkpoint's class, so
            that a model which was declared as another class gets that class's table.
    """
    return fit.layout_of(checkpoint, family, declared=True)


def load(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    family: Path | None = None,
    hooked: bool = True,
    streamed: bool = False,
    device_map: str | None = None,
    wrap: Wrap | None = None,
) -> Live:
    """Return the model of a checkpoint, in eval mode.

    Args:
        checkpoint: with its weights at hand.
        dtype: of weights and arithmetic.
        family: a table of the user's own.
        hooked: whether edits can be set on it, for which its table is needed.
        streamed: hold one part in memory at a time.
        device_map: as ``from_pretrained`` takes it; None for the processor.
        wrap: puts layers around those of the model.

    Raises:
        InputError: a tensor that the class does not expect, or lacks.
    """
    # transformers first: what it says of a file is what any user would read. What is decoded from
    # codes is in no file that it reads as values.
    on_disk = not (streamed or checkpoint.coded)
    model = _whole(checkpoint, dtype, device_map) if on_disk else on_meta(checkpoint, dtype)
    layout = layout_of(checkpoint, family) if hooked else None
    live = Live(model, units_of(model, checkpoint.tensors), layout, checkpoint, streamed)
    if checkpoint.coded and not streamed:
        load_units(model, live.units, live.read)
        model.to(device_map)  # a device, or None for the processor
    if streamed and wrap is not None:
        live.model = stream_wrapped(model, live.units, live.read, wrap)
    elif streamed:
        stream(model, live.units, live.read)
    elif wrap is not None:
        live.model = wrap(model)
    return live


def load_planned(
    base: Checkpoint,
    planned: PlannedModel,
    *,
    family: Path | None = None,
    hooked: bool = True,
    streamed: bool = False,
    device: torch.device | None = None,
) -> Live:
    """Return the model that a plan makes of a base, in float64: nothing of it is rounded.

    Args:
        base: with its weights at hand.
        planned: what the plan makes of its tensors and its configuration.
        family: a table of the user's own.
        hooked: whether sites of its table are to be observed.
        streamed: hold one part in memory at a time, and compute it again for each pass.
        device: where the model goes; the processor when None.
    """
    checkpoint = _under_plan(base, planned)
    layout = layout_of(checkpoint, family) if hooked else None
    values = {name: tensor.value for name, tensor in planned.tensors.items()}
    model = on_meta(checkpoint, torch.float64)
    units = units_of(model, checkpoint.tensors)
    live = Live(model, units, layout, checkpoint, streamed, values)
    if streamed:
        stream(model, live.units, live.read)
        return live
    load_units(live.model, units, live.read)
    live.model.to(device)
    return live


def _under_plan(base: Checkpoint, planned: PlannedModel) -> Checkpoint:
    """Return the base with the plan's configuration and the names of its new tensors."""
    new = {
        name: TensorInfo(name, tensor.dtype, tensor.shape, "", 0, 0)
        for name, tensor in planned.tensors.items()
    }
    return replace(
        base,
        config=json.loads(planned.config_text),
        config_text=planned.config_text,
        tensors={**base.tensors, **new},
    )


def _whole(checkpoint: Checkpoint, dtype: torch.dtype, device_map: str | None) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    placed: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    loader = _named_class(config_of(checkpoint)) or AutoModelForCausalLM
    with _loading(checkpoint, device_map):
        model, info = loader.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **LOADING,
            **placed,
        )
    wrong = {key: sorted(names) for key, names in info.items() if names}
    if wrong:
        raise InputError(
            f"transformers loads this checkpoint with {wrong}",
            where=str(checkpoint.path),
            why="a tensor that the class does not expect, or lacks, changes the model in silence",
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


@contextmanager
def _loading(checkpoint: Checkpoint, device_map: str | None = None) -> Iterator[None]:
    """Turn what transformers raises at a config, or torch at a device, into one line.

    Code that a config names is never run: such a model is refused.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise InputError(
            f"transformers does not load this checkpoint: {first_line(error)}",
            where=str(checkpoint.path),
        ) from error
    except (RuntimeError, AssertionError) as error:
        if device_map is None:
            raise
        raise InputError(
            f"the model cannot be placed by the device map {device_map!r}: {first_line(error)}",
            fix="run on the processor with --device cpu",
        ) from error


def config_of(checkpoint: Checkpoint) -> "PreTrainedConfig":
    """Return a checkpoint's configuration as transformers reads it.

    The text is read and not the folder's file: a plan's configuration is in no folder.
    """
    from transformers import AutoConfig

    with _loading(checkpoint), tempfile.TemporaryDirectory(prefix="bake-") as folder:
        (Path(folder) / CONFIG).write_text(checkpoint.config_text, encoding="utf-8")
        found: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return found


def _named_class(config: "PreTrainedConfig") -> Any:
    """Return the class that a configuration names, where it is none of the causal ones.

    Of some wrappers there is a causal class as well, which leaves out the towers.
    """
    import transformers

    found = getattr(transformers, (config.architectures or ("",))[0], None)
    wrapping = transformers.AutoModelForImageTextToText._model_mapping
    if type(config) in wrapping and found is wrapping[type(config)]:
        return found
    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return None
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known else None


def on_meta(checkpoint: Checkpoint, dtype: torch.dtype) -> "PreTrainedModel":
    """Return the model with no parameter in memory, and its computed buffers as loading makes them.

    Mirrors transformers modeling_utils.py: ``_move_missing_keys_from_meta_to_device`` and
    ``_initialize_missing_keys``.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = config_of(checkpoint)
    named = _named_class(config)
    with _loading(checkpoint), torch.device("meta"):
        model: PreTrainedModel = (
            AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False, **LOADING
            )
            if named is None
            else named._from_config(config, dtype=dtype, **LOADING)
        )
    for name, buffer in list(model.named_buffers()):
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        module._buffers[key] = torch.empty_like(buffer, device="cpu")
        model._init_weights(module)
    return model.eval()
