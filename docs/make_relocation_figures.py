"""Write docs/relocation.md's table of blocks anew, and its picture.

    python docs/make_relocation_figures.py

Both are made of what ``benchmarks/relocation.py --keep benchmarks/relocation.jsonl`` has measured.
"""

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "relocation.jsonl"
PAGE, PICTURE = ROOT / "docs" / "relocation.md", ROOT / "docs" / "relocation.svg"
FIRST, LAST = "<!-- blocks -->\n", "<!-- /blocks -->\n"
KINDS = {"affine": "ACE", "ablate": "ablation"}
TYPES = ("float32", "bfloat16")
HEAD = (
    "| block | ACE: effect, nats (first token) | float32, % | bfloat16, % "
    "| ablation: effect | float32, % | bfloat16, % |\n|---|---|---|---|---|---|---|\n"
)
LEAST = 1e-4
"""In percent: what is less is not told apart."""
NOTHING = 1e-4
"""In nats: of less no share is told."""

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 880, 340, 64, 24, 190, 44
_MOST = 10.0
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.grid { stroke: #d1d9e0 } polyline { fill: none; stroke-width: 1.5 }
.affine { stroke: #0969da } .ablate { stroke: #bc4c00 } .float32 { stroke-dasharray: 5 3 }
circle.affine { fill: #0969da } circle.ablate { fill: #bc4c00 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .grid { stroke: #3d444d }
  .affine { stroke: #58a6ff } .ablate { stroke: #f0883e }
  circle.affine { fill: #58a6ff } circle.ablate { fill: #f0883e }
}
"""
Row = dict[str, Any]


def rows() -> dict[tuple[int, str, str], Row]:
    """Return what was measured, by block, kind and type; what was measured again stands last.

    A row that names its texts is of others than the script's, measured before these were fixed.
    """
    lines = ROWS.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return {(row["block"], row["kind"], row["dtype"]): row for row in found}


def table(found: dict[tuple[int, str, str], Row]) -> str:
    """Return the table: a row for each block."""
    lines = []
    for block in sorted({key[0] for key in found}):
        own = [row for (b, _, _), row in found.items() if b == block]
        cells = [str(block) + " †" * any("texts" in row for row in own)]
        for kind in KINDS:
            these = [found.get((block, kind, dtype)) for dtype in TYPES]
            effect = next((row["effect"] for row in these if row is not None), None)
            cells.append("–" if effect is None else f"{effect[0]:.3f} ({effect[1]:.4f})")
            cells += ["–" if row is None else _lost(row) for row in these]
        lines.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(lines)


def _lost(row: Row) -> str:
    rest, first = map(_share, row["lost"], row["effect"])
    return f"{rest} ({first})"


def _share(lost: float | str, effect: float) -> str:
    """Return a share as a reader is shown it; of next to no effect none is told."""
    if effect < NOTHING:
        return "–"
    if isinstance(lost, str):  # as an earlier table had rounded it
        return lost
    return "< 1e-4" if lost < LEAST else f"{lost:.2g}"


def picture(found: dict[tuple[int, str, str], Row]) -> str:
    """Return what is lost against the block, as SVG that suits light pages and dark ones."""
    last = max(key[0] for key in found)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(block: float, share: float) -> tuple[float, float]:
        low, high = math.log10(LEAST), math.log10(_MOST)
        part = (math.log10(min(max(share, LEAST), _MOST)) - low) / (high - low)
        return _LEFT + (right - _LEFT) * block / last, bottom - (bottom - _TOP) * part

    parts = []
    for power in range(round(math.log10(LEAST)), round(math.log10(_MOST)) + 1):
        _, y = place(0, 10.0**power)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        name = f"{10.0**power:g} %" if 10.0**power > LEAST else "less"
        parts.append(_text(_LEFT - 8, y + 4, name, "end"))
    for block in range(0, last + 1, 5):
        parts.append(_text(place(block, 1)[0], bottom + 18, str(block), "middle"))
    middle = (_LEFT + right) / 2
    parts.append(_text(middle, _HEIGHT - 6, "block behind which the edit stands", "middle"))
    for kind in KINDS:
        for dtype in TYPES:
            line = sorted(
                (b, row["lost"][0]) for (b, k, t), row in found.items() if (k, t) == (kind, dtype)
            )
            points = [place(*one) for one in line]
            shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline class="{kind} {dtype}" points="{shown}"/>')
            if dtype == TYPES[1]:
                parts += [
                    f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points
                ]
    for number, (kind, dtype) in enumerate((k, t) for k in KINDS for t in TYPES):
        y = _TOP + 12 + 22 * number
        start, end = right + 16, right + 46
        parts.append(f'<polyline class="{kind} {dtype}" points="{start},{y} {end},{y}"/>')
        parts.append(_text(end + 8, y + 4, f"{KINDS[kind]}, {dtype}", "start"))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join((head, f"<style>{_STYLE}</style>", *parts, "</svg>\n"))


def _text(left: float, top: float, words: str, anchor: str) -> str:
    return f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}">{words}</text>'


def page(text: str) -> str:
    """Return the page with the table in its place."""
    before, rest = text.split(FIRST)
    return before + FIRST + table(rows()) + LAST + rest.split(LAST)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(picture(rows()), encoding="utf-8")
