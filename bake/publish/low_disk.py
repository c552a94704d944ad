"""Bake and publish on a disk that does not hold the model: one shard at a time, one commit.

Each edited shard is written, checked, uploaded and removed before the next one; an untouched shard
is copied by the Hub from the base's repository, or goes there by way of this machine, one at a
time. The commit that makes a model of them is made at the end, once. The artifact is the same, file
by file, as one that ``bake export`` writes and ``bake push`` publishes.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd
from torch import Tensor

from bake.artifact.base_digests import BaseDigests
from bake.artifact.destination import Destination, Pushed
from bake.artifact.record import read_record
from bake.cards.base import base_facts
from bake.checkpoints import Checkpoint, NewTensor, Producer, TensorInfo
from bake.checkpoints.index import check_closure, parse_index
from bake.checkpoints.outline import File, small_files, weight_files
from bake.checkpoints.stream import Fill, write_file
from bake.edit_store import edit_files
from bake.errors import CheckpointError, HubError, InputError, UsageError
from bake.outputs.checkpoint import (
    RECORD,
    edited_config,
    planned_tensors,
    record_text,
    refuse_inexact,
)
from bake.plan import Plan
from bake.progress import Progress, Tally
from bake.publish.commit import patiently
from bake.publish.failures import Account, told
from bake.publish.originals import Originals
from bake.publish.preflight import Preflight, Terms, preflight
from bake.publish.push import TIMEOUT, listening, refuse_offline
from bake.publish.remote import read_tree
from bake.publish.run import Head, Run
from bake.publish.scratch import scratch
from bake.publish.session import client
from bake.seal.manifest import (
    FileEntry,
    Manifest,
    entry_of,
    manifest_of,
    read_manifest,
    write_text,
)
from bake.seal.scan import MAX_FILE
from bake.seal.seal import as_error, seal_of
from bake.seal.weights import check_shard, read_header

_SLACK = 1 << 20  # for directory entries and small files


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be baked.

    Attributes:
        plan: made for the checkpoint.
        checkpoint: the base: a folder, or a repository of which only headers are here.
        record: what ``bake.json`` keeps besides the plan, as told from ``home``.
        allow: the exactness classes below EXACT that the recipe accepts.
        home: where an export would put the artifact; the receipt goes beside it.
    """

    plan: Plan
    checkpoint: Checkpoint
    record: Mapping[str, Any]
    allow: frozenset[str]
    home: Path


def push_low_disk(
    work: Work,
    to: Destination,
    terms: Terms,
    *,
    download: bool = False,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
    remark: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Bake a plan shard by shard into one commit.

    Beside the base, where that is a folder here, the disk holds one edited shard, one original
    shard where the base is on the Hub, and the small files.

    Args:
        work: what is to be baked.
        to: where it goes.
        terms: what the user takes on; ``unverified`` has to be among it.
        download: download every file again, one at a time, and compare it.
        timeout: seconds that the Hub may take for one answer.
        progress: called with the bytes of edited shards that are written and their total.
        remark: told what is being done.

    Raises:
        InexactPlan: a finding is not exact and not allowed.
        InputError: the artifact must not be published.
        HubError: the Hub refuses or fails.
        UsageError: another run is at work, or ``terms`` claim a verification.
    """
    refuse_at_once(to, terms)
    refuse_inexact(work.plan, work.allow)
    place = work.home.with_name(f".{work.home.name}.bake-push")
    with scratch(place) as folder, listening(timeout) as said:
        pushed = _LowDisk(work, to, terms, folder, download, progress, remark).publish()
    return with_fields(pushed, notes=(*pushed.notes, *said))


def refuse_at_once(to: Destination, terms: Terms) -> None:
    """Refuse what can be refused before the recipe is read.

    Raises:
        UsageError: ``terms`` claim a verification.
        HubError: the Hub is switched off.
    """
    refuse_offline()
    if not terms.unverified:
        raise UsageError(
            "what never lies on this disk cannot have been verified here",
            fix=f"add --unverified; then `bake verify hf://{to.repo}`, and publish what that "
            f"writes with `bake push REPORT {to.repo} --record`",
        )


@dataclass(slots=True)
class _LowDisk:
    work: Work
    to: Destination
    terms: Terms
    folder: Path
    download: bool
    progress: Progress | None
    remark: Callable[[str], None]
    originals: Originals = field(init=False)
    base: Checkpoint = field(init=False)
    digests: BaseDigests = field(init=False)
    replaced: frozenset[str] = frozenset()
    """The base's tensors that the plan replaces."""
    run: Run = field(init=False)
    head: Head = field(init=False)
    shards: dict[str, str] = field(default_factory=dict)
    """The name of each untouched shard in the base, by its name in the artifact."""
    sent: dict[str, CommitOperationAdd] = field(default_factory=dict)
    infos: list[TensorInfo] = field(default_factory=list)
    early: dict[str, list[Callable[[], None]]] = field(default_factory=dict)

    @property
    def small(self) -> Path:
        """The folder of everything but the weights."""
        return self.folder / "small"

    def publish(self) -> Pushed:
        """Bake, send and commit."""
        self._open_base()
        self.digests = BaseDigests(self.base)
        replace, new = planned_tensors(self.work.plan, self.base, None, self.digests)
        self.replaced = frozenset(replace)
        files, index_text = weight_files(self.base, replace, self._kept(new), here=False)
        names = tuple(file.name for file in files)
        self._check_space(files)
        small = self._write_small(index_text, names)
        self._record({})
        self._card()
        found = self._preflight(names)
        receipt = self.work.home.with_name(f"{self.work.home.name}.push.json")
        self.run = Run(
            self.small,
            self.to,
            self.terms,
            receipt,
            self.remark,
            download=self.download,
            home=self.work.home,
            bring=self._bring,
            ahead=lambda file: file.name in self.sent,
        )
        self.run.take(found)
        self.head = self.run.begin()
        self.run.make_branch(self.head)
        entries = self._bake(files)
        self._check_index(index_text)
        self._record({e.name: e.sha256 for e in entries} | small)
        self._card()
        self.run.found = self._preflight(names)
        self.run.manifest = self._seal(entries)
        self.run.notes.append(
            f"verify it with `bake verify hf://{self.to.repo}`, and publish what that writes with "
            f"`bake push REPORT {self.to.repo} --record`"
        )
        return self.run.complete(self.head)

    def _open_base(self) -> None:
        """Make the base one whose shards come one at a time, and fetch its side files."""
        found = self.work.checkpoint
        repo = str(self.work.record["base"]["model"]).partition("@")[0]
        account, tree = Account(repo, "this account", ()), None
        if found.revision is not None:
            api = client()
            with told(account, "reading the base"):
                tree = patiently(lambda: read_tree(api, repo, str(found.revision)))
        folder = self.folder / "base"
        folder.mkdir()
        self.originals = Originals(found, tree, folder, account)
        self.base = with_fields(found, path=self.originals.side_files(), files=self.originals)

    def _kept(self, new: Mapping[str, NewTensor]) -> dict[str, NewTensor]:
        """Have biases that need a weight computed when its shard is here, and kept in memory."""
        kept = dict(new)
        for bias in self.work.plan.biases:
            if bias.create and bias.weight is not None:
                made = _Kept(new[bias.name].produce)
                kept[bias.name] = with_fields(new[bias.name], produce=made.produce)
                shard = self.base.tensors[bias.weight].shard
                self.early.setdefault(shard, []).append(made.compute)
        return kept

    def _check_space(self, files: tuple[File, ...]) -> None:
        """Require room for the largest shard, and for the original that it is made from."""
        for file in files:
            if file.size > MAX_FILE:
                raise InputError(
                    f"is {file.size:,} bytes long; the Hub takes {MAX_FILE:,}", where=file.name
                )
        edited = max((file.size for file in files if _is_edited(file)), default=0)
        original = max(self.base.shard_sizes.values()) if self.originals.downloads else 0
        free = shutil.disk_usage(self.folder).free
        if free < edited + original + _SLACK:
            raise CheckpointError(
                f"the disk is too small: needed {edited + original + _SLACK} bytes, free {free}",
                where=str(self.folder.parent),
                fix="free some space, or run in a folder on another disk",
            )

    def _write_small(self, index_text: str | None, shards: tuple[str, ...]) -> dict[str, str]:
        """Write every file but the weights and the record; return their hashes."""
        plan = self.work.plan
        config_text = edited_config(plan, self.base)
        extra = dict(edit_files(plan.reference, plan.edits))
        hashes = {}
        for file in small_files(self.base, config_text, index_text, extra, set(shards)):
            target = self.small / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            hashes[file.name] = write_file(
                target, file.pieces, origin=file.origin, advance=lambda _: None
            )
        return hashes

    def _record(self, files: Mapping[str, str]) -> None:
        """Write ``bake.json`` as the export writes it; without hashes as long as there are none."""
        record = dict(self.work.record)
        if self.originals.tree is not None:  # the base's card is here now
            record["base"] = {**record["base"], **base_facts(self.base)}
        text = record_text(self.work.plan, record, self.digests.so_far(self.replaced), files)
        (self.small / RECORD).write_text(text, encoding="utf-8")

    def _card(self) -> None:
        if not self.terms.no_card:
            from bake.cards.card import write_card

            write_card(self.small, repo=self.to.repo, unverified=True, force=True)

    def _preflight(self, names: tuple[str, ...]) -> Preflight:
        found = preflight(self.small, self.terms, weights=names)
        error = as_error(found.problems, str(self.work.home))
        if error is not None:
            raise error
        return found

    def _bake(self, files: tuple[File, ...]) -> list[FileEntry]:
        """Write, check and send the edited shards one by one; return the entries of all shards."""
        tally = Tally(sum(file.size for file in files if _is_edited(file)), self.progress)
        entries = []
        for number, file in enumerate(files):
            shard = self.base.shards[number] if number < len(self.base.shards) else None
            if _is_edited(file):
                entries.append(self._bake_one(file, shard, tally))
            else:
                assert shard is not None
                self.shards[file.name] = shard
                entries.append(self.originals.entry(shard, file.name))
                self.infos += self._renamed(shard, file.name)
            for compute in self.early.pop(shard, ()) if shard is not None else ():
                compute()
        self.originals.drop()
        return entries

    def _bake_one(self, file: File, shard: str | None, tally: Tally) -> FileEntry:
        out = self.folder / "out"
        out.mkdir(exist_ok=True)
        target = out / file.name
        origin = None if shard is None else self.originals.path(shard)
        self.remark(f"baking {file.name}, {file.size:,} bytes")
        # subtle: a producer that reads another shard lets go of this one, which stays open.
        sha256 = write_file(target, file.pieces, origin=origin, advance=tally.advance)
        entry = entry_of(target, file.name)
        if entry.sha256 != sha256:
            raise InputError("is not what was written: the disk is at fault", where=str(target))
        changed = {p.info.name for p in file.pieces if isinstance(p, Fill)}
        error = as_error(tuple(check_shard(out, file.name, changed)), str(self.work.home))
        if error is not None:
            raise error
        self.infos += read_header(out, file.name)
        there = self.head.tree.get(file.name)
        if there is None or not there.equals(entry):
            self.sent[file.name] = self._send(entry, target)
        target.unlink()
        return entry

    def _renamed(self, shard: str, name: str) -> Iterator[TensorInfo]:
        for info in self.base.tensors.values():
            if info.shard == shard:
                yield with_fields(info, shard=name)

    def _check_index(self, index_text: str | None) -> None:
        """Require that index and headers agree about every tensor and the size of all."""
        weight_map = None if index_text is None else parse_index(index_text)
        tensors = check_closure(weight_map, self.infos)
        stated = {} if index_text is None else json.loads(index_text).get("metadata", {})
        total = sum(info.nbytes for info in tensors.values())
        if stated.get("total_size", total) != total:
            raise CheckpointError(
                f"total_size is {stated['total_size']}, the tensors have {total}",
                where="model.safetensors.index.json",
            )

    def _seal(self, entries: list[FileEntry]) -> Manifest:
        """Write the statement and the sums over what is here and what is not; return them all."""
        manifest = manifest_of([*read_manifest(self.small).files, *entries])
        sealed = seal_of(read_record(self.small), manifest, str(self.work.home))
        files = sealed.manifest.by_name()
        for name, text in sealed.texts.items():
            files[name] = write_text(self.small, name, text)
        return manifest_of(files.values())

    def _bring(self, file: FileEntry) -> CommitOperationAdd | None:
        """Return the upload of a shard; an untouched one that the Hub does not copy goes now."""
        if file.name in self.shards and file.name not in self.sent:
            path = self.originals.path(self.shards[file.name])
            self.remark(f"sending {file.name}, {file.size:,} bytes")
            self.sent[file.name] = self._send(file, path)
            self.originals.drop()
        return self.sent.get(file.name)

    def _send(self, file: FileEntry, path: Path) -> CommitOperationAdd:
        """Upload one shard; nobody sees it before the commit names it.

        Raises:
            HubError: the Hub refuses or fails.
            InputError: other bytes were sent than were hashed.
        """
        operation = CommitOperationAdd(file.name, path)
        with told(self.run.account, f"uploading {file.name}"):
            patiently(
                lambda: self.run.api.preupload_lfs_files(
                    self.to.repo,
                    additions=[operation],
                    revision=self.to.revision,
                    create_pr=self.to.pull_request,
                    free_memory=True,
                )
            )
        if operation.path_or_fileobj != b"":
            raise HubError(
                f"the repository keeps {file.name} in Git itself, not as a large file",
                where=self.to.repo,
                fix="restore its .gitattributes: *.safetensors filter=lfs diff=lfs merge=lfs -text",
            )
        if operation.upload_info.sha256.hex() != file.sha256:
            raise InputError("changed while it was being sent", where=file.name, fix="run again")
        return operation


def _is_edited(file: File) -> bool:
    return any(isinstance(piece, Fill) for piece in file.pieces)


@dataclass(slots=True)
class _Kept:
    """A small tensor that is computed once, when what it needs is here."""

    make: Producer
    tiles: list[Tensor] | None = None

    def compute(self) -> None:
        """Compute it now."""
        if self.tiles is None:
            self.tiles = [tile.clone() for tile in self.make()]

    def produce(self) -> Iterator[Tensor]:
        """Yield its tiles."""
        self.compute()
        assert self.tiles is not None
        yield from self.tiles
