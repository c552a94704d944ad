"""A report as tables of words: what its Markdown, its page and the terminal show."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bake.artifact.verification import HELD
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


def outcome(report: Report) -> str:
    """Return the verdict in one line: what was answered, and what the edit lost."""
    return f"{report.verdict}: {report.headline.line()}"


def tables(report: Report) -> tuple[Table, ...]:
    """Return the answers and texts, then the comparisons, runtimes and side effects."""
    found = (_answers(report), _samples(report), _comparisons(report), *_others(report))
    return tuple(table for table in found if table.rows)


def _answers(report: Report) -> Table:
    rows = ((answer.text, answer.verdict, answer.reason) for answer in report.answers)
    return Table("Questions", ("question", "answer", ""), tuple(rows))


def _samples(report: Report) -> Table:
    rows = ((sample.prompt, sample.base, sample.hooked, sample.baked) for sample in report.samples)
    return Table("Texts", ("prompt", *_MODELS), tuple(rows))


def _comparisons(report: Report) -> Table:
    """Return every number; one that nothing is demanded of has no verdict."""
    verdicts = {True: PASS, False: FAIL, None: "–"}
    rows = (
        (
            row.name,
            f"{row.value:.4g}",
            "" if row.limit is None else f"{row.limit:.2e}",
            verdicts[row.passed],
            row.note,
        )
        for row in report.rows
    )
    return Table("Comparisons", ("comparison", *NUMBERS, "verdict", ""), tuple(rows))


def _others(report: Report) -> tuple[Table, ...]:
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
    return (
        Table("Runtimes", ("runtime", "version", "status", ""), tuple(runtimes)),
        Table("Side effects", ("", *_MODELS), tuple(effects), _measured_on(report)),
        _gate(report.gate),
    )


def _gate(gate: Mapping[str, Any]) -> Table:
    """Return the recipe's limits on side effects, with what was measured."""
    rows = (
        (
            check["name"],
            "{value:.4g} ({low:.4g} to {high:.4g})".format(**check),
            f"{check['side']} {check['bound']:g}",
            PASS if check["verdict"] == HELD else FAIL,
            check["verdict"],
        )
        for check in gate.get("checks", ())
    )
    note = "limits on side effects, each held where the whole 95 % interval is within it"
    return Table("Gate", ("limit on", *NUMBERS, "verdict", ""), tuple(rows), note)


def _measured_on(report: Report) -> str:
    """Return what side effects were measured on, in one clause."""
    text, intervals = report.text, "with 95 % confidence intervals"
    if "perplexity" not in report.effects:
        return f"{intervals}; no perplexity: {text['reason']}" if text else intervals
    language = "" if text["language"] is None else f" in {text['language']}"
    size = f"{text['passages']} passages, {text['tokens']} tokens"
    return f"{intervals}; perplexity on {text['source']}{language} ({size})"


def gate_of(report: Report) -> str:
    """Return what came of the gate, in a few words; empty where the recipe has none."""
    verdict = str(report.gate.get("verdict", ""))
    reason = report.gate.get("reason")
    return verdict if reason is None else f"{verdict}: {reason}"


def side_effects_of(report: Report) -> str:
    """Return why there is no perplexity, in one line; empty where there is one."""
    reason = report.text.get("reason")
    return "" if reason is None else f"no perplexity: {reason}"


def prompts_of(report: Report) -> str:
    """Return in one clause what the models were run on; empty where the report does not say."""
    found = report.prompts
    if not found:
        return ""
    counts = f"{found['prompts']} with {found['tokens']} tokens"
    answers = f" and {found['answers']} of answers" if found.get("answers") else ""
    return f"{found['source']}, {counts}{answers} ({found['form']})"
