"""``[verify]`` and ``[verify.gate]``: what the result is held to, here and in the record."""

from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec import structs

from bake.artifact.schema import Bounds, Gate, GivenText, Limits, RefusalsGate
from bake.errors import InputError, UsageError
from bake.recipe.base import local_path
from bake.recipe.spec import BoundsTable, GateTable, VerifyTable
from bake.section import Toml

LARGEST = 1_000_000
"""Bytes of a file of texts: it travels in the record."""


def read_verify(values: Toml, where: str) -> VerifyTable:
    """Return what ``[verify]`` asks for.

    Raises:
        UsageError: an unknown key, or a limit that nothing can meet.
    """
    table = VerifyTable.read(values, where)
    if table.gate is not None:
        _check(table.gate, f"{where} [gate]")
        if table.gate.perplexity is not None and table.text is None:
            raise UsageError(
                "the gate limits the perplexity, and no text is named that it is measured on",
                where=where,
                fix='name held-out text in [verify], one passage a line: text = "held-out.txt"',
            )
    return table


def _check(gate: GateTable, where: str) -> None:
    """Refuse what limits nothing.

    Raises:
        UsageError: naming it.
    """
    if gate == GateTable():
        raise UsageError(
            "the gate limits nothing",
            where=where,
            fix="give perplexity, scores, refusals or tasks, or leave [verify.gate] out",
        )
    for name, bounds in (*gate.scores.items(), *gate.tasks.items()):
        if not name.strip():
            raise UsageError("the name of a score or a task is empty", where=where)
        if bounds == BoundsTable():
            known = ", ".join(structs.asdict(bounds))
            raise UsageError(
                f"{name!r} has no limit", where=where, fix=f"give one or more of {known}"
            )
    phrases = () if gate.refusals is None else gate.refusals.phrases
    if not all(phrase.strip() for phrase in phrases):
        raise UsageError("a phrase is empty, and every answer begins with it", where=where)


def _bounds(tables: Mapping[str, BoundsTable]) -> dict[str, Bounds]:
    return {name: Bounds(**structs.asdict(table)) for name, table in tables.items()}


def limits_of(spec: VerifyTable, read: Callable[[str], GivenText]) -> Limits | None:
    """Return what a record keeps of ``[verify]``: the limits, and the texts of its files.

    Args:
        spec: the table.
        read: returns the text of a file that the table names.
    """
    if spec == VerifyTable():
        return None
    gate = spec.gate
    return Limits(
        most_kl=spec.most_kl,
        text=None if spec.text is None else read(spec.text),
        gate=None
        if gate is None
        else Gate(
            perplexity=gate.perplexity,
            scores=_bounds(gate.scores),
            refusals=None
            if gate.refusals is None
            else RefusalsGate(
                prompts=read(gate.refusals.prompts),
                least=gate.refusals.least,
                phrases=gate.refusals.phrases,
            ),
            tasks=_bounds(gate.tasks),
        ),
    )


def given_text(path: Path) -> GivenText:
    """Return a file of texts as the record keeps it.

    Raises:
        InputError: it cannot be read, is no UTF-8 text, holds nothing, or is too long to travel.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise InputError(
                f"the text is {size:,} bytes long; the limit is {LARGEST:,}",
                where=str(path),
                why="it travels in the record of the artifact",
                fix="name a sample of it",
            )
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(
            f"the text cannot be read: {error.strerror or error}",
            where=str(path),
            fix="check the path: it is taken from the folder of the recipe",
        ) from error
    except UnicodeDecodeError as error:
        raise InputError("the text is no UTF-8 text", where=str(path)) from error
    if not text.strip():
        raise InputError("the file holds no text", where=str(path), fix="write one text a line")
    return GivenText(file=path.name, text=text)


def limits_beside(spec: VerifyTable, recipe: Path) -> Limits | None:
    """Return what a record keeps of ``[verify]``, with the files that lie beside a recipe.

    Raises:
        InputError: a file cannot be read.
        UsageError: a name is no path.
    """
    return limits_of(spec, lambda name: given_text(local_path(recipe.parent, name, str(recipe))))


def limits_differ(spec: VerifyTable, recorded: Limits | None) -> str | None:
    """Return how the limits of a record differ from those of its recipe, in one clause, or None.

    The texts are the record's own: a recipe has only their names.
    """
    kept = Limits() if recorded is None else recorded
    if spec.most_kl != kept.most_kl:
        return f"the recipe says most_kl = {spec.most_kl}, the record {kept.most_kl}"
    texts = [] if kept.text is None else [kept.text]
    if kept.gate is not None and kept.gate.refusals is not None:
        texts.append(kept.gate.refusals.prompts)
    by_name = {text.file: text for text in texts}
    absent = GivenText(file="", text="")
    again = limits_of(spec, lambda name: by_name.get(Path(name).name, absent))
    return None if again == recorded else "the recipe's [verify] has other limits than the record"
