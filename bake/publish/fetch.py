"""A published artifact: its files at one commit, each compared with all that speaks of it.

The client takes whatever arrives. Here every file has to be what the Hub states of the commit, what
``bake.json`` lists and what ``SHA256SUMS`` lists. Names are checked before anything is fetched, and
only files that the artifact lists are; nothing in them runs.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from bake.artifact.carrier import KINDS
from bake.artifact.names import CARD, SIGNATURE, STATEMENT, SUMS, check_names, printable
from bake.artifact.record import RECORD, read_record
from bake.artifact.schema import Record
from bake.artifact.verification import VERIFICATION
from bake.checkpoints.folder import regular_file
from bake.checkpoints.hashes import Stated
from bake.checkpoints.hub import download
from bake.checkpoints.hub_errors import translated
from bake.edit_store import EDITS, FITTED
from bake.errors import HubError, InputError, VerificationFailed
from bake.publish.remote import equal, own_tree
from bake.publish.session import client
from bake.seal.manifest import FileEntry, entry_of, read_sums
from bake.seal.provenance import made_by_export

_LIMIT = 64_000_000
_DIGEST = re.compile(r"(?:sha256:)?[0-9a-f]{64}")


def fetch(repo: str, revision: str | None, *, weights: bool) -> tuple[Path, tuple[str, ...]]:
    """Fetch an artifact, or only what its plan is made from.

    Args:
        repo: ``owner/name``.
        revision: a branch, tag or commit; the main branch when None.
        weights: fetch every file that the artifact lists, not the record and the edits alone.

    Returns:
        the folder of its files, which has the name of the commit and lies in the cache of the Hub's
        client: never written to; and what is no reason to stop, and worth knowing.

    Raises:
        HubError: the Hub refuses, cannot be reached, or sent other bytes than it states.
        InputError: the repository holds no artifact of bake, or a malformed one.
        VerificationFailed: a file is not the one that was exported.
    """
    if constants.HF_HUB_OFFLINE:
        folder, tree = _cached(repo, revision), None
    else:
        folder, tree = _online(repo, revision)
    record = read_record(folder)
    listed = _listed(record, f"{repo}: {RECORD}")
    sums = _sums(folder, tree, repo, record.kind)
    edits = [name for name in (EDITS, FITTED) if name in listed]
    wanted = [RECORD, *edits, *([SUMS] if sums else [])]
    if weights:
        for name in (VERIFICATION, STATEMENT):
            if (folder / name).is_file() if tree is None else name in tree:
                wanted.append(name)
        wanted = list(dict.fromkeys([*wanted, *listed]))
    if tree is not None:
        missing = [name for name in wanted if name not in tree]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"{repo} lacks {missing[0]}{more}, which the artifact lists",
                fix="ask its owner to push it again",
            )
        with translated(repo, folder.name):
            download(repo, folder.name, wanted)
    notes = _compare(repo, folder, wanted, tree, listed, sums)
    return folder, tuple(notes)


def _online(repo: str, revision: str | None) -> tuple[Path, dict[str, Stated]]:
    """Return the snapshot with the record in it, and what the Hub states of the commit."""
    api = client()
    with translated(repo, revision):
        info = api.model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        commit = str(info.sha)
        tree = own_tree(api, repo, commit)
        if RECORD not in tree:
            raise InputError(
                f"{repo} holds no {RECORD}: it is {what_it_is(tree)}, and bake did not make it",
                why="the recipe, the edits and the digests that a plan and a verification need are "
                "in it",
                fix="name a model that `bake push` published",
            )
        if tree[RECORD].size > _LIMIT:
            raise InputError(f"{RECORD} is {tree[RECORD].size} bytes long", where=repo)
        # subtle: under the user's own word, which the cache then finds again offline.
        file = Path(hf_hub_download(repo, RECORD, revision=revision))
    if file.parent.name != commit:
        raise HubError(f"{repo} changed while it was being read", fix="run again, or name a commit")
    folder = file.parent.resolve()
    _arrived(repo, folder, RECORD, tree)
    return folder, tree


def _cached(repo: str, revision: str | None) -> Path:
    found = try_to_load_from_cache(repo, RECORD, revision=revision)
    if not isinstance(found, str):
        raise HubError(
            f"{repo} is not in the cache and the Hub is switched off",
            fix="run once without HF_HUB_OFFLINE=1, or name a folder",
        )
    return Path(found).parent.resolve()


def what_it_is(names: Iterable[str]) -> str:
    """Return what a repository or folder without a record holds, in a few words."""
    found = set(names)
    suffixes = {PurePosixPath(name).suffix.lower() for name in found}
    if "adapter_config.json" in found:
        return "a PEFT adapter"
    if "config.json" in found and ".safetensors" in suffixes:
        return "a checkpoint"
    if ".gguf" in suffixes:
        return "a set of GGUF files"
    if "config.json" in found:
        return "a model in another format than safetensors"
    return "no model" if found else "empty"


def _listed(record: Record, where: str) -> dict[str, str]:
    """Return the digests of the export's files by name, once the names may be fetched.

    Raises:
        InputError: the record lists none, or a name that no artifact has.
    """
    files = record.files
    if not files:
        raise InputError("lists no files", where=where)
    if EDITS not in files and KINDS[record.kind].exported:
        raise InputError(f"lists no {EDITS}", where=where)
    for name, digest in files.items():
        if _DIGEST.fullmatch(digest) is None:
            raise InputError(f"the digest of {printable(name)} is no sha256", where=where)
    _check(files, record.kind, where)
    return {name: digest.removeprefix("sha256:") for name, digest in files.items()}


def _check(names: Iterable[str], kind: str, where: str) -> None:
    problems = check_names(list(names), kind, code=True)
    if problems:
        first = problems[0]
        raise InputError(f"names the file {first.where}, which {first.what}", where=where)


def _sums(folder: Path, tree: Mapping[str, Stated] | None, repo: str, kind: str) -> dict[str, str]:
    """Return what ``SHA256SUMS`` lists; nothing where the artifact was never sealed."""
    if tree is not None and SUMS in tree:
        with translated(repo, folder.name):
            download(repo, folder.name, [SUMS])
        _arrived(repo, folder, SUMS, tree)
    if not (folder / SUMS).is_file():
        return {}
    sums = read_sums(folder)
    _check(sums, kind, f"{repo}: {SUMS}")
    return sums


def _compare(
    repo: str,
    folder: Path,
    names: Iterable[str],
    tree: Mapping[str, Stated] | None,
    listed: Mapping[str, str],
    sums: Mapping[str, str],
) -> list[str]:
    """Compare every file with what the Hub, the record and the sums say of it; return notes.

    Raises:
        HubError: a file did not arrive as the Hub states it, or is not in the cache.
        VerificationFailed: a file of the export is not the one that was exported.
    """
    notes = [] if sums else [f"there is no {SUMS}: only what {RECORD} lists is checked"]
    for name in names:
        if not (folder / name).is_file():
            raise HubError(
                f"{name} of {repo} is not in the cache and the Hub is switched off",
                fix="run once without HF_HUB_OFFLINE=1",
            )
        entry = _arrived(repo, folder, name, tree)
        for source, wanted in ((RECORD, listed.get(name)), (SUMS, sums.get(name))):
            if wanted is None or wanted == entry.sha256:
                continue
            if source == SUMS and not made_by_export(name):
                notes.append(f"{name} has changed since the artifact was sealed")
                continue
            raise VerificationFailed(
                f"{name} is not the file that {source} lists",
                where=f"{repo}@{folder.name}",
                why=f"its sha256 is {entry.sha256}, listed is {wanted}: it was changed after the "
                "export",
                fix="take another commit, or ask the owner of the repository",
            )
    known = {*names, *listed, *sums, SUMS, CARD, VERIFICATION, SIGNATURE}
    strange = [name for name in tree or () if name not in known]
    if strange:
        shown = ", ".join(printable(name) for name in strange[:4])
        notes.append(f"not fetched, since the artifact does not list them: {shown}")
    return notes


def _arrived(repo: str, folder: Path, name: str, tree: Mapping[str, Stated] | None) -> FileEntry:
    """Return the hashes of a file, once it is found to be what the Hub states of it.

    Raises:
        HubError: it is not; offline nobody states anything.
    """
    entry = entry_of(regular_file(folder, name), name)
    if tree is not None and not equal(tree[name], entry):
        raise HubError(
            f"{name} of {repo} is not what the Hub states: sha256 {entry.sha256}",
            where=str(folder / name),
            why="it was damaged on the way or on this disk",
            fix="remove that file and run again",
        )
    return entry
