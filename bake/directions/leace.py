"""The erasers of EleutherAI/concept-erasure (LEACE, arXiv 2306.03819).

A ``LeaceEraser`` has ``proj_left`` [d, k], ``proj_right`` [k, d] and ``bias`` [d] or none, and maps
x ↦ x − L R (x − bias): its bias is the mean μ of the fit. The package defines no file, so people
save the object: one eraser, a dictionary of them, or a ``ConceptScrubber``, whose keys are the
paths of norm modules with ``-`` for ``.`` and whose erasers edit those norms' outputs. None of
these classes is imported here; their named fields are read. The same tensors under the same names
are read from a safetensors file.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bake.directions.arrays import Place, listing, place_of
from bake.directions.direction import Direction, Role
from bake.directions.pt import SUFFIXES
from bake.directions.reader import Content, Reader, Request
from bake.directions.safetensors_file import opened
from bake.directions.torch_archive import Record, load, names_in, tensor_of
from bake.errors import DirectionError
from bake.sites import Site, SiteKind


class EraserFields(Record):
    """Stands for ``LeaceEraser``."""


class FitterFields(Record):
    """Stands for ``LeaceFitter``, which keeps the eraser it last computed."""


class ScrubberFields(Record):
    """Stands for ``ConceptScrubber``."""


PACKAGE = "concept_erasure."
RECORDS: Mapping[str, type[Record]] = {
    "concept_erasure.leace.LeaceEraser": EraserFields,
    "concept_erasure.leace.LeaceFitter": FitterFields,
    "concept_erasure.concept_scrubber.ConceptScrubber": ScrubberFields,
}
REFUSED = {
    "concept_erasure.oracle.OracleEraser": "it needs the label of every token at inference",
    "concept_erasure.oracle.OracleFitter": "it needs the label of every token at inference",
    "concept_erasure.quadratic.QuadraticEraser": "its map depends on the label of every token",
    "concept_erasure.quadratic.QuadraticEditor": "its map depends on the label of every token",
    "concept_erasure.quadratic.QuadraticFitter": "its map depends on the label of every token",
}
MODULE = "module."
"""Before the site in the metadata that keeps the module's path."""
FIELDS = ("proj_left", "proj_right", "bias")

_BLOCK = re.compile(r"(?:[a-z_]+\.)*(?:layers|h)\.(\d{1,5})\.([a-z0-9_]+)")
_FINAL = re.compile(r"(?:[a-z_]+\.)*(?:norm|final_layer_norm|ln_f)")
_MODULES = {
    "input_layernorm": SiteKind.LN1_OUT,
    "post_attention_layernorm": SiteKind.LN2_OUT,
    "ln_1": SiteKind.LN1_OUT,
    "ln_2": SiteKind.LN2_OUT,
    "self_attn": SiteKind.ATTN_OUT,
    "attention": SiteKind.ATTN_OUT,
    "attn": SiteKind.ATTN_OUT,
    "mlp": SiteKind.MLP_OUT,
}
# Gemma 2 and OLMo 2 norm what a branch writes, and mean another norm by post_attention_layernorm.
_SANDWICH = _MODULES | {
    "post_attention_layernorm": SiteKind.LN1_POST_OUT,
    "pre_feedforward_layernorm": SiteKind.LN2_OUT,
    "post_feedforward_layernorm": SiteKind.LN2_POST_OUT,
}


def _recognises(path: Path) -> bool:
    if path.suffix in SUFFIXES:
        return any(name.startswith(PACKAGE) for name in names_in(path))
    if path.suffix != ".safetensors":
        return False
    with opened(path) as file:
        fields = {name.rpartition(".")[2] for name in file.names}
        return {"proj_left", "proj_right"} <= fields <= set(FIELDS)


def _read(request: Request) -> Content:
    if request.path.suffix == ".safetensors":
        return _content(_from_safetensors(request.path), request.key)
    for name in sorted(names_in(request.path) & REFUSED.keys()):
        raise DirectionError(
            f"the file holds a {name}, which is no affine map",
            why=REFUSED[name],
            fix="fit a LeaceEraser",
        )
    value = load(request.path, RECORDS)
    if isinstance(value, ScrubberFields):
        if value.fields.get("pre_hook") is not False:
            raise DirectionError(
                "the scrubber edits the input of its norms as those norms alone see it",
                why="the residual stream stays as it is, so that no site stands for this input",
                fix="fit the scrubber with pre_hook=False, on the outputs of the norms",
            )
        value = value.fields.get("erasers")
    return _content(value, request.key)


def _from_safetensors(path: Path) -> dict[str, object]:
    """Return {key: fields}; the key of names without a prefix is empty."""
    erasers: dict[str, dict[str, Tensor]] = {}
    with opened(path) as file:
        for name in file.names:
            key, _, field = name.rpartition(".")
            if field not in FIELDS:
                raise DirectionError(
                    f"the file holds {name!r}, which is no field of an eraser",
                    fix=f"the fields are {', '.join(FIELDS)}",
                )
            erasers.setdefault(key, {})[field] = file.get(name)
    if len(erasers) > 1 and "" in erasers:
        raise DirectionError("the file holds an eraser without a key beside erasers with one")
    return dict(erasers.get("", erasers))


def _content(value: object, key: str | None) -> Content:
    if not isinstance(value, dict) or "proj_left" in value:
        if key is not None:
            raise DirectionError(f"`key` names {key!r}, but the file holds one eraser and no keys")
        return Content((_eraser(value, "the eraser", (None, None)),))
    erasers = {str(name): eraser for name, eraser in value.items()}
    if not erasers or len(erasers) != len(value):
        raise DirectionError("the dictionary of erasers is empty, or two of its keys read the same")
    if key is not None:
        if key not in erasers:
            raise DirectionError(
                f"the file holds no eraser {key!r}", fix=f"it holds {listing(list(erasers))}"
            )
        place = _places(list(erasers)).get(key, (None, None))
        item = _eraser(erasers[key], repr(key), place)
        return Content((item,), {"key": key, **_modules({key: place})})
    places = _places(list(erasers))
    unknown = [name for name in erasers if name not in places]
    if unknown:
        raise DirectionError(
            f"bake knows no site for {listing(unknown)}",
            why=f"it knows layers and the modules {', '.join(_SANDWICH)} of a layer",
            fix="name one eraser with `key`, and its site in the recipe",
        )
    items = tuple(_eraser(erasers[name], repr(name), place) for name, place in places.items())
    return Content(items, _modules(places))


def _modules(places: Mapping[str, Place]) -> dict[str, str]:
    """Return by which key each site was named: a model may call another norm by the same name."""
    return {
        f"{MODULE}{site}": name.replace("-", ".")
        for name, (_, site) in places.items()
        if site is not None
    }


def _places(names: list[str]) -> dict[str, Place]:
    """Return the place of every name that has one: a layer, a site or the path of a module."""
    paths = {name: _BLOCK.fullmatch(name.replace("-", ".")) for name in names}
    words = {match[2] for match in paths.values() if match is not None}
    table = _SANDWICH if any("_feedforward_" in word for word in words) else _MODULES
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


def _eraser(value: object, name: str, place: Place) -> Direction:
    """Return the direction of one eraser, from its fields or from a fitter that keeps it."""
    if isinstance(value, FitterFields):
        value = value.fields.get("_cached_eraser")
        if not isinstance(value, EraserFields):
            raise DirectionError(
                f"{name} is a LeaceFitter that holds statistics and no eraser",
                why="the eraser follows from them only by running concept-erasure",
                fix="save fitter.eraser: torch.save(fitter.eraser, path)",
            )
    fields = value.fields if isinstance(value, EraserFields) else value
    if not isinstance(fields, dict) or not {"proj_left", "proj_right"} <= fields.keys() <= {
        *FIELDS
    }:
        held = listing(list(fields)) if isinstance(fields, dict) else type(value).__name__
        raise DirectionError(f"{name} is no eraser of {', '.join(FIELDS)}: it holds {held}")
    tensors = {
        Role.LEFT: tensor_of(fields["proj_left"], f"proj_left of {name}"),
        Role.RIGHT: tensor_of(fields["proj_right"], f"proj_right of {name}"),
    }
    left, right = tensors[Role.LEFT].shape, tensors[Role.RIGHT].shape
    if left != right[::-1]:
        raise DirectionError(
            f"the factors of {name} do not fit: proj_left {list(left)}, proj_right {list(right)}"
        )
    if fields.get("bias") is not None:
        tensors[Role.MEAN] = tensor_of(fields["bias"], f"the bias of {name}")
    return Direction(tensors, *place)


READER = Reader(
    "erasers of concept-erasure (.pt, or .safetensors with proj_left and proj_right)",
    _recognises,
    _read,
    frozenset({"key"}),
)
