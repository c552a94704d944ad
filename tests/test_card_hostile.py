"""Records that were tampered with: each gives a card that the Hub can read, or is refused."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cards import EXAMPLES, KINDS, example, on_hub
from huggingface_hub import ModelCard

from bake.cards.card import lint_card, render_card
from bake.errors import InputError

ROUNDS = 40
VALUES = (
    None, True, -1, 0.5, 1e308, float("nan"), 10**30, "", "x", "](y) | `z` <b> $$w$$ {{ v }}",
    "a\nb\x00c\u202e", "sha256:" + "0" * 64, [], [1], ["x"], [{}], {}, {"x": 1}, {"value": "x"},
)  # fmt: skip


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a JSON value with each of its keys."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        yield content, key
        if isinstance(value, dict | list):
            yield from places(value)


def tampered(content: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    found = list(places(content))
    for _ in range(chance.choice((1, 1, 2, 5))):
        container, key = chance.choice(found)
        if isinstance(container, dict) and chance.random() < 0.3:
            container.pop(key, None)
        else:
            container[key] = copy.deepcopy(chance.choice(VALUES))
    return content


@pytest.mark.parametrize("kind", KINDS)
def test_tampered_records(kind: str, tmp_path: Path) -> None:
    chance = random.Random(kind)
    out = tmp_path / "out"
    shutil.copytree(EXAMPLES / kind, out)
    shown = refused = 0
    for _ in range(ROUNDS):
        record, report = example(kind, "bake.json"), example(kind, "verify.json")
        if chance.random() < 0.5:
            on_hub(record)
        which = chance.choice((record, report))
        tampered(which, chance)
        for name, content in (("bake.json", record), ("verify.json", report)):
            (out / name).write_text(json.dumps(content), encoding="utf-8")
        try:
            text = render_card(out)
        except InputError:  # any other exception is a defect
            refused += 1
            continue
        shown += 1
        ModelCard(text)
        lint_card(text, out)
        (out / "README.md").write_text(text, encoding="utf-8")
    assert shown + refused == ROUNDS and shown > 0 and refused > 0, (shown, refused)
