"""Every key of config.json is handled, known to change nothing, or refused by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner, Result

from bake.artifact.record import read_record
from bake.cli import main
from bake.errors import FamilyError
from bake.families import Family, family_named, find_family, load_families, parse_family
from bake.families.config_keys import HARMLESS, check_config, known_keys

FAMILIES = {family.name: family for family in load_families()}
every_table = pytest.mark.parametrize("name", sorted(FAMILIES))


def refusal(family: Family, config: dict[str, Any]) -> FamilyError:
    with pytest.raises(FamilyError) as caught:
        check_config(family, config)
    assert caught.value.exit_code == 4
    assert caught.value.where == "config.json"
    return caught.value


# What is accepted


@every_table
@pytest.mark.parametrize("changed_only", [True, False])
def test_what_the_class_writes_is_known(name: str, changed_only: bool) -> None:
    """Every key that ``save_pretrained`` writes, and every key that the class has."""
    from transformers import AutoConfig

    made = AutoConfig.for_model(**tiny.CONFIGS[name])
    config = json.loads(made.to_json_string(use_diff=changed_only))
    assert "hc_mult" not in known_keys(FAMILIES[name])  # the question has an answer
    assert check_config(FAMILIES[name], config) == ()


# Keys of config.json files on the Hub, as their authors wrote them, by table.
_OLD = "_name_or_path architectures bos_token_id eos_token_id hidden_act hidden_size "
_OLD += "initializer_range intermediate_size max_position_embeddings model_type "
_OLD += "num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps "
_OLD += "tie_word_embeddings torch_dtype transformers_version use_cache vocab_size "
_QWEN = _OLD + "attention_dropout max_window_layers rope_theta sliding_window use_sliding_window "
_GEMMA = _OLD + "attention_bias attention_dropout head_dim hidden_activation pad_token_id "
_GEMMA += "rope_theta cache_implementation "
PUBLISHED = {
    "Llama 2": ("llama", _OLD + "pretraining_tp rope_scaling"),
    "SmolLM2, of a GGUF": (
        "llama",
        _OLD + "_model_name_or_path attention_bias attention_dropout dtype head_dim mlp_bias "
        "pad_token_id pretraining_tp rope_parameters unk_token_id",
    ),
    "Llama 3.2": (
        "llama",
        _OLD + "attention_bias attention_dropout head_dim mlp_bias pretraining_tp rope_scaling "
        "rope_theta",
    ),
    "SmolLM2": (
        "llama",
        _OLD + "is_llama_config pretraining_tp rope_interleaved rope_scaling rope_theta "
        "transformers.js_config",
    ),
    "Vicuna": ("llama", _OLD + "max_sequence_length pad_token_id pretraining_tp rope_scaling"),
    "Llama 3 by Unsloth": ("llama", _OLD + "unsloth_fixed unsloth_version pad_token_id"),
    "Mistral 7B": ("mistral", _OLD + "attention_dropout head_dim rope_theta sliding_window"),
    "Mixtral 8x7B": (
        "mixtral",
        _OLD + "attention_dropout num_experts_per_tok num_local_experts output_router_logits "
        "rope_theta router_aux_loss_coef sliding_window",
    ),
    "Qwen2.5": ("qwen2", _QWEN + "use_mrope"),
    "Qwen3": ("qwen3", _QWEN + "attention_bias head_dim rope_scaling"),
    "Gemma": ("gemma", _GEMMA + "rope_scaling"),
    "Gemma 2": (
        "gemma2",
        _GEMMA + "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar "
        "sliding_window sliding_window_size",
    ),
    "Gemma 3": (
        "gemma3",
        _GEMMA + "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar "
        "rope_local_base_freq rope_scaling sliding_window sliding_window_pattern",
    ),
    "Phi-3 mini": (
        "phi3",
        _OLD + "attention_bias attention_dropout auto_map embd_pdrop "
        "original_max_position_embeddings pad_token_id resid_pdrop rope_scaling rope_theta "
        "sliding_window",
    ),
    "Phi-4 mini": (
        "phi3",
        _OLD + "attention_bias auto_map embd_pdrop full_attn_mod interpolate_factor lm_head_bias "
        "mlp_bias original_max_position_embeddings partial_rotary_factor resid_pdrop rope_scaling",
    ),
    "OLMo 2": ("olmo2", _OLD + "attention_bias attention_dropout pad_token_id rope_scaling"),
    "GPT-2": (
        "gpt2",
        (
            "activation_function architectures attn_pdrop bos_token_id embd_pdrop eos_token_id "
            "initializer_range layer_norm_epsilon model_type n_ctx n_embd n_head n_layer "
            "n_positions n_special output_past predict_special_tokens resid_pdrop "
            "summary_activation summary_first_dropout summary_proj_to_labels summary_type "
            "summary_use_proj "
            "task_specific_params vocab_size id2label label2id _num_labels gradient_checkpointing"
        ),
    ),
    "Pythia": (
        "gpt_neox",
        (
            "architectures attention_bias bos_token_id classifier_dropout eos_token_id hidden_act "
            "hidden_dropout hidden_size initializer_range intermediate_size layer_norm_eps "
            "max_position_embeddings model_type num_attention_heads num_hidden_layers "
            "rotary_emb_base rotary_pct tie_word_embeddings torch_dtype transformers_version "
            "use_cache use_parallel_residual vocab_size"
        ),
    ),
    "GPT-NeoX 20B": ("gpt_neox", "attention_probs_dropout_prob hidden_dropout_prob"),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_what_published_checkpoints_say_is_known(model: str) -> None:
    name, keys = PUBLISHED[model]
    assert set(keys.split()) - known_keys(FAMILIES[name]) == set()


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_what_is_declared_as_another_class_is_known_to_its_table(name: str) -> None:
    """A recast drops every key that the other table would not know."""
    (recast,) = FAMILIES[name].recasts.values()
    left = known_keys(FAMILIES[name]) - set(recast.drop)
    assert left - known_keys(family_named(recast.family)) == set()


# What is refused


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "residual_multiplier", 0.22),  # Granite scales every branch
        ("llama", "some_new_arithmetic", True),
        ("olmo2", "clip_qkv", 8.0),  # OLMo clips what the readers write
        ("qwen3", "mlp_only_layers", [1]),  # Qwen's mixtures: blocks that differ
        ("mistral", "text_config", {"hidden_size": 24}),  # a model inside a model
        ("gpt2", "hidden_size", 24),  # another name of n_embd, which may contradict it
        ("llama", "compression_config", {"format": "pack-quantized"}),
        ("gemma", "final_logit_softcapping", 30.0),  # Gemma 2 has it, and Gemma has no code for it
    ],
)
def test_a_key_that_nobody_knows(
    name: str, key: str, value: Any, tiny_checkpoint: Callable[..., Path]
) -> None:
    path = tiny_checkpoint(name)
    config = tiny.config_of(path)
    assert check_config(FAMILIES[name], config) == ()
    error = refusal(FAMILIES[name], {**config, key: value})
    assert f"the table {name!r} does not know {key} = {value}" in error.what
    assert error.why is not None and "bake would plan as if it were not there" in error.why
    assert error.fix is not None and "--family FILE" in error.fix


def test_several_keys_are_named_together() -> None:
    error = refusal(FAMILIES["llama"], {"residual_multiplier": 0.22, "logits_scaling": 8.0})
    assert error.what.endswith("does not know logits_scaling = 8.0, residual_multiplier = 0.22")


def test_the_nearest_table_is_named() -> None:
    def fix(key: str, **config: Any) -> str:
        return str(refusal(FAMILIES["llama"], {key: 1, **config}).fix)

    mixture = {"num_local_experts": 8, "router_jitter_noise": 0.0, "lm_head_bias": False}
    said = fix("num_experts_per_tok", **mixture)
    assert "num_experts_per_tok is known to the table 'phimoe'" in said
    # Gemma 2 and 3 know it, and only Gemma 3 knows the other.
    both = fix("attn_logit_softcapping", sliding_window_pattern=6)
    assert "attn_logit_softcapping is known to the table 'gemma3'" in both
    assert fix("mlp_bia").startswith("mlp_bia is known to no table; 'mlp_bias' is to this one")
    assert fix("zzz").startswith("zzz is known to no table. ")


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("is_encoder_decoder", False, True),
        ("add_cross_attention", False, True),
        ("pruned_heads", {}, {"0": [1]}),
        ("cross_attention_hidden_size", None, 24),
    ],
)
def test_keys_of_every_class_that_change_the_arithmetic(key: str, good: Any, bad: Any) -> None:
    for family in FAMILIES.values():
        assert check_config(family, {key: good}) == ()
        assert f"{key} = {bad!r}, but the table" in refusal(family, {key: bad}).what


def test_a_key_is_let_through_by_its_name_alone() -> None:
    llama = FAMILIES["llama"]
    config = {"vocab_size": 56, "residual_multiplier": 1.0, "logits_scaling": 1.0}
    assert check_config(llama, config, ("residual_multiplier", "logits_scaling", "other")) == (
        "logits_scaling",
        "residual_multiplier",
    )
    with pytest.raises(FamilyError, match=r"does not know logits_scaling = 1\.0\n"):
        check_config(llama, config, ("residual_multiplier",))
    # What a table is written for is no question of harm.
    with pytest.raises(FamilyError, match="pretraining_tp = 2"):
        check_config(llama, {"pretraining_tp": 2}, ("pretraining_tp",))
    with pytest.raises(FamilyError, match="is quantised"):
        check_config(llama, {"quantization_config": {}}, ("quantization_config",))


def test_what_is_shared_needs_no_table() -> None:
    """A table repeats nothing of the list that all of them share."""
    for family in FAMILIES.values():
        assert HARMLESS.isdisjoint(family.config.harmless), family.name


def test_a_table_of_ones_own_knows_its_multipliers() -> None:
    text = (Path(parse_family.__code__.co_filename).parent / "llama.toml").read_text("utf-8")
    own = parse_family(
        text.replace("[embed]", '[embed]\nmultiplier = "embedding_multiplier"').replace(
            'module = "mlp"', 'module = "mlp"\ngain = "residual_multiplier"'
        ),
        "own.toml",
    )
    config = {"residual_multiplier": 0.22, "embedding_multiplier": 12}
    assert check_config(own, config) == ()
    refusal(FAMILIES["llama"], config)


# model_type


@pytest.mark.parametrize(
    ("name", "said"),
    [("llama", "mistral"), ("llama", "granite"), ("qwen2", "qwen3"), ("gemma3", "gemma3")],
)
def test_a_model_type_of_another_class(
    name: str, said: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    config = tiny.config_of(tiny_checkpoint(name))
    assert find_family(config).name == name
    with pytest.raises(FamilyError) as caught:
        find_family({**config, "model_type": said})
    (right,) = FAMILIES[name].model_types
    architecture = FAMILIES[name].architectures[0]
    assert caught.value.exit_code == 4
    assert (
        caught.value.what
        == f"architectures names {architecture}, and model_type = {said!r} is not its type"
    )
    assert f"set model_type to {right!r}" in str(caught.value.fix)


@every_table
def test_the_types_of_a_table_are_those_of_its_class(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for kind in FAMILIES[name].model_types:
        config = type(AutoConfig.for_model(tiny.CONFIGS[name]["model_type"]))
        assert config.model_type == kind
        classes = AutoModelForCausalLM._model_mapping[config]
        assert classes.__name__ in FAMILIES[name].architectures


# The user's word for a key


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--json"])


@pytest.fixture
def exotic(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a recipe for a Llama whose config has a key that no table knows."""
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint("llama", dtype=torch.float32), base)
    config = {**tiny.config_of(base), "some_new_arithmetic": False}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=24))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[base]\nmodel = "base"\n[directions.v]\nfile = "v.npy"\n'
        '[[edits]]\nkind = "ablate"\ndirection = "v"\nat = "resid"\n',
        encoding="utf-8",
    )
    return recipe


WORD = ("--assume-harmless", "some_new_arithmetic")


def test_a_key_is_let_through_and_recorded(exotic: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    for refused in (
        run("families", base),
        run("plan", exotic),
        run("export", exotic, "--out", out),
    ):
        assert refused.exit_code == 4
        assert " ".join(WORD) in refused.output
    assert not out.exists()
    checked = run("families", base, *WORD)
    assert checked.exit_code == 0
    assert json.loads(checked.stdout)["assume_harmless"] == ["some_new_arithmetic"]
    planned = run("plan", exotic, *WORD)
    assert planned.exit_code == 0
    assert json.loads(planned.stdout)["assume_harmless"] == ["some_new_arithmetic"]
    assert run("export", exotic, "--out", out, *WORD).exit_code == 0
    # What the record says is used again, and needs no word more.
    assert read_record(out).assume_harmless == ("some_new_arithmetic",)
    again = run("plan", out)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["again"]["same"] is True
    verified = run("verify", out, "--no-plots", "--rebake")
    assert verified.exit_code == 0, verified.output
    reverted = run("revert", out, "--out", tmp_path / "back")
    assert reverted.exit_code == 0, reverted.output


def test_a_record_that_names_no_key_lets_none_through(exotic: Path, tmp_path: Path) -> None:
    """As those do that were written before keys were closed."""
    out = tmp_path / "out"
    assert run("export", exotic, "--out", out, *WORD).exit_code == 0
    record = json.loads((out / "bake.json").read_text("utf-8"))
    del record["assume_harmless"]
    (out / "bake.json").write_text(json.dumps(record), encoding="utf-8")
    for command in (("plan", out), ("verify", out, "--no-plots")):
        refused = run(*command)
        assert refused.exit_code == 4
        assert " ".join(WORD) in refused.output
        assert run(*command, *WORD).exit_code == 0
