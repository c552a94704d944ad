"""The scripts that measure edited GGUFs, size against loss and speed, on a tiny model."""

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

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # whole blocks of 32 values


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "tied"])
def test_the_script_measures_types_and_adapter(
    tied: bool,
    load: Callable[[str], ModuleType],
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = load("gguf_storage")
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


def test_the_script_counts_the_bytes_of_edited_tensors_alone(
    load: Callable[[str], ModuleType], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """In the type that they are written in; the head that is a copy of the embedding is not."""
    base = tiny_checkpoint(
        "llama", dtype=torch.float32, tie_word_embeddings=True, **NO_BIAS, **WIDE
    )
    recipe, script = write_recipe(tmp_path, base), load("gguf_export")
    np.save(tmp_path / "mood.npy", np.random.default_rng(0).standard_normal(64))
    file = gguf_files.write(tmp_path / "base.gguf", base, "Q4_1")
    edited = [v for n, v in gguf_files.values(file).items() if _is_edited(n)]
    assert len(edited) == 7
    for job, bits in (("keep", 5), ("Q8_0", 8.5), (script.PLAIN, 8.5)):
        seconds, size = script.run(job, recipe, file)
        assert seconds > 0 and size == sum(value.numel() for value in edited) * bits / 8


def _is_edited(name: str) -> bool:
    return name == "token_embd.weight" or name.endswith(("attn_output.weight", "ffn_down.weight"))
