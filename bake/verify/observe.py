"""What is read off a model while it runs: the residual stream, and what each writer adds to it.

The hooks of an observation are set after those of the edits, so that they see what the edits left.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from bake.families import Layout
from bake.sites import Site, SiteKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, eq=False)
class Writer:
    """One thing that writes to the residual stream: the embedding, or a branch of a block."""

    name: str
    """``embed``, or the branch: ``attn``, ``mlp``."""
    layer: int | None
    sites: tuple[Site, ...]
    """Where an edit of what it writes stands: at the stream point after it, or at its output."""


@dataclass(slots=True)
class Observed:
    """Activations of one run, one row a token: a list of batches each."""

    streams: dict[Site, list[Tensor]] = field(default_factory=dict)
    """At the input of every block and at the output of the last, and at points asked for."""
    writes: list[list[Tensor]] = field(default_factory=list)
    """Per writer, in the order of ``writers``, after the gain of its branch."""


def writers_of(layout: Layout) -> tuple[Writer, ...]:
    """Return everything that writes to the stream, in forward order."""
    first = layout.points[0]
    branches = (
        Writer(b.name, b.layer, (*layout.points[b.target], b.output_site)) for b in layout.branches
    )
    return (Writer("embed", None, (Site(SiteKind.EMBED), *first)), *branches)


def block_sites(blocks: Sequence[str]) -> tuple[Site, ...]:
    """Return the input of every block and the output of the last one; nothing without blocks."""
    inputs = [Site(SiteKind.RESID_PRE, layer) for layer in range(len(blocks))]
    return (*inputs, Site(SiteKind.RESID_POST, len(blocks) - 1)) if blocks else ()


@contextmanager
def observed(
    model: "PreTrainedModel",
    blocks: Sequence[str],
    keep: Float[Tensor, " tokens"] | Tensor,
    record: Observed,
    *,
    layout: Layout | None,
    sites: Sequence[Site] = (),
    writes: bool = False,
) -> Iterator[None]:
    """Record activations of the tokens that ``keep`` names, in the run's dtype, on the processor.

    Args:
        model: the live model, with the hooks of its edits set.
        blocks: the paths of its blocks, which the stream runs through.
        keep: [batch, length], true where a token is none of padding.
        record: what the activations are added to.
        layout: of the model, which says what happens inside a block; without one the input of
            every block and the output of the last one can be recorded. Where a block takes no
            [batch, length, width], nothing is.
        sites: stream sites to record: ``resid_pre``, ``resid_mid`` or ``resid_post``.
        writes: whether to record what every writer adds.
    """
    hooks = _Recorder(model, blocks, layout, keep, record)
    for site in sites:
        hooks.add_site(site)
    if writes:
        hooks.add_writes()
    try:
        yield
    finally:
        for handle in hooks.handles:
            handle.remove()


class _Recorder:
    """Sets the hooks of one observation."""

    def __init__(
        self,
        model: "PreTrainedModel",
        blocks: Sequence[str],
        layout: Layout | None,
        keep: Tensor,
        record: Observed,
    ) -> None:
        self.model, self.layout, self.keep, self.record = model, layout, keep, record
        self.handles: list[Any] = []
        self.blocks = [self._module(path) for path in blocks]

    def add_site(self, site: Site) -> None:
        assert site.layer is not None, "only the stream's sites are recorded"
        into = self.record.streams.setdefault(site, [])

        def see(x: Tensor) -> None:
            if x.ndim == 3:
                into.append(self._rows(x))

        if site.kind is SiteKind.RESID_PRE:
            self._before(self.blocks[site.layer], see)
        elif site.kind is SiteKind.RESID_POST and site.layer == len(self.blocks) - 1:
            self._after(self.blocks[site.layer], see)
        elif site.kind is SiteKind.RESID_POST:
            # What the next block reads: edits at either name of this point have acted.
            self._before(self.blocks[site.layer + 1], see)
        else:
            self._add_middle(site, self.blocks[site.layer], into)

    def _add_middle(self, site: Site, block: nn.Module, into: list[Tensor]) -> None:
        """The sum of the block's input and the write of the branch that completes it."""
        layout = self.layout
        assert layout is not None, "only what a table describes is observed inside a block"
        held: list[Tensor] = []
        self._before(block, lambda x: held.append(self._rows(x)))
        writing = [b for b in layout.branches if site in layout.points[b.target]]
        terms = [(path, branch.gain) for branch in writing for path in branch.terms]
        self._sum(terms, held, into)

    def add_writes(self) -> None:
        assert self.layout is not None, "only what a table describes has writers"
        writers = writers_of(self.layout)
        if not self.record.writes:
            self.record.writes.extend([] for _ in writers)
        lists = self.record.writes
        if self.layout.family.stream.closed:  # blocks may take several streams at once
            embed = self._module(self.layout.embed_live)
            self._after(embed, lambda x: lists[0].append(self._rows(x)))
        else:
            self._before(self.blocks[0], lambda x: lists[0].append(self._rows(x)))
        for branch, into in zip(self.layout.branches, lists[1:], strict=True):
            self._sum([(path, branch.gain) for path in branch.terms], [], into)

    def _sum(
        self, terms: Sequence[tuple[str, float]], held: list[Tensor], into: list[Tensor]
    ) -> None:
        """Record what is held and what modules write, each times its gain, once all have run."""

        def keep(gain: float, write: Tensor) -> None:
            held.append(gain * self._rows(write))

        def close(_: Tensor) -> None:
            into.append(sum(held[1:], held[0]))
            held.clear()

        for path, gain in terms:
            self._after(self._module(path), partial(keep, gain))
        self._after(self._module(terms[-1][0]), close)

    def _rows(self, x: Tensor) -> Tensor:
        # Some modules take and give [batch · length, width]: OPT's MLP, Llama 4's mixture.
        return x.reshape(*self.keep.shape, x.shape[-1])[self.keep.to(x.device)].detach().to("cpu")

    def _module(self, path: str) -> nn.Module:
        found: nn.Module = self.model.get_submodule(path)
        return found

    def _before(self, module: nn.Module, see: Any) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            see(args[0] if args else kwargs["hidden_states"])

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, see: Any) -> None:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            see(output[0] if isinstance(output, tuple) else output)

        self.handles.append(module.register_forward_hook(hook))
