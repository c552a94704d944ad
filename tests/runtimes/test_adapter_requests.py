"""What is no adapter is refused before a runtime starts. These tests need no runtime."""

import sys
from pathlib import Path

import pytest

from bake.errors import CheckpointError
from bake.process import RuntimeMissing
from bake.verify.runtimes import exchange, vllm
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.request import RuntimeRequest
from bake.verify.runtimes.vllm import VLLM

PYTHON = Path(sys.executable)


def request(model: Path, adapter: Path | None) -> RuntimeRequest:
    return RuntimeRequest(model, ((1, 2),), 2, 5, "float32", adapter)


def folder(path: Path, config: str) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(config, encoding="utf-8")
    return path


def test_vllm_wants_a_rank(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for number, config in enumerate(("{}", "[]", '{"r": "x"}')):
        bad = folder(tmp_path / str(number), config)
        with pytest.raises(CheckpointError, match="vLLM reads a PEFT LoRA with its rank"):
            ask(VLLM, request(tmp_path, bad), PYTHON)
    with pytest.raises(CheckpointError, match="vLLM reads a PEFT LoRA with its rank"):
        ask(VLLM, request(tmp_path, tmp_path / "none"), PYTHON)
    high = folder(tmp_path / "high", '{"r": 513}')
    with pytest.raises(CheckpointError, match="rank is 513, and vLLM takes up to 512"):
        ask(VLLM, request(tmp_path, high), PYTHON)
    good = folder(tmp_path / "good", '{"r": 9}')
    with pytest.raises(RuntimeMissing):  # the control: it gets as far as starting vLLM
        ask(VLLM, request(tmp_path, good), PYTHON)


@pytest.mark.parametrize(("rank", "maximum"), [(1, 1), (2, 8), (9, 16), (257, 320), (512, 512)])
def test_vllm_is_started_for_the_next_rank_that_it_knows(
    rank: int, maximum: int, tmp_path: Path
) -> None:
    assert vllm.max_lora_rank(folder(tmp_path / "a", f'{{"r": {rank}}}')) == maximum


def test_llamacpp_wants_a_gguf(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    bad = tmp_path / "adapter.gguf"
    bad.write_bytes(b"not one")
    with pytest.raises(CheckpointError, match=r"adapter\.gguf"):
        ask(LLAMA_CPP, request(model, bad), PYTHON)


def test_the_worker_reads_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = exchange.as_json(request(Path("model"), Path("adapter")))
    assert asked["adapter"] == str(tmp_path / "adapter")
    assert exchange.as_json(request(Path("model"), None))["adapter"] is None
