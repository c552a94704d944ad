"""``run.py demo``, but for installation and download: every command of the README's tour."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from smollm2 import SmolLM2

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]


def test_the_demo_fits_bakes_verifies_and_speaks(
    real: SmolLM2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "cache" / "smollm2"
    model.mkdir(parents=True)
    (model / real.gguf.name).symlink_to(real.gguf)
    shutil.copytree(real.checkpoint, model / "checkpoint")
    made = runpy.run_path(str(ROOT / "run.py"))
    told: list[str] = []

    def steps(*commands: list[str]) -> int:
        for program, *rest in commands:
            start = [sys.executable, *(["-m", "bake"] if program == "bake" else [])]
            done = subprocess.run([*start, *rest], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{program} {rest}\n{done.stdout}\n{done.stderr}"
            told.append(done.stdout)
        return 0

    for name, value in {
        "program": lambda: "bake",
        "steps": steps,
        "OUT": tmp_path,
        "CACHE": tmp_path / "cache",
    }.items():
        monkeypatch.setitem(made["demo"].__globals__, name, value)
    assert made["demo"]() == 0
    assert len(told) == 7
    assert "tells the classes apart" in told[1]
    assert "verification  passed" in told[5]
    # What is stored says what the hooks say, and not what the base says.
    answers = [line.split(maxsplit=1) for line in told[6].splitlines() if line.strip()]
    said = {voice: [] for voice in ("base", "hooked", "baked")}
    for line in answers:
        if line[0] in said:
            said[line[0]].append(line[1:])
    assert len(said["baked"]) == 3
    assert said["baked"] == said["hooked"] != said["base"]
    assert (tmp_path / "demo" / "gguf" / real.gguf.name).is_file()
