"""Sites by the paths of live transformers modules, as people write them in hook code.

``model.layers.12`` is ``resid_post.12``, ``model.layers.12.mlp:output`` is ``mlp_out.12`` and
``model.layers.12.self_attn.o_proj:input`` is ``z.12``. A path that stands for no site (a fused
projection, one expert) is no alias.
"""

import difflib
import re
from collections.abc import Mapping, Sequence

from bake.errors import UsageError
from bake.families import Branch, Layout
from bake.sites import Site, SiteKind, expand

INPUT, OUTPUT = ":input", ":output"


def aliases(layout: Layout) -> dict[str, Site]:
    """Return the site of every module path, with ``:input`` or ``:output``; bare means output."""
    outputs = {
        layout.embed_live: Site(SiteKind.EMBED),
        layout.final_norm.live: layout.final_norm.site,
    }
    inputs: dict[str, Site] = {}
    for layer in range(layout.layers):
        block = layout.block_live.replace("{layer}", str(layer))
        outputs[block] = Site(SiteKind.RESID_POST, layer)
        inputs[block] = Site(SiteKind.RESID_PRE, layer)
    for branch in layout.branches:
        _add_branch(branch, outputs, inputs)
    return {
        **outputs,
        **{path + OUTPUT: site for path, site in outputs.items()},
        **{path + INPUT: site for path, site in inputs.items()},
    }


def _add_branch(branch: Branch, outputs: dict[str, Site], inputs: dict[str, Site]) -> None:
    if not branch.beside:
        outputs[branch.live] = branch.output_site
    outputs.update((norm.live, norm.site) for norm in branch.norms)
    for linear in branch.reads:
        if linear.live is not None and linear.is_one_site():
            outputs[linear.live] = linear.parts[0].site
    for linear in branch.writes:
        if linear.live is not None and linear.input_site is not None:
            inputs[linear.live] = linear.input_site
        # The last layer of a branch is its output, unless experts share it.
        if linear.live is not None and linear is branch.writer:
            outputs[linear.live] = branch.output_site


def translate(pattern: str, known: Mapping[str, Site]) -> tuple[str, ...]:
    """Return the sites' own words for a module path, or the pattern itself when it is none.

    A ``*`` in a path stands for every layer: ``model.layers.*.mlp``.

    Raises:
        UsageError: the pattern is a module path, but of no module that is a site.
    """
    roots = {path.partition(".")[0] for path in known if "." in path}
    if pattern in known:
        return (str(known[pattern]),)
    if pattern.partition(".")[0] not in roots:
        return (pattern,)
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    found = tuple(str(site) for path, site in known.items() if expression.fullmatch(path))
    if found:
        return found
    near = difflib.get_close_matches(pattern, known, n=1)
    raise UsageError(
        f"the module path {pattern!r} is no site of the model",
        why="a module is a site where its output, or its input, is one activation of the stream, "
        "of a branch, of a norm or of a projection",
        fix=f"did you mean {near[0]!r}?" if near else None,
    )


def sites_at(
    patterns: Sequence[str], layout: Layout, known: Mapping[str, Site]
) -> tuple[Site, ...]:
    """Return the sites that a recipe names, as sites or by the paths of modules.

    Raises:
        UsageError: an unknown site or module, or a layer out of range.
    """
    words = [word for text in patterns for word in translate(text, known)]
    return expand(words, layers=layout.layers, stream=layout.stream, having=layout.sites)
