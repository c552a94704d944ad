"""Characters that a text must not hold where it is shown: they make it read as it is not.

An override of the direction of writing shows ``exe.png`` for what is ``gnp.exe`` ("Trojan Source",
CVE-2021-42574), and a line separator ends a line for some readers and not for others. Marks that
only help a language's own script (U+200E, U+200F, joiners) stay.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def unseen(value: Any, place: str = "") -> Iterator[str]:
    """Yield the first such character of every text of a value, and where it is, in words.

    Args:
        value: what TOML, YAML or JSON hold: a text, or lists and tables of them, keys included.
        place: of the value, its keys with a dot between them.
    """
    looked_at: set[int] = set()  # a few aliases of YAML make more lists than memory holds
    left = [(value, place)]
    while left:
        found, where = left.pop()
        if isinstance(found, str) and (match := _UNSEEN.search(found)):
            name = unicodedata.name(match[0], "a control character")
            yield f"{where} holds U+{ord(match[0]):04X} ({name})"
        elif isinstance(found, list | dict) and id(found) not in looked_at:
            looked_at.add(id(found))
            inside = found.items() if isinstance(found, dict) else ((None, one) for one in found)
            for key, each in inside:
                left.append((each, where if key is None else f"{where}.{key}".lstrip(".")))
                left.append((key, f"{where}: a key".lstrip(": ")))
