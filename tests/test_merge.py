"""A merged checkpoint computes what base and adapter compute in PEFT, for every kind of adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import (
    NO_BIAS,
    factors_of,
    logits_of,
    peft_logits,
    peft_model,
    peft_warnings,
    rewritten,
)
from exporting import written
from harness import RELATIVE, Base, base_at, edit, logits, plan_of, vector
from safetensors.torch import load_file

from bake import edits as make
from bake.checkpoints import open_checkpoint
from bake.errors import BakeError, InputError, UsageError
from bake.merge import limits
from bake.merge.merge import merge_adapter

Checkpoints = Callable[..., Path]


def trained(base: Base, out: Path, **options: Any) -> Path:
    """Write an adapter as PEFT does after a training that left random factors and biases."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **options}
    generator = torch.Generator().manual_seed(1)
    with peft_warnings():
        model = get_peft_model(
            tiny.load(base.path), LoraConfig(**options), autocast_adapter_dtype=False
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(0.2 * noise)
        model.save_pretrained(out, save_embedding_layers=False)
    return out


FUSED = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}),
    "every layer": ("llama", {}, {"target_modules": "all-linear"}),
    "rank-stabilised": ("llama", {}, {"use_rslora": True}),
    "patterns": (
        "llama",
        {},
        {"rank_pattern": {r"layers\.1\.self_attn.q_proj": 5}, "alpha_pattern": {"down_proj": 2}},
    ),
    "biases of all layers": ("llama", {}, {"bias": "all"}),
    "biases of its layers": ("llama", {}, {"bias": "lora_only"}),
    "biases of B": ("llama", {}, {"lora_bias": True}),
    "embedding": ("llama", {}, {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding and head": ("llama", {}, {"target_modules": ["embed_tokens", "lm_head"]}),
    "a saved head": ("llama", {}, {"modules_to_save": ["lm_head"]}),
    "a saved norm": ("llama", {}, {"modules_to_save": ["input_layernorm"]}),
    "a tied embedding": ("llama", {"tied": True}, {"target_modules": ["embed_tokens"]}),
    "a tied head": ("llama", {"tied": True}, {"target_modules": ["lm_head", "q_proj"]}),
    "beside a tied head": ("llama", {"tied": True}, {"target_modules": ["q_proj"]}),
    "both of a tied pair": (
        "llama",
        {"tied": True},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ),
    "stored the other way": (
        "gpt2",
        {},
        {"target_modules": ["c_attn", "c_proj", "wpe"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "a head of another name": (
        "gpt_neox",
        {},
        {"target_modules": ["query_key_value", "lm_head", "embed_in"]},
    ),
    "a scaled embedding": ("gemma", {"tied": False}, {"target_modules": ["embed_tokens"]}),
    "fused rows": ("phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "beside experts": ("mixtral", {}, {"target_modules": ["o_proj"]}),
    "fused experts, stored one by one": ("mixtral", {}, FUSED),
    "DoRA": ("llama", {}, {"use_dora": True}),
    "DoRA, stored the other way": (
        "gpt2",
        {},
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True},
    ),
    "DoRA on an embedding": (
        "llama",
        {},
        {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True},
    ),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
# PEFT takes the bias of B for a matrix that lost an axis.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 6 LoRA tensor")
@pytest.mark.parametrize("kind", KINDS)
def test_merge_equals_the_adapter_at_work(
    kind: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    family, config, options = KINDS[kind]
    base = base_at(tiny_checkpoint(family, **config))
    adapter = trained(base, tmp_path / "adapter", **options)
    done: list[tuple[int, int]] = []
    artifact = merge_adapter(
        adapter,
        base.checkpoint,
        tmp_path / "merged",
        progress=lambda part, whole: done.append((part, whole)),
    )
    running = peft_logits(base, adapter)
    effect = float((running - logits(base.model, base)).abs().max())
    assert effect > 1e-2
    merged = logits(tiny.load(artifact.path), base)
    assert float((merged - running).abs().max()) <= RELATIVE * effect
    assert done[-1][0] == done[-1][1]
    if "tied" not in kind or kind == "beside a tied head":
        with peft_warnings():
            theirs = logits_of(peft_model(base.path, adapter).merge_and_unload())
        assert float((merged - theirs).abs().max()) <= RELATIVE * effect
        assert tiny.config_of(artifact.path) == tiny.config_of(base.path)
    else:
        assert tiny.config_of(artifact.path)["tie_word_embeddings"] is False


def test_untouched_tensors_keep_their_bytes(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    adapter = trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    out = merge_adapter(adapter, base.checkpoint, tmp_path / "out").path
    merged = open_checkpoint(out)
    changed = {
        name
        for name in base.checkpoint.tensors
        if merged.tensor_digest(name) != base.checkpoint.tensor_digest(name)
    }
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)}
    assert (out / "config.json").read_bytes() == (base.path / "config.json").read_bytes()
    record = json.loads((out / "bake.json").read_text())
    assert record["kind"] == "merge" and record["adapter"]["config"]["r"] == 3


def test_half_precision_is_rounded_once(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.bfloat16))
    adapter = trained(base, tmp_path / "adapter")
    out = merge_adapter(adapter, base.checkpoint, tmp_path / "out").path
    name = "model.layers.1.self_attn.q_proj"
    factors = factors_of(adapter)
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    exact = base.checkpoint.read(f"{name}.weight").double() + 5 / 3 * b @ a
    found = load_file(out / "model.safetensors")[f"{name}.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))


def test_tiles(
    tiny_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_at(tiny_checkpoint("gpt2"))
    options = {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}
    adapter = trained(base, tmp_path / "adapter", **options)
    whole = merge_adapter(adapter, base.checkpoint, tmp_path / "whole")
    monkeypatch.setattr("bake.tiles.TILE_VALUES", 100)
    tiled = merge_adapter(adapter, base.checkpoint, tmp_path / "tiled")
    one, two = tiny.tensors_of(whole.path), tiny.tensors_of(tiled.path)
    assert set(one) == set(two) and "lm_head.weight" in one
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=0, atol=1e-13)


def test_an_exported_adapter_merges_to_the_hooked_model(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Also a mixture's, whose experts have names of their own in the checkpoint."""
    cases = {
        "llama": {**NO_BIAS, "tied": True},
        "mixtral": {},
        "gemma": {"attention_bias": False},
    }
    for family, options in cases.items():
        base = base_at(tiny_checkpoint(family, **options))
        edits = [edit(base, "affine", make.affine(vector(24), alpha=0.7), "resid")]
        plan = plan_of(base, edits)
        adapter = written("lora", plan, base.checkpoint, tmp_path / f"{family}-lora").path
        out = tmp_path / family
        merge_adapter(adapter, base.checkpoint, out)
        hooked = logits(base.model, base, edits)
        effect = float((hooked - logits(base.model, base)).abs().max())
        assert effect > 1e-2
        assert float((logits(tiny.load(out), base) - hooked).abs().max()) <= RELATIVE * effect


def test_what_no_class_says(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A table is not needed; a class that transformers has is, and that of both names."""
    base = base_at(tiny_checkpoint("llama"))
    adapter = trained(base, tmp_path / "adapter")
    wrong: dict[str, dict[str, Any]] = {
        "has no class StrangeForCausalLM": {"architectures": ["StrangeForCausalLM"]},
        "names no single class": {"architectures": None},
        "model_type = 'gpt2' is not its type": {"model_type": "gpt2"},
        "num_hidden_layers = 2147483648": {"num_hidden_layers": 2**31},
        "far more tensors than the checkpoint": {"num_hidden_layers": 9000},
    }
    for number, (message, changes) in enumerate(wrong.items()):
        strange = tmp_path / str(number)
        shutil.copytree(base.path, strange)
        config = {**tiny.config_of(strange), **changes}
        (strange / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            merge_adapter(adapter, open_checkpoint(strange), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    # The control: a key that no class reads changes nothing.
    harmless = tmp_path / "harmless"
    shutil.copytree(base.path, harmless)
    config = {**tiny.config_of(harmless), "some_new_key": 3}
    (harmless / "config.json").write_text(json.dumps(config))
    out = merge_adapter(adapter, open_checkpoint(harmless), tmp_path / "out").path
    assert float((logits(tiny.load(out), base) - peft_logits(base, adapter)).abs().max()) < RELATIVE


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "DoRA without its lengths": (
        "llama",
        {},
        {"use_dora": True},
        "asks for .*lora_magnitude_vector.*, and the file lacks it",
    ),
    "another LoRA": ("llama", {}, {"alora_invocation_tokens": [1]}, "with alora_invocation_tokens"),
    "a module more": (
        "llama",
        {},
        {"target_modules": ["q_proj", "down_proj", "k_proj"]},
        r"asks for .*k_proj\.lora_A\.weight, and the file lacks it",
    ),
    "a module less": ("llama", {}, {"target_modules": ["q_proj"]}, "would not load .*down_proj"),
    "a layer less": ("llama", {}, {"layers_to_transform": [0, 1]}, r"would not load .*layers\.2"),
    "an excluded module": ("llama", {}, {"exclude_modules": ["q_proj"]}, "would not load .*q_proj"),
    "no modules": ("llama", {}, {"target_modules": ["nothing"]}, "does not take this adapter up"),
    "a list of numbers": ("llama", {}, {"modules_to_save": [5]}, "is no list"),
    "a number for a list": ("llama", {}, {"modules_to_save": 5}, "modules_to_save = 5 is no list"),
    "no text": (
        "llama",
        {},
        {"base_model_name_or_path": "\ud800"},
        "is no Unicode text",
    ),
    "without end": (
        "llama",
        {},
        {"rank_pattern": {"(([a-z0-9_.])+)+!": 4}},
        "take more than 1 seconds",  # of the ten that a user waits, which the test shortens
    ),
    "another method": ("llama", {}, {"peft_type": "IA3"}, "of type 'IA3', and only LORA"),
    "an initialisation that changes the base": (
        "llama",
        {},
        {"init_lora_weights": "pissa"},
        "init_lora_weights = 'pissa' cannot be merged",
    ),
    "a key of the future": ("llama", {}, {"use_xlora": True}, "does not know the key 'use_xlora'"),
    "another rank": ("llama", {}, {"r": 4}, "base and configuration make it"),
    "no rank": ("llama", {}, {"r": "three"}, "r = 'three' is no int"),
    "a broken pattern": ("llama", {}, {"rank_pattern": {"(": 3}}, "is no regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(
    case: str, tiny_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_SECONDS", 1.0 if case == "without end" else limits._SECONDS)
    family, options, changes, message = REFUSED[case]
    base = base_at(tiny_checkpoint(family))
    adapter = trained(base, tmp_path / "adapter", **options)
    changed = rewritten(adapter, tmp_path / "changed", factors_of(adapter), **changes)
    with pytest.raises(InputError, match=message):
        merge_adapter(changed, base.checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


PREFIX = "base_model.model.model.layers.1"


def test_every_tensor_must_be_consumed(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    adapter = trained(base, tmp_path / "adapter")
    tensors = factors_of(adapter)
    left = f"{PREFIX}.self_attn.q_proj.lora_B.weight"
    nowhere = f"{PREFIX}.self_attn.qq_proj"
    extra: list[tuple[dict[str, torch.Tensor | None], str, type[BakeError]]] = [
        ({"model.layers.0.x": torch.ones(2)}, "would not load model.layers.0.x", InputError),
        ({f"{left}_scale": torch.ones(2)}, "not load .*B.weight_scale", InputError),
        ({f"{PREFIX}.mlp.down_proj.lora_magnitude_vector": torch.ones(2)}, "not load", InputError),
        ({left: None}, r"asks for .*q_proj\.lora_B\.weight, and the file lacks it", InputError),
        (
            {
                f"{nowhere}.lora_A.weight": torch.ones(3, 24),
                f"{nowhere}.lora_B.weight": torch.ones(24, 3),
            },
            r"would not load .*qq_proj\.lora_A\.weight",
            InputError,
        ),
        ({left: torch.ones(24, 3)}, r"has the shape \[24, 3\]", InputError),
        ({left: torch.full((32, 3), torch.nan)}, "holds NaN or infinity", InputError),
        (
            {left: torch.full((32, 3), 1e300, dtype=torch.float64)},
            "NaN or inf|does not fit",
            InputError,
        ),
    ]
    for number, (changes, message, kind) in enumerate(extra):
        changed = {k: v for k, v in (tensors | changes).items() if v is not None}
        path = rewritten(adapter, tmp_path / str(number), changed)
        if number == len(extra) - 1:
            changed[left.replace("_B", "_A")] = torch.full((3, 24), 1e300, dtype=torch.float64)
            shutil.rmtree(path)
            path = rewritten(adapter, tmp_path / str(number), changed)
        with pytest.raises(kind, match=message):
            merge_adapter(path, base.checkpoint, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    # The control: as it was, it merges.
    assert merge_adapter(adapter, base.checkpoint, tmp_path / "out")


def test_a_bias_that_has_no_place(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("mistral"))
    adapter = trained(base, tmp_path / "adapter")
    tensors = factors_of(adapter)
    tensors[f"{PREFIX}.mlp.down_proj.lora_B.bias"] = torch.ones(24)
    changed = rewritten(adapter, tmp_path / "changed", tensors, lora_bias=True)
    with pytest.raises(InputError, match=r"adds a bias to .*q_proj, which has none"):
        merge_adapter(changed, base.checkpoint, tmp_path / "out")


def test_copies_of_the_base(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """PEFT saves an embedding beside its factors, and loads that in the place of the base's."""
    base = base_at(tiny_checkpoint("llama"))
    adapter = trained(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    tensors = factors_of(adapter)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    before = None
    for change in (0.0, 0.1):
        tensors[name] = base.checkpoint.read("model.embed_tokens.weight") + change
        other = rewritten(adapter, tmp_path / f"other{change}", tensors)
        out = merge_adapter(other, base.checkpoint, tmp_path / f"out{change}").path
        running = peft_logits(base, other)
        assert float((logits(tiny.load(out), base) - running).abs().max()) <= RELATIVE
        assert before is None or float((running - before).abs().max()) > 1e-2
        before = running
    tensors[name] = torch.ones(60, 24)
    resized = rewritten(adapter, tmp_path / "resized", tensors)
    with pytest.raises(InputError, match=r"has the shape \[60, 24\]") as caught:
        merge_adapter(resized, base.checkpoint, tmp_path / "no")
    assert "resize_token_embeddings(60)" in str(caught.value.fix)


def test_a_tensor_of_the_base_in_the_file(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """PEFT loads what has a parameter's name over it, though no key of its config says so."""
    base = base_at(tiny_checkpoint("llama"))
    adapter = trained(base, tmp_path / "adapter")
    tensors = factors_of(adapter)
    without = peft_logits(base, adapter)
    for number, (name, size) in enumerate(
        (("input_layernorm.weight", 24), ("mlp.up_proj.bias", 40))
    ):
        more = tensors | {f"{PREFIX}.{name}": torch.full((size,), 0.7)}
        path = rewritten(adapter, tmp_path / str(number), more)
        out = merge_adapter(path, base.checkpoint, tmp_path / f"out{number}").path
        running = peft_logits(base, path)
        assert float((running - without).abs().max()) > 1e-2
        assert float((logits(tiny.load(out), base) - running).abs().max()) <= RELATIVE


def test_what_is_no_adapter(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    with pytest.raises(InputError, match="this is no PEFT adapter"):
        merge_adapter(tmp_path, base.checkpoint, tmp_path / "out")
    adapter = trained(base, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="is a pickle, which can run code"):
        merge_adapter(adapter, base.checkpoint, tmp_path / "out")
    (adapter / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match="cannot be read"):
        merge_adapter(adapter, base.checkpoint, tmp_path / "out")
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(BakeError, match=r"adapter_config\.json"):
        merge_adapter(adapter, base.checkpoint, tmp_path / "out")


def test_an_output_over_the_base(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    adapter = trained(base, tmp_path / "adapter")
    with pytest.raises(UsageError, match="overlap"):
        merge_adapter(adapter, base.checkpoint, base.path / "out")
