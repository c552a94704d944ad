"""Where a PEFT adapter is: a folder here, or a repository on the Hugging Face Hub."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from bake.checkpoints.hashes import sha256_of
from bake.errors import InputError

FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """An adapter whose two files are on this machine.

    Attributes:
        folder: where they are; for a repository, its snapshot in the cache.
        repo: the repository, or None for a folder.
        commit: its commit on the Hub.
    """

    folder: Path
    repo: str | None = None
    commit: str | None = None


def find_adapter(source: str | Path) -> FoundAdapter:
    """Return an adapter, fetched from the Hub where the text names no folder here.

    Args:
        source: a folder, ``owner/name`` or ``owner/name@revision``.

    Raises:
        CheckpointError: the text is neither.
        InputError: the repository holds no adapter.
        HubError: the Hub refuses or cannot be reached.
    """
    if isinstance(source, Path) or Path(source).expanduser().exists():
        return FoundAdapter(Path(source).expanduser())
    # Here, because importing the Hub's client takes longer than reading an adapter's header.
    from huggingface_hub import errors as theirs
    from huggingface_hub import hf_hub_download

    from bake.checkpoints.hub_errors import translated
    from bake.checkpoints.hub_names import parse_hub_id

    repo, revision = parse_hub_id(source, None)
    folder: Path | None = None
    for name in FILES:
        with translated(repo, revision):
            try:
                folder = Path(hf_hub_download(repo, name, revision=revision)).parent
            except theirs.LocalEntryNotFoundError:
                raise
            except theirs.EntryNotFoundError as error:
                raise InputError(
                    f"{repo} holds no {name}, so it is no PEFT adapter that can be merged",
                    fix=f"name a repository with {' and '.join(FILES)}",
                ) from error
        revision = folder.name  # the second file is of the commit that the first one was
    assert folder is not None
    return FoundAdapter(folder, repo, folder.name)


def adapter_digest(folder: Path) -> str:
    """Return the sha256 of an adapter's two files together."""
    parts = (bytes.fromhex(sha256_of(folder / name)) for name in FILES)
    return hashlib.sha256(b"".join(parts)).hexdigest()
