"""``Model``: one of the two models that are compared, opened and not loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bake.artifact.record import RECORD, read_record, record_at
from bake.artifact.schema import Record
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.folder import regular_file
from bake.checkpoints.gguf.file import Gguf, open_gguf
from bake.checkpoints.hub_names import parse_hub_id
from bake.checkpoints.source import LocalFiles
from bake.diff.bytesource import Counted, Spool
from bake.diff.weights import CheckpointWeights, GgufWeights
from bake.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from bake.diff.hub import Repository

_ADAPTER = "adapter_config.json"
_SCHEME = "hf://"
_LIMIT = 64_000_000


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
        return self.checkpoint is not None and not isinstance(_origin(self), LocalFiles)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that were read, from the disk or over the network."""
        return 0 if self.counted is None else self.counted.count

    def small_file(self, name: str) -> Path | None:
        """Return the path of one small file of the model's folder, or None when it has none."""
        if self.repository is not None and name in self.repository.tree:
            return self.repository.fetch(name)
        if self.remote:
            return None
        folder = self.checkpoint.path if self.checkpoint is not None else _gguf_folder(self)
        return regular_file(folder.resolve(), name) if (folder / name).is_file() else None


def _origin(model: Model) -> object:
    return None if model.counted is None else model.counted.origin


def _gguf_folder(model: Model) -> Path:
    assert model.gguf is not None  # one of the two is there
    return model.gguf.path.parent


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
        from bake.diff.hub import read_repository

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
    if kind == "adapter" or found.arch == "controlvector":
        what = "a control vector" if found.arch == "controlvector" else "an adapter"
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


def base_of(out: str) -> str:
    """Return the base that an artifact names in its record: its folder, or its id on the Hub.

    Args:
        out: the artifact.

    Raises:
        UsageError: the artifact has no record that names a base.
        HubError: the Hub refuses or cannot be reached.
    """
    record, folder = _record_of(out)
    if record is None:
        raise UsageError(
            f"{out} does not say what it was made from",
            why=f"it has no {RECORD} that names a base",
            fix="name both: bake diff BASE OUT",
        )
    path = record.base.path
    if path is not None and folder is not None:
        found = (folder / path).resolve()
        if found.exists():
            return str(found)
        raise UsageError(
            f"the base of {out} is not at {found} any more", fix="name it: bake diff BASE OUT"
        )
    return record.base.address


def _record_of(out: str) -> tuple[Record | None, Path | None]:
    text = _hub_id(out) if out.startswith(_SCHEME) else out
    path = Path(text).expanduser()
    if path.exists():
        folder = path if path.is_dir() else path.parent
        found = folder / RECORD
        return (read_record(folder) if found.is_file() else None), folder.resolve()
    if path.suffix.lower() == ".gguf":
        raise CheckpointError("does not exist; a GGUF model is a file", where=out)
    from bake.checkpoints import hub
    from bake.diff.hub import read_repository

    repo, revision = parse_hub_id(text, None)
    located = hub.locate(repo, revision, complete=False, token=None)
    repository = read_repository(repo, located.commit)
    if repository is None:
        found = located.folder / RECORD
        return (read_record(located.folder) if found.is_file() else None), None
    if RECORD not in repository.tree:
        return None, None
    return record_at(repository.fetch(RECORD), out), None


def listed(model: Model) -> Mapping[str, str]:
    """Return the files beside the weights: name and whether a runtime may read it.

    The value is ``side`` for what travels with a model, ``other`` for its card, its records and
    weights in other formats; the name of a folder ends in ``/``.
    """
    if model.checkpoint is None:
        return {}
    names = {name: "side" for name in model.checkpoint.side_files}
    return names | {name: "other" for name in model.checkpoint.left_out}
