"""Adapters of a vocabulary that was resized: refused, with the command after which they merge."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_samples import TOKENS, base_of, load
from torch import Tensor

from bake.checkpoints import open_checkpoint
from bake.errors import InputError
from bake.merge.merge import merge_adapter
from bake.verify.precision import double_precision

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = 44
NEW = [40, 41, 42, 43]
Options = Mapping[str, Any]
CASES: dict[str, tuple[str, bool, Any, Options]] = {
    "tables saved because of it": ("llama", False, "auto", {}),
    "of a tied pair": ("falcon", True, "auto", {}),
    "saved by name": ("llama", True, False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "factors of both": ("llama", False, "auto", {"target_modules": ["embed_tokens", "lm_head"]}),
    "factors of a tied embedding": ("llama", True, "auto", {"target_modules": ["embed_tokens"]}),
    "its new tokens alone": ("llama", True, False, {"trainable_token_indices": NEW}),
    "its new tokens, and the tables": ("llama", True, "auto", {"trainable_token_indices": NEW}),
    "smaller": ("mamba", True, "auto", {}),
}
TARGETS = {"llama": ["q_proj"], "falcon": ["dense"], "mamba": ["x_proj"]}


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad(), double_precision():
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_resized_vocabulary(
    case: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The merge computes what was trained, new words and all."""
    from peft import LoraConfig, get_peft_model

    architecture, tied, save, options = CASES[case]
    size = SIZE if case != "smaller" else 39
    base = base_of(architecture, tied, "plain", tmp_path_factory.getbasetemp() / "bases")
    model = load(base.path)
    model.resize_token_embeddings(size)
    config = LoraConfig(r=3, **{"target_modules": TARGETS[architecture], **options})
    trained = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in {id(p): p for p in trained.parameters() if p.requires_grad}.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    trained.save_pretrained(tmp_path / "a", save_embedding_layers=save)
    tokens = torch.cat([TOKENS, torch.tensor([NEW, NEW])], 1).clamp(max=size - 1)
    with pytest.raises(InputError, match=r"which has 40|make it \[") as caught:
        merge_adapter(tmp_path / "a", open_checkpoint(base.path), tmp_path / "no")
    code, _, then = str(caught.value.fix).removeprefix('python -c "').partition('", then ')
    assert then == "merge into ./resized" and f"resize_token_embeddings({size})" in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace("'BASE'", repr(str(base.path))), {})
    merge_adapter(tmp_path / "a", open_checkpoint(tmp_path / "resized"), tmp_path / "out")
    want = logits_of(trained.eval(), tokens)
    error = float((logits_of(load(tmp_path / "out"), tokens) - want).abs().max())
    # The control: the base, resized by the same command, which was not trained.
    effect = float((logits_of(load(tmp_path / "resized"), tokens) - want).abs().max())
    assert effect > 1e-2 and error <= 1e-5 * effect


def test_another_width_is_no_other_vocabulary(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of a model that is wider nothing is resized."""
    from peft_samples import ARCHITECTURES
    from test_merge_kinds import make
    from transformers import AutoConfig, AutoModelForCausalLM

    base = base_of("llama", False, "plain", tmp_path_factory.getbasetemp() / "bases")
    wider = AutoConfig.for_model(**{**ARCHITECTURES["llama"], "hidden_size": 32, "head_dim": 4})
    model = AutoModelForCausalLM.from_config(wider)
    adapter = make(base, tmp_path / "a", model, False, target_modules=["embed_tokens"])
    with pytest.raises(InputError, match=r"lora_embedding_B has the shape \[32, 3\]") as caught:
        merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "no")
    assert "resize" not in str(caught.value.fix)
