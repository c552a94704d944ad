"""``import bake``: its names, what it costs, and what its functions take."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import bake
from bake.errors import DirectionError, UsageError

ROOT = Path(bake.__file__).parent
NAMES = [
    "BakeError", "FitRequest", "ablate", "compile_request", "erase", "export",
    "fit_directions", "offset", "open_model", "plan_edits", "read_directions", "steered",
    "verify_artifact",
]  # fmt: skip


def test_the_names_are_these() -> None:
    """A name that goes breaks somebody's code: that is a new version."""
    assert bake.__all__ == NAMES
    for name in NAMES:
        found = getattr(bake, name)
        assert found.__module__.startswith("bake.") and name in dir(bake)
    with pytest.raises(AttributeError, match="no attribute 'abalte'"):
        bake.abalte  # noqa: B018


def test_a_type_checker_is_told_the_same_names_from_the_same_places() -> None:
    stub = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
    told = {
        alias.asname: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == {name: f"bake.{module}" for name, module in bake._WHERE.items()}
    assert (ROOT / "py.typed").is_file()


def test_no_name_is_that_of_a_module() -> None:
    """The import of ``bake.plan`` puts the module where a function of that name was."""
    modules = {path.stem for path in ROOT.iterdir()}
    assert "plan" in modules and not modules & set(NAMES)


def test_the_import_loads_nothing() -> None:
    code = "import sys, bake; print([m for m in sys.modules if m.startswith(('bake.', 'torch'))])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"


def test_an_ablation_in_three_lines(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bake.__doc__ is not None
    code = bake.__doc__.partition("::\n\n")[2].partition("\n\n``")[0]
    lines = [line.strip() for line in code.splitlines()]
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    names = {"bake": bake, "vector": [1, *[0.5] * 23]}
    exec("\n".join(lines).replace("path/to/model", str(tiny_checkpoint("llama"))), names)
    assert (tmp_path / "out" / "bake.json").is_file()
    assert repr(names["model"]).endswith(": llama, 3 × 24)")
    assert repr(names["request"].plan).startswith("Plan(exact: ablate refusal at resid_")


@pytest.mark.parametrize("form", [np.asarray, list, tuple, lambda row: np.float32(row)])
def test_arrays_and_lists_are_what_tensors_are(form: Callable[..., object]) -> None:
    row, x = [3.0, 0.0, 4.0], torch.ones(3, dtype=torch.float64)
    for make in (bake.ablate, bake.offset, lambda v: bake.erase(np.asarray([v]).T, [v])):
        expected = make(torch.tensor(row))(x)
        assert torch.equal(make(form(row))(x), expected)
        assert not torch.equal(make(form(row[::-1]))(x), expected)
    whole = bake.ablate([3, 0, 4])
    assert repr(whole) == "LowRankMap(width 3)" and torch.equal(
        whole(x), bake.ablate(torch.tensor(row))(x)
    )


@pytest.mark.parametrize("values", ["happy", [["a"]], None, [[1.0], [1.0, 2.0]], np.arange(3)])
def test_what_holds_no_numbers_is_refused(values: object) -> None:
    with pytest.raises(DirectionError, match=r"no tensor, array or list|int64 values"):
        bake.ablate(values)


def test_an_unknown_kind_names_the_nearest(tiny_checkpoint: Callable[..., Path]) -> None:
    model = bake.open_model(tiny_checkpoint("llama"))
    with pytest.raises(UsageError, match="did you mean 'ablate'") as caught:
        model.edit("ablat", "refusal", bake.ablate(torch.ones(24)))
    assert caught.value.exit_code == 2
