"""Where a PEFT adapter is: a folder here, or a repository on the Hugging Face Hub."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from bake.checkpoints.folder import CHAT_TEMPLATES
from bake.checkpoints.hashes import sha256_of
from bake.errors import InputError

FILES = ("adapter_config.json", "adapter_model.safetensors")
_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
BESIDE = frozenset(
    "tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json "
    "added_tokens.json vocab.json vocab.txt merges.txt spiece.model tekken.json "
    "chat_template.jinja chat_template.json processor_config.json preprocessor_config.json "
    "generation_config.json".split()
)
"""What says how text becomes tokens, how a conversation becomes text and how tokens are drawn."""
_WANTED = (*FILES, *sorted(BESIDE), f"{CHAT_TEMPLATES}/*")


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """An adapter whose files are on this machine.

    Attributes:
        folder: where they are; for a repository, below its snapshot in the cache.
        repo: the repository, with the folder in it if it is in one; None for a folder here.
        commit: its commit on the Hub.
    """

    folder: Path
    repo: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        """How it is named: its place here, or on the Hub with its commit."""
        return str(self.folder) if self.repo is None else f"{self.repo}@{self.commit}"


def find_adapter(source: str | Path) -> FoundAdapter:
    """Return an adapter, fetched from the Hub where the text names no folder here.

    With it come the tokenizer, the templates and the generation settings that lie beside it.

    Args:
        source: a folder, ``owner/name``, ``owner/name/folder``, both also with ``@revision``.

    Raises:
        CheckpointError: the text is neither.
        InputError: the repository holds no adapter.
        HubError: the Hub refuses or cannot be reached.
    """
    if isinstance(source, Path) or Path(source).expanduser().exists():
        return FoundAdapter(Path(source).expanduser())
    # Here, because importing the Hub's client takes longer than reading an adapter's header.
    from bake.checkpoints.hub_errors import translated
    from bake.checkpoints.hub_names import parse_hub_id

    address, at, revision = source.partition("@")
    owner, name, *folders = address.split("/") if "/" in address else (address, "")
    repo, commit = parse_hub_id(f"{owner}/{name}{at}{revision}" if name else source, None)
    if not all(_FOLDER.fullmatch(part) for part in folders):
        raise InputError(f"{'/'.join(folders)!r} is no folder of {repo}")
    place = "/".join(folders)
    with translated(repo, commit):
        root = _snapshot(repo, commit, [f"{place}/{n}" if place else n for n in _WANTED])
        missing = [name for name in FILES if not (root / place / name).is_file()]
        inner = folders_inside(_snapshot(repo, root.name, [f"*/{FILES[0]}"])) if missing else ()
    if missing:
        fix = f"name a repository with {' and '.join(FILES)}"
        if inner:
            fix = f"name one of its folders: {', '.join(f'{repo}/{name}' for name in inner)}"
        raise InputError(
            f"{address} holds no {missing[0]}, so it is no PEFT adapter that can be merged", fix=fix
        )
    return FoundAdapter(root / place, address, root.name)


def folders_inside(folder: Path) -> tuple[str, ...]:
    """Return the folders below one that hold an adapter, a few of them: what a training saves."""
    found = sorted(path.parent for path in folder.glob(f"*/{FILES[0]}"))
    return tuple(path.name for path in found[:5])


def _snapshot(repo: str, revision: str | None, names: list[str]) -> Path:
    """Return the folder of the cache that holds the files of a repository that match some names."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=revision, allow_patterns=names))


def adapter_digest(folder: Path) -> str:
    """Return the sha256 of an adapter's two files together."""
    parts = (bytes.fromhex(sha256_of(folder / name)) for name in FILES)
    return hashlib.sha256(b"".join(parts)).hexdigest()
