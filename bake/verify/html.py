"""One page that holds a whole report: numbers, plots and nothing from elsewhere."""

from collections.abc import Mapping
from html import escape

from bake.verify.report import Report
from bake.verify.tables import FAIL, NUMBERS, PASS, Table, gate_of, side_effects_of, tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
       color: #1c1c1c; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.25rem 0.6rem; border-bottom: 1px solid #e3e3e3; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pass { color: #1d7a3a; font-weight: 600; } .fail { color: #b3261e; font-weight: 700; }
.open { color: #9a6700; font-weight: 700; }
code { font-size: 0.85rem; overflow-wrap: anywhere; }
figure { margin: 0; } svg { max-width: 100%; height: auto; }
"""
_VERDICTS = {
    PASS: f'<span class="pass">{PASS}</span>',
    FAIL: f'<span class="fail">{FAIL}</span>',
}

_CLASSES = {"passed": "pass", "failed": "fail", "inconclusive": "open"}


def page(report: Report, plots: Mapping[str, bytes]) -> str:
    """Return the report as one HTML page.

    Args:
        report: what was measured.
        plots: each plot as SVG, by its title.
    """
    facts = {
        "artifact": report.artifact,
        "base": report.base,
        "plan": f"{report.exactness}, {report.plan_digest}",
        "stored in": report.dtype,
        **({"gate on side effects": gate_of(report)} if report.gate else {}),
        **({"side effects": said} if (said := side_effects_of(report)) else {}),
        **{f"prompts, {name}": str(value) for name, value in report.prompts.items()},
        **report.environment,
    }
    rows = (
        f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>"
        for name, value in facts.items()
    )
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>Verification of {escape(report.artifact)}</title><style>{_STYLE}</style></head>",
        f'<body><h1>Verification: <span class="{_CLASSES[report.verdict]}">{report.verdict}</span>',
        f"</h1><p>{escape(report.headline.line())}</p>",
        *map(_table, tables(report)),
        f"<h2>What was run</h2><table>{''.join(rows)}</table>",
    ]
    for title, image in plots.items():
        svg = image.decode("utf-8")
        parts.append(f"<h2>{escape(title)}</h2><figure>{svg[svg.index('<svg') :]}</figure>")
    return "".join(parts) + "</body></html>\n"


def _table(table: Table) -> str:
    title = f"{table.title}, {table.note}" if table.note else table.title
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    rows = (
        "".join(map(_cell, table.head, row))  # one cell under each head
        for row in table.rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>"


def _cell(head: str, text: str) -> str:
    if head in NUMBERS:
        return f'<td class="number">{escape(text)}</td>'
    return f"<td>{_VERDICTS[text] if text in _VERDICTS else escape(text)}</td>"
