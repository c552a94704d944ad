"""How the edited tensors of a GGUF are to be stored: one word, or one for each kind of tensor."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from bake.errors import UsageError
from bake.section import nearest

AUTO = "auto"
"""The smallest type that keeps the edit."""
KEEP = "keep"
"""The type that a tensor has in the base file."""
PARTS = ("embed", "head", "writers", "readers")
"""The kinds of tensors: tables, the output head, what writes to the stream and what reads it."""


def storage_words(words: Sequence[str], where: str) -> str | Mapping[str, str] | None:
    """Return what a command line says: TYPE, or PART=TYPE once or several times; None: nothing.

    Raises:
        UsageError: a word for all beside others.
    """
    pairs = [word.partition("=") for word in words]
    if not all(mark for _, mark, _ in pairs) and len(words) > 1:
        raise UsageError(
            f"{where} names a type for all and others beside it",
            fix=f"name one type, or every kind of tensor by itself: {where} embed=Q8_0",
        )
    if words and not pairs[0][1]:
        return words[0]
    return {part: word for part, _, word in pairs} or None


def storage_types(given: str | Mapping[str, str], where: str) -> Mapping[str, str]:
    """Return the word for every kind of tensor.

    Args:
        given: ``auto``, ``keep`` or a type of ggml, for all, or by the kind of tensor; a kind that
            is not named is ``auto``.
        where: what says so, for messages.

    Raises:
        UsageError: there is no such kind or type.
    """
    # Here, since gguf-py, which knows the types, takes longer to import than a recipe to read.
    from bake.checkpoints.gguf.types import BY_NAME, type_named

    words = dict.fromkeys(PARTS, given) if isinstance(given, str) else dict(given)
    for part, word in words.items():
        if part not in PARTS:
            raise UsageError(
                f"there is no kind of tensor {part!r}", where=where, fix=nearest(part, PARTS)
            )
        if word not in (AUTO, KEEP) and word.upper() not in BY_NAME:
            type_named(word)
    found = {part: words.get(part, AUTO) for part in PARTS}
    return MappingProxyType(
        {part: word if word in (AUTO, KEEP) else word.upper() for part, word in found.items()}
    )
