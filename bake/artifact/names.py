"""Which files an artifact consists of, and which names may be published.

What is published is decided by a list of what may go, not of what may not: a file that nobody
thought of stays at home.
"""

import os
import stat
import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bake.artifact.carrier import KINDS
from bake.checkpoints import folder as folders
from bake.checkpoints.index import is_plain
from bake.errors import InputError

SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"
CARD = "README.md"
STATEMENT = "bake/provenance.json"
OUTSIDE = frozenset({SUMS, SIGNATURE})
"""What the sums cannot cover: themselves, and the signature that is made over them."""

HUBS_OWN = frozenset({".gitattributes"})
"""What the Hub adds to a repository by itself; a download has it too."""
_LEFT_BY_DOWNLOADS = frozenset({".cache"})  # what snapshot_download(local_dir=…) keeps there

TEXT = frozenset(".json .jsonl .jinja .txt .md .html .toml .yaml .yml .bpe .tiktoken .csv".split())
IMAGES = frozenset(".png .svg .jpg .jpeg .gif .webp".split())
_BINARY = frozenset({".model"})  # SentencePiece
CODE = ".py"
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
_OLLAMA = "Modelfile"
_FOLDERS = frozenset({"bake", "plots", "verify", "reproduce", folders.CHAT_TEMPLATES})


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an artifact, in one line.

    Attributes:
        where: the file's name.
        what: the fact.
        fix: what to do about it.
    """

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.fix})" if self.fix else "")


def problem_of(error: InputError, name: str) -> Problem:
    """Return an error as a problem of one file."""
    where = error.where if error.where is not None and name in error.where else name
    return Problem(PurePosixPath(where).name if where.startswith("/") else where, error.what)


def walk(folder: Path) -> tuple[list[str], list[Problem]]:
    """Return the names of everything below a folder that may be a file, and what is amiss.

    Nothing is followed: a link, a device or a pipe is a problem, and so is a folder of links. Names
    are relative to the folder, with ``/`` between their parts, in the order of their bytes.
    """
    names: list[str] = []
    problems: list[Problem] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            found = list(entries)
        for entry in found:
            name = prefix + entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                if not (prefix == "" and entry.name in _LEFT_BY_DOWNLOADS):
                    pending.append(name + "/")
            elif stat.S_ISREG(mode) or stat.S_ISLNK(mode):
                names.append(name)
            else:
                problems.append(
                    Problem(name, "is a device, a pipe or a socket and no file", "remove it")
                )
    return sorted(names, key=os.fsencode), problems


def check_links(folder: Path, names: list[str]) -> list[Problem]:
    """Return the links, symbolic and hard: published, they would be copies of other files."""
    problems = []
    for name in names:
        found = (folder / name).lstat()
        if stat.S_ISLNK(found.st_mode):
            problems.append(
                Problem(name, "is a link", "put a copy in its place if it belongs to the model")
            )
        elif found.st_nlink > 1:
            problems.append(
                Problem(name, f"has {found.st_nlink} names on this disk (hard links)", "copy it")
            )
    return problems


def check_names(names: list[str], kind: str, *, code: bool = False) -> list[Problem]:
    """Return the names that may not be published.

    Args:
        names: as ``walk`` returns them.
        kind: of the artifact.
        code: allow Python files.
    """
    problems = []
    spelled: dict[str, str] = {}
    for name in names:
        what = _objection(name, kind, code=code)
        folded = unicodedata.normalize("NFC", name).casefold()
        if what is None and folded in spelled:
            what = f"differs from {spelled[folded]} in upper and lower case only"
        spelled[folded] = name
        if what is not None:
            problems.append(Problem(printable(name), what, "remove or rename it"))
    return problems


def printable(name: str) -> str:
    """Return a name as it may be shown on a terminal."""
    return name if name.isprintable() else repr(name)


def _objection(name: str, kind: str, *, code: bool) -> str | None:
    """Return why a name may not be published, or None when it may."""
    folder, _, file = name.rpartition("/")
    if not is_plain(file) or not name.isprintable():
        return "has characters in its name that not every system can show or store"
    if unicodedata.normalize("NFC", name) != name:
        return "is not spelled in Unicode's composed form (NFC)"
    if any(part.startswith(".") for part in name.split("/")):
        return "is a hidden file"
    if folder and folder not in _FOLDERS:
        return f"is in the folder {folder}/, which is no part of an artifact"
    return _by_suffix(file, folder, kind, code=code)


def is_legal(name: str) -> bool:
    """Tell whether a file at the top of an artifact is a licence or a notice."""
    path = PurePosixPath(name)
    return name.upper().startswith(_LEGAL) and path.suffix.lower() in ("", ".txt", ".md", ".pdf")


def _by_suffix(file: str, folder: str, kind: str, *, code: bool) -> str | None:
    suffix = PurePosixPath(file).suffix.lower()
    if file in OUTSIDE or is_legal(file) or suffix in TEXT | IMAGES | _BINARY:
        return None
    weights = KINDS[kind].suffix if kind in KINDS else None
    if file == _OLLAMA and folder == "" and weights == ".gguf":
        return None
    if suffix == CODE:
        return None if code else "is code, which is published with --allow code only"
    if suffix == weights and folder == "":
        return None
    if folder == "bake" and suffix == ".safetensors":
        return None
    if suffix in (".safetensors", ".gguf"):
        return f"is no weight file of the kind {kind}"
    return f"is of a kind ({suffix or 'no suffix'}) that is not published"
