"""Text of a record in a card: an independent reader of Markdown finds it, and nothing else."""

import ast
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from cards import artifact, blocks_of, on_hub
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from bake.artifact.frontmatter import card_metadata
from bake.cards import edits, markdown
from bake.cards.card import render_card
from bake.cards.templates import _printed
from bake.cards.text import Markdown, code, escape, fenced, merged, printable

READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = (
    "# heading",
    "- item",
    "1. item",
    "> quote",
    "=== \n---",
    "a | b | c",
    "[link](https://evil.example/x) ![i](x.png)",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "`code` ``more`` **bold** _it_ ~~gone~~",
    "https://evil.example www.evil.example @someone",
    "$$x$$ $y$ \\(z\\) \\\\[w\\\\]",
    "line\n\n## second\r\n| a |\n|---|",
    "&lt;b&gt; &#60; &amp;",
    "\\` \\| \\",
    "{{ 7 * 7 }} {% raw %} {# c #}",
    "--- \nlicense: mit\n---",
    "\u202egnorw\u202c \x1b[31mred\x07 \u200bzero",
    "<!-- comment -->",
    "```sh\nrm -rf\n```",
    "[^1] [ref]: x",
    "a" * 10_000,
)
TEXTS = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(max_size=60),
    st.text(alphabet="\\`*_{}[]()<>#+-.!|~$&@:/w \n=1a", max_size=40),
)


def leaves(tokens: list[Token]) -> list[Token]:
    return [leaf for token in tokens for leaf in (token.children or ())]


def shown(tokens: list[Token]) -> str:
    """Return what a reader sees; anything but text is an error."""
    found = leaves(tokens)
    assert {leaf.type for leaf in found} <= {"text", "text_special", "softbreak"}, found
    return "".join(leaf.content for leaf in found)


@given(TEXTS)
@example("\\(x\\)")
def test_escaped_text_is_text_in_a_paragraph_and_in_a_table(text: str) -> None:
    line = printable(text)
    tokens = READER.parse(f"{escape(text)}\n")
    kinds = [token.type for token in tokens]
    assert kinds in (["paragraph_open", "inline", "paragraph_close"], [])
    assert shown(tokens) == line
    table = READER.parse(f"| a | b |\n|---|---|\n| {escape(text)} | end |\n")
    cells = [token for token in table if token.type == "inline"]
    assert len(cells) == 4 and shown(cells[2:3]) == line and cells[3].content == "end"


@given(TEXTS)
def test_escaped_text_begins_no_formula_and_no_address(text: str) -> None:
    made = escape(text)
    # The Hub looks for these before it reads Markdown, and for addresses after.
    assert "$$" not in made and "\\(" not in made
    assert "://" not in made and "www." not in made.lower() and "@" not in made


@given(TEXTS)
def test_code_is_code(text: str) -> None:
    line = printable(text)
    table = READER.parse(f"| a | b |\n|---|---|\n| {code(text)} | end |\n")
    cells = [token for token in table if token.type == "inline"]
    assert len(cells) == 4 and cells[3].content == "end"
    found = leaves(cells[2:3])
    if [leaf.type for leaf in found] == ["code_inline"]:
        assert found[0].content.strip() == line.strip()
        return
    html = [leaf.content for leaf in found if leaf.type == "html_inline"]
    assert html in (["<code>", "</code>"], [])
    assert "".join(leaf.content for leaf in found if leaf.type != "html_inline") == (
        line if html else code(text)
    )


@given(TEXTS)
def test_a_block_holds_its_text(text: str) -> None:
    text = text.replace("\r", "\n").replace("\0", "")
    tokens = READER.parse(f"before\n\n{fenced(text, 'toml')}\n\nafter\n")
    assert [t.type for t in tokens].count("fence") == 1
    block = next(t for t in tokens if t.type == "fence")
    assert block.content.rstrip("\n") == text.rstrip("\n")
    prose = markdown.prose_of(f"before\n\n{fenced(text, 'toml')}\n\nafter\n")
    assert prose == "before\n\n\n\nafter\n"


@given(st.text(max_size=50))
def test_printable_text_has_nothing_hidden(text: str) -> None:
    line = printable(text)
    assert all(unicodedata.category(c)[0] != "C" for c in line) and "\n" not in line


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_records_leave_the_cards_structure_alone(text: str, tmp_path: Path) -> None:
    def harmless(content: dict[str, Any]) -> None:
        put_in(content, "plain")

    def hostile(content: dict[str, Any]) -> None:
        put_in(content, text)

    def put_in(content: dict[str, Any], word: str) -> None:
        on_hub(content)
        content["recipe"] |= {"title": word, "text": "", "digest": word}
        mood = content["directions"].pop("mood")
        mood |= {"file": word, "format": word, "digest": word, "metadata": {word: word}}
        content["directions"][word] = mood
        content["plan"]["notes"] = [word]
        for finding in content["plan"]["findings"]:
            finding |= {"concept": word, "reason": word}
        for tensor in content["plan"]["tensors"]:
            tensor["name"] = tensor["source"] = word
        content["plan"]["config"][0] |= {"key": word, "old": word, "new": word}

    def reported(word: str) -> Any:
        def change(content: dict[str, Any]) -> None:
            content["rows"][0] |= {"name": word, "note": word}
            content["environment"] = {word: word}
            content["prompts"]["source"] = word
            content["runtimes"][1] |= {"runtime": word, "version": word, "status": word}
            content["effects"] = {word: content["effects"]["contains:sad"]}

        return change

    plain = artifact(tmp_path / "plain", record=harmless, verification=reported("plain"))
    made = artifact(tmp_path / "made", record=hostile, verification=reported(text))
    reference, card = render_card(plain), render_card(made)
    assert structure(card) == structure(reference)
    # YAML is data: the same keys, and the title as the model's name.
    found = card_metadata(card)
    assert set(found) == set(card_metadata(reference)) and found["license"] == "apache-2.0"
    assert ModelCard(card).data.model_name == printable(text)


def structure(card: str) -> list[tuple[str, str]]:
    """Return every block of a card but its text, with where every link leads."""
    tokens = READER.parse(card.partition("\n---\n")[2])
    blocks = [(t.type, t.tag) for t in tokens if t.type != "inline"]
    kinds = ("text", "text_special", "softbreak", "code_inline")
    inline = [t for t in leaves(tokens) if t.type not in kinds]
    marks = [
        (t.type, str(t.attrs.get("href", "")))
        for t in inline
        if t.type != "html_inline" or t.content not in ("<code>", "</code>")
    ]
    return blocks + marks


def test_templates_escape_what_is_no_markdown() -> None:
    assert _printed("*a*") == "\\*a\\*"
    assert _printed(Markdown("*a*")) == "*a*"
    assert _printed(12345) == "12,345"
    with pytest.raises(TypeError):
        _printed(None)


def test_code_of_commands_is_quoted(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["base"]["model"] = 'models/a b"; rm -rf $(pwd) `id`'

    text = render_card(artifact(tmp_path / "out", "adapter", record=change))
    blocks = {b.language: b.text for b in blocks_of(text)}
    tree = ast.parse(next(b.text for b in blocks_of(text) if b.language == "python"))
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    assert 'models/a b"; rm -rf $(pwd) `id`' in strings
    serve = next(b.text for b in blocks_of(text) if b.text.startswith("vllm"))
    assert serve.startswith("vllm serve 'models/a b\"; rm -rf $(pwd) `id`' --enable-lora")
    assert blocks


def test_names_run_together() -> None:
    layers = [f"model.layers.{n}.mlp.weight" for n in (0, 1, 2, 5)]
    assert merged([*layers, "lm_head.weight"]) == [
        ("model.layers.0-2,5.mlp.weight", 4),
        ("lm_head.weight", 1),
    ]
    # No full grid: each by itself.
    assert merged(["a.0.1", "a.1.0"]) == [("a.0.1", 1), ("a.1.0", 1)]
    assert merged(["a.0.0", "a.0.1", "a.1.0", "a.1.1"]) == [("a.0-1.0-1", 4)]


@pytest.mark.parametrize(
    ("file", "page"),
    [
        ("hf://a/b/x/direction.pt@c0ffee", "a/b/blob/c0ffee/x/direction.pt"),
        ("hf://a/b/refusal@c0ffee", "a/b/tree/c0ffee/refusal"),
        ("hf://a/b/x.npy", "a/b/blob/main/x.npy"),
        ("hf://a/b/../c", None),
        ("direction.pt", None),
    ],
)
def test_a_direction_on_the_hub_is_linked(file: str, page: str | None) -> None:
    assert edits._link(file) == (page and f"https://huggingface.co/{page}")
