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
    closed: bool = False
    """Whether no edit of the stream folds, whatever it is."""
    gain_offset: float = 0.0
    """What the norms add to their gain."""


_MIXED = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
_DENSE_FIRST = {**_MIXED, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_DENSE_FIRST |= {"n_group": 2, "topk_group": 1}
_LATENT = {
    **_SQUARE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "attention_bias": True,
}
_INDEXED = {"q_lora_rank": 14, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
_DELTA = {
    **_FREE,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
    "attention_bias": True,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_STATES = {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "use_bias": True}
_SSM = {
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_proj_bias": True,
}
_GRANITE = {
    **_SQUARE,
    **_TWO,
    "num_local_experts": 4,
    "attention_bias": True,
    "embedding_multiplier": 2.5,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.4,
    "logits_scaling": 3.0,
}
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
    "bamba": Core(
        {
            **_SQUARE,
            **_SSM,
            "model_type": "bamba",
            "attn_layer_indices": [1],
            "attention_bias": True,
            "mlp_bias": True,
        },
        slot=True,
    ),
    "bloom": Core(
        {**_TOKENS, "model_type": "bloom", "hidden_size": 32, "n_layer": 3, "n_head": 4},
        closed=True,
        tied=True,
    ),
    "cohere": Core(
        {**_SQUARE, "model_type": "cohere", "attention_bias": True, "use_qk_norm": True},
        slot=True,  # the attention's, which writes to the same place
        tied=True,
    ),
    "cohere2": Core(
        {**_SQUARE, **_LOCAL, "model_type": "cohere2", "attention_bias": True}, slot=True, tied=True
    ),
    "cwm": Core({**_FREE, **_LOCAL, "model_type": "cwm", "mlp_bias": True}, slot=True),
    "deepseek_v2": Core(
        {**_LATENT, **_DENSE_FIRST, "model_type": "deepseek_v2", "q_lora_rank": None}
    ),
    "deepseek_v3": Core(
        {**_LATENT, **_DENSE_FIRST, "model_type": "deepseek_v3", "q_lora_rank": 14}
    ),
    "deepseek_v32": Core({**_LATENT, **_DENSE_FIRST, **_INDEXED, "model_type": "deepseek_v32"}),
    "dots1": Core(
        {**_FREE, **_DENSE_FIRST, "model_type": "dots1", "n_group": 1, "attention_bias": True}
    ),
    "ernie4_5": Core({**_FREE, "model_type": "ernie4_5", "use_bias": True}, slot=True, tied=True),
    "ernie4_5_moe": Core(
        {
            **_FREE,
            "model_type": "ernie4_5_moe",
            "use_bias": True,
            "moe_intermediate_size": 20,
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
        },
        tied=True,
    ),
    "exaone4": Core({**_FREE, **_LOCAL, "model_type": "exaone4"}, post_norm=True),
    "exaone_moe": Core(
        {
            **_FREE,
            **_LOCAL,
            **_MIXED,
            "model_type": "exaone_moe",
            "num_experts": 4,
            "num_shared_experts": 1,
        }
    ),
    "falcon": Core({**_FALCON, "multi_query": True, "parallel_attn": True}, slot=True, tied=True),
    "falcon_h1": Core(
        {
            **_SQUARE,
            **_SSM,
            "model_type": "falcon_h1",
            "mamba_proj_bias": False,
            "mamba_d_ssm": 48,
            "mamba_d_head": 12,
            "mamba_rms_norm": True,
            "embedding_multiplier": 2.5,
            "attention_out_multiplier": 0.6,
            "attention_in_multiplier": 1.3,
            "ssm_out_multiplier": 0.7,
            "ssm_in_multiplier": 1.2,
            "key_multiplier": 0.8,
            "lm_head_multiplier": 0.5,
            "mlp_multipliers": [1.2, 0.7],
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        },
    ),
    "falcon_rw": Core(
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True},
        slot=True,
        tied=True,
    ),
    "falcon_mamba": Core(
        {**_STATES, "model_type": "falcon_mamba", "time_step_rank": 4}, slot=True, tied=True
    ),
    "flex_olmo": Core(
        {**_SQUARE, **_TWO, "model_type": "flex_olmo", "num_experts": 3, "attention_bias": True},
        post_norm=True,
    ),
    "gemma3n": Core(
        {
            **_FREE,
            **_LOCAL,
            "model_type": "gemma3n_text",
            "num_hidden_layers": 4,
            "layer_types": [*_WINDOWS[:2]] * 2,
            "attention_bias": True,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": 56,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        },
        closed=True,
        tied=True,
    ),
    "gemma4": Core(
        {
            **_FREE,
            **_LOCAL,
            "model_type": "gemma4_text",
            "num_hidden_layers": 4,
            "layer_types": [*_WINDOWS[:2]] * 2,
            "global_head_dim": 12,
            "attention_bias": True,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": 56,
        },
        closed=True,
        tied=True,
    ),
    "glm": Core({**_FREE, "model_type": "glm", "attention_bias": True}),
    "glm4": Core({**_FREE, "model_type": "glm4", "attention_bias": True}, post_norm=True),
    "glm4_moe": Core(
        {
            **_FREE,
            **_DENSE_FIRST,
            "model_type": "glm4_moe",
            "attention_bias": True,
            "use_qk_norm": True,
        }
    ),
    "glm4_moe_lite": Core(
        {
            **_LATENT,
            **_DENSE_FIRST,
            "model_type": "glm4_moe_lite",
            "q_lora_rank": 14,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        }
    ),
    "glm_moe_dsa": Core(
        {
            **_LATENT,
            **_DENSE_FIRST,
            **_INDEXED,
            "model_type": "glm_moe_dsa",
            "indexer_types": ["full", "shared", "full"],
        }
    ),
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
    "gpt_oss": Core(
        {**_FREE, **_LOCAL, **_TWO, "model_type": "gpt_oss", "num_local_experts": 4}, slot=True
    ),
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
    "granite_swa": Core(
        {
            **_SQUARE,
            **_LOCAL,
            "model_type": "granite_swa",
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 2.5,
            "residual_multiplier": 0.6,
        },
        slot=True,
        tied=True,
    ),
    "granitemoe": Core({**_GRANITE, "model_type": "granitemoe"}, tied=True),
    "granitemoeshared": Core(
        {**_GRANITE, "model_type": "granitemoeshared", "shared_intermediate_size": 28},
        tied=True,
    ),
    "granitemoe_swa": Core(
        {
            **_GRANITE,
            **_LOCAL,
            "model_type": "granitemoe_swa",
            "shared_intermediate_size": 28,
        },
        tied=True,
    ),
    "granitemoehybrid": Core(
        {
            **_GRANITE,
            **_SSM,
            "model_type": "granitemoehybrid",
            "shared_intermediate_size": 28,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
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
    "hy_v3": Core(
        {
            **_FREE,
            **_MIXED,
            "model_type": "hy_v3",
            "num_experts": 4,
            "num_shared_experts": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "enable_moe_fp32_combine": False,
        }
    ),
    "jais2": Core(
        {**_SQUARE, "model_type": "jais2", "attention_bias": True, "mlp_bias": True}, slot=True
    ),
    "jamba": Core(
        {
            **_SQUARE,
            **_TWO,
            "model_type": "jamba",
            "num_experts": 3,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "mamba_proj_bias": True,
            "use_mamba_kernels": False,
        }
    ),
    "kimi_linear": Core(
        {
            **_LATENT,
            **_MIXED,
            "model_type": "kimi_linear",
            "n_shared_experts": 1,
            "num_local_experts": 4,
            "linear_head_dim": 6,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        }
    ),
    "lfm2": Core(
        {
            **_SQUARE,
            "model_type": "lfm2",
            "conv_bias": True,
            "block_multiple_of": 4,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        tied=True,
    ),
    "lfm2_moe": Core(
        {
            **_SQUARE,
            **_MIXED,
            "model_type": "lfm2_moe",
            "conv_bias": True,
            "num_dense_layers": 1,
            "num_experts": 4,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        tied=True,
    ),
    "llama4": Core(
        {
            **_FREE,
            "model_type": "llama4_text",
            "intermediate_size_mlp": 36,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_bias": True,
            "attention_chunk_size": 4,
        }
    ),
    "mamba": Core({**_STATES, "model_type": "mamba", "time_step_rank": 4}, slot=True, tied=True),
    "mamba2": Core(
        {
            **_STATES,
            "model_type": "mamba2",
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
        },
        slot=True,
    ),
    "mellum": Core(
        {
            **_FREE,
            **_LOCAL,
            **_MIXED,
            "model_type": "mellum",
            "num_experts": 4,
            "attention_bias": True,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        }
    ),
    "mimo_v2_flash": Core(
        {
            **_FREE,
            **_MIXED,
            "model_type": "mimo_v2_flash",
            "n_routed_experts": 4,
            "v_head_dim": 6,
            "attention_bias": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        }
    ),
    "minicpm3": Core(
        {
            **_LATENT,
            "model_type": "minicpm3",
            "q_lora_rank": 14,
            "mlp_bias": True,
            "scale_emb": 3,
            "scale_depth": 1.4,
            "dim_model_base": 16,
        },
        slot=True,
        tied=True,
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
    "nemotron_h": Core(
        {
            **_FREE,
            **_MIXED,
            "model_type": "nemotron_h",
            "layers_block_type": ["mamba", "mlp", "attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 12,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 28,
            "mlp_bias": True,
            "use_bias": True,
        },
        slot=True,
    ),
    "olmo": Core(
        {**_SQUARE, "model_type": "olmo", "attention_bias": True, "clip_qkv": 1.0},
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
            "decoder_sparse_step": 2,
            "num_experts": 3,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
        }
    ),
    "qwen3_5": Core({**_DELTA, "model_type": "qwen3_5_text"}, gain_offset=1.0),
    "qwen3_5_moe": Core(
        {
            **_DELTA,
            **_MIXED,
            "model_type": "qwen3_5_moe_text",
            "num_experts": 3,
            "shared_expert_intermediate_size": 28,
        },
        gain_offset=1.0,
    ),
    "qwen3_moe": Core(
        {
            **_FREE,
            **_MIXED,
            "model_type": "qwen3_moe",
            "num_experts": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "attention_bias": True,
        }
    ),
    "qwen3_next": Core(
        {
            **_DELTA,
            **_MIXED,
            "model_type": "qwen3_next",
            "num_experts": 3,
            "shared_expert_intermediate_size": 28,
            "mlp_only_layers": [0],
        },
        gain_offset=1.0,
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
    "youtu": Core(
        {**_LATENT, "model_type": "youtu", "q_lora_rank": 14, "pad_token_id": None}, tied=True
    ),
}

_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
_TOWER |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
_VISUAL = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4}
_VISUAL |= {"out_hidden_size": 24, "num_position_embeddings": 16}

WRAPPED: dict[str, Core] = {
    "gemma3 in its wrapper": Core(
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {
                **_FREE,
                **_LOCAL,
                "model_type": "gemma3_text",
                "query_pre_attn_scalar": 8,
                "attention_bias": True,
            },
            "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": 50,
            "boi_token_index": 51,
            "eoi_token_index": 52,
        },
        post_norm=True,
        tied=True,
        gain_offset=1.0,
    ),
    "gemma4 in its wrapper": Core(
        {
            "model_type": "gemma4",
            "architectures": ["Gemma4ForConditionalGeneration"],
            "text_config": {
                **_FREE,
                **_LOCAL,
                "model_type": "gemma4_text",
                "layer_types": [*_WINDOWS[:2], "full_attention"],
                "global_head_dim": 12,
                "attention_bias": True,
                "hidden_size_per_layer_input": 0,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 20,
            },
            "vision_config": {**_TOWER, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4},
        },
        closed=True,
        tied=True,
    ),
    "mistral in Mistral 3": Core(
        {
            "model_type": "mistral3",
            "architectures": ["Mistral3ForConditionalGeneration"],
            "text_config": {**_FREE, "model_type": "mistral", "sliding_window": None},
            "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 50,
        },
        tied=True,
    ),
    "ministral3 in Mistral 3": Core(
        {
            "model_type": "mistral3",
            "architectures": ["Mistral3ForConditionalGeneration"],
            "text_config": {**_FREE, "model_type": "ministral3"},
            "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 50,
        },
    ),
    "qwen3_5 in its wrapper": Core(
        {
            "model_type": "qwen3_5",
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "text_config": {**_DELTA, "model_type": "qwen3_5_text"},
            "vision_config": _VISUAL,
        },
        gain_offset=1.0,
    ),
    "qwen3_5_moe in its wrapper": Core(
        {
            "model_type": "qwen3_5_moe",
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "text_config": {
                **_DELTA,
                **_MIXED,
                "model_type": "qwen3_5_moe_text",
                "num_experts": 3,
                "shared_expert_intermediate_size": 28,
            },
            "vision_config": _VISUAL,
        },
        gain_offset=1.0,
    ),
    "qwen3_moe in Qwen3-VL": Core(
        {
            "model_type": "qwen3_vl_moe",
            "architectures": ["Qwen3VLMoeForConditionalGeneration"],
            "text_config": {
                **_FREE,
                **_MIXED,
                "model_type": "qwen3_vl_moe_text",
                "num_experts": 3,
                "mlp_only_layers": [0],
                "attention_bias": True,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            },
            "vision_config": {**_VISUAL, "deepstack_visual_indexes": [0]},
        },
    ),
    "llama4 in its wrapper": Core(
        {
            "model_type": "llama4",
            "architectures": ["Llama4ForConditionalGeneration"],
            "text_config": {
                **_FREE,
                "model_type": "llama4_text",
                "intermediate_size_mlp": 36,
                "num_local_experts": 4,
                "interleave_moe_layer_step": 2,
                "attention_bias": True,
            },
            "vision_config": {
                **_TOWER,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
        },
    ),
    "llama in Llava": Core(
        {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "text_config": {**_FREE, "model_type": "llama", "mlp_bias": True},
            "vision_config": {**_TOWER, "model_type": "clip_vision_model"},
            "image_token_index": 50,
        },
        slot=True,
    ),
    **{
        f"qwen2 in {title}": Core(
            {
                "model_type": kind,
                "architectures": [f"{title}ForConditionalGeneration"],
                "text_config": {
                    **_SQUARE,
                    "model_type": f"{kind}_text",
                    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
                },
                "vision_config": vision,
            },
        )
        for kind, title, vision in (
            (
                "qwen2_vl",
                "Qwen2VL",
                {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32},
            ),
            ("qwen2_5_vl", "Qwen2_5_VL", {**_VISUAL, "out_hidden_size": 32}),
        )
    },
    "qwen3 in Qwen3-VL": Core(
        {
            "model_type": "qwen3_vl",
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "text_config": {
                **_FREE,
                "model_type": "qwen3_vl_text",
                "attention_bias": True,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            },
            "vision_config": {**_VISUAL, "deepstack_visual_indexes": [0]},
        },
    ),
    **{
        f"{text} in InternVL": Core(
            {
                "model_type": "internvl",
                "architectures": ["InternVLForConditionalGeneration"],
                "text_config": {**(_SQUARE if text == "qwen2" else _FREE), "model_type": text},
                "vision_config": {**_TOWER, "image_size": [16, 16], "patch_size": [8, 8]},
            },
            tied=True,
        )
        for text in ("qwen2", "qwen3")
    },
}
"""Classes that hold the model of a table as their text model, beside a tower."""
