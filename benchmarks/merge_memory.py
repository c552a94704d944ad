"""Memory of a merge, over the size of the model.

    python benchmarks/merge_memory.py [--gigabytes 1 4] [--threads 1] [--folder DIR]

For each size it makes what ``export.py`` makes, a sharded random Llama checkpoint in bfloat16 and
a LoRA of rank 16 for every layer of it, and merges the two in a process of its own. ``adapter`` is
the size of the factors, which are in memory whole and grow with the number of layers; ``above`` is
what the merge holds beyond a process that has imported the same and done nothing. Of a model that
is loaded it would be the checkpoint. glibc's threshold for mmap is fixed, for otherwise half of
what is shown is what it keeps of freed blocks.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import export


def main() -> None:
    """Make the checkpoints, merge each, print the table and the ratio of the last to the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    rows = [measured(size, arguments.threads, arguments.folder) for size in arguments.gigabytes]
    print("| checkpoint | adapter | peak memory | above imports |")
    print("|---|---|---|---|")
    for size, adapter, peak, above in rows:
        numbers = f"{adapter >> 20} MiB | {peak >> 20} MiB | {above >> 20} MiB"
        print(f"| {size / 1e9:.2f} GB | {numbers} |")
    (small, _, _, least), (large, _, _, most) = rows[0], rows[-1]
    print(f"\n{large / small:.2f} × the checkpoint, {most / least:.2f} × the memory above imports")


def measured(gigabytes: float, threads: int, place: Path | None) -> tuple[int, int, int, int]:
    """Return the bytes of checkpoint and adapter, and the peak with and without the imports."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        root = Path(folder)
        size = export.make(root / "base", gigabytes)
        export.make_adapter(root / "base", root / "adapter")
        adapter = (root / "adapter" / "adapter_model.safetensors").stat().st_size
        jobs = ("imports", "merge")
        found = export.measured(export.__file__, jobs, root, threads, 1, steady=True)
    peak = int(found["merge"]["peak"])
    return size, adapter, peak, peak - int(found["imports"]["peak"])


if __name__ == "__main__":
    main()
