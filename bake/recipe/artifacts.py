"""The directions that a recipe names, read from this machine or fetched from the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bake.checkpoints.hub_names import HUB_PREFIX
from bake.directions import READERS, Directions, Options, read_directions
from bake.errors import BakeError, HubError, UsageError
from bake.recipe.maps import SIGNED_ROLES
from bake.recipe.spec import DirectionSpec, Recipe

# The files that belong together in a folder, the one that is named for all of them first.
FOLDERS = tuple(reader.files for reader in READERS.values() if reader.files)
# What files are called that are read by the folder and have no fixed names.
GLOBS = tuple(glob for reader in READERS.values() for glob in reader.globs)


def read_artifacts(recipe: Recipe) -> dict[str, Directions]:
    """Return the directions that the recipe's edits use, by name.

    Raises:
        DirectionError: an artifact is missing, malformed or hostile.
        HubError: an artifact on the Hub cannot be fetched.
        UsageError: a Hub address that is none.
    """
    used: dict[str, None] = {}
    for edit in recipe.edits:
        used.update(dict.fromkeys((*edit.directions, *recipe.beside(edit))))
    found = {}
    for name in used:
        spec = recipe.directions[name]
        with located(f"{recipe.path} [directions.{name}]"):
            path = spec.path or fetch_artifact(spec.file)
            found[name] = read_directions(path, reader=spec.reader, **_options(spec))
            _check_sign(spec, found[name])
    return found


def _options(spec: DirectionSpec) -> Options:
    """Return what the recipe says of the artifact that it cannot say itself."""
    found: Options = {}
    for name in Options.__annotations__:
        if (value := getattr(spec, name)) is not None:
            found[name] = value  # type: ignore[literal-required]
    if spec.minus is not None:
        found["minus"] = spec.minus_path or fetch_artifact(spec.minus)
    return found


def _check_sign(spec: DirectionSpec, found: Directions) -> None:
    if spec.sign == 1 or any(role in item.tensors for item in found.items for role in SIGNED_ROLES):
        return
    raise UsageError(
        f"sign = -1 is given, but the artifact holds {', '.join(found.items[0].tensors)}",
        why="only a vector, a subspace or an offset has an opposite",
        fix="leave sign out",
    )


def fetch_artifact(file: str) -> Path:
    """Return the path of an artifact on the Hub once it is in the cache.

    Of a folder, and of a file that is read with others beside it, all files of the format come.

    Args:
        file: ``hf://owner/name/path`` or ``hf://owner/name/path@revision``, a file or a folder.

    Raises:
        HubError: the Hub or the network refuses, or holds no such artifact.
        UsageError: an address that names nothing in a repository.
    """
    address, _, revision = file.removeprefix(HUB_PREFIX).partition("@")
    owner, _, rest = address.partition("/")
    name, _, inside = rest.partition("/")
    inside = inside.rstrip("/")
    if not (owner and name and inside):
        raise UsageError(
            f"{file!r} is no address of a file on the Hub",
            fix="write hf://owner/name/path or hf://owner/name/path@revision",
        )
    source = _Source(file, f"{owner}/{name}", revision or None)
    if (path := source.fetch(inside)) is not None:
        for reader in READERS.values():
            together = reader.files[1:] if reader.files[:1] == (path.name,) else ()
            for other in (*together, *reader.beside(path.name)):
                source.fetch(str(PurePosixPath(inside).with_name(other)))
        return path
    for names in FOLDERS:
        paths = [path for name in names if (path := source.fetch(f"{inside}/{name}")) is not None]
        if len(paths) == len(names):
            return paths[0].parent
    if (folder := source.folder(inside)) is not None:
        return folder
    folders = " or ".join(" and ".join(names) for names in (*FOLDERS, *((g,) for g in GLOBS)))
    raise HubError(
        f"{file} is not on the Hub",
        why=f"it is neither a file there nor a folder with {folders}",
        fix="check the path and the revision on the repository's page",
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """One revision of a repository on the Hub."""

    address: str
    """As the recipe names it, for messages."""
    repo: str
    revision: str | None

    def fetch(self, name: str) -> Path | None:
        """Return the path of a file once it is in the cache, or None where the Hub has none.

        Raises:
            HubError: the Hub or the network refuses.
            UsageError: the names are none that the Hub could have.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            HFValidationError,
            LocalEntryNotFoundError,
            RemoteEntryNotFoundError,
        )

        try:
            return Path(hf_hub_download(self.repo, name, revision=self.revision))
        except HFValidationError as error:
            raise UsageError(
                f"{self.address!r} is no address of a file on the Hub: {error}"
            ) from error
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError as error:
            if self._known_absent(name):
                return None
            raise self._failure(error) from error
        except OSError as error:  # the Hub's and the network's own errors
            raise self._failure(error) from error

    def folder(self, inside: str) -> Path | None:
        """Return a folder with the files that are read by the folder, or None where it has none.

        Raises:
            HubError: the Hub or the network refuses.
        """
        from huggingface_hub import snapshot_download

        plain = "".join(f"[{c}]" if c in "*?[" else c for c in inside)
        try:
            whole = snapshot_download(
                self.repo,
                revision=self.revision,
                allow_patterns=[f"{plain}/{glob}" for glob in GLOBS],
            )
        except OSError as error:  # the Hub's and the network's own errors
            raise self._failure(error) from error
        path = Path(whole) / inside
        found = path.is_dir() and any(r.recognises(path) for r in READERS.values() if r.globs)
        return path if found else None

    def _known_absent(self, name: str) -> bool:
        """Whether the cache remembers that the Hub has no such file: asked without a network."""
        from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

        return try_to_load_from_cache(self.repo, name, revision=self.revision) is _CACHED_NO_EXIST

    def _failure(self, error: OSError) -> HubError:
        first = str(error).strip().partition("\n")[0]
        return HubError(
            f"{self.address} cannot be fetched: {first}",
            fix="check the address and the connection, or name a local file",
        )


@contextmanager
def located(where: str) -> Iterator[None]:
    """Say where in the recipe an error belongs that does not say it itself."""
    try:
        yield
    except BakeError as error:
        if error.where is not None:
            raise
        raise type(error)(error.what, where=where, why=error.why, fix=error.fix) from error
