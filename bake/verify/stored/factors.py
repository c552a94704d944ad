"""The factors of an adapter: their product, added to the base's weight, is the planned weight."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bake.checkpoints import Checkpoint
from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.planned import PlannedTensor
from bake.families import Layout
from bake.families.gguf import gguf_places
from bake.verify.planned import PlannedGguf
from bake.verify.stored.blocks import values_of
from bake.verify.stored.files import Directions, Rows
from bake.verify.stored.gguf import differing

_PREFIX = "base_model.model."

Factors = tuple[Tensor, Tensor]
"""Left [rows, r] and right [r, columns], in float64: what their product adds to stored rows."""


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """An adapter beside the weights that it is loaded over, and its plan.

    Weights have the names and the order of rows of the file that it is loaded over.
    """

    base: Callable[[str, int, int], Rows | None]
    planned: Mapping[str, PlannedTensor]
    factors: Mapping[str, tuple[Factors, ...]]
    """By weight: one pair, or one for each of a stack of experts."""
    homeless: tuple[str, ...]
    """Tensors of the adapter that belong to no weight, and of the base beside it those that are not
    the base's."""
    unit: float
    """The unit in the last place of a factor."""
    unbiased: bool = False
    rounds: bool = False
    stored_name: str = "an adapter"

    @property
    def tied(self) -> tuple[str, str] | None:
        """None: a tied head reads the base's embedding, which an adapter leaves as it is."""
        return None

    def reach(self, name: str) -> float:
        """Return by how many steps a stored value may lie from the planned one."""
        return 1.0

    def strays(self) -> Iterator[str]:
        """Yield what the adapter changes and the plan does not."""
        yield from self.homeless
        for name, pairs in self.factors.items():
            # A loader that stacks experts wants factors of those that stay, which are zero.
            if name not in self.planned and any(bool((a @ b).any()) for a, b in pairs):
                yield name

    def _change(self, name: str, start: int, stop: int) -> Factors | None:
        """Return the factors of some rows, counted through all experts."""
        if name not in self.factors:
            return None
        pairs = self.factors[name]
        size = pairs[0][0].shape[0]
        left, right = pairs[start // size]
        first = start % size
        return left[first : first + stop - start], right

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Return rows as base and adapter make them together."""
        base, change = self.base(name, start, stop), self._change(name, start, stop)
        assert base is not None
        return base if change is None else base + change[0] @ change[1]

    def steps(self, name: str, start: int, stop: int, exact: Rows) -> Rows:
        """Return what rounding the factors may move a value by.

        Each of two factors errs by half a unit of itself at most, so that their product errs by a
        unit, and a sum of r products by as much of the sum of their sizes.
        """
        change = self._change(name, start, stop)
        if change is None:
            return torch.zeros_like(exact)
        return self.unit * (change[0].abs() @ change[1].abs())

    def spacing(self, name: str, weight: Tensor) -> Tensor:
        """Return zero: what is rounded are the factors, to more than the weights are."""
        return torch.zeros_like(weight)

    def directions(self, name: str) -> Directions | None:
        """Return None: factors are not rounded value by value."""
        return None


def over_checkpoint(
    folder: Path, base: Checkpoint, layout: Layout, planned: Mapping[str, PlannedTensor]
) -> StoredFactors:
    """Return a PEFT adapter over the base's checkpoint.

    Mirrors peft/tuners/lora/layer.py: ``Linear.get_delta_weight`` (B A · alpha / r, transposed
    where the layer is a Conv1D) and ``Embedding.get_delta_weight`` ((B A)ᵀ).
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    unit = max(torch.finfo(tensor.dtype).eps for tensor in stored.values())
    found: dict[str, tuple[Factors, ...]] = {}
    for weight, (module, names, transposed) in _modules(layout).items():
        keys = [f"{_PREFIX}{module}.{name}" for name in names]
        if stored.keys() >= set(keys):
            a, b = (stored.pop(key).to(torch.float64) for key in keys)
            found[weight] = ((a.T, b.T * scale) if transposed else (b * scale, a),)
    rows = _checkpoint_rows(base, layout)
    return StoredFactors(rows, _held(planned, layout, found), found, tuple(sorted(stored)), unit)


def over_gguf(
    adapter: Gguf, planned: PlannedGguf, layout: Layout, own: Gguf | None = None
) -> StoredFactors:
    """Return a GGUF adapter over the base's own GGUF.

    Mirrors llama.cpp's src/llama-graph.cpp: ``build_lora_mm``, and ``build_inp_embd`` for the token
    embedding, whose A is [tokens, r].

    Args:
        adapter: the file.
        planned: the base's own GGUF, and what becomes of it.
        layout: of the base.
        own: the copy of the base's GGUF that the adapter goes over, where it is not the base's.
    """
    base, places = planned.original if own is None else own, gguf_places(layout)
    head, embed = places[layout.unembed.weight].name, places[layout.embed].name

    def rows(name: str, start: int, stop: int) -> Rows | None:
        if name not in base.tensors:
            return None
        shape, kind = base.tensors[name].shape, base.tensors[name].kind
        expert, first = (
            (start // shape[-2], start % shape[-2]) if len(shape) == 3 else (None, start)
        )
        return values_of(
            base.read_rows(name, first, first + stop - start, expert=expert), kind, name
        )

    found, homeless = _gguf_factors(adapter, layout, in_file_order=True)
    if own is not None:
        homeless = (*homeless, *differing(planned.original, own, {head: embed}))
    copies = {head} - found.keys() if layout.tied else set[str]()
    held = {n: t for n, t in planned.tensors.items() if len(t.shape) > 1 and n not in copies}
    return StoredFactors(rows, held, found, homeless, torch.finfo(torch.float32).eps)


def over_converted(
    adapter: Gguf, base: Checkpoint, layout: Layout, planned: Mapping[str, PlannedTensor]
) -> StoredFactors:
    """Return a GGUF adapter that was made from the base's checkpoint, for any GGUF of it."""
    found, homeless = _gguf_factors(adapter, layout, in_file_order=False)
    unit = torch.finfo(torch.float32).eps
    rows = _checkpoint_rows(base, layout)
    return StoredFactors(rows, _held(planned, layout, found), found, homeless, unit)


def _held(
    planned: Mapping[str, PlannedTensor], layout: Layout, found: Mapping[str, object]
) -> dict[str, PlannedTensor]:
    """Return the weights of a plan that an adapter holds: not the copy that becomes a head."""
    head = layout.unembed.weight
    copies = {head} - found.keys() if layout.tied else set[str]()
    return {n: t for n, t in planned.items() if len(t.shape) > 1 and n not in copies}


def _checkpoint_rows(base: Checkpoint, layout: Layout) -> Callable[[str, int, int], Rows | None]:
    def rows(name: str, start: int, stop: int) -> Rows | None:
        # A tied head is the embedding's tensor.
        stored = name if name in base.tensors else layout.embed
        return base.read_rows(stored, start, stop).to(torch.float64)

    return rows


def _modules(layout: Layout) -> dict[str, tuple[str, tuple[str, str], bool]]:
    """Return, for every weight, its module, the names of A and B, and whether it is [in, out]."""
    table = ("lora_embedding_A", "lora_embedding_B")
    layer = ("lora_A.weight", "lora_B.weight")
    found = {layout.embed: (layout.embed_live, table, True)}
    for live, name in zip(layout.family.embed.positions, layout.positions, strict=True):
        found[name] = (live, table, True)
    for linear in (*layout.linears, layout.unembed):
        path = linear.weight.removesuffix(".weight")
        # Loaders of adapters know the experts of a mixture by their names in the checkpoint.
        live = path if linear.live is None or linear.is_expert() else linear.live
        found[linear.weight] = (live, layer, linear.output_axis == 1)
    return found


def _gguf_factors(
    model: Gguf, layout: Layout, *, in_file_order: bool
) -> tuple[dict[str, tuple[Factors, ...]], tuple[str, ...]]:
    """Return the factors by weight, as the file or as the checkpoint orders and names them."""
    found: dict[str, tuple[Factors, ...]] = {}
    used, tables = set[str](), {layout.embed, *layout.positions}
    for weight, place in gguf_places(layout).items():
        names = [f"{place.name}.lora_a", f"{place.name}.lora_b"]
        if not model.tensors.keys() >= set(names):
            continue
        a, b = (_matrix(model, name, place.expert) for name in names)
        used |= set(names)
        pair = (a, b.T) if weight in tables else (b, a)
        if in_file_order:
            found[place.name] = (*found.get(place.name, ()), pair)
            continue
        if weight not in tables:
            if place.rows is not None:
                b = torch.empty_like(b).index_copy(0, torch.tensor(place.rows), b)
            pair = (a.T, b.T) if place.transposed else (b, a)
        found[weight] = (pair,)
    return found, tuple(sorted(model.tensors.keys() - used))


def _matrix(model: Gguf, name: str, expert: int | None) -> Tensor:
    info = model.tensors[name]
    stacked = expert if len(info.shape) == 3 else None
    return values_of(model.read_rows(name, 0, info.shape[-2], expert=stacked), info.kind, name)
