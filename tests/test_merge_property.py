"""Random adapters on random bases: what PEFT computes is what a merge writes, or it is refused."""

from collections import Counter
from pathlib import Path

import pytest
from peft_samples import ARCHITECTURES, sample

SAMPLES = 34
"""Of each architecture: 510 in all."""
MANY = 334
"""Of each architecture: 5,010 in all, none of which is among those."""


def found(architecture: str, seeds: range, folder: Path) -> Counter[str]:
    return Counter(sample(seed, architecture, folder).partition(":")[0] for seed in seeds)


def check(results: Counter[str], count: int) -> None:
    """Require that a third is merged, of what weights can hold: refusing all proves nothing."""
    assert results["merged"] >= (count - results["not read"]) / 3, results


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merge_is_what_peft_computes_or_refused(architecture: str, tmp_path: Path) -> None:
    results = found(architecture, range(SAMPLES), tmp_path)
    check(results, SAMPLES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_merges_are_what_peft_computes_or_refused(architecture: str, tmp_path: Path) -> None:
    results = found(architecture, range(1000, 1000 + MANY), tmp_path)
    check(results, MANY)
