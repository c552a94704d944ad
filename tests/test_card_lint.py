"""The lint of cards: each thing that may be wrong with one is found, and a sound one passes."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cards import BASE, COMMIT, KINDS, artifact, blocks_of, example, not_of_its_language, on_hub
from hypothesis import given
from hypothesis import strategies as st

from bake.cards import markdown
from bake.cards.card import lint_card, render_card
from bake.cards.lint import _public

Change = Callable[[str], str]

REPORT = example("checkpoint", "verify.json")
EFFECT = REPORT["metrics"]["effect"]["max_dlogit"]
MEAN_KL = REPORT["metrics"]["float32"]["mean_kl"]
MISSED = next(r["value"] for r in REPORT["rows"] if r["name"].startswith("plan: not rounded"))
LOST = next(r["lost"] for r in REPORT["runtimes"] if r["runtime"] == "vllm")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An artifact whose base is on the Hub, and its card."""
    out = artifact(tmp_path_factory.mktemp("lint") / "out", record=on_hub)
    return out, render_card(out, repo="me/happy-storyteller")


def put(old: str, new: str) -> Change:
    """Return a change that has to find what it replaces."""

    def change(text: str) -> str:
        assert old in text, old
        return text.replace(old, new)

    return change


def cell(value: float) -> str:
    """Return a number as a table shows it."""
    return f"| {value:.4g} |"


def add(line: str) -> Change:
    return lambda text: text + "\n" + line + "\n"


def test_a_sound_card_passes(made: tuple[Path, str]) -> None:
    out, text = made
    assert lint_card(text, out) == ()
    # Prose is free, and a card that was edited is checked like any other.
    assert lint_card(put("## Not for\n", "## Not for\n\nChildren under three.\n")(text), out) == ()
    assert lint_card(add("One more line, and [a page](https://example.org).")(text), out) == ()
    assert lint_card(add("Para todo o mundo: an undefined owner/name.")(text), out) == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # Numbers and facts.
        (put(cell(MISSED), cell(MISSED / 100)), f"'{MISSED / 100:.4g}' in the row"),
        (put(cell(EFFECT), cell(2 * EFFECT)), f"verify.json gives '{EFFECT:.4g}'"),
        (put("0.125 (0.02242", "0.99 (0.02242"), "in the row 'contains:happy'"),
        (put(cell(LOST), cell(LOST / 10)), "in the row 'vllm'"),
        (put("| 0.32.0 | passed |", "| 0.33.0 | passed |"), "'0.33.0' in the row 'vllm'"),
        (put("| files as exported | 0 | 0 | pass |  |\n", ""), "rows in the table 'comparison'"),
        (put("| what was run |  |", "| what was done |  |"), "lacks the table 'what was run'"),
        (put(f"value: {MEAN_KL!r}", "value: 2.4e-20"), "says '2.4e-20' of mean KL"),
        (put("name: mean KL(hooked ‖ baked), nats", "name: fun"), "has a metric 'fun'"),
        (put("36e102d45614037b", "36e102d45614037c"), "a sha256 that no record has"),
        (put(COMMIT, COMMIT[::-1]), "does not link the base at its commit"),
        (put("6550e169d01b", "6550e169d01c"), "does not name the plan's digest"),
        # Metadata.
        (put("---\nbase_model", "---\n: [base_model"), "metadata that is no YAML"),
        (lambda text: text.partition("\n---\n")[2], "has no metadata"),
        (put(f"base_model: {BASE}", "base_model: meta/other"), "has base_model 'meta/other'"),
        (put(f"base_model: {BASE}", "base_model: ./folder"), "which is no id on the Hub"),
        (put(f"base_model: {BASE}\n", ""), "has base_model 'None'"),
        (put("base_model_relation: finetune", "base_model_relation: merge"), "base_model_relation"),
        (put("library_name: transformers", "library_name: keras"), "has library_name 'keras'"),
        (put("- bake\n", ""), "lacks the tag bake"),
        (put("tags:\n- bake", "tags:\n- 3"), "tags that are no list of texts"),
        (put("license: apache-2.0", "license: mit"), ""),
        (put("license: apache-2.0\n", ""), "states no licence; the base has apache-2.0"),
        # What belongs to one machine.
        (add("Made in /home/somebody/models."), "names a"),
        (add("Made in /scratch/run7."), "names a place on one machine"),
        (add("See file:///etc/hosts."), "names a place on one machine"),
        (add("From C:\\models\\x."), "names a place on one machine"),
        (add("From http://127.0.0.1:8000/x"), "names a host that nobody else reaches"),
        (add("From https://node7/x"), "names a host that nobody else reaches"),
        (add("From https://wiki.corp/x"), "names a host that nobody else reaches"),
        (add("hf_" + "a" * 34), "holds a Hugging Face token"),
        # Links.
        (add("[more](missing.md)"), "links to 'missing.md', which is not in the folder"),
        (add("![plot](plots/missing.png)"), "which is not in the folder"),
        (add("[up](../bake.json)"), "links to '../bake.json', which is not in the folder"),
        (add('<img src="gone.png">'), "links to 'gone.png'"),
        (add("[run](javascript:alert)"), "which is no page and no file"),
    ],
)
def test_what_is_wrong_is_found(change: Change, said: str, made: tuple[Path, str]) -> None:
    out, text = made
    problems = [problem.what for problem in lint_card(change(text), out)]
    if not said:  # a licence as permissive as the base's is allowed
        assert problems == []
        return
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize("letter", ["\u202e", "\u2066", "\u2028", "\x85", "\x1b"])
def test_letters_that_hide_others_are_found(letter: str, made: tuple[Path, str]) -> None:
    out, text = made
    (found,) = lint_card(add(f"A file {letter}gnp.exe.")(text), out)
    assert f"README.md: the text holds U+{ord(letter):04X} (" in str(found)
    escaped = put("pipeline_tag: ", f'model_name: "\\u{ord(letter):04x}x"\npipeline_tag: ')(text)
    (found,) = lint_card(escaped, out)
    assert f"README.md: the metadata.model_name holds U+{ord(letter):04X} (" in str(found)
    # Marks that a script of its own needs are no such letters.
    assert (
        lint_card(add("\u05e9\u05dc\u05d5\u05dd\u200f, \U0001f469\u200d\U0001f52c")(text), out)
        == ()
    )


def test_the_recipe_may_say_what_prose_may_not(tmp_path: Path) -> None:
    def change(content: dict[str, dict[str, str]]) -> None:
        on_hub(content)
        content["recipe"]["text"] = "# TODO: {{ other }} layers\n" + content["recipe"]["text"]

    out = artifact(tmp_path / "out", record=change)
    assert lint_card(render_card(out), out) == ()


def test_a_recipe_with_fences_stays_in_its_block(tmp_path: Path) -> None:
    def change(content: dict[str, dict[str, str]]) -> None:
        on_hub(content)
        content["recipe"]["text"] += "# ```\n# [out](gone.md)\n# ````\n"

    out = artifact(tmp_path / "out", record=change)
    text = render_card(out)
    assert "`````toml\n" in text
    assert lint_card(text, out) == ()
    recipe = next(b for b in blocks_of(text) if b.language == "toml")
    assert "[out](gone.md)" in recipe.text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repo", [None, "me/happy-storyteller"])
def test_every_block_of_code_is_of_its_language(
    kind: str, repo: str | None, tmp_path: Path
) -> None:
    out = artifact(tmp_path / "out", kind, record=on_hub)
    blocks = blocks_of(render_card(out, repo=repo))
    assert {"sh", "toml"} <= {block.language for block in blocks}
    assert [why for block in blocks if (why := not_of_its_language(block))] == []


@pytest.mark.parametrize(
    "block", ["json\n{1}", "toml\na = ", "python\nif", "sh\nif true", "sh\nfor (", "none\nx"]
)
def test_a_block_that_does_not_parse_is_seen(block: str) -> None:
    """The control of the test above."""
    (found,) = blocks_of(f"```{block}\n```\n")
    assert not_of_its_language(found)


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("huggingface.co", True),
        ("arxiv.org:443", True),
        ("user@example.org", True),
        ("localhost:80", False),
        ("10.0.0.1", False),
        ("[::1]:80", False),
        ("8.8.8.8", False),
        ("build.internal", False),
    ],
)
def test_hosts(host: str, public: bool) -> None:
    assert _public(host) is public


@given(st.text(max_size=400))
def test_any_text_is_read(text: str) -> None:
    prose = markdown.prose_of(text)
    assert len(prose) <= len(text)
    list(markdown.targets(prose))
    markdown.tables(prose)


BOMB = "\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 30))


@pytest.mark.parametrize(
    "metadata",
    [
        f"x0: &x0 [a]\n{BOMB}\nbase_model: *x29\nlicense: *x29\ntags: *x29",
        f"x0: &x0 [a]\n{BOMB}\nmodel-index: *x29",
        "model-index: 3",
        "model-index: [3, {results: 4}, {results: [5, {metrics: 6}, {metrics: [7, {name: [8]}]}]}]",
        "base_model: {a: b}\ntags: 7\nlicense: {}",
        "base_model: [1, [2]]",
    ],
)
def test_hostile_metadata_is_a_problem(metadata: str, made: tuple[Path, str]) -> None:
    out, text = made
    assert lint_card(f"---\n{metadata}\n---\n" + text.partition("\n---\n")[2], out)


@pytest.mark.parametrize("piece", ["[", "](", "<a ", "`", "```sh\n", "| ", "![", "\\", "/a", "&"])
def test_a_long_card_is_read_in_time(piece: str, made: tuple[Path, str]) -> None:
    out, text = made
    started = time.monotonic()
    lint_card(text + "\n" + piece * (300_000 // len(piece)), out)
    assert time.monotonic() - started < 10
