"""What steering packages fit, save and steer themselves, against bake's reading of their files.

``steering_worker.py`` runs them in an environment of their own; a ``Case`` here says which of its
artifacts a recipe names and how, ``measured`` how far the baked model is from the package's.
"""

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tiny
from harness import Base, base_at, plain_logits
from safetensors.torch import load_file
from systems import NO, Made
from test_sources import Distance, baked, filled, hooked_by_bake, recipe_text, shares
from torch import Tensor

from bake.verify import precision

WORKER = Path(__file__).parent / "steering_worker.py"
FEATURE, LEVEL = 7, 1.5  # the worker's


@dataclass(frozen=True)
class Case:
    """An artifact of a package, and the recipe of what the package does with it."""

    name: str
    """The worker's, and of its folder."""
    package: str
    version: str
    what: str
    """The class or function that steers."""
    file: str
    edit: Mapping[str, Any]
    wrong: Mapping[str, Any]
    """What the control has in place of some of ``edit``: nearly the same edit, and another."""
    options: Mapping[str, Any] = field(default_factory=dict)
    folds: str = "yes"


def _offset(coefficient: float = 2.0) -> dict[str, Any]:
    return {"kind": "offset", "coefficient": coefficient}


def _clamp(level: float) -> dict[str, Any]:
    return {"kind": "clamp", "low": level, "high": level}


_LESS, _WEAKER = {"coefficient": 1.9}, {"strength": 0.95}
_FEATURE = {"feature": FEATURE}
_ENCODER = {**_FEATURE, "method": "encoder"}
_KERNEL = {"peak": 1.0, "max": 1.0, "min": 0.25, "width": 1.5}
_ABLITERATE = {"kind": "ablate", "at": ["attn_out.*", "mlp_out.*"], "strength": _KERNEL}
_VECTORS = ("steering-vectors", "0.12.2")
_APPLY = "`SteeringVector.apply`"

CASES = (
    Case(
        "concept-erasure",
        "concept-erasure",
        "0.2.4",
        "`ConceptScrubber.scrub`",
        "scrubber.pt",
        {"kind": "erase"},
        _WEAKER,
    ),
    Case(
        "repeng",
        "repeng",
        "0.4.0",
        "`ControlModel.set_control`",
        "vector.gguf",
        _offset(),
        _LESS,
    ),
    Case(
        "dialz",
        "dialz",
        "1.1.4",
        "`SteeringModel.set_control`",
        "vector.gguf",
        _offset(),
        _LESS,
    ),
    Case("steering-vectors", *_VECTORS, _APPLY, "vector.pt", _offset(), _LESS),
    Case("steering-vectors-mlp", *_VECTORS, f"{_APPLY}, `mlp`", "vector.pt", _offset(), _LESS),
    Case(
        "steering-vectors-ablation",
        *_VECTORS,
        f"{_APPLY}, `mlp`, `ablation_operator`",
        "vector.pt",
        {"kind": "ablate"},
        _WEAKER,
    ),
    Case(
        "pyvene",
        "pyvene",
        "0.1.8",
        "`AdditionIntervention`",
        "saved",
        _offset(1.0),
        {"coefficient": 0.95},
    ),
    Case("pyreft", "pyreft", "0.1.0", "`LoreftIntervention`", "saved", {"kind": "linear"}, _WEAKER),
    Case(
        "sae-lens",
        "sae-lens",
        "6.54.12",
        "a hook that adds `W_dec[feature]`",
        "sae",
        _offset(),
        _LESS,
        _FEATURE,
    ),
    Case(
        "heretic",
        "heretic-llm",
        "1.4.0",
        "`Model.abliterate`",
        "refusal_directions.pt",
        _ABLITERATE,
        {"strength": {**_KERNEL, "max": 0.95}},
    ),
    *(
        Case(
            name,
            "sae-lens",
            "6.54.12",
            f"`{kind}.forward` with its error term, a hook on `hook_sae_acts_post`",
            "sae",
            _clamp(LEVEL),
            _clamp(LEVEL - 0.1),
            _ENCODER,
            NO,
        )
        for name, kind in (
            ("sae-lens-clamp", "StandardSAE"),
            ("sae-lens-clamp-jumprelu", "JumpReLUSAE"),
        )
    ),
)


@dataclass(frozen=True, eq=False)
class Steered:
    """What the packages made of one base."""

    base: Base
    folder: Path
    logits: Mapping[str, Tensor]
    """By the case's name, and ``base`` without any steering."""


def steered_by_packages(
    python: Path, checkpoints: Mapping[str, Path], folder: Path
) -> dict[str, Steered]:
    """Return what every package makes of some bases, by the dtype that they are computed in.

    Args:
        python: the interpreter of the packages' environment.
        checkpoints: the base of each dtype.
        folder: an empty folder, for the artifacts.
    """
    bases = [
        {"base": str(path), "dtype": dtype, "out": str(folder / dtype)}
        for dtype, path in checkpoints.items()
    ]
    request = {"bases": bases, "tokens": tiny.tokens().tolist(), "precision": precision.__file__}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [python, "-I", WORKER, folder / "request.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        dtype: Steered(
            base_at(path), folder / dtype, load_file(folder / dtype / "logits.safetensors")
        )
        for dtype, path in checkpoints.items()
    }


def measured(of: Steered, case: Case, scratch: Path) -> Distance:
    """Return how far bake's model is from the package's, and the control's, of the effect.

    Args:
        of: what the packages made.
        case: one of ``CASES``.
        scratch: an empty folder, for the baked models.
    """
    made = Made(case.file, case.edit, {}, case.options)
    wrong = replace(made, edit={**case.edit, **case.wrong})
    wanted = of.logits[case.name].double()
    effect = float((wanted - plain_logits(of.base)).abs().max())
    assert effect > 1e-3
    ours = hooked_by_bake if case.folds == NO else baked
    far = []
    for number, one in enumerate((made, wrong)):
        folder = scratch / str(number)
        folder.mkdir()
        text = recipe_text(of.folder / case.name, one)
        far.append(float((ours(of.base, folder, text) - wanted).abs().max()) / effect)
    return Distance(*far)


HEAD = (
    "| package | steered by | its file | edit | folds | float64 | float32 | control |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def words(case: Case) -> str:
    """Return what a row of the table in docs/sources.md says before what is measured."""
    named = f"{case.package} {case.version}"
    return f"| {named} | {case.what} | `{case.file}` | `{case.edit['kind']}` | {case.folds} | "


def page(text: str, measured: Callable[[Case], tuple[float, float, float]]) -> str:
    """Return docs/sources.md with the table of the packages in its place.

    Args:
        text: the page.
        measured: returns the distance in float64, in float32, and the control's.
    """
    rows = (words(case) + shares(measured(case)) for case in CASES)
    return filled(text, "packages", HEAD + "".join(rows))
