"""Convolutions, plain and as DoRA: in models that see and hear, where PEFT adapts them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import peft_warnings
from peft_samples import GROUPED
from torch import Tensor

from bake.checkpoints import open_checkpoint
from bake.merge.merge import merge_adapter
from bake.verify.precision import double_precision

pytestmark = pytest.mark.filterwarnings("ignore")

Options = dict[str, Any]
TEXT = {**GROUPED, "vocab_size": 64}
IMAGE, START, VIDEO, END = 60, 61, 62, 63


def random(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WORDS = torch.tensor([[5, 9, 4, 33, 7], [39, 3, 17, 6, 6]])


def llava() -> Any:
    """Conv2d, without a bias, as large as its step."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Model

    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    vision = CLIPVisionConfig(**tower, num_attention_heads=2, image_size=8, patch_size=4)
    text = LlamaConfig(**TEXT)
    return Model(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))


def llava_inputs() -> dict[str, Tensor]:
    ids = torch.cat([torch.full((2, 4), IMAGE), WORDS], 1)
    return {"input_ids": ids, "pixel_values": random(2, 3, 8, 8)}


def qwen2_vl() -> Any:
    """Conv3d, over two frames."""
    from transformers import Qwen2VLConfig
    from transformers import Qwen2VLForConditionalGeneration as Model

    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    ids |= {"vision_start_token_id": START, "vision_end_token_id": END}
    text = {**TEXT, "rope_parameters": rope}
    return Model(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))


def qwen2_vl_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[START, *[IMAGE] * 4, *WORDS[0].tolist()]])
    return {
        "input_ids": ids,
        "pixel_values": random(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def speech_to_text() -> Any:
    """Conv1d with a bias, a border and a step of two."""
    from transformers import Speech2TextConfig
    from transformers import Speech2TextForConditionalGeneration as Model

    sizes: dict[str, Any] = {"d_model": 16, "vocab_size": 64, "decoder_start_token_id": 2}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    sizes |= {"conv_channels": 24, "input_feat_per_channel": 8, "max_target_positions": 32}
    return Model(Speech2TextConfig(**sizes))


def speech_to_text_inputs() -> dict[str, Tensor]:
    return {"input_features": random(2, 16, 8), "decoder_input_ids": WORDS}


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "llava": (llava, llava_inputs),
    "qwen2_vl": (qwen2_vl, qwen2_vl_inputs),
    "speech_to_text": (speech_to_text, speech_to_text_inputs),
}


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), double_precision():
        found: Tensor = model(**inputs).logits
    return found


@cache
def base_of(name: str, folder: Path) -> tuple[Path, Any, Tensor]:
    """Return where a random model is, its class, and what it computes."""
    make, inputs = MODELS[name]
    model = make()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = random(*parameter.shape, seed=number).to(parameter.dtype)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.2 * noise)
    path = folder / name
    model.save_pretrained(path)
    kind = type(model)
    return path, kind, logits_of(load(path, kind), inputs())


def load(path: Path, kind: Any) -> Any:
    return kind.from_pretrained(path, attn_implementation="eager").double().eval()


KERNELS = {
    "llava": r".*(patch_embedding|layers\.1\.self_attn\.q_proj)",
    "qwen2_vl": r".*patch_embed\.proj",
    "speech_to_text": r".*conv_layers\.[01]",
}
CASES: dict[str, Options] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "rank-stabilised, of another rank and scale": {
        "use_rslora": True,
        "rank_pattern": {r"patch_embedding|proj|conv_layers\.1": 5},
        "alpha_pattern": {r"patch_embedding|proj|conv_layers\.1": 9},
    },
}


def adapted(path: Path, kind: Any, out: Path, **options: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    with peft_warnings():
        model = get_peft_model(load(path, kind), LoraConfig(r=3, lora_alpha=5, **options))
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.3 * random(*parameter.shape, seed=number))
        model.save_pretrained(out)
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_convolutions(
    name: str, case: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is seen and heard is computed as PEFT computes it."""
    from peft import PeftModel

    path, kind, before = base_of(name, tmp_path_factory.getbasetemp() / "towers")
    adapter = adapted(path, kind, tmp_path / "a", target_modules=KERNELS[name], **CASES[case])
    merge_adapter(adapter, open_checkpoint(path), tmp_path / "out")
    with peft_warnings():
        live = PeftModel.from_pretrained(load(path, kind), str(adapter))
    inputs = MODELS[name][1]()
    want = logits_of(live.double().eval(), inputs)
    effect = float((want - before).abs().max())
    error = float((logits_of(load(tmp_path / "out", kind), inputs) - want).abs().max())
    assert effect > 1e-2 and error <= 1e-5 * effect
