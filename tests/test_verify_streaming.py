"""Verification with one block in memory at a time: the same numbers, in the memory of a block."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from harness import bake, base_at, edit, plan_of, vector
from test_merge import trained
from test_verify import baked, row

from bake import edits as make
from bake.checkpoints import open_checkpoint
from bake.errors import InputError
from bake.jobs.planned import judged
from bake.merge.merge import merge_adapter
from bake.sites import Site, SiteKind
from bake.verify.models import layout_of, load
from bake.verify.observe import block_sites
from bake.verify.runs import batches_of, halves, run
from bake.verify.units import blocks_of, units_of
from bake.verify.verification import Verification

PROMPTS = ((5, 6, 7, 8), (9,) * 12, tuple(range(20)), (3,))


@pytest.mark.parametrize("family", ["opt", "llama4", "falcon_h1", "granitemoeshared"])
def test_what_writers_add_is_the_stream(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """Writers that give [batch · length, width], and several whose outputs add up, included."""
    base = base_at(tiny_checkpoint(family))
    last = Site(SiteKind.RESID_POST, base.layout.layers - 1)
    for batches in (batches_of(PROMPTS), batches_of([tuple(range(9))] * 2)):
        whole = load(base.checkpoint, torch.float64)
        found = run(whole, batches, sites=[last], writes=True)
        stream, writes = found.streams[last], found.writes
        error, size = (sum(writes) - stream).abs().max(), stream.abs().max()
        assert float(error) <= 1e-10 * float(size)
        for write in writes:
            assert write.shape == stream.shape and float(write.abs().max()) > 1e-2 * float(size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamed_runs_equal_those_in_memory_exactly(
    family: str, dtype: torch.dtype, tiny_checkpoint: Callable[..., Path]
) -> None:
    base = base_at(tiny_checkpoint(family, dtype=dtype))
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "resid")]
    batches, sites = batches_of(PROMPTS), block_sites(base.layout.live_blocks)
    whole = load(base.checkpoint, dtype)
    parts = load(base.checkpoint, dtype, streamed=True)
    plain = run(whole, batches)
    for hooks in ((), edits):
        ours = run(whole, batches, hooks, sites=sites, writes=True)
        theirs = run(parts, batches, hooks, sites=sites, writes=True)
        assert torch.equal(ours.logits, theirs.logits)
        assert all(torch.equal(ours.streams[site], theirs.streams[site]) for site in sites)
        assert all(map(torch.equal, ours.writes, theirs.writes))
        assert torch.equal(ours.logits, plain.logits) == (not hooks)
        kept = set(parts.units[0].parameters)
        assert all(p.is_meta for name, p in parts.model.named_parameters() if name not in kept)
    # Another value in one tensor reaches the model both ways, and leaves it again.
    name = base.layout.branches[1].writes[0].weight
    zeros = {name: lambda: torch.zeros_like(base.checkpoint.read(name))}
    with whole.replaced(zeros), parts.replaced(zeros):
        changed = run(whole, batches).logits
        assert torch.equal(changed, run(parts, batches).logits)
        assert not torch.equal(changed, plain.logits)
    # Nothing is left of it in a run with other values, or with none.
    other = base.layout.branches[0].writes[0].weight
    only = {other: lambda: torch.zeros_like(base.checkpoint.read(other))}
    with whole.replaced(only), parts.replaced(only):
        assert torch.equal(run(whole, batches).logits, run(parts, batches).logits)
    whole.restore()
    assert torch.equal(run(whole, batches).logits, plain.logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3"])
def test_a_streamed_report_has_the_same_numbers(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family, dtype=torch.float32))
    out = baked(base, tmp_path / "out")
    whole = judged(Verification(out, base=str(base.path), streamed=False, generate=3))
    parts = judged(Verification(out, base=str(base.path), streamed=True, generate=3))
    assert whole.passed and parts.passed
    named = {found.name: found.value for found in whole.rows}
    shared = [found for found in parts.rows if found.name in named]
    assert len(shared) >= len(parts.rows) - 1
    assert all(found.value == named[found.name] for found in shared)
    assert parts.layers == whole.layers
    assert parts.leaks == whole.leaks
    assert row(parts, "effect") > 0.1


def test_a_streamed_pass_tells_how_far_it_is(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32, num_hidden_layers=21))
    out, said = baked(base, tmp_path / "out"), list[str]()
    assert judged(Verification(out, base=str(base.path), streamed=True, remark=said.append)).passed
    first = said.index("base model in float64")
    assert said[first + 1 : first + 3] == ["    10 of 21 blocks", "    20 of 21 blocks"]
    said.clear()
    assert judged(Verification(out, base=str(base.path), streamed=False, remark=said.append)).passed
    assert not any("blocks" in line for line in said)


def test_the_writes_sum_to_the_stream(tiny_checkpoint: Callable[..., Path]) -> None:
    for family in tiny.FAMILIES:
        base = base_at(tiny_checkpoint(family))
        last = block_sites(base.layout.live_blocks)[-1]
        trace = run(
            load(base.checkpoint, torch.float64), batches_of(PROMPTS), sites=(last,), writes=True
        )
        difference = (sum(trace.writes) - trace.streams[last]).abs().max()
        assert difference <= tiny.tolerance(base.model) * trace.streams[last].abs().max()
        # Without one writer the sum is another one.
        rest = sum(trace.writes[1:]) - trace.streams[last]
        assert rest.abs().max() > 0.1


def test_every_tensor_is_in_one_part(tiny_checkpoint: Callable[..., Path]) -> None:
    for family in tiny.FAMILIES:
        model, names = tiny.make_model(family), open_checkpoint(tiny_checkpoint(family)).tensors
        units = units_of(model, names)
        assert sorted(name for unit in units for name in unit.tensors) == sorted(names)
        parameters = [key for unit in units for key in unit.parameters]
        assert sorted(parameters) == sorted(model.state_dict())
        assert len(blocks_of(units)) == tiny.layout_of(tiny_checkpoint(family)).layers


def test_a_tensor_in_no_part_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    model, names = tiny.make_model("llama"), open_checkpoint(tiny_checkpoint("llama")).tensors
    with pytest.raises(InputError, match=r"does not load model\.extra\.weight"):
        units_of(model, (*names, "model.extra.weight"))


def test_batches_hold_every_prompt_in_order() -> None:
    batches = batches_of(PROMPTS, limit=24)
    assert [batch.lengths for batch in batches] == [(4, 12), (20,), (1,)]
    tokens = torch.cat([batch.tokens[batch.keep] for batch in batches])
    assert tokens.tolist() == [token for prompt in PROMPTS for token in prompt]
    other = halves(batches)
    assert [batch.tokens.shape[0] for batch in other] == [1, 1, 2, 2]
    again = torch.cat([batch.tokens[batch.keep] for batch in other])
    assert torch.equal(again, tokens)


MEMORY = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from bake.jobs.planned import judged
from bake.merge.merge import merge_adapter
from bake.sites import Site, SiteKind
from bake.verify.verification import Verification
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import convert_and_load_state_dict_in_model

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
report = judged(Verification(Path(sys.argv[1]), base=sys.argv[2], streamed=True))
assert report.passed, report.rows
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["checkpoint", "merge"])
def test_streaming_holds_a_few_blocks(kind: str, tmp_path: Path) -> None:
    """24 blocks verify within the memory of six of them in float64, traces and all."""
    model = tiny.make_model(
        "llama",
        dtype=torch.bfloat16,
        hidden_size=512,
        intermediate_size=3072,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    tiny.write_checkpoint(model, tmp_path / "base")
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    del model
    checkpoint = open_checkpoint(tmp_path / "base")
    base = base_at(tmp_path / "base")
    if kind == "checkpoint":
        plan = plan_of(base, [edit(base, "ablate", make.ablate(vector(512)), "resid")])
        out = bake(base, plan, tmp_path / "out")
    else:
        options = {"target_modules": ["q_proj", "down_proj"], "use_dora": True}
        adapter = trained(base, tmp_path / "adapter", **options)
        out = merge_adapter(adapter, checkpoint, tmp_path / "out").path
    assert layout_of(checkpoint).layers == 24
    arguments = [sys.executable, "-c", MEMORY, str(out), str(tmp_path / "base")]
    # What is freed goes back at once: else glibc keeps up to half as much again, as chance has it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    assert grown < 6 * block * 8 < total * 8 / 3
