"""Adapters and bases as people have them: kinds of which a merge once got an instance wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import peft_warnings
from click.testing import CliRunner
from peft_samples import ARCHITECTURES, TOKENS, Base, base_of, load, logits_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake.checkpoints import open_checkpoint
from bake.cli import main
from bake.errors import InputError
from bake.jobs.planned import judged
from bake.merge.merge import merge_adapter
from bake.verify.verification import Verification

Tensors = dict[str, Tensor]
# What PEFT and transformers say of ties, axes and keys is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")


def make(base: Base, out: Path, model: Any = None, save: Any = "auto", **options: Any) -> Path:
    """Write an adapter as PEFT does after a training that left random values."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 3, "lora_alpha": 5, **options}
    generator = torch.Generator().manual_seed(3)
    with peft_warnings():
        wrapped = get_peft_model(model or load(base.path), LoraConfig(**options))
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        wrapped.save_pretrained(out, save_embedding_layers=save)
    return out


def running(base: Base, adapter: Path) -> Tensor:
    """Return the logits of PEFT with the adapter at work."""
    from peft import PeftModel

    with peft_warnings():
        wrapped = PeftModel.from_pretrained(
            load(base.path), str(adapter), autocast_adapter_dtype=False
        )
    return logits_of(wrapped.eval())


def check(base: Base, adapter: Path, out: Path, path: Path | None = None) -> Path:
    """Require that a merge computes what PEFT does, and that this is not the base."""
    merge_adapter(adapter, open_checkpoint(path or base.path), out)
    want = running(base, adapter)
    effect = float((want - base.logits).abs().max())
    assert effect > 1e-2
    assert float((logits_of(load(out)) - want).abs().max()) <= 1e-5 * effect
    return out


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "bases"


SAVED: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "a parent": ("llama", False, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "a parent of another name": (
        "gpt_neox",
        False,
        {"target_modules": ["dense_h_to_4h"], "modules_to_save": ["attention"]},
    ),
    "one layer": ("llama", False, {"target_modules": ["v_proj"], "modules_to_save": ["layers.1"]}),
    "an end": ("llama", False, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "an end of many": ("bloom", False, {"target_modules": ["dense"], "modules_to_save": ["norm"]}),
    "a piece of a name": ("gpt2", True, {"target_modules": ["c_fc"], "modules_to_save": ["_1"]}),
    "a tied embedding, tied": (
        "llama",
        True,
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "a tied embedding": (
        "llama",
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "a tied head": ("gpt2", True, {"target_modules": ["c_fc"], "modules_to_save": ["lm_head"]}),
    "factors of both, tied": (
        "llama",
        True,
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "factors of one, whose name PEFT does not tie": (
        "bloom",
        True,
        {"target_modules": ["word_embeddings"], "ensure_weight_tying": True},
    ),
    "factors of one, of another name": ("mamba", True, {"target_modules": ["embeddings"]}),
}


@pytest.mark.parametrize("case", SAVED)
def test_saved_and_tied_modules(case: str, folder: Path, tmp_path: Path) -> None:
    architecture, tied, options = SAVED[case]
    base = base_of(architecture, tied, "plain", folder)
    out = check(base, make(base, tmp_path / "a", **options), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    names = load_file(out / "model.safetensors") if (out / "model.safetensors").exists() else {}
    if case.endswith(", tied"):
        assert config["tie_word_embeddings"] is True and "lm_head.weight" not in names
    elif tied and case != "a piece of a name":
        assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("falcon", True)])
@pytest.mark.parametrize("table", [False, True])
def test_embeddings_saved_whole(
    architecture: str, tied: bool, table: bool, folder: Path, tmp_path: Path
) -> None:
    """``save_embedding_layers`` stores embedding and head, which PEFT loads over the base's."""
    base = base_of(architecture, tied, "plain", folder)
    model = load(base.path)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    names = {"llama": ("q_proj", "embed_tokens"), "falcon": ("dense", "word_embeddings")}
    targets = list(names[architecture][: 1 + table])
    adapter = make(base, tmp_path / "a", model, True, target_modules=targets)
    check(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("layout", ["both stored", "under the head", "without the prefix"])
@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "opt"])
def test_a_tied_pair_in_other_files(
    architecture: str, layout: str, folder: Path, tmp_path: Path
) -> None:
    base = base_of(architecture, True, layout, folder)
    name = {"gpt2": "c_fc", "bloom": "dense_h_to_4h", "opt": "fc1"}[architecture]
    check(base, make(base, tmp_path / "a", target_modules=[name]), tmp_path / "one")
    tables = {"gpt2": "wte", "bloom": "word_embeddings", "opt": "embed_tokens"}
    options = {"target_modules": [tables[architecture]]}
    check(base, make(base, tmp_path / "b", **options), tmp_path / "two")


def test_a_base_whose_prefix_is_another_one_on_disk(tmp_path: Path) -> None:
    """transformers stores ``language_model.model``, and runs ``model.language_model``."""
    from transformers import Gemma3Config
    from transformers import Gemma3ForConditionalGeneration as Model

    text = {**ARCHITECTURES["gemma3_text"], "vocab_size": 64}
    del text["model_type"]
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    model = Model(config).double().eval()
    model.save_pretrained(tmp_path / "base")
    stored = open_checkpoint(tmp_path / "base").tensors
    # Otherwise it would prove nothing.
    assert not {name for name in stored if "language_model" in name} & {
        name for name, _ in model.named_parameters()
    }
    base = Base(tmp_path / "base", model, logits_of(model))
    for number, targets in enumerate((["q_proj"], r".*tower.*fc1|.*layers\.1\.mlp\.up_proj")):
        fresh = Model.from_pretrained(base.path).double()
        adapter = make(base, tmp_path / f"a{number}", fresh, target_modules=targets)
        out = tmp_path / f"out{number}"
        merge_adapter(adapter, open_checkpoint(base.path), out)
        from peft import PeftModel

        with peft_warnings():
            live_model = Model.from_pretrained(base.path).double()
            want = logits_of(PeftModel.from_pretrained(live_model, str(adapter)).eval())
        effect = float((want - base.logits).abs().max())
        found = logits_of(Model.from_pretrained(out).double().eval())
        assert effect > 1e-4 and float((found - want).abs().max()) <= 1e-5 * effect
    # Its class is none of the causal ones, and the adapter is verified all the same.
    for streamed in (False, True):
        asked = Verification(tmp_path / "out0", streamed=streamed, generate=0)
        report = judged(asked)
        # Its towers have blocks too, which no text runs through.
        assert report.passed and len(report.layers["sites"]) == 3
        assert report.layers["effect"][-1] > 1e-3
    file = tmp_path / "out0" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight"))
    save_file({**tensors, name: -tensors[name]}, file, metadata={"format": "pt"})
    assert not judged(asked).passed


@pytest.mark.parametrize(
    "key", [{"enable_lora": None}, {"merge_weights": False}, {"a_future": []}, {"bias": "none"}]
)
def test_keys_that_ask_for_nothing(key: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    base = base_of("llama", False, "plain", folder)
    adapter = make(base, tmp_path / "a", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **key}))
    check(base, adapter, tmp_path / "out")
    asking = {name: True for name in key if name != "bias"} or {"a_future": 1}
    path.write_text(json.dumps({**json.loads(path.read_text()), **asking}))
    with pytest.raises(InputError, match="does not know the key"):
        merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "no")


def test_a_saved_module_that_is_stored_twice(folder: Path, tmp_path: Path) -> None:
    """What stands in for nothing changes nothing; a second one that differs is refused."""
    base = base_of("llama", False, "plain", folder)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapter = make(base, tmp_path / "a", **options)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    head = "base_model.model.lm_head"
    tensors[f"{head}.original_module.weight"] = tensors[f"{head}.weight"] + 1
    tensors[f"{head}.modules_to_save.weight"] = tensors[f"{head}.weight"].clone()
    save_file(tensors, file)
    check(base, adapter, tmp_path / "out")
    tensors[f"{head}.modules_to_save.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"would not load .*lm_head\.modules_to_save\.weight"):
        merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "no")


def fp8(name: str, weight: Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.view(1, 1)}


def int8(name: str, weight: Tensor) -> Tensors:
    scale = weight.abs().max() / 127
    return {name: (weight / scale).to(torch.int8), name.replace("weight", "SCB"): scale.view(1)}


def gptq(name: str, weight: Tensor) -> Tensors:
    stem = name.removesuffix("weight")
    codes = torch.zeros(2, weight.shape[0], dtype=torch.int32)
    return {
        f"{stem}qweight": codes,
        f"{stem}scales": torch.ones(1, 4),
        f"{stem}qzeros": codes.clone(),
    }


def kept(name: str, weight: Tensor) -> Tensors:
    """Return weights in a float type whose scale lies beside them."""
    return {name: weight.to(torch.bfloat16), f"{name}_scale": torch.full((1,), 2.0)}


@pytest.mark.parametrize("quantise", [fp8, int8, gptq, kept])
def test_a_quantised_base(
    quantise: Callable[[str, Tensor], Tensors], folder: Path, tmp_path: Path
) -> None:
    base = base_of("llama", False, "plain", folder)
    path = tmp_path / "base"
    shutil.copytree(base.path, path)
    tensors: Tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        tensors |= quantise(name, tensor) if "mlp" in name else {name: tensor}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "some"}
    (path / "config.json").write_text(json.dumps(config))
    codes = make(base, tmp_path / "codes", target_modules=["q_proj", "up_proj"])
    with pytest.raises(InputError, match=r"up_proj\.weight") as caught:
        merge_adapter(codes, open_checkpoint(path), tmp_path / "no")
    assert "the base is quantised" in str(caught.value) and not (tmp_path / "no").exists()
    # The layers beside the codes hold weights, which may be merged.
    plain = make(base, tmp_path / "plain", target_modules=["q_proj"])
    out = merge_adapter(plain, open_checkpoint(path), tmp_path / "out").path
    name = "model.layers.0.self_attn.q_proj"
    factors = load_file(plain / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    found = load_file(out / "model.safetensors")
    exact = tensors[f"{name}.weight"].double() + 5 / 3 * b @ a
    assert torch.equal(found[f"{name}.weight"], exact.float())
    untouched = [key for key in tensors if "q_proj" not in key]
    assert all(torch.equal(found[key].float(), tensors[key].float()) for key in untouched)


@pytest.mark.parametrize(
    ("architecture", "module", "reader"),
    [("mamba", "dt_proj", "MambaMixer"), ("opt", "embed_positions", "OPTLearnedPositional")],
)
def test_a_weight_that_its_layer_does_not_read_alone(
    architecture: str, module: str, reader: str, folder: Path, tmp_path: Path
) -> None:
    base = base_of(architecture, True, "plain", folder)
    adapter = make(base, tmp_path / "a", target_modules=[module])
    with pytest.raises(InputError, match=reader):
        merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "no")
    # The controls: PEFT computes something else there, and a neighbour of it is merged.
    if architecture == "mamba":
        assert float((running(base, adapter) - base.logits).abs().max()) < 1e-12
    other = {"mamba": "x_proj", "opt": "fc2"}[architecture]
    check(base, make(base, tmp_path / "b", target_modules=[other]), tmp_path / "out")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base(
    init: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, with a command after which it is none; its result is merged to what was trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base_of("llama", False, "plain", folder)
    single = AutoModelForCausalLM.from_pretrained(base.path)
    adapter = make(base, tmp_path / "a", single, target_modules=["q_proj"], init_lora_weights=init)
    with pytest.raises(InputError, match="cannot be merged") as caught:
        merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "no")
    command = str(caught.value.fix)
    code = command.removeprefix('python -c "').removesuffix('"')
    monkeypatch.chdir(tmp_path)
    named = code.replace("'BASE'", repr(str(base.path))).replace("'ADAPTER'", repr(str(adapter)))
    with peft_warnings():
        exec(named, {})
        fresh = AutoModelForCausalLM.from_pretrained(base.path)
        want = logits_of(PeftModel.from_pretrained(fresh, str(adapter)).eval())
    merge_adapter(tmp_path / "converted", open_checkpoint(base.path), tmp_path / "out")
    effect = float((want - base.logits).abs().max())
    single_precision = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    error = float((logits_of(single_precision) - want).abs().max())
    assert effect > 1e-2 and error <= 1e-4 * effect


@pytest.mark.parametrize("init", ["lora_ga", "corda", "loftq", "pissa_niter_4"])
def test_an_initialisation_that_the_base_does_not_tell(
    init: str, folder: Path, tmp_path: Path
) -> None:
    base = base_of("llama", False, "plain", folder)
    adapter = make(base, tmp_path / "a", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    with pytest.raises(InputError, match="cannot be merged") as caught:
        merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "no")
    assert "where it was trained" in str(caught.value) or "quantised base" in str(caught.value)


def invoke(*arguments: object) -> str:
    found = CliRunner(env={"COLUMNS": "400"}).invoke(main, list(map(str, arguments)))
    assert found.exit_code == 0, found.output
    return found.output


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json"]
)
def test_what_lies_beside_an_adapter(name: str, folder: Path, tmp_path: Path) -> None:
    base = base_of("llama", False, "plain", folder)
    path = tmp_path / "base"
    shutil.copytree(base.path, path)
    (path / name).write_text('{"a": 1}')
    adapter = make(base, tmp_path / "a", target_modules=["q_proj"])
    (adapter / name).write_text('{"a": 1}')
    said = invoke("merge", adapter, path, "--out", tmp_path / "same")
    assert name not in said
    (adapter / name).write_text('{"a": 2}')
    said = invoke("merge", adapter, path, "--out", tmp_path / "base_s")
    assert f"the adapter's own {name} stay behind" in said
    assert (tmp_path / "base_s" / name).read_text() == '{"a": 1}'
    said = invoke("merge", adapter, path, "--out", tmp_path / "own", "--tokenizer", "adapter")
    assert name not in said
    assert (tmp_path / "own" / name).read_text() == '{"a": 2}'


@pytest.mark.parametrize("layout", ["sharded", "plain"])
def test_weights_that_no_index_names(layout: str, folder: Path, tmp_path: Path) -> None:
    base = base_of("llama", False, layout, folder)
    path = tmp_path / "base"
    shutil.copytree(base.path, path)
    adapter = make(base, tmp_path / "a", target_modules=["q_proj"])
    said = invoke("merge", adapter, path, "--out", tmp_path / "without")
    assert "stay behind" not in said
    save_file({"mtp.fc.weight": torch.ones(4, 4)}, path / "model-mtp.safetensors")
    said = invoke("merge", adapter, path, "--out", tmp_path / "out")
    assert "model-mtp.safetensors of the base stay behind" in said


def test_a_regular_expression_names_whole_paths(folder: Path, tmp_path: Path) -> None:
    """Of a text all has to match, of a list the end: what matches nothing more is refused."""
    base = base_of("llama", False, "plain", folder)
    adapter = make(base, tmp_path / "a", target_modules=["q_proj", "k_proj"])
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for targets, merged in (
        (r".*\.(q|k)_proj", True),
        (r"model\.layers\.\d\.self_attn\.[qk]_proj", True),
        (r"[qk]_proj", False),
        (r".*\.q_proj", False),
    ):
        path.write_text(json.dumps({**config, "target_modules": targets}))
        if merged:
            check(base, adapter, tmp_path / f"out{len(targets)}")
            continue
        with pytest.raises(InputError, match=r"does not take this adapter up|would not load"):
            merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "no")


def test_the_tokens_of_the_tests_are_words() -> None:
    assert int(TOKENS.max()) < ARCHITECTURES["llama"]["vocab_size"]
