"""The base of a revert: where it is, what is read of it, and what its files must hash to."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.source import ByteSource
from bake.errors import BakeError, InputError
from bake.progress import Progress
from bake.revert.record import Revertible

_CHUNK = 8 << 20


@dataclass(slots=True)
class Counted:
    """A source of bytes that counts what is read of it."""

    inner: ByteSource
    count: int = 0

    def size(self, file: str) -> int:
        """Return a file's length in bytes."""
        return self.inner.size(file)

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of ``file`` from offset ``start`` on."""
        self.inner.read_into(file, start, buffer)
        self.count += len(buffer)


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
        from huggingface_hub import hf_hub_download

        from bake.checkpoints.hub_errors import translated

        with translated(self._repo, self.checkpoint.revision):
            hf_hub_download(self._repo, name, revision=self.checkpoint.revision)
        return self.checkpoint.file(name)

    @property
    def _repo(self) -> str:
        return self.checkpoint.source.partition("@")[0]

    def stated(self, names: Iterable[str], progress: Progress | None) -> dict[str, "Stated"]:
        """Return what the files must hash to: by the Hub's word, or by the files that are here.

        Raises:
            HubError: the Hub refuses or cannot be reached.
        """
        if self.on_hub and not _offline():
            return self._from_hub(frozenset(names))
        here = [name for name in names if (self.checkpoint.path / name).exists()]
        paths = {name: self.checkpoint.file(name) for name in here}
        total = sum(path.stat().st_size for path in paths.values())
        done, found = 0, {}
        for name, path in paths.items():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
            found[name] = Stated(digest.hexdigest(), None)
        return found

    def _from_hub(self, names: frozenset[str]) -> dict[str, "Stated"]:
        from huggingface_hub import HfApi

        from bake import __version__
        from bake.checkpoints.hub_errors import translated

        api = HfApi(library_name="bake", library_version=__version__)
        with translated(self._repo, self.checkpoint.revision):
            items = list(
                api.list_repo_tree(self._repo, recursive=True, revision=self.checkpoint.revision)
            )
        found = {}
        for item in items:
            blob = getattr(item, "blob_id", None)
            if blob is not None and item.path in names:
                lfs = getattr(item, "lfs", None)
                found[item.path] = Stated(None if lfs is None else lfs.sha256, blob)
        return found


@dataclass(frozen=True, slots=True)
class Stated:
    """What a file hashes to: its sha256, or for a small file on the Hub the id Git gives it."""

    sha256: str | None
    git_oid: str | None

    def matches(self, path: Path, sha256: str | None = None) -> bool:
        """Tell whether a file has these bytes; ``sha256`` is its own, where it is known."""
        if self.sha256 is not None:
            return self.sha256 == (_hashed(path, hashlib.sha256()) if sha256 is None else sha256)
        size = path.stat().st_size
        git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        return self.git_oid == _hashed(path, git)


def _hashed(path: Path, digest: "hashlib._Hash") -> str:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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
