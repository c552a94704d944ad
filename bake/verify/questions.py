"""The three questions of a verification, asked in this order and never mixed.

Is the plan right on this model: nothing is rounded, the hooks judge. Do the files hold that plan:
nothing is run, every stored value is compared. What did storage and runtime cost: what is stored
and served against the hooked model, beside what rounding alone does.

Each is answered by its rows and by its controls, which are broken bakes. Where a limit is missed
the answer is *failed*; where no control could fail, or one did not, the comparison cannot tell and
the answer is *inconclusive*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bake.verify.rows import Row

Verdict = Literal["passed", "failed", "inconclusive", "not asked"]


@dataclass(frozen=True, slots=True)
class Question:
    """One of the three.

    Attributes:
        key: how the report calls it.
        text: the question.
        groups: the rows that answer it.
        controls: the group of the broken bakes that it has to tell.
        always: whether it is asked of every artifact.
    """

    key: str
    text: str
    groups: tuple[str, ...]
    controls: str
    always: bool


QUESTIONS = (
    Question("plan", "Is the plan right on this model?", ("plan",), "plan control", True),
    Question("files", "Do the files hold that plan?", ("files",), "files control", True),
    Question(
        "cost", "What did storage and runtime cost?", ("cost", "runtime"), "cost control", False
    ),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verification says to one question."""

    key: str
    text: str
    verdict: Verdict
    reason: str = ""
    """The row that decided it, where it did not pass."""


def answers(rows: Sequence[Row]) -> tuple[Answer, ...]:
    """Return the answer to every question."""
    return tuple(_answer(question, rows) for question in QUESTIONS)


def verdict(found: Sequence[Answer]) -> Verdict:
    """Return what the answers come to: the worst of them."""
    words = {answer.verdict for answer in found}
    for word in ("failed", "inconclusive"):
        if word in words:
            return word
    return "passed" if "passed" in words else "inconclusive"


def _answer(question: Question, rows: Sequence[Row]) -> Answer:
    judged = [row for row in rows if row.group in question.groups and row.passed is not None]
    controls = [row for row in rows if row.group == question.controls and row.passed is not None]
    effects = [row for row in rows if row.group == "effect" and row.passed is not None]

    def answer(word: Verdict, reason: str = "") -> Answer:
        return Answer(question.key, question.text, word, reason)

    failed = [row for row in judged if not row.passed]
    if failed:
        return answer("failed", failed[0].name)
    if not judged:
        return answer("inconclusive" if question.always else "not asked", "nothing was compared")
    # Where nothing was changed, equality is no evidence; the files are compared value by value.
    blind = [row for row in effects if not row.passed and question.key != "files"]
    blind += [row for row in controls if not row.passed]
    if blind:
        return answer("inconclusive", blind[0].name)
    if not controls:
        return answer("inconclusive", "there is no way to break it that could have been seen")
    return answer("passed")
