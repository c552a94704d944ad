"""Artifacts for the tests of cards: the records of ``model_cards/examples``, changed at will."""

import ast
import copy
import json
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

EXAMPLES = Path(__file__).parents[1] / "model_cards" / "examples"
KINDS = ("checkpoint", "adapter", "gguf")
BASE = "meta/storyteller"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Change = Callable[[dict[str, Any]], None]


def example(kind: str, name: str) -> dict[str, Any]:
    """Return a record of an example."""
    found: dict[str, Any] = json.loads((EXAMPLES / kind / name).read_text(encoding="utf-8"))
    return found


def artifact(
    to: Path,
    kind: str = "checkpoint",
    *,
    record: Change = lambda content: None,
    verification: Change | None = lambda content: None,
) -> Path:
    """Write an example without its card, its records changed; None leaves verify.json out."""
    shutil.copytree(EXAMPLES / kind, to)
    (to / "README.md").unlink()
    for name, change in (("bake.json", record), ("verify.json", verification)):
        if change is None:
            (to / name).unlink()
            continue
        content = copy.deepcopy(example(kind, name))
        change(content)
        (to / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return to


def on_hub(content: dict[str, Any]) -> None:
    """Have the base be a repository at a commit, under Apache-2.0."""
    card = {"license": "apache-2.0", "language": "en", "pipeline_tag": "text-generation"}
    content["base"] |= {"model": BASE, "revision": COMMIT, "path": None, "card": card}
    without_card(content)


def without_card(content: dict[str, Any]) -> None:
    """Take ``[card]`` out of the recipe."""
    recipe = content["recipe"]
    recipe["text"] = recipe["text"].partition("[card]")[0]


def with_licence(**stated: Any) -> Change:
    """Return a change that puts a base on the Hub under a licence."""

    def change(content: dict[str, Any]) -> None:
        on_hub(content)
        content["base"]["card"] = stated

    return change


@dataclass(frozen=True)
class Block:
    """A block of code between fences."""

    language: str
    text: str


def blocks_of(text: str) -> list[Block]:
    """Return the blocks of code of a card, as a reader of Markdown finds them."""
    tokens = MarkdownIt().parse(text)
    return [Block(token.info, token.content) for token in tokens if token.type == "fence"]


def not_of_its_language(block: Block) -> str | None:
    """Return why a block of code does not parse, or None; nothing in it is run."""
    read = {"json": json.loads, "toml": tomllib.loads, "python": ast.parse, "sh": _parse_shell}
    if block.language not in read:
        return f"{block.language!r} is no language of a card"
    try:
        read[block.language](block.text)
    except (ValueError, SyntaxError) as error:
        return str(error)
    return None


def _parse_shell(text: str) -> None:
    shell = ["bash", "--norc", "--noprofile", "-n"]
    done = subprocess.run(shell, input=text, capture_output=True, text=True, timeout=10, env={})
    if done.returncode != 0:
        raise ValueError(done.stderr)
