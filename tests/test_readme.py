"""What the README shows is what works: its Python, its commands, its numbers of families."""

import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import bake
from bake.cli import COMMANDS, main
from bake.families import load_families
from bake.plan import Exactness

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = ROOT / "recipes" / "quickstart" / "model"


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"## In Python\n\n```python\n(.*?)```", README, re.DOTALL)
    # It is what `help(bake)` says.
    assert code.partition("\n\n")[2].strip() in re.sub("^    ", "", str(bake.__doc__), flags=re.M)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"vector": torch.randn(128)}
    exec(code.replace("path/to/model", str(MODEL)), names)
    assert names["request"].plan.exactness is Exactness.EXACT
    for command, said in (
        (["card", "out"], "written   yes"),
        (["plan", "out"], "this is   the plan of the record"),
        (["export", "out", "--out", "again"], "as recorded  11 of 11 files identical"),
    ):
        result = CliRunner().invoke(main, command)
        assert (result.exit_code, said in result.output) == (0, True), result.output


def test_every_command_is_listed() -> None:
    listed = re.findall(r"^bake (\w+) ", README.partition("## Two commands")[0], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_picture_is_that_of_the_report() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_picture.py"))
    text = made["REPORT"].read_text(encoding="utf-8")
    drawn = made["picture"](json.loads(text))
    assert made["PICTURE"].read_text(encoding="utf-8") == drawn, "run python docs/make_picture.py"
    # The control: another report is another picture.
    assert made["picture"](json.loads(text.replace("grinned", "frowned"))) != drawn
    recipe = tomllib.loads(made["APPROXIMATE"].read_text(encoding="utf-8"))
    figure = made["verdicts"](json.loads(text), recipe)
    assert made["VERDICTS"].read_text(encoding="utf-8") == figure, "run python docs/make_picture.py"
    assert made["verdicts"](json.loads(text), {"verify": {"most_kl": 0.5}}) != figure


def test_the_tour_is_what_the_demo_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Command by command; tests/real runs the demo."""
    block = README.partition("## Five minutes on a real model")[2].split("```")[1]
    told = [shlex.split(line) for line in block.strip().splitlines()]
    made = runpy.run_path(str(ROOT / "run.py"))
    ran: list[list[str]] = []
    names = made["demo"].__globals__
    monkeypatch.setitem(names, "program", lambda: "/bin/bake")
    monkeypatch.setitem(names, "steps", lambda *commands: ran.extend(commands))
    monkeypatch.setitem(names, "OUT", tmp_path)
    monkeypatch.setitem(names, "CACHE", tmp_path / "cache")
    made["demo"]()
    places = (f"{tmp_path}/cache/", f"{tmp_path}/demo/", f"{ROOT}/", "/bin/")

    def plain(word: str) -> str:
        return next((word.removeprefix(p) for p in places if word.startswith(p)), word)

    assert [[plain(word) for word in command] for command in ran] == told
    assert len(told) == 7 and told[1][:2] == ["bake", "fit"]


def test_the_number_of_families_is_that_of_the_tables() -> None:
    (stated,) = re.findall(r"\*\*Architectures:\*\* (\d+) families", README)
    assert int(stated) == len(load_families())


def test_the_plan_of_the_quickstart_is_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = README.partition("## The quickstart")[2].split("```")[1].strip()
    monkeypatch.chdir(ROOT)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["plan", "recipes/quickstart.toml"])
    assert result.stdout.strip() == shown
