"""The base of a revert: where it is, what is read of it, and what its files must hash to."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.hashes import Stated, sha256_of
from bake.checkpoints.source import Counted
from bake.errors import BakeError, InputError
from bake.progress import Progress, Tally
from bake.revert.record import Revertible


@dataclass(frozen=True, slots=True)
class RevertBase:
    """A base that was opened, its headers read and none of its weights.

    Attributes:
        checkpoint: reads through ``counted``.
        counted: how many bytes of tensors were read.
        pinned: whether it is the very commit that the record names, so that the Hub vouches for it.
    """

    checkpoint: Checkpoint
    counted: Counted
    pinned: bool

    @property
    def on_hub(self) -> bool:
        """Whether it is a repository and not somebody's folder."""
        return self.checkpoint.revision is not None

    def file(self, name: str) -> Path:
        """Return the path of a small file, which is downloaded where it is not here.

        Raises:
            HubError: the Hub refuses or cannot be reached.
        """
        if not self.on_hub or (self.checkpoint.path / name).exists():
            return self.checkpoint.file(name)
        from bake.checkpoints.hub_tree import fetch_file

        fetch_file(self._repo, self.checkpoint.revision, name)
        return self.checkpoint.file(name)

    @property
    def _repo(self) -> str:
        return self.checkpoint.source.partition("@")[0]

    def stated(self, names: Iterable[str], progress: Progress | None) -> dict[str, Stated]:
        """Return what the files must hash to: by the Hub's word, or by the files that are here.

        Raises:
            HubError: the Hub refuses or cannot be reached.
        """
        found = None
        if self.checkpoint.revision is not None:
            from bake.checkpoints.hub_tree import read_repository

            found = read_repository(self._repo, self.checkpoint.revision)
        if found is not None:
            return {name: found.tree[name] for name in names if name in found.tree}
        here = [name for name in names if (self.checkpoint.path / name).exists()]
        paths = {name: self.checkpoint.file(name) for name in here}
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        tally = Tally(sum(sizes.values()), progress)
        return {
            name: Stated(sizes[name], sha256_of(path, tally), "") for name, path in paths.items()
        }


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def open_base(baked: Revertible, named: str | None, revision: str | None) -> RevertBase:
    """Open the base of an artifact: the one that is named, or the one that the record names.

    Raises:
        InputError: it is not there, or it is another model than the recorded one.
        HubError: the Hub refuses or cannot be reached.
    """
    try:
        opened = _open(baked, named, revision)
    except BakeError as error:
        if named is not None:
            raise
        raise type(error)(
            f"the base that the record names is not at hand: {error.what}",
            where=error.where,
            why=error.why,
            fix="name it with --base MODEL",
        ) from error
    _check_recorded(baked, opened)
    counted = Counted(opened.files)
    # Offline the bytes are those of the cache, which nobody has compared with the Hub's hashes.
    same = opened.revision is not None and opened.revision == baked.record.base.revision
    pinned = same and not _offline()
    return RevertBase(replace(opened, files=counted), counted, pinned)


def _open(baked: Revertible, named: str | None, revision: str | None) -> Checkpoint:
    if named is not None:
        return open_checkpoint(named, revision=revision)
    if baked.base_path is not None:
        return open_checkpoint(Path(os.path.normpath(baked.base_path)))
    model = baked.record.base.model
    return open_checkpoint(model, revision=None if "@" in model else baked.record.base.revision)


def _check_recorded(baked: Revertible, base: Checkpoint) -> None:
    """Refuse a base whose config, index or headers are not those that the artifact was made of."""
    known = baked.record.base.address
    if base.digest() != (baked.record.base.digest or base.digest()):
        raise InputError(
            "this is not the base that the artifact was made of",
            where=base.source,
            why="its config.json, its index or the headers of its weights are others",
            fix=f"name the base that the record names: {known}",
        )
    missing = sorted(baked.edited - base.tensors.keys())
    surplus = sorted(baked.created & base.tensors.keys())
    if missing or surplus:
        what = f"has no {missing[0]}" if missing else f"has {surplus[0]}, which the edit created"
        raise InputError(
            f"this is not the base that the artifact was made of: it {what}",
            where=base.source,
            fix=f"name the base that the record names: {known}",
        )
