"""One page that holds a whole report: numbers, plots and nothing from elsewhere."""

from collections.abc import Mapping
from html import escape

from bake.verify.report import Report

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
       color: #1c1c1c; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.25rem 0.6rem; border-bottom: 1px solid #e3e3e3; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pass { color: #1d7a3a; font-weight: 600; } .fail { color: #b3261e; font-weight: 700; }
code { font-size: 0.85rem; overflow-wrap: anywhere; }
figure { margin: 0; } svg { max-width: 100%; height: auto; }
"""


def page(report: Report, plots: Mapping[str, bytes]) -> str:
    """Return the report as one HTML page.

    Args:
        report: what was measured.
        plots: each plot as SVG, by its title.
    """
    verdict = _verdict(report.passed)
    facts = {
        "artifact": report.artifact,
        "base": report.base,
        "plan": f"{report.exactness}, {report.plan_digest}",
        "stored in": report.dtype,
        **{f"prompts, {name}": str(value) for name, value in report.prompts.items()},
        **report.environment,
    }
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>Verification of {escape(report.artifact)}</title><style>{_STYLE}</style></head>",
        f"<body><h1>Verification: {verdict}</h1>",
        _table(
            [], [[escape(name), f"<code>{escape(value)}</code>"] for name, value in facts.items()]
        ),
        "<h2>Comparisons</h2>",
        _comparisons(report),
        _runtimes(report),
        _effects(report),
    ]
    for title, image in plots.items():
        svg = image.decode("utf-8")
        parts.append(f"<h2>{escape(title)}</h2><figure>{svg[svg.index('<svg') :]}</figure>")
    return "".join(parts) + "</body></html>\n"


def _comparisons(report: Report) -> str:
    rows = []
    for row in report.rows:
        limit = "" if row.limit is None else f"{row.limit:.2e}"
        verdict = "" if row.passed is None else _verdict(row.passed)
        rows.append([escape(row.name), _number(f"{row.value:.4g}"), _number(limit), verdict])
        rows[-1].append(escape(row.note))
    return _table(["comparison", "measured", "limit", "", ""], rows)


def _runtimes(report: Report) -> str:
    if not report.runtimes:
        return ""
    rows = [
        [escape(str(record.get(key, ""))) for key in ("runtime", "version", "status", "reason")]
        for record in report.runtimes
    ]
    return "<h2>Runtimes</h2>" + _table(["runtime", "version", "status", ""], rows)


def _effects(report: Report) -> str:
    if not report.effects:
        return ""
    rows = []
    for name, found in report.effects.items():
        cells = [
            "{value:.4g} ({low:.4g} to {high:.4g})".format(**found[model]) if model in found else ""
            for model in ("base", "hooked", "baked")
        ]
        rows.append([escape(name), *cells])
    return "<h2>Side effects, with 95 % confidence intervals</h2>" + _table(
        ["", "base", "hooked", "baked"], rows
    )


def _verdict(passed: bool) -> str:
    return '<span class="pass">pass</span>' if passed else '<span class="fail">FAIL</span>'


def _number(text: str) -> str:
    return f"\0{text}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table; a cell that begins with a null holds a number."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="number">{cell[1:]}</td>' if cell[:1] == "\0" else f"<td>{cell}</td>"
            for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return f"<table>{f'<tr>{top}</tr>' if top else ''}{body}</table>"
