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
    # torch keeps the memory of the first model: asked again, the GPU has no room.
    room = iter([True])
    monkeypatch.setattr(inputs, "fits_gpu", lambda *args: next(room, False))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "A GPU")
    return found


@pytest.mark.parametrize(
    ("options", "narrow", "named"),
    [
        ({}, "cuda", "cpu, A GPU for float32"),
        ({"device_map": "cpu"}, "cpu", "cpu"),
        ({"streamed": True}, None, "cpu, one block in memory at a time"),
        ({"streamed": True, "device_map": "cpu"}, "cpu", "cpu, one block in memory at a time"),
    ],
    ids=["by itself", "kept off", "streamed", "streamed and kept off"],
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
    short: list[bool] = []  # whether a convolution on a GPU took ten bits of a float32 number

    def remark(text: str) -> None:
        short.append(torch.backends.cudnn.allow_tf32)

    before = torch.backends.cudnn.allow_tf32
    asked = Verification(out, base=str(base.path), generate=0, remark=remark, **options)
    report = judged(asked)
    assert before and torch.backends.cudnn.allow_tf32 and not any(short)
    assert report.passed and report.environment["device"] == named
    wide = options.get("device_map")
    assert {place for dtype, place in places if dtype == torch.float64} == {wide}
    assert {place for dtype, place in places if dtype == torch.float32} == {narrow}


def test_a_gpu_without_room_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    values = sum(parameter.numel() for parameter in base.model.parameters())
    assert not memory.fits_gpu(base.checkpoint, 1)  # there is none here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # Logits of a large vocabulary take more than a small model.
    for logits, least in ((values - 1, 8 * values), (3 * values, 16 * values)):
        for free, fits in ((least, True), (least - 1, False)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10 * free))
            assert memory.fits_gpu(base.checkpoint, logits) is fits


@pytest.mark.parametrize(
    ("options", "streamed"),
    [
        ({}, True),
        ({"device_map": "cpu"}, True),
        ({"device_map": "auto"}, False),
        ({"streamed": False}, False),
    ],
    ids=["by itself", "on the processor", "placed", "in memory"],
)
def test_a_model_that_is_placed_elsewhere_is_not_streamed_here(
    options: dict[str, Any],
    streamed: bool,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A streamed model is on the processor, whatever device was asked for."""
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32)).checkpoint
    monkeypatch.setattr(inputs, "too_large", lambda checkpoint: True)
    said: list[str] = []
    asked = Verification(base.path, remark=said.append, **options)
    assert inputs._is_streamed(asked, base) is streamed
    assert any("no greedy text" in line for line in said) is streamed
