"""``adapter_config.json`` as published adapters have it: each version's keys, each trainer's ways.

The shapes are those of files on GitHub and the Hub, cut down to tiny models: which keys there are,
how targets are named, what is null. Each is merged to what PEFT computes, or refused by name.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from peft_samples import base_of
from test_merge_kinds import check, make

from bake.checkpoints import open_checkpoint
from bake.errors import InputError
from bake.merge.merge import merge_adapter

# What PEFT says of ties, axes and keys is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")

Config = dict[str, Any]

FIRST: Config = {
    "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 5,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 3,
    "task_type": "CAUSAL_LM",
}
SINCE: dict[str, Config] = {
    "0.2": {"enable_lora": None, "merge_weights": False},
    "0.4": {
        "auto_mapping": None,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "revision": None,
    },
    "0.7": {
        "alpha_pattern": {},
        "loftq_config": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "rank_pattern": {},
    },
    "0.10": {"layer_replication": None, "use_dora": False, "use_rslora": False},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.18": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "corda_config": None,
        "ensure_weight_tying": False,
        "peft_version": "0.18.1",
        "qalora_group_size": 16,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_qalora": False,
    },
    "0.21": {
        "kasa_config": None,
        "lora_ga_config": None,
        "monteclora_config": None,
        "use_bdlora": None,
        "velora_config": None,
    },
}
"""What each version of PEFT began to write."""


def shape(version: str) -> Config:
    """Return the keys that a version writes, with what they are where nothing is asked for."""
    order, found = list(SINCE), dict(FIRST)
    for name in order[: order.index(version) + 1]:
        if name != "0.2" or version == "0.2":  # 0.3 took its two keys back
            found |= SINCE[name]
    return found


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAST = [
    f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
]
ANY = r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q_proj|k_proj|up_proj|down_proj).*?)"
BLOCKS = (
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
MERGED: dict[str, tuple[str, str, Config]] = {
    "alpaca-lora": ("llama", "0.2", {"target_modules": ["q_proj", "v_proj"]}),
    "QLoRA notebooks": ("llama", "0.4", {"target_modules": SEVEN[:4], "lora_dropout": 0.1}),
    "paths of the last block": ("llama", "0.4", {"target_modules": LAST}),
    "xtuner": ("llama", "0.7", {"target_modules": SEVEN}),
    "ChatGLM in LLaMA-Factory": (
        "bloom",
        "0.10",
        {"target_modules": ["dense", "dense_h_to_4h", "query_key_value", "dense_4h_to_h"]},
    ),
    "LLaMA-Factory with additional targets": (
        "llama",
        "0.10",
        {"target_modules": SEVEN, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "unsloth": ("llama", "0.14", {"target_modules": SEVEN, "lora_dropout": 0}),
    "unsloth with tables": (
        "llama",
        "0.14",
        {"target_modules": [*SEVEN, "embed_tokens", "lm_head"], "use_rslora": True},
    ),
    "unsloth's expression for blocks": ("llama", "0.18", {"target_modules": BLOCKS}),
    "unsloth's expression for any model": ("llama", "0.18", {"target_modules": ANY}),
    "axolotl": ("llama", "0.14", {"target_modules": SEVEN, "use_dora": True, "use_rslora": True}),
    "trl": (
        "llama",
        "0.18",
        {"target_modules": SEVEN, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
    ),
    "ends with a dot": ("llama", "0.18", {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}),
    "another task": ("llama", "0.18", {"target_modules": SEVEN, "task_type": "SEQ_2_SEQ_LM"}),
    "training goes on": (
        "llama",
        "0.18",
        {"target_modules": SEVEN, "inference_mode": False, "revision": "main"},
    ),
    "converted from MLX": ("llama", "0.10", {"target_modules": SEVEN, "lora_dropout": 0.0}),
    "GPT-2 in PEFT's examples": (
        "gpt2",
        "0.4",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "GPT-NeoX": ("gpt_neox", "0.4", {"target_modules": ["query_key_value"]}),
    "Falcon": ("falcon", "0.7", {"target_modules": ["query_key_value", "dense"]}),
    "Phi-3": ("phi3", "0.10", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj"]}),
    "Mamba": ("mamba", "0.10", {"target_modules": ["x_proj", "embeddings", "in_proj"]}),
    "some blocks": (
        "llama",
        "0.7",
        {"target_modules": SEVEN, "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "patterns": (
        "llama",
        "0.7",
        {
            "target_modules": SEVEN,
            "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"q_proj": 10},
        },
    ),
    "without some": ("llama", "0.14", {"target_modules": SEVEN, "exclude_modules": ["k_proj"]}),
    "biases of factors": (
        "llama",
        "0.14",
        {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    ),
    "EVA": (
        "llama",
        "0.14",
        {"target_modules": SEVEN, "init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    ),
    "single tokens": (
        "llama",
        "0.18",
        {"target_modules": SEVEN, "trainable_token_indices": [9, 5]},
    ),
    "single tokens by name": (
        "gpt2",
        "0.18",
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [33]}},
    ),
    "orthogonal": (
        "llama",
        "0.21",
        {"target_modules": SEVEN, "r": 4, "init_lora_weights": "orthogonal"},
    ),
    "not initialised": ("llama", "0.21", {"target_modules": SEVEN, "init_lora_weights": False}),
    "stacked experts": (
        "qwen2_moe",
        "0.18",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj"],
            "lora_dropout": 0.0,
        },
    ),
    "tied tables": (
        "llama",
        "0.21",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "at run time": (
        "llama",
        "0.21",
        {"target_modules": SEVEN, "runtime_config": {"ephemeral_gpu_offload": False}},
    ),
}
UNTOLD = ("init_lora_weights", "eva_config", "runtime_config", "auto_mapping", "revision")
"""What is written into the file alone: PEFT would want data for it, or means something else."""


@pytest.mark.parametrize("case", MERGED)
def test_merged(case: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    architecture, version, options = MERGED[case]
    folder = tmp_path_factory.getbasetemp() / "bases"
    base = base_of(architecture, case == "tied tables", "plain", folder)
    asked = {key: value for key, value in options.items() if key not in UNTOLD}
    adapter = make(base, tmp_path / "a", **{"lora_dropout": 0.05, **asked})
    config = {**shape(version), **options}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    check(base, adapter, tmp_path / "out")


REFUSED: dict[str, tuple[Config, str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights = 'pissa_niter_16'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
    "CorDA": (
        {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
        "init_lora_weights = 'corda'",
    ),
    "LoRA-GA": (
        {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "ArB2r"}},
        "init_lora_weights = 'lora_ga'",
    ),
    "LoftQ": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        "init_lora_weights = 'loftq'",
    ),
    "an initialisation to come": ({"init_lora_weights": "next"}, "init_lora_weights = 'next'"),
    "aLoRA": ({"alora_invocation_tokens": [27, 91]}, "alora_invocation_tokens"),
    "single tokens that the file lacks": (
        {"trainable_token_indices": [39]},
        "embed_tokens.token_adapter.trainable_tokens_delta, and the file lacks it",
    ),
    "single tokens in no list": (
        {"trainable_token_indices": {"embed_tokens": 39}},
        "is no list of int or dict",
    ),
    "repeated blocks": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "Megatron": ({"megatron_config": {"hidden_size": 16}}, "megatron_config"),
    "QALoRA": ({"use_qalora": True, "qalora_group_size": 16}, "use_qalora"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
    "MonteCLoRA": ({"monteclora_config": {"num_samples": 4}}, "monteclora_config"),
    "VeLoRA": ({"velora_config": {"scale": 1.0}}, "velora_config"),
    "a rank of somebody's own": ({"middle_lora_rank": 4}, "'middle_lora_rank'"),
    "LoRA+ by a trainer": ({"loraplus_lr_ratio": 16.0}, "'loraplus_lr_ratio'"),
    "a scale that PEFT does not know": ({"scaling": 2.0}, "'scaling'"),
    **{
        name: ({"peft_type": name}, f"of type '{name}'")
        for name in ("ADALORA", "XLORA", "VERA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "LN_TUNING")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(
    case: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    more, named = REFUSED[case]
    base = base_of("llama", False, "plain", tmp_path_factory.getbasetemp() / "bases")
    made = tmp_path_factory.getbasetemp() / "one adapter"
    if not made.is_dir():
        make(base, made, target_modules=SEVEN)
    adapter = tmp_path / "a"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").hardlink_to(made / "adapter_model.safetensors")
    config = {**shape("0.21"), "target_modules": SEVEN}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "out")  # the control
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **more}))
    with pytest.raises(InputError) as caught:
        merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "no")
    assert named in str(caught.value) and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8}},
        {"base_model": "lerobot/smolvla_base"},
    ],
)
def test_what_is_not_peft_s(config: Config, tmp_path: Path) -> None:
    """mlx-lm and others give their files the same name."""
    base = base_of("llama", False, "plain", tmp_path / "bases")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="names no peft_type") as caught:
        merge_adapter(tmp_path, open_checkpoint(base.path), tmp_path / "no")
    assert "mlx" in str(caught.value.why)
