"""Tiny configurations of the core tables' classes, and what of an edit each class can hold.

What stands here is read from the classes of transformers and not from the tables: which writers
have a bias, whether a norm follows them, whether the head is the embedding.
"""

from dataclasses import dataclass
from typing import Any

_TOKENS = {"vocab_size": 56, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SQUARE = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
_FREE = {**_SQUARE, "hidden_size": 24, "head_dim": 8}  # heads × head_dim ≠ hidden
_OLD = {**_TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_TWO = {"num_experts_per_tok": 2}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_LOCAL = {"sliding_window": 4, "layer_types": _WINDOWS}  # shorter than the tests' sequences


@dataclass(frozen=True, slots=True)
class Core:
    """One class, small."""

    config: dict[str, Any]
    slot: bool = False
    """Whether the last writer of a block has a bias that an offset of the stream can go into."""
    post_norm: bool = False
    """Whether a norm follows the writers, so that nothing folds at the stream's own sites."""
    tied: bool = False
    gain_offset: float = 0.0
    """What the norms add to their gain."""


_FALCON = {
    **_TOKENS,
    "model_type": "falcon",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_hidden_size": 40,
    "bias": True,
}

CORE: dict[str, Core] = {
    "apertus": Core({**_FREE, "model_type": "apertus", "attention_bias": True}),
    "arcee": Core({**_FREE, "model_type": "arcee", "attention_bias": True, "mlp_bias": True}, True),
    "bitnet": Core({**_SQUARE, "model_type": "bitnet", "attention_bias": True}),
    "cohere": Core(
        {**_SQUARE, "model_type": "cohere", "attention_bias": True, "use_qk_norm": True},
        slot=True,  # the attention's, which writes to the same place
        tied=True,
    ),
    "cohere2": Core(
        {**_SQUARE, **_LOCAL, "model_type": "cohere2", "attention_bias": True}, slot=True, tied=True
    ),
    "cwm": Core({**_FREE, **_LOCAL, "model_type": "cwm", "mlp_bias": True}, slot=True),
    "ernie4_5": Core({**_FREE, "model_type": "ernie4_5", "use_bias": True}, slot=True, tied=True),
    "exaone4": Core({**_FREE, **_LOCAL, "model_type": "exaone4"}, post_norm=True),
    "falcon": Core({**_FALCON, "multi_query": True, "parallel_attn": True}, slot=True, tied=True),
    "falcon_rw": Core(
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True},
        slot=True,
        tied=True,
    ),
    "flex_olmo": Core(
        {**_SQUARE, **_TWO, "model_type": "flex_olmo", "num_experts": 3, "attention_bias": True},
        post_norm=True,
    ),
    "glm": Core({**_FREE, "model_type": "glm", "attention_bias": True}),
    "glm4": Core({**_FREE, "model_type": "glm4", "attention_bias": True}, post_norm=True),
    "gpt_neo": Core(
        {
            **_TOKENS,
            "model_type": "gpt_neo",
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "intermediate_size": 40,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
        slot=True,
        tied=True,
    ),
    "gptj": Core({**_OLD, "model_type": "gptj", "n_inner": 40, "rotary_dim": 4}, slot=True),
    "granite": Core(
        {
            **_FREE,
            "model_type": "granite",
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 2.5,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
        slot=True,
        tied=True,
    ),
    "helium": Core(
        {
            **_SQUARE,
            "head_dim": 8,
            "model_type": "helium",
            "attention_bias": True,
            "mlp_bias": True,
        },
        slot=True,
    ),
    "hunyuan_v1_dense": Core({**_FREE, "model_type": "hunyuan_v1_dense", "attention_bias": True}),
    "hunyuan_v1_moe": Core(
        {
            **_FREE,
            "model_type": "hunyuan_v1_moe",
            "attention_bias": True,
            "num_experts": 3,
            "moe_topk": 2,
        }
    ),
    "minimax_m2": Core({**_FREE, **_TWO, "model_type": "minimax_m2", "num_local_experts": 3}),
    "ministral": Core({**_FREE, **_LOCAL, "model_type": "ministral"}),
    "ministral3": Core({**_FREE, "model_type": "ministral3"}),
    "mpt": Core(
        {
            "model_type": "mpt",
            "vocab_size": 56,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "attn_config": {"clip_qkv": 1.0},
        },
        tied=True,
    ),
    "nemotron": Core(
        {**_FREE, "model_type": "nemotron", "attention_bias": True, "mlp_bias": True},
        slot=True,
        gain_offset=1.0,
    ),
    "olmo3": Core(
        {**_SQUARE, **_LOCAL, "model_type": "olmo3", "attention_bias": True}, post_norm=True
    ),
    "olmoe": Core(
        {
            **_SQUARE,
            **_TWO,
            "model_type": "olmoe",
            "num_experts": 3,
            "attention_bias": True,
            "clip_qkv": 1.0,
        }
    ),
    "opt": Core(
        {
            **_TOKENS,
            "model_type": "opt",
            "hidden_size": 32,
            "ffn_dim": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        slot=True,
        tied=True,
    ),
    "phi": Core({**_SQUARE, "model_type": "phi", "qk_layernorm": True}, slot=True),
    "phimoe": Core(
        {
            **_SQUARE,
            **_TWO,
            "model_type": "phimoe",
            "num_local_experts": 3,
            "attention_bias": True,
            "lm_head_bias": True,
        }
    ),
    "qwen2_moe": Core(
        {
            **_SQUARE,
            **_TWO,
            "model_type": "qwen2_moe",
            "num_experts": 3,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
        }
    ),
    "qwen3_moe": Core(
        {
            **_FREE,
            **_TWO,
            "model_type": "qwen3_moe",
            "num_experts": 3,
            "moe_intermediate_size": 20,
            "attention_bias": True,
        }
    ),
    "seed_oss": Core(
        {
            **_FREE,
            "model_type": "seed_oss",
            "attention_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
        },
        slot=True,
    ),
    "smollm3": Core(
        {**_FREE, "model_type": "smollm3", "attention_bias": True, "mlp_bias": True},
        slot=True,
        tied=True,
    ),
    "solar_open": Core(
        {
            **_FREE,
            **_TWO,
            "model_type": "solar_open",
            "n_routed_experts": 4,
            "moe_intermediate_size": 20,
            "n_shared_experts": 1,
            "attention_bias": True,
        }
    ),
    "stablelm": Core(
        {**_SQUARE, "model_type": "stablelm", "use_qkv_bias": True, "qk_layernorm": True}
    ),
    "stablelm_parallel": Core(
        {
            **_SQUARE,
            "model_type": "stablelm",
            "use_qkv_bias": True,
            "qk_layernorm": True,
            "use_parallel_residual": True,
        }
    ),
    "starcoder2": Core({**_SQUARE, "model_type": "starcoder2"}, slot=True, tied=True),
    "vaultgemma": Core(
        {
            **_FREE,
            **_LOCAL,
            "model_type": "vaultgemma",
            "attention_bias": True,
            "query_pre_attn_scalar": 8,
        },
        tied=True,
        gain_offset=1.0,
    ),
}
