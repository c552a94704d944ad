"""What a merge writes of the real model, against PEFT at work on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import peft_warnings
from by_hand import logprobs, lost, mean_kl
from commands import data_of
from smollm2_edits import Subject, loaded

pytestmark = pytest.mark.real

MOST = 0.001
"""Of the adapter's effect: what bfloat16 may cost, as for edits."""
VISIBLE = 0.05
"""Nats: what an adapter moves at least."""


LAYERS = {"target_modules": ["q_proj", "down_proj"]}
TABLES = {"target_modules": ["embed_tokens"], "modules_to_save": ["norm"]}


def adapter_of(checkpoint: Path, options: dict[str, Any], folder: Path) -> Path:
    """Write a DoRA adapter whose factors are random, and so is the norm that it saves whole."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    with peft_warnings():
        asked = LoraConfig(r=4, lora_alpha=8, use_dora=True, **options)
        model = get_peft_model(loaded(checkpoint), asked)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data.add_(0.2 * torch.randn_like(value))
            elif "lora_embedding" in name:
                value.data.add_(0.01 * torch.randn_like(value))
            elif value.requires_grad and "modules_to_save" in name:
                value.data.mul_(1 + 0.05 * torch.randn_like(value))
        model.save_pretrained(folder, save_embedding_layers="modules_to_save" in options)
    return folder


@pytest.mark.parametrize(
    ("options", "forgotten"),
    [(LAYERS, ["down_proj.weight"]), (TABLES, ["model.norm.weight", "lm_head.weight"])],
    ids=["layers", "tables"],
)
def test_a_merge_is_what_peft_computes(
    options: dict[str, Any], forgotten: list[str], subject: Subject, tmp_path: Path
) -> None:
    """Controls: a kind of layer left as it was; a norm left out, and a head tied again.

    A single tensor of thirty costs no more than rounding does: ``bake verify`` compares by value.
    """
    from peft import PeftModel

    checkpoint, texts = subject.files.checkpoint, subject.files.texts
    adapter = adapter_of(checkpoint, options, tmp_path / "adapter")
    with peft_warnings():
        at_work = PeftModel.from_pretrained(loaded(checkpoint), adapter).eval()
    want = logprobs(at_work, texts)
    assert mean_kl(want, subject.base) > VISIBLE
    data_of("merge", adapter, checkpoint, "--out", tmp_path / "merged")
    merged = loaded(tmp_path / "merged")
    found = lost(want, subject.base, logprobs(merged, texts))
    print(f"merge: effect {mean_kl(want, subject.base):.3f}, lost {found:.2e}")
    assert found <= MOST
    own = dict(subject.model.named_parameters())
    own.setdefault("lm_head.weight", merged.model.embed_tokens.weight)
    for kind in forgotten:
        spoiled = {n: p.data.clone() for n, p in merged.named_parameters() if n.endswith(kind)}
        assert spoiled
        for name in spoiled:
            merged.get_parameter(name).data.copy_(own[name].data)
        missed = lost(want, subject.base, logprobs(merged, texts))
        print(f"merge: {kind} forgotten, lost {missed:.2e}")
        assert missed > MOST
        for name, before in spoiled.items():
            merged.get_parameter(name).data.copy_(before)
