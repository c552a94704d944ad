"""The installer makes a part once, makes a half-made part anew, and unpacks only what it should.

Nothing is downloaded here: the parts are stand-ins.
"""

import io
import tarfile
from pathlib import Path

import install
import pytest


class Maker:
    """Makes the folder, unless it is told to break off half-way."""

    def __init__(self) -> None:
        self.calls = 0
        self.breaks = False

    def __call__(self, folder: Path, requirements: Path) -> None:
        self.calls += 1
        folder.mkdir()
        (folder / f"call-{self.calls}").touch()
        if self.breaks:
            raise KeyboardInterrupt


def test_part_is_made_once(tmp_path: Path) -> None:
    make = Maker()
    folder = install.ensure(tmp_path, "vllm", make)
    assert install.ensure(tmp_path, "vllm", make) == folder == tmp_path / "vllm"
    assert make.calls == 1


def test_half_made_part_is_made_anew(tmp_path: Path) -> None:
    make = Maker()
    make.breaks = True
    with pytest.raises(KeyboardInterrupt):
        install.ensure(tmp_path, "vllm", make)
    make.breaks = False
    folder = install.ensure(tmp_path, "vllm", make)
    assert sorted(path.name for path in folder.iterdir()) == ["call-2", "installed.json"]


def test_changed_requirements_make_the_part_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "HERE", tmp_path)
    requirements = tmp_path / "vllm-requirements.txt"
    make = Maker()
    requirements.write_text("numpy==1\n")
    install.ensure(tmp_path / "cache", "vllm", make)
    requirements.write_text("numpy==2\n")
    install.ensure(tmp_path / "cache", "vllm", make)
    install.ensure(tmp_path / "cache", "vllm", make)
    assert make.calls == 2


def archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return path


def test_only_the_converter_is_unpacked(tmp_path: Path) -> None:
    kept = ["conversion/llama.py", "convert_hf_to_gguf.py", "gguf-py/gguf/quants.py"]
    inside = "package-1/vendor/llama.cpp/"
    left = [f"{inside}src/llama.cpp", f"{inside}convert_lora_to_gguf.py", "package-1/setup.py"]
    packed = archive(tmp_path / "a.tar.gz", [*(inside + name for name in kept), *left])
    install.extract(packed, tmp_path / "out")
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in found) == kept
    assert (tmp_path / "out" / kept[0]).read_text() == inside + kept[0]


def test_archive_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    packed = archive(tmp_path / "a.tar.gz", ["p/vendor/llama.cpp/conversion/../../x.py"])
    with pytest.raises(SystemExit, match="leaves its folder"):
        install.extract(packed, tmp_path / "out")


def test_every_package_is_pinned() -> None:
    for name in install.PARTS:
        text = (install.HERE / f"{name}-requirements.txt").read_text()
        lines = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
        assert lines
        assert all("==" in line for line in lines)
