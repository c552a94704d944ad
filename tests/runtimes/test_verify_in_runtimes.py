"""``bake verify --runtime``: every carrier in the runtimes that load it, against the hooks."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import written
from harness import Base, bake, edit, plan_of, vector
from install import GgufConverter
from tiny import layout_of
from tiny_checkpoints import HIDDEN, SHAPE, randomised, sentencepiece_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from bake import edits as make
from bake.checkpoints import open_checkpoint
from bake.converter import convert
from bake.edit_store import dump_edits
from bake.edits import Edit
from bake.jobs.planned import judged
from bake.verify.report import Report
from bake.verify.runtimes.registry import Runtimes
from bake.verify.served_rows import SERVED
from bake.verify.verification import Verification

pytestmark = pytest.mark.runtimes

PROMISED = 1e-4  # nats, in float32


@pytest.fixture(scope="module")
def runtimes(
    vllm_python: Path, llamacpp_python: Path, gguf_converter: GgufConverter
) -> Callable[..., Runtimes]:
    pythons = {"vllm": vllm_python, "llama.cpp": llamacpp_python, "peft": Path(sys.executable)}

    def named(*names: str) -> Runtimes:
        return Runtimes(names, pythons, gguf_converter.script)

    return named


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A Llama with every bias."""
    return on_disk(
        LlamaForCausalLM(LlamaConfig(**SHAPE, mlp_bias=True)), tmp_path_factory.mktemp("llama")
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A Llama without biases: an adapter has no slot for one."""
    config = LlamaConfig(**{**SHAPE, "attention_bias": False})
    return on_disk(LlamaForCausalLM(config), tmp_path_factory.mktemp("plain"))


def on_disk(model: Any, path: Path) -> Base:
    randomised(model, seed=3).save_pretrained(path)
    (path / "tokenizer.model").write_bytes(sentencepiece_model())
    return Base(path, open_checkpoint(path), model, layout_of(path))


def record(base: Base) -> dict[str, Any]:
    return {"base": {"model": str(base.path)}}


def ablation(base: Base) -> list[Edit]:
    return [edit(base, "ablate", make.ablate(vector(HIDDEN)), ["attn_out.*", "mlp_out.*"])]


def offset(base: Base) -> list[Edit]:
    return [edit(base, "offset", make.offset(vector(HIDDEN)), ["resid_post.1"])]


def check(base: Base, out: Path, asked: Runtimes) -> Report:
    """Every runtime that was asked passes, and keeps what the project promises."""
    report = judged(Verification(out, base=str(base.path), runtimes=asked, generate=0))
    statuses = {entry["runtime"]: entry["status"] for entry in report.runtimes}
    assert statuses == dict.fromkeys(asked.names, "passed"), report.runtimes
    assert report.passed
    assert report.metrics["effect"]["max_dlogprob"] > 1000 * PROMISED
    for entry in report.runtimes:
        assert entry["metrics"]["max_dlogprob"] <= PROMISED
        # The engine without the edit serves the base, and that is not the hooked model.
        name = f"{entry['runtime']}: control: served without the edit, share lost"
        (bare,) = (row for row in report.rows if row.name == name)
        assert bare.passed and bare.value == pytest.approx(1, abs=0.01)
        assert entry["floor"] < bare.limit < 0.1
    return report


def test_a_checkpoint(llama: Base, runtimes: Callable[..., Runtimes], tmp_path: Path) -> None:
    edits: Sequence[Edit] = [
        edit(llama, "ablate", make.ablate(vector(HIDDEN)), "resid"),
        edit(llama, "offset", make.offset(vector(HIDDEN, 1)), "resid_post.1"),
    ]
    out = bake(llama, plan_of(llama, edits), tmp_path / "out")
    check(llama, out, runtimes("vllm", "llama.cpp", "transformers"))


def test_a_recast_checkpoint(runtimes: Callable[..., Runtimes], tmp_path: Path) -> None:
    """A Qwen2 that is declared as a Llama, for a bias that Qwen2 has no slot for."""
    shape = {k: v for k, v in SHAPE.items() if k not in ("head_dim", "attention_bias")}
    base = on_disk(Qwen2ForCausalLM(Qwen2Config(**shape)), tmp_path / "base")
    plan = plan_of(base, offset(base), allow=["recast"])
    assert any(change.key == "architectures" for change in plan.config)
    out = bake(base, plan, tmp_path / "out", allow=frozenset({"recast"}))
    check(base, out, runtimes("vllm"))


def test_a_lora(plain: Base, runtimes: Callable[..., Runtimes], tmp_path: Path) -> None:
    plan = plan_of(plain, ablation(plain))
    out = written("lora", plan, plain.checkpoint, tmp_path / "out", record=record(plain)).path
    check(plain, out, runtimes("vllm", "peft"))


def test_a_gguf(
    llama: Base,
    runtimes: Callable[..., Runtimes],
    gguf_converter: GgufConverter,
    tmp_path: Path,
) -> None:
    base = tmp_path / "base.gguf"
    convert(llama.path, base, converter=gguf_converter.script, python=gguf_converter.python)
    plan = plan_of(llama, ablation(llama))
    out = written(
        "gguf", plan, llama.checkpoint, tmp_path / "out", gguf=base, record=record(llama)
    ).path
    check(llama, out, runtimes("llama.cpp"))


def test_a_gguf_in_half_precision_of_a_base_in_float32(
    llama: Base,
    runtimes: Callable[..., Runtimes],
    gguf_converter: GgufConverter,
    tmp_path: Path,
) -> None:
    """It is held to what half precision costs the hooked model, and a spoiled one fails there."""
    base = tmp_path / "base.gguf"
    convert(llama.path, base, "f16", converter=gguf_converter.script, python=gguf_converter.python)
    edits = ablation(llama)
    for name, sound in (("sound", True), ("spoiled", False)):
        plan = plan_of(llama, edits if sound else [replace(edits[0], sites=edits[0].sites[1:])])
        target = tmp_path / name
        out = written("gguf", plan, llama.checkpoint, target, gguf=base, record=record(llama)).path
        if not sound:  # one writer was forgotten
            (out / "bake" / "edits.safetensors").write_bytes(dump_edits(edits))
        report = judged(Verification(out, base=str(llama.path), runtimes=runtimes("llama.cpp")))
        assert [r["status"] for r in report.runtimes] == ["passed" if sound else "failed"]
        served = next(row for row in report.rows if SERVED in row.name)
        assert served.passed is sound
        # Half precision costs more than float32 may, and what it costs unedited is beside it.
        (entry,) = report.runtimes
        assert entry["metrics"]["max_dlogprob"] > 10 * PROMISED
        assert 1e-8 < entry["floor"] < served.limit


def test_a_gguf_lora(plain: Base, runtimes: Callable[..., Runtimes], tmp_path: Path) -> None:
    plan = plan_of(plain, ablation(plain))
    out = written("gguf-lora", plan, plain.checkpoint, tmp_path / "out", record=record(plain)).path
    check(plain, out, runtimes("llama.cpp"))


def test_a_control_vector(plain: Base, runtimes: Callable[..., Runtimes], tmp_path: Path) -> None:
    plan = plan_of(plain, offset(plain))
    out = written(
        "control-vector", plan, plain.checkpoint, tmp_path / "out", record=record(plain)
    ).path
    check(plain, out, runtimes("llama.cpp"))


def test_a_bake_of_another_edit_fails_in_every_runtime(
    llama: Base, runtimes: Callable[..., Runtimes], tmp_path: Path
) -> None:
    """The control: the runtimes serve what is in the file, and it is not what the hooks do."""
    out = bake(llama, plan_of(llama, ablation(llama)), tmp_path / "out")
    other = [edit(llama, "ablate", make.ablate(vector(HIDDEN, 1)), ["attn_out.*", "mlp_out.*"])]
    (out / "bake" / "edits.safetensors").write_bytes(dump_edits(other))
    asked = runtimes("vllm", "llama.cpp")
    report = judged(Verification(out, base=str(llama.path), runtimes=asked, generate=0))
    assert [entry["status"] for entry in report.runtimes] == ["failed", "failed"]
    assert not report.passed
    assert torch.tensor([row.value for row in report.rows if row.group == "runtime"]).max() > 1e-2
