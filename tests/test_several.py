"""Several carriers in one run: the bytes of separate runs, fewer reads, all of them or none."""

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from adapters import NO_BIAS
from folders import files_of
from harness import Base, base_at, edit, matrix, plan_of, vector

from bake import edits as make
from bake.artifact.artifact import Artifact
from bake.artifact.base import base_ref
from bake.artifact.schema import Provenance
from bake.checkpoints import Checkpoint
from bake.checkpoints.source import ByteSource, Stamps
from bake.checkpoints.workers import at_most
from bake.edits import Edit
from bake.errors import CheckpointError, InexactPlan, InputError, UsageError
from bake.outputs.export import CarrierRun, CarrierWriter, Export
from bake.outputs.registry import prepare
from bake.outputs.write import export
from bake.plan import Plan

Checkpoints = Callable[..., Path]
ALL = ("gguf-lora", "lora", "checkpoint")  # not in the order in which they are written


@dataclass(frozen=True)
class Counting:
    """A source of bytes that counts those that are read, by the tensor that they belong to."""

    inner: ByteSource
    checkpoint: Checkpoint
    read: Counter[str] = field(default_factory=Counter)

    @property
    def stamps(self) -> Stamps:
        return self.inner.stamps

    def size(self, shard: str) -> int:
        return self.inner.size(shard)

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        self.inner.read_into(shard, start, buffer)
        for info in self.checkpoint.tensors.values():
            if info.shard == shard:
                shared = min(info.stop, start + len(buffer)) - max(info.start, start)
                if shared > 0:
                    self.read[info.name] += shared


def counted(base: Base) -> tuple[Checkpoint, Counter[str]]:
    source = Counting(base.checkpoint.files, base.checkpoint)
    return replace(base.checkpoint, files=source), source.read


def record_of(base: Base, out: Path) -> Provenance:
    told = base_ref(base.checkpoint, out=out, model=str(base.path))
    return Provenance(base=told, allow=(), target=())


def run(
    base: Base, plan: Plan, carriers: Sequence[str], out: Path, **options: Any
) -> tuple[Artifact, ...]:
    checkpoint = options.pop("checkpoint", base.checkpoint)
    return export(Export(plan, checkpoint, record_of(base, out), **options), carriers, out)


def both(
    base: Base, plan: Plan, folder: Path, carriers: Sequence[str], **options: Any
) -> tuple[tuple[Artifact, ...], list[Artifact]]:
    """Write the carriers together and each alone; the folders lie equally deep."""
    together = run(base, plan, carriers, folder / "all", **options)
    alone = [run(base, plan, [name], folder / "one" / name, **options)[0] for name in carriers]
    return together, alone


Maker = Callable[[Base], list[Edit]]
EDITS: dict[str, Maker] = {
    "ablate": lambda base: [edit(base, "ablate", make.ablate(vector(24)), "resid")],
    "affine": lambda base: [edit(base, "affine", make.affine(vector(24), alpha=0.7), "resid")],
    "an offset from the start": lambda base: [
        edit(base, "offset", make.offset(vector(24)), "embed")
    ],
    "both sides": lambda base: [
        edit(base, "ablate", make.ablate(vector(40)), "mlp_act.1", "in"),
        edit(base, "ablate", make.ablate(vector(24)), "mlp_out.*", "out"),
    ],
    "heads": lambda base: [edit(base, "ablate", make.ablate(vector(8)), "q.1.h2", "q")],
    "a ready update": lambda base: [
        edit(
            base,
            "update",
            make.WeightUpdate(matrix(24)[:, :2], matrix(40)[:2]),
            "mlp_out.1",
            "fact",
        ),
        edit(base, "ablate", make.ablate(vector(24)), "mlp_out.*", "out"),
    ],
    "the head": lambda base: [edit(base, "ablate", make.ablate(vector(24)), "ln_final_out")],
}
CASES = [
    *(("llama", NO_BIAS, name) for name in EDITS),
    ("phi3", {}, "ablate"),
    ("mixtral", {}, "ablate"),
]


@pytest.mark.parametrize(("family", "config", "name"), CASES)
@pytest.mark.parametrize("rows", [None, 3])
def test_bytes_are_those_of_separate_runs(
    family: str,
    config: dict[str, Any],
    name: str,
    rows: int | None,
    tiny_checkpoint: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = base_at(tiny_checkpoint(family, dtype=torch.bfloat16, **config))
    plan = plan_of(base, EDITS[name](base))
    if rows is not None:  # several tiles a weight
        monkeypatch.setattr("bake.tiles.TILE_VALUES", rows * 24)
    together, alone = both(base, plan, tmp_path, ALL)
    assert [a.kind for a in together] == list(ALL)
    for carrier, one, other in zip(ALL, together, alone, strict=True):
        assert one.path == tmp_path / "all" / carrier
        assert files_of(one.path) == files_of(other.path)
        assert (one.files, one.bytes_written, one.bytes_edited) == (
            other.files,
            other.bytes_written,
            other.bytes_edited,
        )
    assert {path.name for path in (tmp_path / "all").iterdir()} == set(ALL)
    assert {path.name for path in tmp_path.iterdir()} == {"all", "one"}


@pytest.mark.parametrize("name", ["ablate", "both sides"])
def test_bytes_do_not_depend_on_the_workers(
    name: str, tiny_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bake.checkpoints.workers._STEP", 1000)
    monkeypatch.setattr("bake.tiles.TILE_VALUES", 100)
    base = base_at(tiny_checkpoint("llama", dtype=torch.bfloat16, **NO_BIAS))
    plan, threads = plan_of(base, EDITS[name](base)), torch.get_num_threads()
    found = []
    for jobs in (1, 4):
        with at_most(jobs):
            run(base, plan, ALL, tmp_path / f"{jobs}")
        found.append(files_of(tmp_path / f"{jobs}"))
    assert found[0] == found[1]
    assert torch.get_num_threads() == threads


def test_control_vector_and_checkpoint(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    plan = plan_of(base, [edit(base, "offset", make.offset(vector(24)), "resid_post.1")])
    together, alone = both(base, plan, tmp_path, ("control-vector", "checkpoint"))
    for one, other in zip(together, alone, strict=True):
        assert files_of(one.path) == files_of(other.path)


CONVERTER = """
import hashlib, pathlib, sys
folder = pathlib.Path(sys.argv[1])
out = pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
weights = sorted(folder.glob("*.safetensors"))
shas = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
out.write_text("GGUF " + folder.name + " ".join(shas))
"""


def test_a_converted_file_is_made_from_the_checkpoint_of_the_run(
    tiny_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in for llama.cpp's converter says what it was given, and under which name."""
    base = base_at(tiny_checkpoint("llama"))
    plan = plan_of(base, EDITS["ablate"](base))
    llama_cpp = tmp_path / "llama.cpp"
    llama_cpp.mkdir()
    (llama_cpp / "convert_hf_to_gguf.py").write_text(CONVERTER)
    carriers = ("gguf", "checkpoint")
    together, alone = both(base, plan, tmp_path, carriers, llama_cpp=llama_cpp)
    for one, other in zip(together, alone, strict=True):
        assert files_of(one.path) == files_of(other.path)
    text = (tmp_path / "all" / "gguf" / "gguf-F16.gguf").read_text()
    digest = together[1].files["model.safetensors"]
    assert text == f"GGUF gguf{digest}"
    baked: list[str] = []
    monkeypatch.setattr(
        "bake.outputs.gguf.convert.write_edited",
        lambda what, run, target: baked.append(target.folder.name) or pytest.fail("baked twice"),
    )
    # Alone it needs a checkpoint for the moment, and a failure leaves nothing of it.
    with pytest.raises(pytest.fail.Exception):
        run(base, plan, ["gguf"], tmp_path / "deep" / "gguf", llama_cpp=llama_cpp)
    assert baked == ["gguf"]
    assert {path.name for path in tmp_path.iterdir()} == {"all", "one", "llama.cpp"}


READS = {
    # times that a weight is read: by the checkpoint alone, by one adapter alone, by all together
    "model.embed_tokens.weight": (1, 1, 1),
    "model.layers.1.mlp.down_proj.weight": (2, 1, 2),
    "model.layers.2.self_attn.o_proj.weight": (2, 1, 2),
}


def test_an_adapter_beside_a_checkpoint_reads_no_weight(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """A map across rows reads a matrix twice for a checkpoint; factors are summed up meanwhile."""
    base = base_at(tiny_checkpoint("llama", dtype=torch.bfloat16, **NO_BIAS))
    plan = plan_of(base, EDITS["ablate"](base))
    edited = {update.name for update in plan.tensors}

    def reads(*carriers: str) -> Counter[str]:
        checkpoint, counter = counted(base)
        out = tmp_path / "+".join(carriers)
        run(base, plan, carriers, out, checkpoint=checkpoint)
        return Counter({name: counter[name] for name in edited})

    checkpoint, lora, gguf = (reads(name) for name in ("checkpoint", "lora", "gguf-lora"))
    adapters, everything = reads("lora", "gguf-lora"), reads(*ALL)
    for name, times in READS.items():
        size = base.checkpoint.tensors[name].nbytes
        found = (checkpoint[name], lora[name], everything[name])
        assert found == tuple(count * size for count in times), name
    assert lora == gguf == adapters
    assert lora == Counter({name: base.checkpoint.tensors[name].nbytes for name in edited})
    assert everything == checkpoint
    # The control: separate runs read more.
    assert (checkpoint + lora + gguf).total() > 1.9 * everything.total()


def test_nothing_is_written_when_one_of_them_refuses(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan = plan_of(base, EDITS["ablate"](base))
    checkpoint, counter = counted(base)
    tied = base_at(tiny_checkpoint("llama", tied=True, **NO_BIAS))
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF")
    there, back = (make.offset(sign * vector(24)) for sign in (1, -1))
    zero = [edit(base, "offset", map_, "resid_post.1") for map_ in (there, back)]
    cases: list[tuple[Plan, tuple[str, ...], dict[str, Any], type[Exception], str]] = [
        (plan, ("checkpoint", "control-vector"), {}, InexactPlan, "as control-vector"),
        (plan, ("checkpoint", "gguf"), {}, UsageError, "made from one of two things"),
        (
            plan,
            ("checkpoint", "gguf"),
            {"llama_cpp": tmp_path / "none"},
            Exception,
            "there is no converter at",
        ),
        (plan, ("lora", "gguf"), {"gguf": wrong}, CheckpointError, "wrong.gguf"),
        (plan, ("lora", "gguf-lora"), {"gguf": wrong}, CheckpointError, "wrong.gguf"),
        (plan, ("lora", "checkpoint"), {"rounding": "up"}, UsageError, "rounding is 'up'"),
        (plan_of(base, zero), ("control-vector", "checkpoint"), {}, UsageError, "is zero"),
        (
            plan_of(tied, EDITS["ablate"](tied)),
            ("checkpoint", "gguf-lora"),
            {},
            UsageError,
            "a tensor of its own",
        ),
    ]
    for of, carriers, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            run(base, of, carriers, tmp_path / "deep" / "out", checkpoint=checkpoint, **options)
        assert {path.name for path in tmp_path.iterdir()} == {"wrong.gguf"}
    assert not set(counter) & {update.name for update in plan.tensors}


def test_a_failure_in_the_middle_leaves_nothing(
    tiny_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever carrier fails, and with --force what was there stays."""
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan = plan_of(base, EDITS["ablate"](base))
    out = tmp_path / "out"
    run(base, plan, ["lora"], out)
    before = files_of(out)
    written: list[str] = []

    broken = ""

    def failing(what: Export, name: str) -> CarrierWriter:
        writer = prepare(what, name)

        def write(run: CarrierRun) -> Artifact:
            if name == broken:
                raise InputError("the disk refuses")
            written.append(name)
            return writer(run)

        return write

    monkeypatch.setattr("bake.outputs.write.prepare", failing)
    for carrier in ALL:
        broken = carrier
        for place, force in ((tmp_path / "deep" / "new", False), (out, True)):
            with pytest.raises(InputError, match="the disk refuses"):
                run(base, plan, ALL, place, force=force)
            assert {path.name for path in tmp_path.iterdir()} == {"out"}
            assert files_of(out) == before
    assert set(written) == {"checkpoint", "lora"}  # gguf-lora is the last
    monkeypatch.undo()
    run(base, plan, ALL, out, force=True)
    assert {path.name for path in out.iterdir()} == set(ALL)
    assert files_of(out / "lora").keys() == before.keys()


def test_what_is_in_the_way(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan = plan_of(base, EDITS["ablate"](base))

    mine = tmp_path / "mine"
    (mine / "lora").mkdir(parents=True)
    (mine / "lora" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        run(base, plan, ALL, mine)
    with pytest.raises(UsageError, match="holds lora, which bake did not write"):
        run(base, plan, ALL, mine, force=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="exists and is no folder"):
        run(base, plan, ALL, tmp_path / "file", force=True)
    (tmp_path / "link").symlink_to(mine)
    with pytest.raises(UsageError, match="is a link"):
        run(base, plan, ALL, tmp_path / "link", force=True)
    for place in (base.path, base.path / "out", base.path.parent):
        with pytest.raises(UsageError, match="overlap"):
            run(base, plan, ALL, place, force=True)
    assert (mine / "lora" / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "file", "link"}
    # An artifact of bake is replaced.
    single = tmp_path / "single"
    run(base, plan, ["lora"], single)
    run(base, plan, ALL, single, force=True)
    assert {path.name for path in single.iterdir()} == set(ALL)


def test_an_interrupted_run_is_taken_up(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan, out = plan_of(base, EDITS["ablate"](base)), tmp_path / "out"
    asked: list[str] = []

    @contextmanager
    def bar(label: str, *, unit: str | None = None) -> Iterator[None]:
        carrier = label.removeprefix("writing ")
        asked.append(carrier)
        if carrier == stop:
            raise KeyboardInterrupt
        yield

    def again(**options: Any) -> tuple[Artifact, ...]:
        asked.clear()
        return run(base, plan, ALL, out, bars=bar, **options)

    stop = "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        again()
    assert not any(tmp_path.iterdir())  # nothing was finished, nothing is kept
    stop = "gguf-lora"
    with pytest.raises(KeyboardInterrupt):
        again()
    assert asked == ["checkpoint", "lora", "gguf-lora"] and not out.exists()
    stage = tmp_path / ".out.bake-partial" / "files"
    assert {path.name for path in stage.iterdir()} == {"checkpoint", "lora"}
    # What was changed since is made anew, and what a killed run left half-done goes.
    (stage / "lora" / "adapter_model.safetensors").write_bytes(b"torn")
    (stage / "gguf-lora").mkdir()
    (stage / "gguf-lora" / "lora.gguf").write_bytes(b"half")
    stop = ""
    made = again()
    assert asked == ["lora", "gguf-lora"]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    whole = run(base, plan, ALL, tmp_path / "whole")
    assert [replace(a, path=out) for a in made] == [replace(a, path=out) for a in whole]
    assert files_of(out) == files_of(tmp_path / "whole")
    # Another request takes nothing up.
    out = tmp_path / "again"
    stop = "gguf-lora"
    with pytest.raises(KeyboardInterrupt):
        again()
    stop = ""
    again(allow=frozenset({"nulling"}))
    assert asked == ["checkpoint", "lora", "gguf-lora"]


KILLED = """
import sys
from contextlib import contextmanager
from pathlib import Path
sys.path[:0] = [{tests!r}]
from harness import base_at
from test_several import ALL, EDITS, plan_of, run

@contextmanager
def bar(label, *, unit=None):
    if label == "writing lora":
        print("ready", flush=True)
        sys.stdin.read()
    yield

base = base_at(Path({base!r}))
run(base, plan_of(base, EDITS["ablate"](base)), ALL, Path({out!r}), bars=bar)
"""


def test_a_killed_run_is_taken_up_and_a_second_one_waits_its_turn(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan, out = plan_of(base, EDITS["ablate"](base)), tmp_path / "out"
    code = KILLED.format(tests=str(Path(__file__).parent), base=str(base.path), out=str(out))
    child = programs.start(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"

    with pytest.raises(UsageError, match="another run of bake is writing"):
        run(base, plan, ALL, out)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert child.stdin is not None
    child.stdin.close()
    stage = tmp_path / ".out.bake-partial" / "files"
    assert not out.exists() and {path.name for path in stage.iterdir()} == {"checkpoint"}
    stamp = (stage / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    time.sleep(0.01)
    run(base, plan, ALL, out)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (out / "checkpoint" / "model.safetensors").stat().st_mtime_ns == stamp
    record_text = json.loads((out / "lora" / "bake.json").read_text())
    assert record_text["plan"]["digest"] == plan.digest
