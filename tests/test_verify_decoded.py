"""What storage loses of an edit and what a runtime adds to it are two numbers, each judged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import tiny
import torch
from exporting import written
from harness import Base, base_at, edit, plan_of, vector
from test_verify import baked
from torch import Tensor

from bake import edits as make
from bake.jobs.planned import judged, planned_of
from bake.jobs.recorded import Source
from bake.verify import collect, moved, runner, serving
from bake.verify.decoded import _weights_of
from bake.verify.inputs import opened
from bake.verify.report import Report
from bake.verify.rows import Row
from bake.verify.runs import Trace
from bake.verify.runtimes.registry import Runtimes
from bake.verify.served_rows import ADDED, SERVED, ServedRun
from bake.verify.target import Target
from bake.verify.verdict import LOST_DECODED
from bake.verify.verification import Verification

PROMPTS = [(3, 4, 5, 6, 7, 8, 9), (9, 3, 5), (11, 2, 7, 7)]
RUNTIMES = Runtimes(("llama.cpp",))
SIZES = {"hidden_size": 64, "intermediate_size": 96}  # whole blocks


@pytest.fixture(autouse=True)
def _runtimes_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No runtime is started here, so that none need be installed."""
    monkeypatch.setattr(Runtimes, "find", lambda self, kind, **options: None)


def by_name(report: Report) -> dict[str, Row]:
    return {row.name: row for row in report.rows}


def decoded(base: Base, file: Path) -> torch.nn.Module:
    """Return the base's model with the weights that a file decodes to, by gguf-py alone."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    config, values, model = tiny.config_of(base.path), gguf_files.values(file), tiny.load(base.path)
    _, before = gguf_files.converted(base.path)
    names = gguf_files.gguf.get_tensor_name_map(gguf_files.ARCH[config["architectures"][0]], 3)
    assert before.keys() <= values.keys()
    for name, parameter in model.named_parameters():
        value = values[gguf_files.named(names, name)]
        for key, count in heads.items():
            if key in name:  # the halves of every head lie interleaved in the file
                split = value.reshape(config[count], -1, 2, *value.shape[1:])
                value = split.swapaxes(1, 2).reshape(value.shape)
        parameter.data.copy_(value)
    return model


@torch.no_grad()
def logprobs(model: torch.nn.Module) -> Tensor:
    rows = [model(torch.tensor([p]), use_cache=False).logits[0] for p in PROMPTS]
    return torch.cat(rows).double().log_softmax(-1)


def mean_kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gpt_neox", "gemma", "phi3"])
def test_a_file_decodes_to_the_checkpoint_and_an_edited_one_to_the_plan(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """In float32, whatever order and names the file has: rows of heads, stacks, 1 + weight."""
    tied = {"tied": True} if family == "llama" else {}
    base = base_at(tiny_checkpoint(family, dtype=torch.float32, **tied))
    file = gguf_files.write(tmp_path / "base.gguf", base.path, "F32")
    at = "attn_out.*" if family == "gemma" else "resid"  # llama.cpp's Gemma has no head of its own
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), at)]
    plan, record = plan_of(base, edits), {"base": {"model": str(base.path)}}
    out = written("gguf", plan, base.checkpoint, tmp_path / "out", record=record, gguf=file).path
    asked = Verification(out, base=str(base.path), gguf=file, runtimes=RUNTIMES)
    planned = planned_of(Source(out, str(out), published=False), asked)
    with opened(asked, planned) as inputs:
        weights = _weights_of(inputs)
        assert weights is not None
        before, after = weights.values(edited=False), weights.values(edited=True)
        tensors = planned.model.tensors
        assert base.checkpoint.tensors.keys() | tensors.keys() == before.keys() == after.keys()
        for name in base.checkpoint.tensors:
            assert torch.allclose(before[name](), base.checkpoint.read(name).double(), atol=1e-6)
        changed = [n for n, t in tensors.items() if not torch.allclose(after[n](), before[n]())]
        assert len(changed) >= base.layout.layers
        for name, tensor in tensors.items():
            assert torch.allclose(after[name](), tensor.value(), atol=1e-5), name


@pytest.mark.parametrize(
    ("kind", "carrier"), [("Q8_0", "gguf"), ("Q4_1", "gguf"), ("Q4_1", "gguf-lora")]
)
def test_storage_and_runtime_are_told_apart(
    kind: str,
    carrier: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = base_at(
        tiny_checkpoint("llama", dtype=torch.float64, attention_bias=False, mlp_bias=False, **SIZES)
    )
    file = gguf_files.write(tmp_path / "base.gguf", base.path, kind)
    direction = vector(64)
    edits = [edit(base, "ablate", make.ablate(direction), ["attn_out.*"])]
    record = {"base": {"model": str(base.path)}}
    options: dict[str, Any] = {} if carrier == "gguf-lora" else {"gguf_type": "keep"}
    out = written(
        carrier, plan_of(base, edits), base.checkpoint, tmp_path / "out", record=record,
        gguf=file, **options,
    ).path  # fmt: skip

    plain = decoded(base, file)
    bare, unit = logprobs(plain), direction / direction.norm()
    for block in plain.model.layers:
        block.self_attn.o_proj.register_forward_hook(
            lambda module, args, out: out - (out @ unit)[..., None] * unit
        )
    meant = logprobs(plain)
    stored = meant if carrier == "gguf-lora" else logprobs(decoded(base, next(out.glob("*.gguf"))))
    effect = mean_kl(meant, bare)
    noise = 1.0

    def run(name: str, asked: Runtimes, target: Target, unedited: int) -> ServedRun:
        """Serve what the file decodes to, and of what the edit does there some or more too much."""
        served = stored + noise * (meant - bare)
        return ServedRun("0", {}, target.greedy.tokens, served, bare[: len(PROMPTS[0])], 1)

    monkeypatch.setattr(serving, "_run", run)
    asked = Verification(
        out, base=str(base.path), gguf=file, prompts=PROMPTS, generate=0, runtimes=RUNTIMES
    )
    noise = 0.0
    found = by_name(judged(asked))
    lost, added = found[LOST_DECODED], found[f"llama.cpp: {ADDED}"]
    assert lost.value == pytest.approx(mean_kl(meant, stored) / effect, rel=1e-3, abs=1e-9)
    assert lost.passed is (kind == "Q8_0" or carrier == "gguf-lora"), lost
    assert 0 <= added.value < 1e-6 and added.passed
    assert found["llama.cpp: control: served without the edit, share added"].passed
    # The control: a runtime that changes the same file fails by itself, whatever was stored.
    noise = 0.5
    worse = by_name(judged(asked))
    assert worse[LOST_DECODED].value == lost.value
    assert worse[f"llama.cpp: {ADDED}"].passed is False


@pytest.mark.parametrize(("times", "further"), [(0.5, False), (2.0, True), (1e4, False)])
def test_a_floor_is_drawn_further_where_it_decides_of_a_runtime_too(
    times: float,
    further: bool,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where three draws allow less than is lost, and no more is lost than may be at all."""
    base = base_at(tiny_checkpoint("llama", dtype=torch.bfloat16))
    out = baked(base, tmp_path / "out")
    drawn, served = list[int](), list[int]()

    def counted(run: runner.Runner, number: int) -> Trace:
        drawn.append(number)
        return moved.moved(run, number)

    def run(name: str, asked: Runtimes, target: Target, unedited: int) -> ServedRun:
        served.append(unedited)
        share = times * 3 * target.limits.floor.over(target.effect)
        step = target.base - target.hooked
        unit = target.loss(target.hooked + 1e-3 * step).over(target.effect) / 1e-6
        answer = target.hooked + (share / unit) ** 0.5 * step
        few = target.first(min(unedited, len(target.prompts)))
        return ServedRun("0", {}, target.greedy.tokens, answer, few.base, len(few.prompts))

    monkeypatch.setattr(collect, "moved", counted)
    monkeypatch.setattr(serving, "_run", run)
    runtimes = Runtimes(("transformers",))
    asked = Verification(out, base=str(base.path), prompts=PROMPTS, generate=0, runtimes=runtimes)
    found = by_name(judged(asked))[f"transformers: {SERVED}"]
    assert drawn == list(range(12 if further else 3))
    assert served == ([serving.UNEDITED, len(PROMPTS)] if further else [serving.UNEDITED])
    if not further:
        assert found.passed is (times < 1)
