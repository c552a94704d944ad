"""``bake try``: what the models say, before anything is written; and ``--set``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import data_of, error_of, run

from bake.cli import trying

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quickstart.toml"
PROMPT, SHORT = "One day", ("--tokens", "12")


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("try") / "out"
    data_of("export", RECIPE, "--out", out)
    return out


def answers(*args: object) -> dict[str, str]:
    (row,) = data_of("try", *args, *SHORT)["answers"]
    assert row.pop("prompt") == PROMPT
    return dict(row)


def test_a_recipe_speaks_as_base_and_under_hooks_and_writes_nothing(tmp_path: Path) -> None:
    before = sorted(ROOT.joinpath("recipes").rglob("*"))
    said = answers(RECIPE, PROMPT)
    assert list(said) == ["base", "hooked"] and said["base"] != said["hooked"]
    assert sorted(ROOT.joinpath("recipes").rglob("*")) == before
    none = answers(RECIPE, PROMPT, "--set", "edits.0.strength=0")
    assert none["hooked"] == none["base"] == said["base"]  # the control


def test_an_artifact_speaks_as_its_weights_do(baked: Path, tmp_path: Path) -> None:
    said = answers(baked, PROMPT)
    assert list(said) == ["base", "hooked", "baked"]
    assert said["baked"] == said["hooked"] == answers(RECIPE, PROMPT)["hooked"]
    # The control: what is stored is what is heard.
    other = tmp_path / "other"
    shutil.copytree(baked, other)
    base = ROOT / "recipes" / "quickstart" / "model"
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        shutil.copy(base / name, other / name)
    assert answers(other, PROMPT, "--base", base)["baked"] != said["baked"]


def test_a_text_is_shown_whole_and_a_dead_edit_is_remarked_on() -> None:
    shown = run("try", RECIPE, PROMPT, *SHORT)
    assert shown.stdout.startswith(f"{PROMPT}\nbase ") and "\nhooked " in shown.stdout
    assert "change none" not in shown.stderr
    dead = run("try", RECIPE, PROMPT, *SHORT, "--set", "edits.0.strength=0")
    assert "the edits change none of these answers" in dead.stderr


def test_every_line_of_a_pipe_is_a_prompt() -> None:
    piped = run("try", RECIPE, *SHORT, "--json", stdin="One day\n\nA boy\n")
    assert [row["prompt"] for row in json.loads(piped.stdout)["answers"]] == ["One day", "A boy"]
    empty = run("try", RECIPE, stdin="")
    assert empty.exit_code == 2 and "there is no prompt" in empty.stderr


def test_a_chat_remembers_each_voice_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trial:
        voices = ("base", "hooked")
        heard: list[tuple[str, list[str]]] = []  # noqa: RUF012

        def answer(self, voice: str, chats: list[list[dict[str, str]]]) -> list[str]:
            self.heard.append((voice, [turn["content"] for turn in chats[0]]))
            return [f"{voice} {len(chats[0])}"]

    lines = iter(["hello", "", "again", "/new", "fresh"])

    def typed(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    trial = Trial()
    trying._chat(trial)  # type: ignore[arg-type]
    assert trial.heard == [
        ("base", ["hello"]),
        ("hooked", ["hello"]),
        ("base", ["hello", "base 1", "again"]),
        ("hooked", ["hello", "hooked 1", "again"]),
        ("base", ["fresh"]),
        ("hooked", ["fresh"]),
    ]


def test_what_is_no_trial_of_an_artifact_is_refused(baked: Path) -> None:
    for option in (("--set", "title='x'"), ("--model", "m")):
        result = run("try", baked, PROMPT, *option)
        assert result.exit_code == 2 and "is for recipes" in result.stderr


# --- --set -------------------------------------------------------------------------------------


def test_what_is_set_is_planned_recorded_and_planned_again(tmp_path: Path) -> None:
    given = ("--set", "edits.0.alpha=1.0", "--set", 'card.summary="Other"')
    digest = data_of("plan", RECIPE)["plan"]["digest"]
    assert data_of("plan", RECIPE, *given)["plan"]["digest"] != digest
    out = tmp_path / "out"
    data_of("export", RECIPE, "--out", out, *given)
    recipe = json.loads((out / "bake.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe["settings"] == [given[1], given[3]]
    assert recipe["text"] == RECIPE.read_text(encoding="utf-8")
    assert data_of("plan", out)["again"]["same"] is True
    assert run("card", out).exit_code == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Other" in card and "--set edits.0.alpha=1.0" in card
    again = data_of("export", out, "--out", tmp_path / "again")
    assert again["reproduced"]["identical"]
    # The control: without what was set the record's text asks for other edits.
    recipe.pop("settings")
    text = json.loads((out / "bake.json").read_text(encoding="utf-8"))
    (out / "bake.json").write_text(json.dumps({**text, "recipe": recipe}), encoding="utf-8")
    assert run("card", out).exit_code == 0
    assert "Other" not in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("edits.0.strength", "is no KEY=VALUE"),
        ("=1", "is no KEY=VALUE"),
        ("title=Happy", "quote a text, for the shell as well: --set 'title=\"Happy\"'"),
        ("title=", "nothing is no value of TOML"),
        ("edits.1.strength=1", "there is no entry 1 in a list of 1"),
        ("edits.first.strength=1", "there is no entry first in a list of 1"),
        ("title.x=1", "x leads into 'A cheerful storyteller', which is no table"),
        ("edits.0.strenght=1", "did you mean 'strength'?"),
        ("edits.0.alpha='a'", "alpha = 'a' is no number"),
        ("title='a'\nx = 1", "more than one value"),
    ],
)
def test_a_setting_that_leads_nowhere_says_so(setting: str, said: str) -> None:
    content = data_of("plan", RECIPE, "--set", setting, code=2)
    assert said in error_of(content)


def test_a_table_that_the_recipe_does_not_have_can_be_set() -> None:
    found: Callable[..., object] = lambda *a: data_of("plan", RECIPE, *a)["plan"]["exactness"]  # noqa: E731
    assert found("--set", 'edits.0.at="resid_post.2"', "--set", 'export.allow=["relocate"]') == (
        "relocated"
    )
