"""The Hugging Face Hub as a source: resolve a commit, then read by range or fetch a snapshot.

Only what huggingface_hub exports is used, so that both generations of its HTTP client work, and
the client itself is never imported by name. A reader who is offline (``HF_HUB_OFFLINE=1``) gets
what the cache holds.
"""

import glob
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError

from bake import __version__
from bake.checkpoints import folder as folders
from bake.checkpoints.config import CONFIG
from bake.checkpoints.hashes import git_id_of, sha256_of
from bake.checkpoints.hub_errors import translated
from bake.checkpoints.hub_names import is_commit
from bake.checkpoints.hub_ranges import HubFiles
from bake.checkpoints.index import INDEX
from bake.errors import CheckpointError, HubError, first_line

_DIGEST = re.compile(r"[0-9a-f]{64}")


_LOG = logging.getLogger("bake")


@dataclass(frozen=True, slots=True)
class Located:
    """Where a repository's files are.

    Attributes:
        folder: the snapshot in the cache; it holds at least the config and the index.
        commit: the commit on the Hub.
        listing: what the repository holds.
        files: access by range, or None when the shards are in ``folder``.
    """

    folder: Path
    commit: str
    listing: folders.Listing
    files: HubFiles | None


def locate(repo: str, revision: str | None, *, complete: bool) -> Located:
    """Resolve a revision and return where its files are, downloading them when asked.

    Raises:
        HubError: the Hub refuses, cannot be reached, or sent other bytes than it states.
        CheckpointError: the repository holds no safetensors checkpoint.
    """
    pinned = is_commit(revision)
    if constants.HF_HUB_OFFLINE:
        return _offline(repo, revision, complete=complete)
    cached = _cached(repo, revision) if pinned and not complete else None
    try:
        return cached or _online(repo, revision, complete=complete)
    except HubError as error:
        if not error.unreachable:
            raise
        return _without_network(repo, revision, error, complete=complete)


def _without_network(
    repo: str, revision: str | None, error: HubError, *, complete: bool
) -> Located:
    """Return the snapshot in the cache, with a word of warning, or raise why the Hub has none."""
    try:
        found = _offline(repo, revision, complete=complete)
    except HubError:
        raise error from None
    _LOG.warning(f"{error.what}; {repo} is taken from the cache, commit {found.commit}")
    return found


def _cached(repo: str, revision: str | None) -> Located | None:
    """Return the snapshot in the cache, or None when it lacks the config or a shard."""
    config = try_to_load_from_cache(repo, CONFIG, revision=revision)
    if not isinstance(config, str):
        return None
    found = Path(config).parent.resolve()
    try:
        return Located(found, found.name, folders.read_listing(found), None)
    except CheckpointError:
        return None  # whoever asks says what that means


def _offline(repo: str, revision: str | None, *, complete: bool) -> Located:
    """Return the snapshot in the cache.

    Which side files the repository has is known only where a whole snapshot was fetched before;
    a cache that other programs filled file by file is taken as it is.
    """
    found = _cached(repo, revision)
    missing: list[str] = []
    if found is not None and complete:
        try:
            names = [file.path for file in get_cached_repo_tree(repo, revision=found.commit)]
        except CachedRepoTreeNotFoundError:
            names = []
        index_text = found.listing.index_text
        if names:
            wanted = _wanted(folders.sort_names(names, index_text, where=repo))
            missing = [x for x in names if x in wanted and not (found.folder / x).exists()]
    if found is None or missing:
        raise HubError(
            f"{repo} is not, or only in part, in the cache and the Hub is switched off",
            why=f"missing: {', '.join(missing[:4])}" if missing else None,
            fix="run once without HF_HUB_OFFLINE=1, or name a folder",
        )
    if complete:
        _check_blobs(found.folder, found.listing, repo)
    return found


def _online(repo: str, revision: str | None, *, complete: bool) -> Located:
    api = HfApi(library_name="bake", library_version=__version__)
    with translated(repo, revision):
        info = api.model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        names = [sibling.rfilename for sibling in info.siblings or []]
        commit = str(info.sha)
        folders.refuse_adapter(names, repo)
        if CONFIG not in names:
            raise CheckpointError(f"has no {CONFIG}", where=repo)
        # subtle: asked for under the user's own word, so that the cache learns which commit that
        # word stands for and finds it again offline.
        config = Path(hf_hub_download(repo, CONFIG, revision=revision))
        if config.parent.name != commit:
            raise HubError(
                f"{repo} changed while it was being read", fix="run again, or name a commit"
            )
        if INDEX in names:
            hf_hub_download(repo, INDEX, revision=commit)
    path = config.parent.resolve()
    index_text = folders.read_text(path, INDEX) if INDEX in names else None
    listing = folders.sort_names(names, index_text, where=repo)
    if not complete:
        here = all((path / name).exists() for name in listing.shards)
        return Located(path, commit, listing, None if here else HubFiles(repo, commit))
    wanted = [name for name in names if name in _wanted(listing)]
    with translated(repo, revision):
        download(repo, commit, wanted)
    _check_blobs(path, listing, repo)
    return Located(path, commit, listing, None)


def _wanted(listing: folders.Listing) -> frozenset[str]:
    """Return the names that an export or a model card needs; ``README.md`` is for the latter."""
    return frozenset((*listing.shards, *listing.side_files, CONFIG, INDEX, "README.md"))


def download(repo: str, commit: str, names: list[str]) -> None:
    """Fetch files of a commit into the cache.

    Raises:
        HubError: the chunk transfer failed; other failures are the client's own.
    """
    try:
        snapshot_download(
            repo,
            revision=commit,
            allow_patterns=[glob.escape(name) for name in names],
            library_name="bake",
            library_version=__version__,
        )
    except RuntimeError as error:  # what the chunk transfer (Xet) raises
        raise HubError(
            f"the download of {repo} failed: {first_line(error)}",
            fix="run again, finished files are kept; HF_HUB_DISABLE_XET=1 avoids chunk transfer",
        ) from error


def _check_blobs(path: Path, listing: folders.Listing, repo: str) -> None:
    """Compare every file of a snapshot with the hash in the name of its blob.

    The client does not: it accepts a byte that flipped on the way. A file kept by Git is named
    by its Git hash, a large one by its sha256.
    """
    names = [*listing.shards, *listing.side_files, CONFIG]
    names += [INDEX] if listing.index_text is not None else []
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda name: _check_blob(path, name, repo), names):
            pass


def _check_blob(path: Path, name: str, repo: str) -> None:
    file = folders.regular_file(path, name)
    link = path / name
    # The first link's name, because a blob may itself link to one that all repositories share.
    expected = link.readlink().name if link.is_symlink() else file.name
    if _DIGEST.fullmatch(expected):
        found = sha256_of(file)
    elif is_commit(expected):  # the id that Git gives a file is spelled like a commit
        found = git_id_of(file)
    else:
        raise HubError(
            f"cannot tell whether {name} of {repo} arrived as it was sent",
            where=str(file),
            why="the cache names it by something other than its hash",
            fix=f"name the folder {path} instead if you trust it",
        )
    if found != expected:
        raise HubError(
            f"{name} of {repo} is not what the Hub states: hash {found}",
            where=str(file),
            why="it was damaged on the way or on this disk",
            fix="remove that file and run again",
        )
