"""Where the models of a verification run: a GPU, of which there is a stand-in here, or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import base_at
from test_verify import baked

from bake.jobs.planned import judged
from bake.verify import inputs, memory, runner
from bake.verify.verification import Verification

Places = list[tuple[torch.dtype, str | None]]


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    """A GPU that has room, and where each model is loaded: none of them is put there."""
    found: Places = []
    real = runner.load

    def load(checkpoint: Any, dtype: torch.dtype, **options: Any) -> Any:
        found.append((dtype, options.pop("device_map")))
        return real(checkpoint, dtype, **options)

    monkeypatch.setattr(runner, "load", load)
    monkeypatch.setattr(inputs, "fits_gpu", lambda checkpoint: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "A GPU")
    return found


@pytest.mark.parametrize(
    ("options", "narrow", "named"),
    [
        ({}, "cuda", "cpu, A GPU for float32"),
        ({"device_map": "cpu"}, "cpu", "cpu"),
        ({"streamed": True}, None, "cpu"),
    ],
    ids=["by itself", "kept off", "streamed"],
)
def test_float32_goes_to_a_gpu_and_float64_does_not(
    options: dict[str, Any],
    narrow: str | None,
    named: str,
    places: Places,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    out = baked(base, tmp_path / "out")
    report = judged(Verification(out, base=str(base.path), generate=0, **options))
    assert report.passed and report.environment["device"] == named
    wide = options.get("device_map")
    assert {place for dtype, place in places if dtype == torch.float64} == {wide}
    assert {place for dtype, place in places if dtype == torch.float32} == {narrow}


def test_a_gpu_without_room_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    size = 4 * sum(parameter.numel() for parameter in base.model.parameters())
    assert not memory.fits_gpu(base.checkpoint)  # there is none here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, fits in ((2 * size, True), (2 * size - 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10 * free))
        assert memory.fits_gpu(base.checkpoint) is fits
