"""What must not leave this machine: secrets, private paths, and files that are not what they say.

The patterns are those that the Hub itself would report after the fact, in an e-mail. Here they stop
the upload.
"""

import re
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from bake.artifact.names import IMAGES, Problem, problem_of
from bake.checkpoints import strictjson
from bake.checkpoints.folder import regular_file
from bake.checkpoints.gguf.header import parse_header, text_of
from bake.errors import InputError
from bake.seal.weights import metadata

MAX_FILE = 50_000_000_000
MAX_TEXT = 64_000_000
MAX_FILES = 1000
_BINARY = IMAGES - {".svg"} | {".model", ".pdf"}

# What pickles of the oldest protocol, which are text, import first.
_MODULES = b"__builtin__|builtins|os|posix|nt|sys|subprocess|copy_reg|copyreg|torch|numpy|_codecs"
_MAGIC = (
    (re.compile(rb"\x80[\x02-\x05][\x00-\xff]"), "is a pickle, which can run code when opened"),
    (re.compile(rb"[(\]}]?c(%b)[\w.]*\n[\w.]+\n" % _MODULES), "is a pickle, which can run code"),
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), "is a zip archive"),
    (re.compile(rb"\x1f\x8b|BZh[1-9]|\xfd7zXZ\x00|7z\xbc\xaf|\x28\xb5\x2f\xfd"), "is an archive"),
    (re.compile(rb"\x89HDF\r\n"), "is an HDF5 file, which can hold code of a model"),
    (re.compile(rb"\x7fELF|MZ.{2}|\xcf\xfa\xed\xfe|#!"), "is a program"),
)
_SECRETS = (
    ("a Hugging Face token", re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}\b")),
    ("an AWS key", re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a private key", re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----")),
    ("a GitHub token", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,})\b")),
    ("an OpenAI or Anthropic key", re.compile(r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}\b")),
    ("a Slack token", re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{20,}")),
    ("a Google key", re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b")),
    ("a password in an address", re.compile(r"\bhttps?://[^\s/:@\"']+:[^\s/@\"']{3,}@")),
)
_HOME = re.compile(r"(?:/home/|/Users/|[A-Z]:\\+Users\\+)([\w.-]+)[/\\]|(?<![\w.])/root/[\w.-]")
# Vocabularies hold every kind of text, and nothing of this machine.
_VOCABULARY = re.compile(
    r"(tokenizer|vocab|merges|tekken|added_tokens|spiece).*|.*\.(bpe|tiktoken)"
)


def scan(folder: Path, names: list[str], *, paths: bool = False) -> list[Problem]:
    """Return what is wrong with the contents of files.

    Args:
        folder: the artifact.
        names: its files, none of them a link.
        paths: allow home folders and the name of this machine in texts.
    """
    problems: list[Problem] = []
    if len(names) > MAX_FILES:
        problems.append(Problem(".", f"{len(names)} files are more than {MAX_FILES}"))
    for name in names:
        try:
            problems += _scan_file(folder, name, paths=paths)
        except InputError as error:
            problems.append(problem_of(error, name))
    return problems


def _scan_file(folder: Path, name: str, *, paths: bool) -> Iterator[Problem]:
    path = regular_file(folder, name)
    size = path.stat().st_size
    suffix = PurePosixPath(name).suffix.lower()
    if size > MAX_FILE:
        yield Problem(name, f"is {size:,} bytes long; the Hub takes {MAX_FILE:,}")
    if suffix == ".gguf":
        yield from _scan_gguf(path, name, size, paths=paths)
        return
    if suffix == ".safetensors":
        # Their format is checked strictly, to the last byte; only the metadata is free text.
        text = "\n".join(f"{key} {value}" for key, value in metadata(folder, name).items())
        yield from findings(name, text, paths=paths, place="its metadata")
        return
    with path.open("rb") as file:
        head = file.read(512)
    disguised = next((what for magic, what in _MAGIC if magic.match(head)), None)
    if disguised is not None or zipfile.is_zipfile(path):
        yield Problem(name, disguised or "has a zip archive at its end", "remove it")
        return
    if suffix in _BINARY:
        # Images and vocabularies and documents carry texts of their own beside what they are for.
        said = path.read_bytes().decode("ascii", errors="replace")
        yield from findings(name, said, paths=paths, place="a text in it")
        return
    yield from _scan_text(path, name, size, paths=paths)


def _scan_gguf(path: Path, name: str, size: int, *, paths: bool) -> Iterator[Problem]:
    """Scan every text of the metadata; the vocabulary may hold any path, as tokenizer.json may."""
    with path.open("rb") as file:
        header = parse_header(file, shard=name, size=size)
    for key, value in header.metadata.items():
        allowed = paths or key.startswith("tokenizer.ggml.")
        text = text_of(value, key, errors="replace")
        yield from findings(name, text, paths=allowed, place=f"its key {key}")


def _scan_text(path: Path, name: str, size: int, *, paths: bool) -> Iterator[Problem]:
    if size > MAX_TEXT:
        yield Problem(name, f"is {size:,} bytes long; the limit for a text is {MAX_TEXT:,}")
        return
    text = strictjson.decode(path.read_bytes(), where=name)
    if "\0" in text:
        yield Problem(name, "holds the character NUL and is no text")
    if name.endswith(".json"):
        _check_json(text, name)
    yield from findings(name, text, paths=paths)


def _check_json(text: str, name: str) -> None:
    """Require JSON that all readers read alike: every object's keys once, and no deep nesting."""
    if text.lstrip().startswith("["):  # a list of tokens, of which some tokenizers keep one
        text = f'{{"list": {text}}}'
    strictjson.parse_object(text, where=name, constants=True)


def findings(
    name: str, text: str, *, paths: bool = False, place: str | None = None
) -> Iterator[Problem]:
    """Yield the secrets and, unless they are allowed, the private names in a text.

    Args:
        name: of the file.
        text: of it, or in it.
        paths: allow the private names.
        place: where in the file the text is; its line when None.
    """

    def at(match: re.Match[str]) -> str:
        line = 1 + text.count("\n", 0, match.start())
        return place or f"line {line}"

    for what, pattern in _SECRETS:
        if match := pattern.search(text):
            yield Problem(name, f"{at(match)} holds {what}", "remove and revoke it")
    if paths or _VOCABULARY.fullmatch(PurePosixPath(name).name):
        return
    if match := _HOME.search(text):
        yield Problem(name, f"{at(match)} names a home folder", "remove it, or --allow paths")
    host = socket.gethostname()
    if _telling(host) and (match := re.search(rf"(?<![\w-]){re.escape(host)}(?![\w-])", text)):
        yield Problem(name, f"{at(match)} names this machine", "remove it, or --allow paths")


def _telling(host: str) -> bool:
    """Tell whether a host's name is no common word: ``node-17`` is telling, ``localhost`` not."""
    return len(host) >= 5 and re.search(r"[\d.-]", host) is not None
