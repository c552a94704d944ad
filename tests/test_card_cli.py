"""``bake card`` as a user runs it, and what an export records for it."""

import json
from pathlib import Path
from typing import Any

import pytest
from cards import COMMIT, EXAMPLES, artifact, example, on_hub
from click.testing import Result
from commands import recipe_text, run

from bake.artifact.base import base_card, base_ref
from bake.artifact.record import read_record
from bake.artifact.schema import BaseCard
from bake.checkpoints import open_checkpoint
from bake.directions import read_directions
from bake.directions.describe import direction_record
from bake.errors import UsageError
from bake.recipe import CardTable, load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart"


def failure(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)["error"]
    return found


def test_card_is_written_checked_and_found_wrong_once_doctored(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out", record=on_hub)
    card = out / "README.md"
    done = run("card", out, "--repo", "me/happy", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout) == {
        "card": str(card),
        "written": True,
        "problems": [],
        "notes": [],
    }
    text = card.read_text(encoding="utf-8")
    assert "me/happy" in text
    assert run("card", out, "--check", "-q").exit_code == 0
    effect = f"| {example('checkpoint', 'verify.json')['metrics']['effect']['max_dlogit']:.4g} |"
    assert text.count(effect) == 2  # two tables have it
    card.write_text(text.replace(effect, "| 44.93 |"), encoding="utf-8")
    wrong = run("card", out, "--check", "--json")
    assert wrong.exit_code == 4
    assert failure(wrong)["what"] == "2 things are wrong"
    problems = json.loads(wrong.stdout)["problems"]
    assert len(problems) == 2 and all("says '44.93' in the row" in line for line in problems)
    again = run("card", out, "--json")
    assert again.exit_code == 2 and "was edited since" in failure(again)["what"]
    assert run("card", out, "--force", "-q").exit_code == 0
    assert run("card", out, "--check").exit_code == 0


def test_out_names_another_file(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out", record=on_hub)
    done = run("card", out, "--out", tmp_path / "card.md")
    assert done.exit_code == 0 and "written   yes" in done.stdout
    assert (tmp_path / "card.md").is_file() and not (out / "README.md").exists()
    other = tmp_path / "notes.md"
    other.write_text("mine", encoding="utf-8")
    assert run("card", out, "--out", other).exit_code == 2
    assert other.read_text(encoding="utf-8") == "mine"
    assert run("card", out, "--out", tmp_path).exit_code == 2
    assert run("card", out, "--out", tmp_path / "no" / "card.md").exit_code == 2


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["nowhere"], 4, "is no folder"),
        (["out", "--check"], 4, "there is no card"),
        (["out", "--check", "--repo", "me/x"], 2, "--check and --repo exclude each other"),
        (["out", "--check", "--force"], 2, "--check and --force exclude each other"),
        (["out", "--repo", "storyteller"], 2, "is no repository"),
        (["out", "--repo", "me/x@main"], 2, "is no repository"),
    ],
)
def test_wrong_requests(
    args: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact(tmp_path / "out", record=on_hub)
    monkeypatch.chdir(tmp_path)
    done = run("card", *args, "--json")
    assert done.exit_code == code and said in failure(done)["what"]
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_card_that_would_be_wrong_is_not_written(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        on_hub(content)
        content["base"]["card"] = None
        content["recipe"]["title"] = "Made in /scratch/run7"

    out = artifact(tmp_path / "out", record=change)
    done = run("card", out, "--json")
    assert done.exit_code == 4 and "names a place on one machine" in done.stdout
    assert any("states no licence" in note for note in json.loads(done.stdout)["notes"])
    assert json.loads(done.stdout)["written"] is False
    assert not (out / "README.md").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"---\n- 1\n---\n",
        b"---\na: [\n---\n",
        b"---\n" + b"[" * 5000 + b"\n---\n",
        b"",
    ],
)
def test_any_file_may_be_there(content: bytes, tmp_path: Path) -> None:
    out = artifact(tmp_path / "out", record=on_hub)
    (out / "README.md").write_bytes(content)
    assert run("card", out, "--check", "--json").exit_code == 4
    assert run("card", out, "--json").exit_code == 2
    assert (out / "README.md").read_bytes() == content


def test_an_export_records_what_the_card_needs(tmp_path: Path) -> None:
    found = base_ref(open_checkpoint(QUICKSTART / "model"))
    assert (found.tensors, found.dtypes, found.card) == (56, {"F32": 56}, None)
    made = direction_record(
        read_directions(QUICKSTART / "mood.safetensors"), "quickstart/mood.safetensors"
    )
    recorded = read_record(EXAMPLES / "checkpoint")
    assert recorded.directions == {"mood": made}
    assert (recorded.base.digest, recorded.base.tensors) == (found.digest, found.tensors)
    assert len(made.tensors) == 12 and all(row.norm > 0 for row in made.tensors)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        (
            "---\nlicense: gemma\nlanguage: [en, de]\ntags: [x]\n---\n# B\n",
            {"license": "gemma", "language": ["en", "de"]},
        ),
        ("---\nlicense: 3\nlanguage: []\n---\n", {}),
        ("# no metadata\n", {}),
        ("---\n: [\n---\n", None),
    ],
)
def test_what_the_bases_card_states(
    text: str, stated: dict[str, Any] | None, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    found = base_card(tmp_path)
    if stated is None:
        assert found is not None and list(found.to_json()) == ["unreadable"]
    else:
        assert found == BaseCard.of(stated)


CARD = """
[card]
notice = "safety"
summary = "s"
licence = "other"
licence_name = "acme"
language = ["en", "pt"]
datasets = "owner/prompts"
"""


def card_of(text: str) -> CardTable:
    return parse_recipe((recipe_text("base") + text).encode(), Path("recipe.toml")).card


def test_card_of_a_recipe() -> None:
    spec = card_of(CARD)
    assert (spec.notice, spec.summary, spec.intended) == ("safety", "s", None)
    assert (spec.licence, spec.licence_name) == ("other", "acme")
    assert (spec.language, spec.datasets) == (("en", "pt"), ("owner/prompts",))
    recipe = load_recipe(ROOT / "recipes" / "quickstart.toml")
    assert recipe.card.licence == "apache-2.0"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('sumary = "x"', "did you mean 'summary'"),
        ("summary = 3", "summary = 3 is no text"),
        ('notice = "saftey"', "did you mean 'safety'"),
        ('licence = "Apache License"', "licence holds 'Apache License'"),
        ('licence = "other"', "licence_name goes with"),
        ('licence_name = "acme"', "licence_name goes with"),
        ('language = "English"', "language holds 'English'"),
        ("language = []", "language is an empty list"),
        ('datasets = ["https://x/y"]', "datasets holds 'https://x/y'"),
    ],
)
def test_card_of_a_recipe_is_strict(line: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        card_of(f"[card]\n{line}\n")
    assert said in str(caught.value) and "recipe.toml [card]" in str(caught.value)


def test_words_of_the_recipe_are_in_the_card(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        on_hub(content)
        content["recipe"]["text"] += (
            '[card]\nsummary = "Told *gaily*."\nintended = """One.\n\nTwo."""\n'
            'not_for = "Sad people"\ndatasets = ["owner/prompts"]\nlanguage = "de"\n'
        )

    out = artifact(tmp_path / "out", record=change)
    assert run("card", out, "-q").exit_code == 0
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "\nTold \\*gaily\\*.\n" in text and "\nOne.\n\nTwo.\n" in text and "Sad people" in text
    assert "[owner/prompts](https://huggingface.co/datasets/owner/prompts)" in text
    assert "language:\n- de\n" in text and "datasets:\n- owner/prompts\n" in text
    assert COMMIT in text
