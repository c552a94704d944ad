"""Sites by the paths of modules, as systems name the files and the keys of what they fit.

Families call different modules by one name, and an artifact names no family: the path stays in the
metadata, so that a recipe can be refused where the model has that module at another site.
"""

import re
from collections.abc import Mapping, Sequence

from bake.directions.arrays import STACK, Place, place_of
from bake.sites import Site, SiteKind

MODULE = "bake.module."
"""Before the site in the metadata that keeps the module's path."""

_BLOCK = re.compile(STACK + r"(?:layers|h)\.(\d{1,5})(?:\.([a-z0-9_.]+))?")
_FINAL = re.compile(STACK + r"(?:norm|final_layer_norm|ln_f)")
NORMS_AND_BRANCHES: Mapping[str, SiteKind] = {
    "input_layernorm": SiteKind.LN1_OUT,
    "post_attention_layernorm": SiteKind.LN2_OUT,
    "pre_feedforward_layernorm": SiteKind.LN2_OUT,
    "post_feedforward_layernorm": SiteKind.LN2_POST_OUT,
    "ln_1": SiteKind.LN1_OUT,
    "ln_2": SiteKind.LN2_OUT,
    "self_attn": SiteKind.ATTN_OUT,
    "attention": SiteKind.ATTN_OUT,
    "attn": SiteKind.ATTN_OUT,
    "mlp": SiteKind.MLP_OUT,
}
_PROJECTIONS: Mapping[str, SiteKind] = {
    "self_attn.q_proj": SiteKind.Q,
    "self_attn.k_proj": SiteKind.K,
    "self_attn.v_proj": SiteKind.V,
    "self_attn.o_proj": SiteKind.ATTN_OUT,
    "attn.c_proj": SiteKind.ATTN_OUT,
    "mlp.gate_proj": SiteKind.MLP_GATE,
    "mlp.up_proj": SiteKind.MLP_UP,
    "mlp.down_proj": SiteKind.MLP_OUT,
    "mlp.c_proj": SiteKind.MLP_OUT,
}
_ALL = {**NORMS_AND_BRANCHES, **_PROJECTIONS}
# Gemma 2 and OLMo 2 norm what a branch writes, and mean another norm by post_attention_layernorm.
_SANDWICH = {**_ALL, "post_attention_layernorm": SiteKind.LN1_POST_OUT}


def places_of(names: Sequence[str]) -> dict[str, Place]:
    """Return the place of every name that has one: a layer, a site or the path of a module.

    Args:
        names: all names of an artifact, which together tell one family's words from another's.
    """
    paths = {name: _BLOCK.fullmatch(name.replace("-", ".")) for name in names}
    words = {match[2] for match in paths.values() if match is not None and match[2]}
    table = _SANDWICH if any("_feedforward_" in word for word in words) else _ALL
    places: dict[str, Place] = {}
    for name, match in paths.items():
        plain = place_of(name)
        if plain is not None:
            places[name] = plain
        elif match is not None and match[2] in table:
            site = Site(table[match[2]], int(match[1]))
            places[name] = site.layer, str(site)
        elif _FINAL.fullmatch(name.replace("-", ".")):
            places[name] = None, str(SiteKind.LN_FINAL_OUT)
    return places


def modules_of(places: Mapping[str, Place]) -> dict[str, str]:
    """Return by which key each site was named: a model may call another norm by the same name."""
    return {
        f"{MODULE}{site}": name.replace("-", ".")
        for name, (_, site) in places.items()
        if site is not None
    }
