"""Several carriers in one run beside the same carriers one after another.

    python benchmarks/carriers.py [--gigabytes 1] [--threads 1] [--folder DIR]

It makes a random Llama checkpoint in bfloat16 and exports an ablation at every stream site as
checkpoint, LoRA and GGUF LoRA: ``together`` in one run, ``separate`` in three. For each it prints
the time, the peak memory, and how often the bytes of the edited tensors are read on average; that
the files are the same is checked. Both run by turns in one call, each in a process of its own; the
fastest turn of each counts.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from export import HIDDEN, direction, make, measured, peak_memory

if TYPE_CHECKING:
    from bake.checkpoints import Checkpoint
    from bake.checkpoints.source import ByteSource
    from bake.plan import Plan

CARRIERS = ("checkpoint", "lora", "gguf-lora")
JOBS = ("separate", "together")


def main() -> None:
    """Make the checkpoint, run both jobs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--job", choices=JOBS)
    arguments = parser.parse_args()
    if arguments.job:
        run(arguments.job, arguments.folder, arguments.threads)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        size = make(root / "base", arguments.gigabytes)
        results = measured(__file__, JOBS, root, arguments.threads, arguments.turns, steady=True)
        assert digests(root / "together") == digests(root / "separate"), "the files differ"
    print(f"checkpoint: {size / 1e9:.2f} GB in bfloat16, {arguments.threads} thread(s)\n")
    print("| run | seconds | peak memory | times that edited weights are read |")
    print("|---|---|---|---|")
    for job, found in results.items():
        print(
            f"| {job} | {found['seconds']:.1f} | {found['peak'] / 2**20:.0f} MiB "
            f"| {found['read'] / found['edited']:.2f} |"
        )
    one, other = results["together"], results["separate"]
    print(
        f"| ratio | {one['seconds'] / other['seconds']:.2f} × | {one['peak'] / other['peak']:.2f} ×"
        f" | {one['read'] / other['read']:.2f} × |"
    )


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file that a job wrote, by its name."""
    found: dict[str, str] = json.loads((folder.parent / f"{folder.name}.json").read_text())
    return found


@dataclass(frozen=True)
class Counting:
    """A source of bytes that counts what is read of the edited tensors."""

    inner: "ByteSource"
    spans: dict[str, list[tuple[int, int]]]
    total: list[int] = field(default_factory=lambda: [0])

    def size(self, shard: str) -> int:
        """Return the length of a shard."""
        return self.inner.size(shard)

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        """Read bytes, and count those that belong to an edited tensor."""
        self.inner.read_into(shard, start, buffer)
        stop = start + len(buffer)
        for first, last in self.spans.get(shard, []):
            self.total[0] += max(0, min(stop, last) - max(start, first))


def counted(checkpoint: "Checkpoint", plan: "Plan") -> tuple["Checkpoint", list[int], int]:
    """Return the checkpoint with its reads counted, the count, and the bytes that are edited."""
    names = {update.source for update in plan.tensors}
    spans: dict[str, list[tuple[int, int]]] = {}
    for name in names:
        info = checkpoint.tensors[name]
        spans.setdefault(info.shard, []).append((info.start, info.stop))
    source = Counting(checkpoint.files, spans)
    edited = sum(checkpoint.tensors[name].nbytes for name in names)
    return replace(checkpoint, files=source), source.total, edited


def run(job: str, root: Path, threads: int) -> None:
    """Do one job and print what it took; imports are not counted."""
    import torch

    from bake.checkpoints import open_checkpoint
    from bake.edits import Edit, EditKind, ablate
    from bake.families.fit import layout_of
    from bake.outputs.export import Export
    from bake.outputs.write import export
    from bake.plan import compile_plan
    from bake.sites import expand

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(root / "base")
    layout = layout_of(checkpoint)
    assert layout.hidden == HIDDEN
    sites = expand("resid", layers=layout.layers, stream=layout.stream)
    edit = Edit(EditKind.ABLATE, "c", sites, ablate(direction().to(torch.float64)))
    plan = compile_plan([edit], layout, gain=checkpoint.read, config=checkpoint.config)
    counting, total, edited = counted(checkpoint, plan)
    out, what = root / job, Export(plan, counting)
    start = time.perf_counter()
    if job == "together":
        made = export(what, CARRIERS, out)
    else:
        made = tuple(export(what, [name], out / name)[0] for name in CARRIERS)
    seconds = time.perf_counter() - start
    files = {f"{part.kind}/{name}": sha for part in made for name, sha in part.files.items()}
    (root / f"{job}.json").write_text(json.dumps(files))
    shutil.rmtree(out)
    result = {"seconds": seconds, "peak": peak_memory(), "read": total[0], "edited": edited}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
