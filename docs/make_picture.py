"""The README's pictures: what three models answer to one prompt, and what a verdict means.

    python docs/make_picture.py

They are drawn from the report of the example card, which a verification of the quickstart wrote,
and from the share that a recipe with stand-ins allows.
"""

import json
import textwrap
import tomllib
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "model_cards" / "examples" / "checkpoint" / "verify.json"
PICTURE = ROOT / "docs" / "answers.svg"
VERDICTS = ROOT / "docs" / "verdicts.svg"
APPROXIMATE = ROOT / "recipes" / "quickstart-one-site.toml"

_SAMPLE = 1  # of the report's: the one whose answers differ from their first word on
_WIDTH, _LETTERS, _LINE, _BAR = 880, 33, 19, 740
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
.exact { fill: #1a7f37 } .approximate { fill: #9a6700 } .impossible { fill: #d1242f }
rect.exact, rect.approximate, rect.impossible { stroke: none }
.baked { stroke: #1a7f37; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 }
  rect { fill: #151b23; stroke: #3d444d } .baked { stroke: #3fb950 }
  .exact { fill: #3fb950 } .approximate { fill: #d29922 } .impossible { fill: #f85149 }
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
    share = _percent(headline["lost"])
    measured = (
        f"Measured: hooks move the model's predictions by {headline['effect']:.2g} nats a token; "
        f"{share} % of that is lost in the baked file ({headline['to']})."
    )
    parts.append(_text(0, height - 10, measured, "small"))
    return _drawn(parts, height)


def verdicts(report: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Return the picture of the three verdicts: what each keeps of what the hooks do.

    Args:
        report: of an exact plan, for what rounding alone loses.
        recipe: one with stand-ins, for the share that it may lose.
    """
    lost, most = _percent(report["headline"]["lost"]), recipe["verify"]["most_kl"]
    fitted = f"Lost: at most {100 * most:g} %, as this recipe allows."
    rows = (
        ("exact", 1.0, f"The function that hooks compute. Lost: {lost} % (rounding)."),
        ("approximate", 1 - most, f"Fitted, and measured on texts kept out of the fit. {fitted}"),
        ("impossible", 0.0, "No weights compute it. Refused, with what would do instead."),
    )
    parts = [_text(0, 18, "How much of the edit the written file keeps", "head")]
    for number, (name, kept, said) in enumerate(rows):
        top = 36 + 58 * number
        parts.append(f'<rect x="120" y="{top}" width="{_BAR}" height="18" rx="4"/>')
        if kept:
            bar = f'x="120" y="{top}" width="{_BAR * kept:.0f}" height="18" rx="4"'
            parts.append(f'<rect class="{name}" {bar}/>')
        parts.append(_text(0, top + 14, name, f"head {name}"))
        parts.append(_text(120, top + 36, said, "small"))
    return _drawn(parts, 36 + 58 * len(rows))


def _percent(share: float) -> str:
    return f"{100 * share:.2g}" if share >= _LEAST else f"less than {100 * _LEAST:g}"


def _drawn(parts: list[str], height: int) -> str:
    size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join((head, f"<style>{_STYLE}</style>", *parts, "</svg>\n"))


def _text(left: float, top: float, words: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{left:.0f}" y="{top:.0f}"{style}>{escape(words, quote=False)}</text>'


def main() -> None:
    """Write the pictures."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    recipe = tomllib.loads(APPROXIMATE.read_text(encoding="utf-8"))
    PICTURE.write_text(picture(report), encoding="utf-8")
    VERDICTS.write_text(verdicts(report, recipe), encoding="utf-8")


if __name__ == "__main__":
    main()
