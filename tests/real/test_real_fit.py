"""A direction fitted on the shipped prompts, against one that transformers alone computes."""

from pathlib import Path

import pytest
import torch
from by_hand import hooked, logprobs, lost, mean_kl
from commands import data_of
from safetensors.torch import load_file
from smollm2 import LAYER
from smollm2_edits import Subject, loaded
from test_real_carriers import MOST, VISIBLE

pytestmark = pytest.mark.real

PROMPTS = Path(__file__).parents[2] / "recipes" / "mood"
STRONG = 3.0
RELATED = 0.25
"""Cosine: six standard deviations of that of unrelated vectors of width 576, 1/√576 each."""


def test_a_mood_is_fitted_and_baked(subject: Subject, tmp_path: Path) -> None:
    out = tmp_path / "mood.safetensors"
    files = ("--positive", PROMPTS / "happy.jsonl", "--negative", PROMPTS / "sad.jsonl")
    found = data_of("fit", subject.files.checkpoint, *files, "--concept", "mood", "--out", out)
    print(f"{found['best']}: AUROC {found['auroc']}")
    assert found["separates"] and found["exactness"] == "exact" and len(found["sites"]) == 60

    # Other prompts, other code, the same concept: the vectors of blocks beside each other agree.
    kind, _, layer = found["best"].partition(".")
    assert kind == "resid_post"
    vector = load_file(out)[f"vector.{layer}"]
    other = load_file(subject.files.directions)[f"vector.{LAYER}"].to(vector)
    shuffled = vector[torch.randperm(len(vector), generator=torch.Generator().manual_seed(0))]
    cosines = [float(torch.cosine_similarity(v, other, dim=0)) for v in (vector, shuffled)]
    print(f"cosines {cosines}")
    assert cosines[0] > RELATED > abs(cosines[1])

    # The recipe, stronger as its comment says: the checkpoint is what a hook written by hand is.
    recipe = out.with_suffix(".toml")
    text = recipe.read_text(encoding="utf-8")
    assert "coefficient = 1 " in text
    recipe.write_text(text.replace("coefficient = 1 ", f"coefficient = {STRONG} "))
    data_of("export", recipe, "--out", tmp_path / "baked")
    baked = logprobs(loaded(tmp_path / "baked"), subject.files.texts)
    with hooked(subject.model, lambda x: x + STRONG * vector.to(x), int(layer)):
        wanted = logprobs(subject.model, subject.files.texts)
    assert mean_kl(wanted, subject.base) > VISIBLE
    share = lost(wanted, subject.base, baked)
    print(f"effect {mean_kl(wanted, subject.base):.3f}, lost {share:.2e}")
    assert share <= MOST
