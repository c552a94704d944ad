"""The erasers of EleutherAI/concept-erasure (LEACE, arXiv 2306.03819).

A ``LeaceEraser`` has ``proj_left`` [d, k], ``proj_right`` [k, d] and ``bias`` [d] or none, and maps
x ↦ x − L R (x − bias): its bias is the mean μ of the fit. The package defines no file, so people
save the object: one eraser, a dictionary of them, or a ``ConceptScrubber``, whose keys are the
paths of norm modules with ``-`` for ``.`` and whose erasers edit those norms' outputs. None of
these classes is imported here; their named fields are read. The same tensors under the same names
are read from a safetensors file.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bake.directions.arrays import Place, listing
from bake.directions.direction import Direction, Role
from bake.directions.modules import NORMS_AND_BRANCHES, modules_of, places_of
from bake.directions.pt import SUFFIXES
from bake.directions.reader import Content, Reader, Request
from bake.directions.safetensors_file import opened
from bake.directions.torch_archive import Record, load, names_in, tensor_of
from bake.errors import DirectionError


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
    "concept_erasure.quadratic.QuadraticFitter": "its map depends on the label of every token",
}
EDITOR = "concept_erasure.quadratic.QuadraticEditor"
"""A map between labelled classes, which has a reader of its own."""
FIELDS = ("proj_left", "proj_right", "bias")


def _recognises(path: Path) -> bool:
    if path.suffix in SUFFIXES:
        names = names_in(path)
        return any(name.startswith(PACKAGE) for name in names) and EDITOR not in names
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
        place = places_of(list(erasers)).get(key, (None, None))
        item = _eraser(erasers[key], repr(key), place)
        return Content((item,), {"key": key, **modules_of({key: place})})
    places = places_of(list(erasers))
    unknown = [name for name in erasers if name not in places]
    if unknown:
        raise DirectionError(
            f"bake knows no site for {listing(unknown)}",
            why=f"it knows layers and the modules {', '.join(NORMS_AND_BRANCHES)} of a layer",
            fix="name one eraser with `key`, and its site in the recipe",
        )
    items = tuple(_eraser(erasers[name], repr(name), place) for name, place in places.items())
    return Content(items, modules_of(places))


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
    kinds=("erase",),
)
