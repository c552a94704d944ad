"""What the README shows is what works: its Python, its commands, its numbers of families."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bake.cli import COMMANDS, main
from bake.families import load_families
from bake.plan import Exactness

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = ROOT / "recipes" / "quickstart" / "model"


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"## In Python\n\n```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"vector": torch.randn(128)}
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


def test_the_number_of_families_is_that_of_the_tables() -> None:
    (stated,) = re.findall(r"\*\*Architectures:\*\* (\d+) families", README)
    assert int(stated) == len(load_families())
