"""The report as files: what is in them, and that one report gives one set of bytes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from harness import base_at
from rich.text import Text
from test_verify import baked

from bake.cli import main
from bake.errors import UsageError
from bake.jobs.planned import judged
from bake.verify.files import write_report
from bake.verify.plots import titles
from bake.verify.report import Report
from bake.verify.rows import Row
from bake.verify.verification import Verification


@pytest.fixture(scope="module")
def report(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Report:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    out = baked(base, tmp_path_factory.mktemp("report") / "out")
    return judged(Verification(out, base=str(base.path), generate=2))


def test_files_hold_every_number(report: Report, tmp_path: Path) -> None:
    written = write_report(report, tmp_path / "new" / "folder")
    names = {path.relative_to(tmp_path / "new" / "folder").as_posix() for path in written}
    assert names == {
        "verify.json",
        "verify.md",
        "plots/residual-stream-by-layer.png",
        "plots/leak-per-writer.png",
        "plots/divergence-per-token.png",
        "plots/hooked-against-baked-logits.png",
    }
    text = (tmp_path / "new" / "folder" / "verify.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert data["passed"] is True
    assert data["artifact"] == "out"  # not where it is on this machine
    assert len(data["rows"]) == len(report.rows)
    assert data["prompts"]["digest"].startswith("sha256:")
    assert set(data["environment"]) == {
        "attention",
        "bake",
        "device",
        "python",
        "torch",
        "transformers",
    }
    shown = (tmp_path / "new" / "folder" / "verify.md").read_text(encoding="utf-8")
    for row in report.rows:
        assert row.name.replace("|", "\\|") in shown
    for path in re.findall(r"\]\((plots/[^)]+)\)", shown):
        assert (tmp_path / "new" / "folder" / path).read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def hostile(report: Report) -> Report:
    row = Row("<script>alert(1)</script>", 1.0, None, None)
    return replace(report, rows=(*report.rows, row))


@pytest.fixture(scope="module")
def page(hostile: Report, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """The files of a report with its page, drawn once: read them, never write to them."""
    return write_report(hostile, tmp_path_factory.mktemp("page"), html=True)


def test_one_report_gives_the_same_bytes(
    hostile: Report, page: tuple[Path, ...], tmp_path: Path
) -> None:
    again = write_report(hostile, tmp_path, html=True)
    for ours, theirs in zip(page, again, strict=True):
        assert ours.read_bytes() == theirs.read_bytes(), ours.name


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [str(v) for k, v in attrs if k in ("href", "src", "xlink:href")]


def test_the_page_holds_everything_itself(report: Report, page: tuple[Path, ...]) -> None:
    text = next(file for file in page if file.suffix == ".html").read_text(encoding="utf-8")
    parsed = _Links()
    parsed.feed(text)
    assert parsed.tags.count("svg") == 4
    assert "script" not in parsed.tags and "link" not in parsed.tags
    for link in parsed.found:
        assert link.startswith(("#", "data:image/png;base64,")), link[:80]
    assert "&lt;script&gt;alert(1)" in text
    assert text.count('class="pass"') >= len([r for r in report.rows if r.passed])
    assert 'class="fail"' not in text
    # The verdict and what the edit lost come before everything else.
    assert text.index("lost") < text.index("<table")


def test_a_report_without_numbers_has_no_plots(tmp_path: Path) -> None:
    bare = Report(
        "out", "base", "sha256:0", "exact", "F64", (Row("a", 1.0, 0.0, False, "", "plan"),), {}
    )
    assert titles(bare) == ()
    write_report(bare, tmp_path, html=True)
    assert "**Failed**" in (tmp_path / "verify.md").read_text(encoding="utf-8")
    assert 'class="fail"' in (tmp_path / "verify.html").read_text(encoding="utf-8")


def test_numbers_that_are_not_finite_become_null(report: Report, tmp_path: Path) -> None:
    strange = replace(report, rows=(Row("a", float("nan"), float("inf"), None),))
    write_report(strange, tmp_path, plots=False)
    (row,) = json.loads((tmp_path / "verify.json").read_text(encoding="utf-8"))["rows"]
    assert row["value"] is None and row["limit"] is None
    assert not (tmp_path / "plots").exists()


def test_plots_without_matplotlib_say_what_to_install(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for wanted in ({"plots": True}, {"html": True}):
        with pytest.raises(UsageError, match="plots need matplotlib"):
            write_report(report, tmp_path / "report", **wanted)
    assert not (tmp_path / "report").exists()
    write_report(report, tmp_path / "report")  # the control: they are drawn where they can be
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"verify.json", "verify.md"}


@pytest.mark.parametrize("missing", ["matplotlib", "folder", "file"])
def test_what_a_report_needs_is_there_before_anything_is_run(
    missing: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = baked(base_at(tiny_checkpoint("llama")), tmp_path / "out")
    place = tmp_path / "place"
    place.mkdir()
    (place / "verify.md").write_text("earlier")
    words = ["--report", str(place if missing == "file" else place / "new" / "folder")]
    if missing == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        words.append("--plots")
    locked = place / "verify.md" if missing == "file" else place
    if missing != "matplotlib":
        # A permission does not bind everybody who may run this test.
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked)
    result = CliRunner().invoke(main, ["verify", str(out), "--base", "nowhere", *words])
    assert result.exit_code == 2, result.output
    said = "plots need matplotlib" if missing == "matplotlib" else f"{locked} is read-only"
    # A long path is broken over lines.
    assert said.replace(" ", "") in "".join(result.stderr.split())
    # The control: without it the run begins, and sees that there is no such base.
    monkeypatch.undo()
    result = CliRunner().invoke(main, ["verify", str(out), "--base", "nowhere", *words[:2]])
    assert result.exit_code == 4
    assert not (place / "new").exists()


def test_the_command_writes_the_report_and_says_where(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    out = baked(base, tmp_path / "out")
    arguments = ["verify", str(out), "--base", str(base.path), "--generate", "2"]
    result = CliRunner().invoke(main, [*arguments, "--no-plots"])
    assert result.exit_code == 0, result.output
    assert "verify.md" in re.sub(r"\s+", "", result.stdout)  # a long path is broken
    assert not (out / "plots").exists()
    assert not list(out.glob(".bake*"))
    elsewhere = tmp_path / "elsewhere"
    result = CliRunner().invoke(main, [*arguments, "--html", "--report", str(elsewhere), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["passed"] is True
    assert {path.name for path in elsewhere.iterdir()} == {
        "verify.json", "verify.md", "verify.html", "plots",
    }  # fmt: skip
    # Verifying again does not count its own report as a change of the artifact.
    assert CliRunner().invoke(main, [*arguments, "--no-plots"]).exit_code == 0
    result = CliRunner().invoke(main, [*arguments, "--html", "--no-plots"])
    assert result.exit_code == 2
    result = CliRunner().invoke(main, [*arguments, "--generate", "0", "--score", "contains:a"])
    assert result.exit_code == 2
    assert "a score needs generated text" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--most-kl", "-1"], 2, "--most-kl is -1"),
        (["--most-kl", "nan"], 2, "--most-kl is nan"),
        (["--most-kl", "0"], 2, "--most-kl is 0"),
        (["--adapter", "somewhere"], 2, "--adapter is for a merge"),
        (["--device", "cuda", "--stream"], 2, "--device cuda and --stream exclude each other"),
        (["--device", "cpu", "--stream", "--most-kl", "0"], 2, "--most-kl is 0"),
        (["--device-map", "nonsense"], 4, "transformers does not load this checkpoint"),
        (["--device-map", "cuda:99"], 4, "cannot be placed by the device map 'cuda:99'"),
        (["--score", "contains:"], 2, "the score 'contains:' names nothing"),
        (["--score", "no-such-program --at all"], 4, "there is no such program"),
        (["--score", "'"], 4, "the score's command does not run"),
        (["--score", "classifier:FOLDER"], 4, "the classifier cannot be loaded"),
        (["--report", "FILE"], 2, "is a file"),
        (["--family", "nowhere.toml"], 4, "the family table cannot be read"),
        (["--prompts", "nowhere.txt"], 4, "the prompts cannot be read"),
        (["--base", "nowhere"], 4, "is neither a folder here nor a Hub id"),
        (["--tokens", "0"], 2, "--tokens"),
        (["--generate", "-1"], 2, "--generate"),
        (["--runtime", "sglang"], 2, "--runtime"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_run(
    options: list[str],
    code: int,
    message: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    out = baked(base, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    words = [
        word.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path / "folder"))
        for word in options
    ]
    if "--base" not in words:
        words += ["--base", str(base.path)]
    result = CliRunner().invoke(main, ["verify", str(out), "--no-plots", *words])
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.stderr.split())
    assert "base and hooked model" not in result.stderr
    assert not (out / "verify.json").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_verify_imports_neither_fold_nor_plan() -> None:
    """Two derivations from one edit are evidence only as long as they share no code."""
    code = (
        "import sys, pkgutil, importlib, bake.verify\n"
        "for info in pkgutil.walk_packages(bake.verify.__path__, 'bake.verify.'):\n"
        "    if not info.name.rpartition('.')[2].startswith('_'):\n"
        "        importlib.import_module(info.name)\n"
        "import bake.steer\n"
        "taken = [name for name in sys.modules if name.split('.')[:2] in (\n"
        "    ['bake', 'fold'], ['bake', 'plan'], ['bake', 'outputs'], ['bake', 'rounding'])]\n"
        "sys.exit(repr(taken) if taken else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_stages_are_a_bar_on_a_terminal_and_lines_elsewhere(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    out = baked(base, tmp_path / "out")
    arguments = ["verify", str(out), "--base", str(base.path), "--generate", "2", "--no-plots"]
    piped = CliRunner().invoke(main, arguments).stderr.splitlines()
    assert "base model in float64" in piped and "stored model in float32" in piped
    assert CliRunner().invoke(main, [*arguments, "-q"]).stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    shown = Text.from_ansi(CliRunner().invoke(main, arguments).stderr).plain
    # The count that is expected, and an estimate; no line of a stage by itself.
    (expected,) = {int(n) for n in re.findall(r"\d+/(\d+)", shown)}
    assert abs(expected - len(piped)) <= 3
    assert re.search(r"\d:\d\d:\d\d|-:--:--", shown)
    assert "base model in float64" not in shown.splitlines()
