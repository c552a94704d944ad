"""The README's picture: one prompt, answered by the base, by the hooked and by the baked model.

    python docs/make_picture.py

It is drawn from the report of the example card, which a verification of the quickstart wrote.
"""

import json
import textwrap
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "model_cards" / "examples" / "checkpoint" / "verify.json"
PICTURE = ROOT / "docs" / "answers.svg"

_SAMPLE = 1  # of the report's: the one whose answers differ from their first word on
_WIDTH, _LETTERS, _LINE = 880, 33, 19
_LEAST = 1e-5  # shares below this are not told apart
_COLUMNS = (
    ("base", "the model as it was"),
    ("hooked", "hooks steer it at run time"),
    ("baked", "the edit is in the weights"),
)
_STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328 }
.small { font-size: 12px; fill: #59636e }
.head { font-weight: 600 }
rect { fill: #f6f8fa; stroke: #d1d9e0 }
.baked { stroke: #1a7f37; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 }
  rect { fill: #151b23; stroke: #3d444d } .baked { stroke: #3fb950 }
}
"""


def picture(report: dict[str, Any]) -> str:
    """Return the picture of a report, as SVG that suits light pages and dark ones."""
    sample, headline = report["samples"][_SAMPLE], report["headline"]
    answers = {name: textwrap.wrap(sample[name], _LETTERS) for name, _ in _COLUMNS}
    height = 96 + _LINE * max(map(len, answers.values()))
    parts = [_text(0, 18, f"“{sample['prompt']}”", "head")]
    step = (_WIDTH + 16) / len(_COLUMNS)
    for number, (name, said) in enumerate(_COLUMNS):
        left = number * step + 1
        box = f'x="{left:.0f}" y="32" width="{step - 18:.0f}" height="{height - 64}" rx="6"'
        parts.append(f'<rect class="{name}" {box}/>')
        parts.append(_text(left + 12, 52, name, "head"))
        parts.append(_text(left + 76, 52, said, "small"))
        for line, words in enumerate(answers[name]):
            parts.append(_text(left + 12, 76 + _LINE * line, words))
    lost = headline["lost"]
    share = f"{100 * lost:.2g}" if lost >= _LEAST else f"less than {100 * _LEAST:g}"
    measured = (
        f"Measured: hooks move the model's predictions by {headline['effect']:.2g} nats a token; "
        f"{share} % of that is lost in the baked file ({headline['to']})."
    )
    parts.append(_text(0, height - 10, measured, "small"))
    size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join((head, f"<style>{_STYLE}</style>", *parts, "</svg>\n"))


def _text(left: float, top: float, words: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{left:.0f}" y="{top:.0f}"{style}>{escape(words, quote=False)}</text>'


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(picture(json.loads(REPORT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
