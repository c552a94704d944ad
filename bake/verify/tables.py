"""A report as tables of words: what its Markdown, its page and the terminal show."""

from dataclasses import dataclass

from bake.verify.report import Report

PASS, FAIL = "pass", "FAIL"
NUMBERS = ("measured", "limit")
"""Heads of the columns that hold numbers."""
_MODELS = ("base", "hooked", "baked")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a title; a cell of verdicts is ``PASS``, ``FAIL`` or empty."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(report: Report) -> tuple[Table, ...]:
    """Return the comparisons, and runtimes and side effects where there are any."""
    verdicts = {True: PASS, False: FAIL, None: ""}
    comparisons = (
        (
            row.name,
            f"{row.value:.4g}",
            "" if row.limit is None else f"{row.limit:.2e}",
            verdicts[row.passed],
            row.note,
        )
        for row in report.rows
    )
    runtimes = (
        (
            str(record["runtime"]),
            str(record.get("version", "")),
            str(record["status"]),
            str(record.get("reason", "")).partition("\n")[0],
        )
        for record in report.runtimes
    )
    effects = (
        (
            name,
            *(
                "{value:.4g} ({low:.4g} to {high:.4g})".format(**numbers[model])
                if model in numbers
                else ""
                for model in _MODELS
            ),
        )
        for name, numbers in report.effects.items()
    )
    more = (
        Table("Runtimes", ("runtime", "version", "status", ""), tuple(runtimes)),
        Table("Side effects", ("", *_MODELS), tuple(effects), "with 95 % confidence intervals"),
    )
    return (
        Table("Comparisons", ("comparison", *NUMBERS, "verdict", ""), tuple(comparisons)),
        *(table for table in more if table.rows),
    )


def prompts_of(report: Report) -> str:
    """Return in one clause what the models were run on; empty where the report does not say."""
    found = report.prompts
    if not found:
        return ""
    counts = f"{found['prompts']} with {found['tokens']} tokens"
    return f"{found['source']}, {counts} ({found['form']})"
