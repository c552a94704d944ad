"""Packages fit, save and steer themselves; bake's reading of their files computes the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import steering_packages
import torch
from harness import RELATIVE, plain_logits
from steering_packages import CASES, Case, Steered, measured, page, words
from test_sources import TABLE, told
from tiny import unbiased

from bake.directions import read_directions

MOST = {"float64": RELATIVE, "float32": 1e-5}


@pytest.fixture(scope="module")
def by_packages(
    steering_python: Path,
    tiny_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Steered]:
    # heretic leaves the biases of what it edits alone, where an edit of activations does not.
    without = unbiased("llama")
    bases = {
        dtype: tiny_checkpoint("llama", dtype=getattr(torch, dtype), **without) for dtype in MOST
    }
    folder = tmp_path_factory.mktemp("packages")
    return steering_packages.steered_by_packages(steering_python, bases, folder)


@pytest.mark.runtimes
@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_package_is_baked_as_it_steers(
    tmp_path: Path, by_packages: dict[str, Steered], case: Case, dtype: str
) -> None:
    found = measured(by_packages[dtype], case, tmp_path)
    assert found.right <= MOST[dtype]
    assert found.wrong > 1e-3


@pytest.mark.runtimes
def test_the_base_is_the_same_there(by_packages: dict[str, Steered]) -> None:
    """Another transformers reads the checkpoint: what it steers is the model that is baked."""
    for dtype, of in by_packages.items():
        off = (of.logits["base"].double() - plain_logits(of.base)).abs().max()
        assert float(off) <= MOST[dtype] * float(plain_logits(of.base).abs().max())


@pytest.mark.runtimes
def test_no_package_is_needed_to_read_what_it_saved(by_packages: dict[str, Steered]) -> None:
    """Erasers and vectors are pickled objects of classes that are not imported here."""
    folder = by_packages["float64"].folder
    for case in CASES:
        found = read_directions(folder / case.name / case.file, **case.options)
        assert found.items


def test_the_table_is_that_of_the_documentation() -> None:
    """Its words are the cases', its versions those that are installed, its numbers in bounds."""
    text = TABLE.read_text(encoding="utf-8")
    assert page(text, lambda case: told(text, words(case))) == text
    requirements = Path(__file__).with_name("steering-requirements.txt").read_text()
    for case in CASES:
        float64, float32, other = told(text, words(case))
        assert float64 <= MOST["float64"] and float32 <= MOST["float32"] < other, case.name
        assert f"\n{case.package}=={case.version}\n" in requirements
    with pytest.raises(ValueError, match="not enough values"):  # the control: another table
        told(text.replace("| repeng 0.4.0 |", "| repeng |"), words(CASES[1]))
