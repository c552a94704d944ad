"""The last line of a card: by it bake knows a card that it wrote and nobody has edited since."""

import hashlib
import re
from pathlib import Path

from bake.artifact.frontmatter import LIMIT

_LINE = r"<!-- bake card, sha256:([0-9a-f]{64}) -->\n"
_STAMP = re.compile(rf"\n{_LINE}\Z")
_ANYWHERE = re.compile(rf"^{_LINE}", re.MULTILINE)


def stamped(text: str) -> str:
    """Return a card with its stamp."""
    text = text.rstrip("\n") + "\n"
    return f"{text}\n<!-- bake card, sha256:{_digest(text)} -->\n"


def is_stamped(text: str) -> bool:
    """Tell whether a card is one that bake wrote, to the last character."""
    match = _STAMP.search(text)
    return match is not None and _digest(text[: match.start()]) == match[1]


def is_bakes(path: Path) -> bool:
    """Tell whether a file is a card that bake wrote and nobody has edited since."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LIMIT:
        return False
    return is_stamped(path.read_bytes().decode("utf-8", errors="replace"))


def without(text: str) -> str:
    """Return a card without its stamp, which is no longer its end where somebody wrote on."""
    return _ANYWHERE.sub("", text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
