"""``verify.md``: the report for whoever reads a folder."""

from collections.abc import Iterable, Mapping, Sequence

from bake.verify.report import Report
from bake.verify.tables import FAIL, NUMBERS, gate_of, prompts_of, side_effects_of, tables


def markdown(report: Report, plots: Mapping[str, str]) -> str:
    """Return the report as Markdown.

    Args:
        report: what was measured.
        plots: path of each plot by its title, relative to the file.
    """
    lines = [
        "# Verification",
        "",
        f"**{report.verdict.capitalize()}**: {report.headline.line()}.",
        "",
        f"- plan: {report.exactness}, `{report.plan_digest}`",
        f"- base: `{report.base}`",
        f"- stored in: {report.dtype}",
    ]
    if report.prompts:
        lines.append(f"- prompts: {prompts_of(report)}, `{report.prompts['digest']}`")
    if report.gate:
        lines.append(f"- gate on side effects: **{gate_of(report)}**")
    if side_effects_of(report):
        lines.append(f"- side effects: {side_effects_of(report)}")
    versions = ", ".join(f"{name} {version}" for name, version in report.environment.items())
    lines.append(f"- run with: {versions}")
    for table in tables(report):
        lines += ["", f"## {table.title}", ""]
        lines += [f"{table.note.capitalize()}.", ""] if table.note else []
        lines += table_lines(table.head, table.rows)
    for title, path in plots.items():
        lines += ["", f"## {title}", "", f"![{title}]({path})"]
    return "\n".join(lines) + "\n"


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown, line by line."""
    rules = ("---:" if name in NUMBERS else "---" for name in head)
    lines = ["|" + "|".join(f" {name} " if name else " " for name in head) + "|"]
    lines.append("|" + "|".join(rules) + "|")
    for row in rows:
        cells = (f"**{FAIL}**" if cell == FAIL else _escaped(cell) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
