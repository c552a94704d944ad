"""How the Hub names things: a repository ``owner/name``, one state of it by its commit."""

import re
from pathlib import Path

from bake.errors import CheckpointError, UsageError
from bake.nearby import nearby

HUB_PREFIX = "hf://"
"""Before the name of a file or a repository that is on the Hub."""

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/+-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def split_hub_id(text: str) -> tuple[str, str | None] | None:
    """Return repository and revision of ``owner/name`` or ``owner/name@revision``, or None."""
    match = _HUB_ID.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"] or match["repo"].endswith(".git"):
        return None
    return match["repo"], match["revision"]


def is_repository(text: str) -> bool:
    """Tell whether a text is ``owner/name`` and nothing else."""
    return split_hub_id(text) == (text, None)


def is_commit(text: str | None) -> bool:
    """Tell whether a revision is a commit, which names the same files for ever."""
    return text is not None and _COMMIT.fullmatch(text) is not None


def parse_hub_id(text: str, revision: str | None) -> tuple[str, str | None]:
    """Return the repository and the revision that ``owner/name`` or ``owner/name@revision`` names.

    Raises:
        CheckpointError: the text is no Hub id.
        UsageError: it names a revision and ``revision`` is another one.
    """
    found = split_hub_id(text)
    if found is None:
        raise CheckpointError(
            f"{text!r} is neither a folder here nor a Hub id",
            fix=nearby(Path(text), "a Hub id is owner/name or owner/name@revision"),
        )
    if revision is not None and found[1] not in (None, revision):
        raise UsageError(f"two revisions are named: {found[1]!r} and {revision!r}")
    return found[0], revision or found[1]
