"""Sites that an edit could be meant at where its artifact names none, as examples."""

import json
from collections.abc import Sequence

from bake.directions import Direction
from bake.edits import EditKind
from bake.families import Layout
from bake.sites import Site, SiteKind, patterns

_PROJECTED = (EditKind.ABLATE, EditKind.AFFINE, EditKind.ERASE)


def example(
    kind: EditKind, items: Sequence[Direction], layout: Layout | None = None
) -> tuple[str, str]:
    """Return a value of ``at`` as a recipe spells it, and in words what it is.

    Args:
        kind: the edit's.
        items: what acts; their layers are where they were fitted.
        layout: the model, where it is known.
    """
    layers = sorted({item.layer for item in items if item.layer is not None})
    normed = layout is not None and any(b.norm_out is not None for b in layout.branches)
    middle = 0 if layout is None else layout.layers // 2
    if kind is EditKind.OFFSET:
        kinds: tuple[SiteKind, ...] = (SiteKind.RESID_POST,)
        what = "the output of the blocks that it names"
    elif kind is EditKind.UPDATE:
        kinds, what = (SiteKind.MLP_OUT,), "the weight that writes it"
    elif layers or kind not in _PROJECTED:
        kinds, what = (SiteKind.ATTN_OUT, SiteKind.MLP_OUT), "what the modules write"
        kinds = kinds if layers else kinds[1:]
    elif normed:
        return spelled(
            [f"{SiteKind.ATTN_OUT}.*", f"{SiteKind.MLP_OUT}.*"]
        ), "what the modules write"
    else:
        return spelled(["resid"]), "every site of the stream"
    if not layers:
        what = "an example: the file does not say where it belongs"
    sites = [Site(one, n) for one in kinds for n in layers or [middle]]
    return spelled(patterns(sites)), what


def spelled(words: Sequence[str]) -> str:
    """Return patterns of sites as a value of TOML."""
    return json.dumps(words[0] if len(words) == 1 else list(words))
