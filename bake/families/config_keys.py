"""The keys of config.json are closed: handled by the table, known to change nothing, or refused.

A key that no code reads could scale the stream (Granite's ``residual_multiplier``), clip it or add
to it, and the plan would be wrong in silence. What a table handles is derived from what it names;
what changes nothing in any family stands here, and what changes nothing in one stands in its table.
"""

import difflib
from collections.abc import Collection, Mapping

from bake.errors import FamilyError
from bake.families.load import load_families
from bake.families.section import Json, size_keys
from bake.families.table import MISSING, Family, configured

# "Nothing" is meant of the algebra of the stream: which linear layer reads and writes it through
# which norm. Keys of attention scores, of the shape of an activation or of a norm's epsilon act
# between the places that bake edits, so that the hooked and the baked model share them.
HARMLESS = frozenset(
    {
        # What the file says of itself and of who wrote it.
        *("_name_or_path", "_commit_hash", "transformers_version", "tokenizer_class", "prefix"),
        *("transformers.js_config", "unsloth_fixed", "unsloth_version", "finetuning_task"),
        "_model_name_or_path",  # transformers, of a model that it read from a GGUF
        # Code of the repository, which nothing runs: ``architectures`` is a class of transformers.
        "auto_map",
        # How the model is loaded and run, not what it computes.
        *("torch_dtype", "dtype", "use_bfloat16", "torchscript", "tf_legacy_loss", "use_cache"),
        *("cache_implementation", "_attn_implementation_autoset", "attn_implementation"),
        *("_experts_implementation", "experts_implementation", "gradient_checkpointing"),
        *("chunk_size_feed_forward", "return_dict", "output_attentions", "output_hidden_states"),
        *("output_past", "is_decoder"),
        # Tokens.
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
        *("decoder_start_token_id",),
        # Generation, which old versions kept in config.json.
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"),
        *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("output_scores", "return_dict_in_generate", "forced_bos_token_id"),
        *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
        *("suppress_tokens", "begin_suppress_tokens", "task_specific_params"),
        # Heads for other tasks.
        *("id2label", "label2id", "num_labels", "_num_labels", "problem_type"),
        *("classifier_dropout", "summary_type", "summary_use_proj", "summary_activation"),
        *("summary_proj_to_labels", "summary_first_dropout"),
        # Training: a model in eval mode drops nothing out.
        *("initializer_range", "attention_dropout", "hidden_dropout", "hidden_dropout_prob"),
        *("attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
        "neftune_noise_alpha",
        # Positions, and how far attention looks back.
        *("max_position_embeddings", "max_sequence_length", "original_max_position_embeddings"),
        *("rope_theta", "rope_scaling", "rope_parameters", "rope_interleaved"),
        *("partial_rotary_factor", "rotary_pct", "rotary_emb_base", "rope_local_base_freq"),
        *("sliding_window", "sliding_window_size", "use_sliding_window", "max_window_layers"),
        # Inside a norm, and between a reader and a writer.
        *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
        *("hidden_act", "hidden_activation", "activation_function"),
    }
)
MUST: Mapping[str, tuple[Json, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
}
"""Keys of every configuration, with the values that leave a decoder what its table says."""
_READ = frozenset({"architectures", "model_type", "quantization_config", "tie_word_embeddings"})


def check_config(
    family: Family, config: Mapping[str, Json], assumed: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the keys that the table does not know and the user lets through, by name.

    Args:
        family: the table.
        config: the parsed config.json.
        assumed: the keys that the user takes to change nothing.

    Raises:
        FamilyError: the weights are codes, a key has a value that the table is not written for, or
            a key is not known.
    """
    inner = family.section(config)
    if any(part.get("quantization_config") is not None for part in (config, inner)):
        raise FamilyError(
            "the checkpoint is quantised",
            where="config.json quantization_config",
            why="an edit must be folded into weights, and these are codes",
            fix="use the unquantised checkpoint, or dequantise this one first",
        )
    for key, allowed in {**MUST, **family.must}.items():
        value = configured(family, inner, key)
        if value is not MISSING and value not in allowed:
            raise FamilyError(
                f"{key} = {value!r}, but the table {family.name!r} is written for "
                + " or ".join(repr(value) for value in allowed),
                where="config.json",
                why="the key changes the arithmetic of the forward pass",
                fix="bring a table for this variant with --family FILE",
            )
    zeroed = configured(family, inner, family.embed.zeroed) if family.embed.zeroed else None
    if zeroed is not MISSING and zeroed is not None:
        raise _zeroed(family, zeroed)
    unknown = {key: inner[key] for key in set(inner) - known_keys(family)}
    if family.within is not None:
        around = HARMLESS | _READ | MUST.keys() | {family.within.config, *family.within.harmless}
        if family.within.config in config:  # else every key on top is one of the text model
            unknown |= {key: config[key] for key in set(config) - around}
    refused = sorted(key for key in unknown if key not in assumed)
    if refused:
        raise _unknown(family, unknown, refused)
    return tuple(sorted(unknown))


def _zeroed(family: Family, row: Json) -> FamilyError:
    """Return the error for a row of the embedding that is loaded otherwise than it is stored."""
    key = family.embed.zeroed
    return FamilyError(
        f"{key} = {row!r}, and {family.architectures[0]} sets that row of its embedding to zero "
        "when it loads a file",
        where="config.json",
        why="an edited row would be lost there, a head that is untied would no longer have its "
        "zeros, and other programs load what is stored",
        fix=f"set {key} to null in config.json: every program then loads the row that is stored",
    )


def known_keys(family: Family) -> frozenset[str]:
    """Return the keys that the table handles, and those that change nothing."""
    recasts = family.recasts.values()
    factors = (family.embed.multiplier, *(branch.gain for branch in family.branches))
    multipliers = {key for one in factors for key in (one if isinstance(one, tuple) else (one,))}
    return (
        HARMLESS
        | _READ
        | MUST.keys()
        | {
            *filter(None, (family.embed.zeroed,)),
            *family.tied_by,
            *family.when,
            *family.must,
            *family.flags,
            *family.defaults,
            *family.config.harmless,
        }
        | family.dims.said_by
        | {key for row in family.branches for of in row.dims.values() for key in size_keys(of)}
        | {key for one in family.conditions for key in one.keys_said}
        | {key for key in multipliers if isinstance(key, str)}
        | {key for recast in recasts for key in (*recast.when, *recast.drop, *recast.explicit)}
    )


def _unknown(family: Family, config: Mapping[str, Json], keys: list[str]) -> FamilyError:
    """Return the error for keys that the table would pass over."""
    said = ", ".join(f"{key} = {str(config[key])[:60]}" for key in keys)
    options = " ".join(f"--assume-harmless {key}" for key in keys)
    advice = "; ".join(_nearest(family, config, key) for key in keys[:3])
    return FamilyError(
        f"the table {family.name!r} does not know {said}",
        where="config.json",
        why="bake would plan as if it were not there, and it may change what the model computes",
        fix=f"{advice}. Bring a table that handles it with --family FILE or, where it changes "
        f"nothing, say so with {options}",
    )


def _nearest(family: Family, config: Mapping[str, Json], key: str) -> str:
    """Return which shipped table knows the key, or a key that is written much like it."""
    others = [f for f in load_families() if f.name != family.name and key in known_keys(f)]
    if others:
        # Of several, the one that knows most of this file.
        best = max(others, key=lambda other: len(known_keys(other) & set(config)))
        return f"{key} is known to the table {best.name!r}"
    near = difflib.get_close_matches(key, known_keys(family), n=1, cutoff=0.8)
    if near:
        return f"{key} is known to no table; {near[0]!r} is to this one"
    return f"{key} is known to no table"
