"""How fast a GGUF is edited, beside gguf-py's own quantiser.

    python benchmarks/gguf_export.py RECIPE --gguf FILE [--types keep,Q8_0] [--turns 3]

``export`` is what ``bake export --to gguf`` does behind its imports: the checks against the
checkpoint, the choice of types, decoding, folding in float64, codes with feedback, measuring them,
writing and hashing the whole file. ``gguf-py`` decodes the same tensors and quantises them anew to
Q8_0, in float32 and to nearest, and writes nothing: it encodes no four bits under scales that are
there. Counted are the bytes of the edited tensors in the type that they are written in; a head that
is a copy of the embedding is written as well, and not counted. Seconds are of one processor: each
job is a process of its own with one thread, by turns, and of each the fastest turn counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bake.jobs.request import compile_request
from bake.outputs.gguf.edit import new_tensors
from bake.outputs.write import export as write

PLAIN = "gguf-py"


def main() -> None:
    """Run every job by turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--types", default="keep,Q8_0")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--job")
    given = parser.parse_args()
    if given.job:
        print(json.dumps(run(given.job, given.recipe, given.gguf)))
        return
    best: dict[str, tuple[float, int]] = {}
    jobs = (*given.types.split(","), PLAIN)
    for _ in range(given.turns):
        for job in jobs:
            command = [sys.executable, __file__, given.recipe, "--gguf", given.gguf, "--job", job]
            single = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=single)
            seconds, size = json.loads(done.stdout.splitlines()[-1])
            best[job] = min(best.get(job, (seconds, size)), (seconds, size))
    print("| edited tensors | written | processor seconds | MB/s | of gguf-py's seconds |")
    print("|---|---|---|---|---|")
    for job, (seconds, size) in best.items():
        words = f"{seconds:.2f} | {size / seconds / 1e6:.1f} | {seconds / best[PLAIN][0]:.2f} ×"
        print(f"| {job} | {size / 1e6:.1f} MB | {words} |")


def run(job: str, recipe: Path, gguf: Path) -> tuple[float, int]:
    """Do one job; return processor seconds, and the bytes of the edited tensors."""
    import gguf as library

    start = time.process_time()
    request = compile_request(recipe, to=["gguf"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        export = request.export(out, gguf=gguf, gguf_type="Q8_0" if job == PLAIN else job)
        if job != PLAIN:
            write(export, ["gguf"], out)
            seconds = time.process_time() - start
    model = export.model()
    assert model is not None
    new = [t for t in new_tensors(export, model)[0].values() if t.measure is not None]
    size = sum(tensor.nbytes for tensor in new)
    if job == PLAIN:
        start, kinds = time.process_time(), library.GGMLQuantizationType
        for tensor in new:
            info = model.tensors[tensor.name]
            for expert in range(info.shape[0]) if len(info.shape) == 3 else (None,):
                raw = model.read_rows(tensor.name, 0, info.shape[-2], expert=expert).numpy()
                values = library.quants.dequantize(raw, kinds(info.kind.number))
                library.quants.quantize(values, kinds.Q8_0)
        seconds = time.process_time() - start
    return seconds, size


if __name__ == "__main__":
    main()
