"""``Model``: one of the two models that are compared, opened and not loaded."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bake.artifact.record import RECORD, record_at
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.folder import regular_file
from bake.checkpoints.gguf.file import Gguf, open_gguf
from bake.checkpoints.source import Counted, LocalFiles
from bake.diff.bytesource import Spool
from bake.diff.weights import CheckpointWeights, GgufWeights
from bake.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from bake.checkpoints.hub_tree import Repository

_ADAPTER = "adapter_config.json"
_SCHEME = "hf://"


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One side of a comparison.

    Attributes:
        label: what the user named, with the commit of a repository.
        weights: its tensors.
        checkpoint: the checkpoint, or None for a GGUF file.
        gguf: the GGUF file, or None.
        repository: what the Hub states of it; None for what is on this machine alone.
        counted: how many bytes of weights were read, where that is counted.
    """

    label: str
    weights: CheckpointWeights | GgufWeights
    checkpoint: Checkpoint | None
    gguf: Gguf | None
    repository: "Repository | None"
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
        if self.repository is not None and name in self.repository.tree:
            return self.repository.fetch(name)
        if self.remote or not (self._folder / name).is_file():
            return None
        return regular_file(self._folder.resolve(), name)

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
    text = _hub_id(source) if source.startswith(_SCHEME) else source
    path = Path(text).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return _open_gguf(path)
    if (path / _ADAPTER).is_file():
        raise _adapter(source)
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if files:
            raise UsageError(
                f"{source} is a folder of GGUF files", fix=f"name the file: {files[0]}"
            )
    try:
        opened = open_checkpoint(text)
    except CheckpointError as error:
        if _ADAPTER in error.what:
            raise _adapter(source) from error
        raise
    return _model_of(source, opened, scratch)


def _hub_id(source: str) -> str:
    text = source.removeprefix(_SCHEME)
    if text.partition("@")[0].count("/") != 1:
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


def _model_of(source: str, opened: Checkpoint, scratch: Path) -> Model:
    repository = None
    if opened.revision is not None:
        # Here, because importing the Hub's client takes longer than reading a folder's headers.
        from bake.checkpoints.hub_tree import read_repository

        name = source.removeprefix(_SCHEME).partition("@")[0]
        repository = read_repository(name, opened.revision)
        source = f"{name}@{opened.revision}"
    counted = Counted(opened.files)
    local = isinstance(opened.files, LocalFiles)
    files = counted if local else Spool(counted, scratch)
    checkpoint = replace(opened, files=files)
    weights = CheckpointWeights.of(checkpoint)
    return Model(source, weights, checkpoint, None, repository, counted)


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
    return Model(str(path), GgufWeights.of(found), None, found, None, None)


def _adapter(source: str) -> UsageError:
    return UsageError(
        f"{source} is an adapter: it has factors, and no weights of its own",
        why="what it changes is the product of its factors, which a runtime adds",
        fix="download it, and name its folder as the second of the two",
    )


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
