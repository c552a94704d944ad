"""Where config.json says what of a wrapped model, and whether the head is the embedding."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from core import WRAPPED
from exporting import written
from harness import RELATIVE, Base, edit, logits, plain_logits, plan_of, vector
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from bake import edits as make
from bake.checkpoints import open_checkpoint
from bake.edits import Edit
from bake.errors import FamilyError
from bake.families import find_family
from bake.families.fit import layout_of
from bake.families.settings import read_settings
from bake.plan import Exactness
from bake.plan.record import plan_record

Checkpoints = Callable[..., Path]


def changed(source: Path, out: Path, config: Mapping[str, Any], **tensors: Tensor) -> Path:
    """Write a checkpoint with another config.json, and with some tensors more."""
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = {**tiny.tensors_of(source), **tensors}
    save_file(found, out / "model.safetensors", {"format": "pt"})
    return out


def base_of(path: Path) -> Base:
    """Return a checkpoint with the layout that its bytes, and not its header alone, give it."""
    checkpoint = open_checkpoint(path)
    return Base(path, checkpoint, tiny.load(path), layout_of(checkpoint))


def baked(base: Base, out: Path) -> Callable[[Path], float]:
    """Write an ablation of the whole stream, and return how far a checkpoint is from its hooks."""
    whole = edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "resid")
    return written_as(base, [whole], out)


def written_as(base: Base, edits: list[Edit], out: Path) -> Callable[[Path], float]:
    """Write an exact plan, and return how far a checkpoint is from its hooks."""
    plan = plan_of(base, edits)
    assert plan.exactness is Exactness.EXACT, plan.findings
    written("checkpoint", plan, base.checkpoint, out, record={"base": {"model": str(base.path)}})
    hooked = logits(base.model, base, edits)
    effect = float((hooked - plain_logits(base)).abs().max())
    assert effect > 1e-2

    def error(path: Path) -> float:
        return float((logits(tiny.load(path), base) - hooked).abs().max()) / effect

    assert error(out) <= RELATIVE
    return error


def test_a_flat_file_of_a_wrapper(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Qwen2-VL on the Hub has the text model's keys on top, and no part of its own for them."""
    source = tiny_checkpoint("qwen2 in Qwen2VL", tied=True)
    config = tiny.config_of(source)
    text = config.pop("text_config")
    flat = {**text, **config, "tie_word_embeddings": True}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    del flat["rope_parameters"]
    base = base_of(changed(source, tmp_path / "flat", flat))
    assert base.layout.tied and base.layout.family.within is not None
    error = baked(base, tmp_path / "out")
    now = tiny.config_of(tmp_path / "out")
    assert now == {**flat, "tie_word_embeddings": False}
    head = {"lm_head.weight": tiny.tensors_of(tmp_path / "out")[base.layout.embed]}
    assert error(changed(tmp_path / "out", tmp_path / "tied", now, **head)) > 1e-3


def test_the_sizes_that_a_wrapper_leaves_to_its_text_model() -> None:
    """The text model's part of llava-hf/llava-1.5-7b-hf says no size but that of the vocabulary."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": {"model_type": "clip_vision_model"},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }
    dims = read_settings(find_family(config), config).dims
    assert (dims["layers"], dims["hidden"], dims["inner"]) == (32, 4096, 11008)
    assert dims["vocab"] == 32064
    with pytest.raises(FamilyError, match="'num_hidden_layers' is missing"):
        read_settings(find_family({**config["text_config"]}), config["text_config"])


def test_a_head_of_its_own_where_nothing_says_that_it_is_tied(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """transformers loads it as what it is; where a file says the contrary, programs disagree."""
    source = tiny_checkpoint("mistral in Mistral 3", tied=False)
    config = tiny.config_of(source)
    del config["tie_word_embeddings"]
    config["text_config"].pop("tie_word_embeddings", None)
    base = base_of(changed(source, tmp_path / "unsaid", config))
    assert not base.layout.tied
    with torch.no_grad():
        assert not torch.equal(
            base.model.get_input_embeddings().weight, base.model.get_output_embeddings().weight
        )
    error = baked(base, tmp_path / "out")
    assert tiny.config_of(tmp_path / "out") == config
    head = base.layout.unembed.weight
    tied = {head: tiny.tensors_of(tmp_path / "out")[base.layout.embed]}
    assert error(changed(tmp_path / "out", tmp_path / "tied", config, **tied)) > 1e-3
    said = changed(source, tmp_path / "said", {**config, "tie_word_embeddings": True})
    with pytest.raises(FamilyError, match="another matrix than the embedding"):
        layout_of(open_checkpoint(said))


@pytest.mark.parametrize("name", sorted(WRAPPED))
def test_a_wrapper_is_tied_where_its_class_ties_it(name: str) -> None:
    """Some classes read the top level, some the text model's part, and some both."""
    written_by_class = AutoConfig.for_model(**WRAPPED[name].config).to_dict()
    found = {}
    for top, text in ((None, None), (None, True), (False, True), (True, False)):
        config = copy.deepcopy(written_by_class)
        for part, said in ((config, top), (config["text_config"], text)):
            part.pop("tie_word_embeddings", None)
            part.update({} if said is None else {"tie_word_embeddings": said})
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
        config["architectures"] = [type(model).__name__]
        ties = any(key.endswith("lm_head.weight") for key in model.all_tied_weights_keys)
        assert read_settings(find_family(config), config).tied is ties, (top, text)
        found[top, text] = ties
    assert len(set(found.values())) == 2, "no part of config.json matters"


def test_a_second_key_that_ties_the_head(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """LFM2's class reads tie_embedding first: an untied head has to be said there as well."""
    source = tiny_checkpoint("lfm2", tied=True)
    config = tiny.config_of(source)
    del config["tie_word_embeddings"]
    base = base_of(changed(source, tmp_path / "base", {**config, "tie_embedding": True}))
    assert base.layout.tied
    error = baked(base, tmp_path / "out")
    now = tiny.config_of(tmp_path / "out")
    assert (now["tie_embedding"], now["tie_word_embeddings"]) == (False, False)
    kept = {**now, "tie_embedding": True}
    head = {"lm_head.weight": tiny.tensors_of(tmp_path / "out")[base.layout.embed]}
    assert error(changed(tmp_path / "out", tmp_path / "kept", kept, **head)) > 1e-3


@pytest.mark.parametrize(
    ("name", "loader"),
    [
        ("qwen3_5 in its wrapper", "Qwen3_5ForConditionalGeneration"),
        ("mistral in Mistral 3", "Mistral3ForConditionalGeneration"),
        ("qwen3_5", None),
    ],
)
def test_a_record_names_the_class_that_loads_a_wrapper(
    name: str, loader: str | None, tiny_checkpoint: Checkpoints
) -> None:
    """AutoModelForCausalLM knows no Mistral 3, and of Qwen3.5 it leaves out the tower."""
    path = tiny_checkpoint(name)
    layout = layout_of(open_checkpoint(path))
    base = Base(path, open_checkpoint(path), tiny.load(path), layout)
    plan = plan_of(base, [edit(base, "ablate", make.ablate(vector(layout.hidden)), "resid")])
    assert plan_record(plan).loader == loader


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ernie4_5_moe", "offset"), ("ernie4_5_moe", "affine"), ("gptj", "affine"), ("phi", "affine")],
)
def test_a_tied_head_with_a_bias_takes_a_constant(
    name: str, kind: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """The constant goes through the head, which is stored as the embedding and nowhere else."""
    path = tiny_checkpoint(name, tied=True)
    base = base_of(path)
    assert base.layout.tied and not base.layout.head_is_stored
    width = base.layout.hidden
    map_ = make.offset(vector(width))
    if kind == "affine":
        map_ = make.affine(vector(width), mean=vector(width, 1), alpha=0.7)
    other = edit(base, "ablate", make.ablate(vector(width, 2)), "embed")  # no part of the head
    edits = [edit(base, kind, map_, "ln_final_out"), other]
    error = written_as(base, edits, tmp_path / "out")
    was = tiny.tensors_of(path)
    bias = {base.layout.unembed.bias.name: was[base.layout.unembed.bias.name]}
    config = tiny.config_of(tmp_path / "out")
    assert error(changed(tmp_path / "out", tmp_path / "left", config, **bias)) > 1e-3
