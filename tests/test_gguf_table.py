"""The script that makes the table of size against loss in docs/gguf.md, on a tiny model."""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gguf_files
import numpy as np
import pytest
import torch
from adapters import NO_BIAS
from commands import write_recipe
from words import write_tokenizer

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gguf_storage.py"
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # whole blocks of 32 values


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gguf_storage", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gguf_storage", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "tied"])
def test_the_script_measures_types_and_adapter(
    tied: bool,
    script: ModuleType,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = tiny_checkpoint(
        "llama", dtype=torch.float32, tie_word_embeddings=tied, **NO_BIAS, **WIDE
    )
    base = shutil.copytree(made, tmp_path / "base")  # others use what is there as well
    write_tokenizer(base)
    recipe = write_recipe(tmp_path, base)
    np.save(tmp_path / "mood.npy", np.random.default_rng(0).standard_normal(64))
    file = gguf_files.write(tmp_path / "base.gguf", base, "Q4_1")
    chosen = (("keep", "nearest"), ("Q8_0", "feedback"), ("F16", "nearest"))
    monkeypatch.setattr(script, "CHOICES", chosen)
    given = [str(recipe), "--gguf", str(file), "--tokens", "4", "--chats", "2"]
    monkeypatch.setattr(sys, "argv", ["gguf_storage.py", *given])
    script.main()
    effect, _, *rows, behind = capsys.readouterr().out.splitlines()
    assert float(effect.split()[1]) > 1e-3  # nats: else shares of it say nothing
    assert [row.split(" | ")[0] for row in rows] == [
        *(f"{types}, {rounding}" for types, rounding in chosen),
        "as they are, with an adapter",
    ]
    sizes = [float(row.split(" | ")[1].removesuffix(" MB")) for row in rows]
    lost = [float(row.split(" | ")[2].rstrip("%")) / 100 for row in rows]
    assert sizes[0] <= sizes[1] <= sizes[2]
    # An adapter rounds nothing. The control: four bits do, and cost ten times more than eight.
    assert lost[3] < 1e-4 and lost[2] < 1e-4
    assert 10 * lost[1] < lost[0]
    # Four bits cost the checkpoint itself more than an edit of its decoded weights.
    assert float(behind.split()[6].rstrip("%,")) > 0
