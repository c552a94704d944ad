"""``verify.md``: the report for whoever reads a folder."""

from collections.abc import Mapping
from typing import Any

from bake.verify.report import Report

_VERDICTS = {True: "pass", False: "**FAIL**", None: ""}


def markdown(report: Report, plots: Mapping[str, str]) -> str:
    """Return the report as Markdown.

    Args:
        report: what was measured.
        plots: path of each plot by its title, relative to the file.
    """
    prompts = report.prompts
    lines = [
        "# Verification",
        "",
        f"The baked model **{'passed' if report.passed else 'failed'}**.",
        "",
        f"- plan: {report.exactness}, `{report.plan_digest}`",
        f"- base: `{report.base}`",
        f"- stored in: {report.dtype}",
    ]
    if prompts:
        lines.append(
            f"- prompts: {prompts['source']}, {prompts['prompts']} with {prompts['tokens']} "
            f"tokens, `{prompts['digest']}`"
        )
    versions = ", ".join(f"{name} {version}" for name, version in report.environment.items())
    lines += [f"- run with: {versions}", "", *_rows(report), *_runtimes(report)]
    lines += _effects(report)
    for title, path in plots.items():
        lines += ["", f"## {title}", "", f"![{title}]({path})"]
    return "\n".join(lines) + "\n"


def _rows(report: Report) -> list[str]:
    lines = ["| comparison | measured | limit | verdict | |", "|---|---:|---:|---|---|"]
    for row in report.rows:
        limit = "" if row.limit is None else f"{row.limit:.2e}"
        cells = (row.name, f"{row.value:.4g}", limit, _VERDICTS[row.passed], row.note)
        lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    return lines


def _runtimes(report: Report) -> list[str]:
    if not report.runtimes:
        return []
    lines = ["", "## Runtimes", "", "| runtime | version | status | |", "|---|---|---|---|"]
    for record in report.runtimes:
        cells = (record["runtime"], record.get("version", ""), record["status"])
        reason = str(record.get("reason", "")).partition("\n")[0]
        lines.append("| " + " | ".join(_escaped(str(c)) for c in (*cells, reason)) + " |")
    return lines


def _effects(report: Report) -> list[str]:
    if not report.effects:
        return []
    lines = ["", "## Side effects", "", "With 95 % confidence intervals.", ""]
    lines += ["| | base | hooked | baked |", "|---|---|---|---|"]
    for name, found in report.effects.items():
        cells = [_interval(found.get(model)) for model in ("base", "hooked", "baked")]
        lines.append("| " + " | ".join((_escaped(name), *cells)) + " |")
    return lines


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['value']:.4g} ({found['low']:.4g} to {found['high']:.4g})"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
