"""The reference: edits as forward hooks on the live base model.

It is the definition of what an edit means, and it shares no code with the fold: the hooks act on
activations where the plan acts on weights. A site is reached as follows.

| site                                             | hook                                          |
|--------------------------------------------------|-----------------------------------------------|
| ``embed``                                        | output of the embedding, after its multiplier |
| ``resid_pre``, ``resid_post``                    | input, output of the block                    |
| ``resid_mid``                                    | output of the branch's last module, see below |
| ``ln1_out``, ``ln2_out``, ``ln_final_out``, post | output of the norm, after gain and bias       |
| ``attn_out``, ``mlp_out``                        | output of the branch's module                 |
| ``q``, ``k``, ``v``, ``mlp_gate``, ``mlp_up``    | the site's part of the linear layer's output  |
| ``z``, ``mlp_act``                               | input of the linear layer that writes         |

No module computes ``resid_mid`` = x + g w, the sum of the block's input x and the branch's write w
with the residual gain g. The hook therefore replaces w by w + (h(y) − y) / g for y = x + g w, which
makes the sum h(y). Where several modules write to it, x has what the others wrote; where several
make up a branch's output, y is the sum of theirs, and w the last one's.

Where sites meet, the order is that of the forward pass: weight updates of a layer before maps of
its output, ``resid_post.l`` before ``resid_pre.l+1`` (one point of the stream, two names), and at
one site the order in which the edits are listed.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bake.affine import AffineMap
from bake.edits import Edit, WeightUpdate
from bake.errors import DirectionError, FamilyError, UsageError
from bake.families import Layout
from bake.nonlinear import Nonlinear
from bake.positions import Positions, Spoken
from bake.sites import Site, SiteKind

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

See = Callable[[Site, Tensor], None]
"""Is shown an activation [batch, length, d] at a site."""

_UPDATABLE = (
    SiteKind.ATTN_OUT,
    SiteKind.MLP_OUT,
    SiteKind.Q,
    SiteKind.K,
    SiteKind.V,
    SiteKind.MLP_GATE,
    SiteKind.MLP_UP,
)


@contextmanager
def steered(
    model: "PreTrainedModel",
    layout: Layout,
    edits: Sequence[Edit],
    *,
    as_system: Spoken | None = None,
) -> Iterator[None]:
    """Apply the edits to every forward pass of the model inside the context.

    The hooks see every token, in prefill and with a cache alike, and change no tensor in place.
    A map is evaluated in float64 on float64 activations and in float32 on all others, on the
    device of the activation; the result has the activation's dtype. Everything is checked before
    the first hook is set, and the hooks are gone after the context, also after an error. An edit at
    ``embed`` acts where the embedding is looked up, so not on a caller's own ``inputs_embeds``.

    The model's own record of hidden states (``output_hidden_states``) is made by hooks as well, so
    what it shows at an edited site depends on which were there first.

    Args:
        model: a transformers model of the layout's family, in eval mode (dropout would come
            between a branch's write and the stream).
        layout: the family resolved against the model's checkpoint.
        edits: what to apply, in order.
        as_system: what of the text is prompt: every edit then acts as its own system does
            (``Edit.own``), at its positions and on its conditions, in one forward pass over a whole
            text. None applies them always and everywhere.

    Raises:
        UsageError: the model has no such site, an update stands at a site that is no weight's
            output, an edit names no site, or the model is in training mode.
        DirectionError: an edit's width is not that of its site.
        FamilyError: the model is not the one that the layout describes.
    """
    _check_model(model, layout)
    hooks = _Hooks(model, layout, as_system)
    # Updates are set first, so that they come before the maps of the same module's output.
    for updates in (True, False):
        for site, edit in _in_order(layout, edits):
            name = f"{edit.kind} {edit.concept!r} at {site}"
            if isinstance(edit.map, WeightUpdate) and updates:
                hooks.add_update(site, edit.map, name)
            elif not isinstance(edit.map, WeightUpdate) and not updates:
                hooks.add_map(site, edit, name)
    with ExitStack() as stack:
        for planned in hooks.planned:
            stack.callback(planned.attach().remove)
        yield


@contextmanager
def watched(
    model: "PreTrainedModel", layout: Layout, sites: Sequence[Site], see: See
) -> Iterator[None]:
    """Show the activation at some sites in every forward pass inside the context.

    It is what a map set there by ``steered`` is given, so that what is fitted on it acts where it
    was fitted. Nothing is changed.

    Args:
        model: as for ``steered``.
        layout: likewise.
        sites: where to look.
        see: called with the site and the activation [batch, length, d], on the model's device.

    Raises:
        UsageError: the model has no such site, or is in training mode.
        FamilyError: the model is not the one that the layout describes.
    """
    _check_model(model, layout)
    hooks = _Hooks(model, layout, None)
    for site in sites:
        layout.width(site)  # raises for a site that the model does not have
        hooks.add_sight(site, see)
    with ExitStack() as stack:
        for planned in hooks.planned:
            stack.callback(planned.attach().remove)
        yield


def _in_order(layout: Layout, edits: Sequence[Edit]) -> list[tuple[Site, Edit]]:
    """Return every edit at each of its sites, in the order of the forward pass."""
    for edit in edits:
        if not edit.sites:
            raise UsageError(f"the {edit.kind} edit {edit.concept!r} names no site")
        for site in edit.sites:
            layout.width(site)  # raises for a site that the model does not have
    steps = [(site, edit) for edit in edits for site in edit.sites]
    # The sort is stable: edits at one site, whole or by heads, keep the order they are listed in.
    return sorted(steps, key=lambda step: Site(step[0].kind, step[0].layer).order)


def _check_model(model: "PreTrainedModel", layout: Layout) -> None:
    if model.training:
        raise UsageError(
            "the model is in training mode",
            why="dropout between a branch and the stream makes the reference random",
            fix="call model.eval() first",
        )
    config = model.config.get_text_config()
    have = (config.num_hidden_layers, config.hidden_size)
    if have != (layout.layers, layout.hidden):
        raise FamilyError(
            f"the model has {have[0]} blocks of width {have[1]}, but the layout describes "
            f"{layout.layers} of width {layout.hidden}",
            fix="resolve the layout from the checkpoint that the model was loaded from",
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a site is in the live model."""

    module: str
    side: Literal["input", "output"]
    rows: Sequence[int] | None = None
    """The part of the vector that the site stands for; None for all of it."""
    sum: "_Sum | None" = None
    """What is added to the module's output where the site is a sum that no module computes."""


@dataclass(frozen=True, slots=True)
class _Sum:
    """A site that modules add up to, and of which the last of them completes it."""

    block: str | None
    """The block whose input is a part of it."""
    others: tuple[tuple[str, float], ...]
    """The modules that run before, and what their outputs are multiplied by."""
    gain: float = 1.0
    """What the last one's is."""


def _places(layout: Layout) -> Mapping[Site, _Place]:
    """Return where every site of the layout is, except those that no module of its own carries."""
    places = {
        Site(SiteKind.LN_FINAL_OUT): _Place(layout.final_norm.live, "output"),
    }
    if layout.family.embed.multiplied_by == "module":
        places[Site(SiteKind.EMBED)] = _Place(layout.embed_live, "output")
    elif not layout.positions:
        # Multiplied behind the module: what enters the first block is the first to be seen so.
        places[Site(SiteKind.EMBED)] = _Place(_block(layout, 0), "input")
    for layer in range(layout.layers):
        places[Site(SiteKind.RESID_PRE, layer)] = _Place(_block(layout, layer), "input")
        places[Site(SiteKind.RESID_POST, layer)] = _Place(_block(layout, layer), "output")
    for branch in layout.branches:
        added = _Sum(None, tuple((path, 1.0) for path in branch.beside)) if branch.beside else None
        places[branch.output_site] = _Place(branch.live, "output", sum=added)
        for norm in branch.norms:
            places[norm.site] = _Place(norm.live, "output")
        for reader in branch.reads:
            for part in reader.parts:
                if reader.live is not None:
                    places[part.site] = _Place(reader.live, "output", part.rows)
        for writer in branch.writes:
            if writer.input_site is not None and writer.live is not None:
                places[writer.input_site] = _Place(writer.live, "input")
        mid = Site(SiteKind.RESID_MID, branch.layer)
        if mid in layout.points[branch.target]:
            writing = [b for b in layout.branches if b.target == branch.target]
            terms = [(path, b.gain) for b in writing for path in b.terms]
            last, gain = terms.pop()
            block = _block(layout, branch.layer)
            places[mid] = _Place(last, "output", sum=_Sum(block, tuple(terms), gain))
    return places


def _block(layout: Layout, layer: int) -> str:
    return layout.block_live.replace("{layer}", str(layer))


class _Hooks:
    """Plans hooks in the order in which they have to fire, and checks what they are given."""

    def __init__(self, model: "PreTrainedModel", layout: Layout, as_system: Spoken | None) -> None:
        self.model, self.layout, self.places = model, layout, _places(layout)
        self.planned: list[_Planned] = []
        self._as_system = as_system
        self._evaluators: dict[tuple[int, str], _Evaluator] = {}

    def _evaluator(self, edit: Edit) -> "_Evaluator":
        """Return what evaluates an edit's map, or what its system does in place of that."""
        map_, among = edit.map, None
        if self._as_system is not None and edit.own is not None:
            map_ = edit.own.map or map_
            among = _Among(edit.own.positions, self._as_system)
        assert not isinstance(map_, WeightUpdate)
        # One evaluator for a map at many sites, so that a device holds one copy of it.
        key = (id(map_), "" if among is None else among.positions.text)
        return self._evaluators.setdefault(key, _Evaluator(map_, among))

    def add_map(self, site: Site, edit: Edit, name: str) -> None:
        """Plan the hooks of an edit's map at a site."""
        width, evaluate = self.layout.width(site), self._evaluator(edit)
        map_ = evaluate.map
        if map_.width != width:
            raise DirectionError(
                f"the map has width {map_.width}, but {site} is {width} wide",
                where=name,
                fix="use a direction that was fitted on this model, at a site of that width",
            )
        place = self._place(site)
        module = self._module(place.module)
        if place.sum is not None:
            hook: _Hook = _map_sum(evaluate, self._captured(place.sum), place.sum.gain)
        elif place.side == "input":
            hook = _map_input(evaluate, self._rows(site, place))
        else:
            hook = _map_output(evaluate, self._rows(site, place))
        self.planned.append(_Planned(module, place.side, hook))

    def add_sight(self, site: Site, see: See) -> None:
        """Plan the hooks that look at a site."""
        place = self._place(site)
        if place.sum is None:
            hook = _look(partial(see, site), place.side, self._rows(site, place))
        else:
            hook = _look_at_sum(partial(see, site), self._captured(place.sum), place.sum.gain)
        self.planned.append(_Planned(self._module(place.module), place.side, hook))

    def _captured(self, added: _Sum) -> "_Capture":
        """Plan the hooks that keep the parts of a sum but the last.

        The hooks at the parts' own sites come earlier in the order: the capture sees their result.
        """
        capture = _Capture()
        if added.block is not None:
            self.planned.append(_Planned(self._module(added.block), "input", capture))
        for path, gain in added.others:
            self.planned.append(_Planned(self._module(path), "output", capture.adding(gain)))
        return capture

    def add_update(self, site: Site, update: WeightUpdate, name: str) -> None:
        """Plan the hook of a weight update at the output of the weight."""
        width = self.layout.width(site)
        if site.kind not in _UPDATABLE:
            raise UsageError(
                f"a weight update cannot stand at {site}",
                where=name,
                why="it is the output of no weight",
                fix=f"name one of {', '.join(_UPDATABLE)}",
            )
        place, inner = self._weight(site, name)
        have = (update.left.shape[0], update.right.shape[1])
        if have != (width, inner):
            raise DirectionError(
                f"the update is {have[0]} × {have[1]}, but the weight at {site} is "
                f"{width} × {inner}",
                where=name,
                fix="left is [out, k] and right is [k, in], whatever way the checkpoint stores it",
            )
        hook = _add_update(update, self._rows(site, place))
        self.planned.append(_Planned(self._module(place.module), "output", hook))

    def _weight(self, site: Site, name: str) -> tuple[_Place, int]:
        """Return where the output of the weight at a site is, and the width of its input."""
        if site.kind not in (SiteKind.ATTN_OUT, SiteKind.MLP_OUT):
            return self._place(site), self.layout.hidden
        (branch,) = (b for b in self.layout.branches if b.output_site == site)
        writer = branch.writer
        if writer is None or writer.live is None:
            raise UsageError(
                f"a weight update cannot stand at {site}: no single module writes it",
                where=name,
                why="the experts of a block have one weight each",
                fix="give the edit as a map of the site",
            )
        return _Place(writer.live, "output"), writer.inputs

    def _place(self, site: Site) -> _Place:
        place = self.places.get(Site(site.kind, site.layer))
        if place is None:
            raise UsageError(
                f"no module of {self.layout.family.name} carries {site} in a loaded model",
                fix="name the output of the norm or of the branch instead",
            )
        return place

    def _rows(self, site: Site, place: _Place) -> Int[Tensor, " d"] | None:
        """Return which channels of the module's vector a site, or its head, stands for."""
        if site.head is None:
            return None if place.rows is None else torch.tensor(place.rows)
        size = self.layout.width(site)
        whole = range(size * (site.head + 1)) if place.rows is None else place.rows
        return torch.tensor(whole[size * site.head : size * (site.head + 1)])

    def _module(self, path: str) -> nn.Module:
        try:
            module: nn.Module = self.model.get_submodule(path)
        except AttributeError as error:
            raise FamilyError(
                f"the model has no module {path}",
                where=self.layout.family.name,
                why=f"a {type(self.model).__name__} is not laid out as the table says",
                fix="load the model with the class that config.json names",
            ) from error
        return module


_Hook = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Planned:
    """A hook that is not set yet."""

    module: nn.Module
    side: Literal["input", "output"]
    hook: _Hook

    def attach(self) -> "RemovableHandle":
        """Set the hook and return the handle that removes it."""
        if self.side == "input":
            return self.module.register_forward_pre_hook(self.hook, with_kwargs=True)
        return self.module.register_forward_hook(self.hook, with_kwargs=True)


@dataclass(frozen=True, slots=True)
class _Among:
    """The tokens at which an edit acts; at the others an activation stays as it is."""

    positions: Positions
    spoken: Spoken

    def __call__(
        self, y: Float[Tensor, "rows tokens d"], x: Float[Tensor, "rows tokens d"]
    ) -> Float[Tensor, "rows tokens d"]:
        """Return y at these tokens and x at the others."""
        if x.dim() != 3:
            raise FamilyError(
                f"an activation of shape {list(x.shape)} does not say which token is which",
                fix="name a site of the stream or a module's output",
            )
        mask = self.positions.mask(x.shape[1], self.spoken).to(x.device)
        return torch.where(mask.unsqueeze(-1), y, x)


class _Evaluator:
    """Evaluates a map on the device of an activation, and keeps the map there."""

    def __init__(self, map_: AffineMap | Nonlinear, among: _Among | None = None) -> None:
        self.map, self._among = map_, among
        self._moved: dict[tuple[torch.device, torch.dtype], AffineMap | Nonlinear] = {}

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return h(x), a new tensor in the dtype of the arithmetic."""
        key = (x.device, _arithmetic(x))
        if key not in self._moved:
            self._moved[key] = self.map.to(*key)
        precise = x.to(key[1])
        y = self._moved[key](precise)
        return y if self._among is None else self._among(y, precise)

    def on_rows(
        self, x: Float[Tensor, "*batch d"], rows: Int[Tensor, " k"] | None
    ) -> Float[Tensor, "*batch d"]:
        """Return x with h applied to some of its channels, a new tensor in the dtype of x."""
        if rows is None:
            return self(x).to(x.dtype)
        index = rows.to(x.device)
        return x.index_copy(-1, index, self(x.index_select(-1, index)).to(x.dtype))


class _Capture:
    """A pre-hook that keeps a block's input, and what is added to it, until a branch takes it."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._parts = [_input(module, args, kwargs)]

    def adding(self, gain: float) -> _Hook:
        """Return a hook that adds a module's output, times a gain."""

        def hook(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            self._parts.append(gain * _output(module, output))

        return hook

    def take(self) -> Tensor:
        """Return the sum and let go of it."""
        assert self._parts, "a branch ran outside its block"
        (first, *others), self._parts = self._parts, []
        return sum(others, first)


def _map_input(evaluate: _Evaluator, rows: Int[Tensor, " d"] | None) -> _Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = evaluate.on_rows(_input(module, args, kwargs), rows)
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, _input_name(module): x}

    return hook


def _map_output(evaluate: _Evaluator, rows: Int[Tensor, " d"] | None) -> _Hook:
    def hook(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        return _with_output(output, evaluate.on_rows(_output(module, output), rows))

    return hook


def _map_sum(evaluate: _Evaluator, block: _Capture, gain: float) -> _Hook:
    def hook(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        write = _output(module, output)
        precise = write.to(_arithmetic(write))
        total = block.take().to(precise) + gain * precise
        # The difference comes first: an identity map leaves every bit as it is.
        return _with_output(output, (precise + (evaluate(total) - total) / gain).to(write.dtype))

    return hook


def _look(see: Callable[[Tensor], None], side: str, rows: Int[Tensor, " d"] | None) -> _Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, *output: Any) -> None:
        x = _output(module, output[0]) if side == "output" else _input(module, args, kwargs)
        see(x if rows is None else x.index_select(-1, rows.to(x.device)))

    return hook


def _look_at_sum(see: Callable[[Tensor], None], block: _Capture, gain: float) -> _Hook:
    def hook(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        see(block.take() + gain * _output(module, output))

    return hook


def _add_update(update: WeightUpdate, rows: Int[Tensor, " d"] | None) -> _Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> Any:
        y = _output(module, output)
        precise = y.to(_arithmetic(y))
        x, left, right = (
            t.to(precise) for t in (_input(module, args, kwargs), update.left, update.right)
        )
        added = (x @ right.T) @ left.T
        if rows is None:
            return _with_output(output, (precise + added).to(y.dtype))
        return _with_output(output, precise.index_add(-1, rows.to(y.device), added).to(y.dtype))

    return hook


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _input_name(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters))


def _input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the activation that a module was called with: its first parameter, named or not."""
    x = args[0] if args else kwargs[_input_name(module)]
    assert isinstance(x, Tensor), f"{type(module).__name__} was called without an activation"
    return _of_one_stream(module, x)


def _output(module: nn.Module, output: Any) -> Tensor:
    """Return the activation that a module returned, alone or first in a tuple."""
    x = output[0] if isinstance(output, tuple) else output
    if not isinstance(x, Tensor):
        raise FamilyError(
            f"{type(module).__name__} returns a {type(output).__name__} where an activation is "
            "meant"
        )
    return _of_one_stream(module, x)


def _of_one_stream(module: nn.Module, x: Tensor) -> Tensor:
    """Refuse what blocks of several streams take and give: [streams, batch, length, d]."""
    if x.dim() > 3:
        raise FamilyError(
            f"{type(module).__name__} has activations of shape {list(x.shape)}, not of one stream",
            fix="name the output of a norm, or of the attention or the MLP",
        )
    return x


def _with_output(output: Any, x: Tensor) -> Any:
    return (x, *output[1:]) if isinstance(output, tuple) else x
