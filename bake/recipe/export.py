"""``[export]``: what is written, for whom, and what the plan may do; and what overrides it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from bake.artifact import CARRIERS
from bake.checkpoints.gguf.storage import AUTO, storage_types
from bake.errors import UsageError
from bake.families import READS, RUNTIMES
from bake.recipe.base import model_of
from bake.recipe.spec import ALLOWANCES, ExportTable, Recipe
from bake.section import Toml, nearest

_KNOWN = {"to": CARRIERS, "allow": ALLOWANCES, "target": RUNTIMES}


def read_export(values: Toml, where: str) -> ExportTable:
    """Return what ``[export]`` asks for.

    Raises:
        UsageError: an unknown key or word, an empty list, or a runtime that reads no output.
    """
    table = ExportTable.read(values, where)
    export = ExportTable(
        to=_words("to", table.to, where),
        # Who says by how much allows it.
        allow=_words("allow", (*table.allow, *(["widen"] if table.widen else [])), where),
        target=_words("target", table.target, where),
        gguf_type=_types(table.gguf_type, where),
        rounding=table.rounding,
        widen=table.widen,
        dequantize=table.dequantize,
    )
    _check_read(export.to, export.target if "target" in values else (), where)
    return export


def override(
    recipe: Recipe,
    *,
    model: str | None = None,
    to: Sequence[str] = (),
    allow: Sequence[str] = (),
    target: Sequence[str] = (),
) -> Recipe:
    """Return the recipe with what a command line says instead.

    Args:
        recipe: the recipe.
        model: another model, a path from the working folder or a Hub id.
        to: other outputs.
        allow: what is allowed as well.
        target: other runtimes.

    Raises:
        UsageError: a word that is none of the known ones, or a runtime that reads no output.
    """
    base = recipe.base
    if model is not None:
        base = model_of(model, None, Path(), "--model")
    words = {
        key: _words(key, given, f"--{key}")
        for key, given in (("to", to), ("allow", allow), ("target", target))
    }
    export = structs.replace(
        recipe.export,
        to=words["to"] or recipe.export.to,
        allow=tuple(dict.fromkeys((*recipe.export.allow, *words["allow"]))),
        target=words["target"] or recipe.export.target,
    )
    _check_read(export.to, words["target"], "--target")
    return replace(recipe, base=base, export=export)


def _types(given: str | dict[str, str], where: str) -> str | dict[str, str]:
    return given if given == AUTO else dict(storage_types(given, f"{where} gguf_type"))


def _words(key: str, given: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the words of a key as the record spells them, without repeats.

    Case, dots, hyphens and underscores do not count: ``vLLM``, ``llama_cpp`` and ``MLX-LM``.
    """
    known = {_plain(word): word for word in _KNOWN[key]}
    for word in given:
        if _plain(word) not in known:
            fix = nearest(word, _KNOWN[key])
            raise UsageError(f"{key} holds {word!r}", where=where, fix=fix)
    return tuple(dict.fromkeys(known[_plain(word)] for word in given))


def _plain(word: str) -> str:
    """Return a word without what people spell in several ways."""
    return re.sub(r"[-_. ]", "", word.lower())


def _check_read(to: Sequence[str], targets: Sequence[str], where: str) -> None:
    """Raise when a target that somebody named reads nothing of what is written."""
    for target in targets:
        if not set(READS[target]) & set(to):
            raise UsageError(
                f"{target} is a target, and reads no {' or '.join(to)}",
                where=where,
                fix=f"write {' or '.join(READS[target])} as well, or leave {target} out",
            )
