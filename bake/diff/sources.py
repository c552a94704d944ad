"""``Model``: one of the two models that are compared, opened and not loaded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from bake.artifact.record import RECORD, record_at
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.adapter import FILES, FoundAdapter, find_adapter
from bake.checkpoints.folder import regular_file
from bake.checkpoints.gguf.file import Gguf, open_gguf
from bake.checkpoints.hashes import Stated, git_id_of, sha256_of
from bake.checkpoints.source import Counted, LocalFiles
from bake.diff.bytesource import Spool
from bake.diff.weights import CheckpointWeights, FileWeights, GgufWeights
from bake.errors import CheckpointError, UsageError

_SCHEME = "hf://"
CONFIG = FILES[0]
_FOLDER = re.compile(r"[\w.-]+/[\w.-]+/[^@]+(@.+)?", re.ASCII)


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One side of a comparison.

    Attributes:
        label: what the user named, with the commit of a repository.
        weights: its tensors.
        checkpoint: the checkpoint, or None for a GGUF file.
        gguf: the GGUF file, or None.
        hub: what the Hub states of its files; nothing for what is on this machine alone.
        counted: how many bytes of weights were read, where that is counted.
    """

    label: str
    weights: FileWeights
    checkpoint: Checkpoint | None
    gguf: Gguf | None
    hub: Mapping[str, Stated]
    counted: Counted | None = field(repr=False)

    @property
    def remote(self) -> bool:
        """Whether its weights come over the network."""
        return self.counted is not None and not isinstance(self.counted.origin, LocalFiles)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that were read, from the disk or over the network."""
        return 0 if self.counted is None else self.counted.count

    def small_file(self, name: str) -> Path | None:
        """Return the path of one small file of the model's folder, or None when it has none."""
        if self.checkpoint is not None and name in self.hub:
            return self.checkpoint.fetched(name)
        if self.remote or not (self._folder / name).is_file():
            return None
        return regular_file(self._folder.resolve(), name)

    def digest(self, name: str, kind: Literal["sha256", "git"] = "sha256") -> str:
        """Return ``sha256:…`` or ``git:…`` of a file, as the Hub states it or the file here has it.

        Raises:
            HubError: the Hub refuses or cannot be reached.
            CheckpointError: the file has gone, or is a link out of its folder.
        """
        assert self.checkpoint is not None  # GGUF files have no files beside them
        stated = self.hub.get(name)
        known = None if stated is None else stated.sha256 if kind == "sha256" else stated.git_oid
        if known is None:
            path = self.checkpoint.fetched(name)
            known = sha256_of(path) if kind == "sha256" else git_id_of(path)
        return f"{kind}:{known}"

    @property
    def folder(self) -> Path | None:
        """Where the model is on this machine; None where that is the cache of the Hub."""
        cached = self.checkpoint is not None and self.checkpoint.revision is not None
        return None if cached else self._folder.resolve()

    @property
    def _folder(self) -> Path:
        if self.checkpoint is not None:
            return self.checkpoint.path
        assert self.gguf is not None  # one of the two is there
        return self.gguf.path.parent


def open_out(source: str, scratch: Path) -> Model | FoundAdapter:
    """Open what may also be a PEFT adapter, which has no weights of its own.

    Args:
        source: as ``open_model`` takes it; an adapter is a folder, ``owner/name`` or
            ``owner/name/folder``.
        scratch: an existing folder for what is fetched.

    Raises:
        CheckpointError: it is malformed, hostile or no model.
        HubError: the Hub refuses or cannot be reached.
    """
    text = _text(source)
    if _in_repository(text):
        return find_adapter(text)
    return _open(text, scratch) or find_adapter(text)


def open_model(source: str, scratch: Path) -> Model:
    """Open a folder, a repository on the Hub or a GGUF file.

    Args:
        source: a path, ``owner/name``, ``owner/name@revision``, or either with ``hf://`` before it.
        scratch: an existing folder for what is fetched.

    Raises:
        CheckpointError: it is malformed, hostile or no model.
        UsageError: it is an adapter, which has no weights of its own.
        HubError: the Hub refuses or cannot be reached.
    """
    found = _open(_text(source), scratch)
    if found is None:
        raise UsageError(
            f"{source} is an adapter: it has factors, and no weights of its own",
            why="what it changes is the product of its factors, which a runtime adds",
            fix="name it as the second of the two",
        )
    return found


def _open(text: str, scratch: Path) -> Model | None:
    """Return a model; None for an adapter."""
    path = Path(text).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return _open_gguf(path)
    if (path / CONFIG).is_file():
        return None
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if files:
            raise UsageError(f"{text} is a folder of GGUF files", fix=f"name the file: {files[0]}")
    try:
        opened = open_checkpoint(text)
    except CheckpointError as error:
        if CONFIG in error.what:
            return None
        raise
    return _model_of(text, opened, scratch)


def _text(source: str) -> str:
    """Return a path or an id, without what says that it is on the Hub."""
    if not source.startswith(_SCHEME):
        return source
    text = source.removeprefix(_SCHEME)
    if "/" not in text:
        raise UsageError(
            f"{source!r} names no repository",
            fix="write hf://owner/name or hf://owner/name@revision",
        )
    if Path(text).exists():
        raise UsageError(
            f"{source} is on the Hub, and {text} is a folder here too",
            fix="run from another folder, or name the folder without hf://",
        )
    return text


def _in_repository(text: str) -> bool:
    """Whether a text names a folder of a repository, which only an adapter is."""
    path = Path(text).expanduser()
    inside = _FOLDER.fullmatch(text) is not None and path.suffix.lower() != ".gguf"
    return inside and not path.exists()


def _model_of(source: str, opened: Checkpoint, scratch: Path) -> Model:
    counted = Counted(opened.files)
    files = counted if isinstance(opened.files, LocalFiles) else Spool(counted, scratch)
    checkpoint = replace(opened, files=files)
    label = source if opened.revision is None else f"{opened.repo}@{opened.revision}"
    weights = CheckpointWeights.of(checkpoint)
    return Model(label, weights, checkpoint, None, opened.stated(), counted)


def _open_gguf(path: Path) -> Model:
    found = open_gguf(path)
    kind = found.parts[0].header.text("general.type")
    if kind == "adapter" or found.is_vector:
        what = "a control vector" if found.is_vector else "an adapter"
        raise UsageError(
            f"{path} is {what} and no model",
            why="it holds what a runtime adds, and no weights that could be compared",
            fix=f"`bake directions {path}` says what is in a control vector; of an adapter compare "
            "the folder that PEFT loads",
        )
    return Model(str(path), GgufWeights.of(found), None, found, {}, None)


def base_of(out: str, record: Path | None, folder: Path | None) -> str:
    """Return the base that an artifact names in its record: its folder, or its id on the Hub.

    Args:
        out: what the user called it.
        record: the artifact's record, or None where it has none.
        folder: where the artifact is on this machine; None for one on the Hub, whose paths are
            those of another machine.

    Raises:
        UsageError: there is no record, or the base has moved.
        InputError: the record is malformed.
    """
    if record is None:
        raise UsageError(
            f"{out} does not say what it was made from",
            why=f"it has no {RECORD} that names a base",
            fix="name both: bake diff BASE OUT",
        )
    base = record_at(record, out).base
    if base.path is None or folder is None:
        return base.address
    found = (folder / base.path).resolve()
    if not found.exists():
        raise UsageError(
            f"the base of {out} is not at {found} any more", fix="name it: bake diff BASE OUT"
        )
    return str(found)
