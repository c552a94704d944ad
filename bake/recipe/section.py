"""The tables of a recipe, with the kinds of value that only they hold."""

import re
from collections.abc import Sequence

from bake import section
from bake.errors import UsageError
from bake.section import nearest


class Section(section.Section):
    """A table of a recipe."""

    error = UsageError

    def words(self, key: str) -> tuple[str, ...]:
        """Return a text or a list of texts; an absent key gives none."""
        value = self.raw(key)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise UsageError(f"{key} = {value!r} is no text or list of texts", where=self.where)
        if value is not None and not values:
            raise UsageError(f"{key} is an empty list", where=self.where)
        return tuple(values)

    def choices(self, key: str, known: Sequence[str], default: tuple[str, ...]) -> tuple[str, ...]:
        """Return a list of words, each one of ``known``, without repeats.

        Case, dots, hyphens and underscores do not count: ``vLLM``, ``llama_cpp`` and ``MLX-LM``.
        """
        names = {_plain(word): word for word in known}
        values = self.take(key, list, list(default))
        values = [names.get(_plain(v), v) if isinstance(v, str) else v for v in values]
        for value in values:
            if value not in known:
                raise UsageError(
                    f"{key} holds {value!r}", where=self.where, fix=nearest(str(value), known)
                )
        return tuple(dict.fromkeys(values))


def _plain(word: str) -> str:
    """Return a word without what people spell in several ways."""
    return re.sub(r"[-_. ]", "", word.lower())
