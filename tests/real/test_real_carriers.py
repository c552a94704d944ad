"""What transformers and PEFT compute with the files, against hooks written by hand.

The share of the edit's effect that is lost is KL(hooked ‖ baked) over KL(hooked ‖ base), over the
tokens of chats and of the model's answers to them.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import with_adapter
from by_hand import logprobs, lost
from commands import data_of, error_of
from smollm2_edits import Subject, loaded

pytestmark = pytest.mark.real

MOST = 0.001
"""Of the effect: what bfloat16 may cost. One tensor of sixty loses several times that."""
VISIBLE = 0.05
"""Nats: what an edit moves at least, on the mean over tokens."""

# A tensor of each edit that the controls spoil.
SPOILED = {
    "ablation": "model.layers.14.mlp.down_proj.weight",
    "affine": "model.embed_tokens.weight",  # it sets the component, which nothing moves then
    "offset": "model.layers.14.mlp.down_proj.bias",
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_checkpoint_keeps_the_edit(
    name: str, subject: Subject, exported: Callable[..., Path]
) -> None:
    hooked, texts = subject.hooked(name), subject.files.texts
    assert subject.effect(name) > VISIBLE
    baked = loaded(exported(name, "checkpoint"))
    found = lost(hooked, subject.base, logprobs(baked, texts))
    print(f"{name}: effect {subject.effect(name):.3f}, lost {found:.2e}")
    assert found <= MOST
    # The controls: one tensor forgotten, and one with its change turned round.
    tensor, own = baked.get_parameter(SPOILED[name]), dict(subject.model.named_parameters())
    before = own[SPOILED[name]].data if SPOILED[name] in own else torch.zeros_like(tensor)
    sound = tensor.data.clone()
    for spoiled in (before, 2 * before - sound):
        tensor.data.copy_(spoiled)
        missed = lost(hooked, subject.base, logprobs(baked, texts))
        print(f"{name}: spoiled, lost {missed:.2e}")
        assert missed > MOST


def test_a_lora_keeps_the_edit(subject: Subject, exported: Callable[..., Path]) -> None:
    hooked, texts = subject.hooked("ablation"), subject.files.texts
    adapted = with_adapter(loaded(subject.files.checkpoint), exported("ablation", "lora"))
    found = lost(hooked, subject.base, logprobs(adapted, texts))
    print(f"lora: lost {found:.2e}")
    assert found <= MOST
    # The controls: the sign of one tensor's change, and no adapter.
    (factor,) = (p for n, p in adapted.named_parameters() if "layers.14.mlp.down_proj.lora_B" in n)
    factor.data.neg_()
    assert lost(hooked, subject.base, logprobs(adapted, texts)) > MOST
    with adapted.disable_adapter():
        assert lost(hooked, subject.base, logprobs(adapted, texts)) == pytest.approx(1.0, abs=1e-3)


def test_an_affine_edit_of_one_site_is_refused(subject: Subject, tmp_path: Path) -> None:
    """No stock weights compute it, and nothing near to it is written unasked."""
    recipe, out = subject.recipe("one site"), tmp_path / "out"
    said = error_of(data_of("export", recipe, "--to", "checkpoint", "--out", out, code=3))
    assert "skip path" in said and "apply the edit at every stream site" in said
    assert not out.exists()
    # The control: the same edit everywhere, and an offset at that site, are exact.
    for name in ("affine", "offset"):
        assert data_of("plan", subject.recipe(name))["plan"]["exactness"] == "exact"
