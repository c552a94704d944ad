"""What others have put into a repository since bake's last commit there; it is not ours to undo.

``SHA256SUMS`` of the last commit lists what bake published. A file that it does not list was added
on the web, or by another program; a card with another hash was edited there.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from bake.artifact.names import CARD, OUTSIDE, SUMS
from bake.errors import HubError
from bake.publish.download import fetch
from bake.publish.hub import Head, Hub
from bake.publish.remote import equal
from bake.seal.manifest import FileEntry, Manifest, read_sums


def keep_others(
    hub: Hub, head: Head, manifest: Manifest, *, force_card: bool
) -> tuple[Hub, Head, tuple[str, ...]]:
    """Return the repository without the files of others, which a commit then leaves as they are.

    A pull request is looked at by whoever owns the repository, and may replace anything.

    Args:
        hub: who publishes where.
        head: the state of the repository.
        manifest: what is going to be published.
        force_card: replace a card that was edited on the Hub.

    Returns:
        hub and head that see the rest alone, and the names that are kept.

    Raises:
        HubError: what is published has a file of that name, or a card that was edited on the Hub;
            or the Hub refuses or fails.
        InputError: ``SHA256SUMS`` on the Hub is malformed.
    """
    if head.commit is None:
        return hub, head, ()
    ours = manifest.by_name()
    with tempfile.TemporaryDirectory(prefix="bake-push-") as folder:
        listed = _listed(hub, head, Path(folder))
        others = head.tree.keys() - listed.keys() - OUTSIDE
        if not hub.to.pull_request:
            changed = {n for n in others & ours.keys() if not equal(head.tree[n], ours[n])}
            _check_card(hub, head, ours, listed, Path(folder), force=force_card)
            for name in sorted(changed - {CARD}):
                raise HubError(
                    f"{name} is on the Hub already, and bake did not put it there",
                    where=hub.to.repo,
                    fix="rename one of the two, or propose the change with --create-pr",
                )
    kept = frozenset(others - ours.keys())
    tree = {name: file for name, file in head.tree.items() if name not in kept}
    return replace(hub, kept=kept), replace(head, tree=tree), tuple(sorted(kept))


def _listed(hub: Hub, head: Head, folder: Path) -> dict[str, str]:
    """Return the hashes of what bake published last, by name."""
    if SUMS not in head.tree or head.commit is None:
        return {}
    fetch(hub, head.commit, SUMS, folder)
    return read_sums(folder)


def _check_card(
    hub: Hub,
    head: Head,
    ours: dict[str, FileEntry],
    listed: dict[str, str],
    folder: Path,
    *,
    force: bool,
) -> None:
    """Refuse to replace or remove a card that was edited on the Hub."""
    there = head.tree.get(CARD)
    if force or there is None or head.commit is None:
        return
    if CARD in ours and equal(there, ours[CARD]):
        return
    if fetch(hub, head.commit, CARD, folder).sha256 != listed.get(CARD):
        raise HubError(
            f"{CARD} was edited on the Hub since bake wrote it",
            where=hub.to.repo,
            why="this push would undo that",
            fix=f"take the text over into the {CARD} here, or replace it with --force-card",
        )
