"""A Hugging Face Hub on this machine, for the real client: repositories, Git LFS, Xet, faults.

It speaks the calls that huggingface_hub 1.31 and 2.x make to create, fill, read and tag a model's
repository. The Hub is on 127.0.0.1 and the storage that it sends large files to on localhost, at
another port: two origins, so that a test can see that the token never reaches the second one.
Everything that is uploaded is hashed here, also what comes in chunks, which are decoded for that.

It needs Python's standard library only. The Xet formats are those of the public description of
the protocol (xet-core, openapi/cas.openapi.yaml).
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGE = (".safetensors", ".gguf", ".model", ".png")


def git_oid(data: bytes) -> str:
    """Return the id that Git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    """Return the sha256 in hex."""
    return hashlib.sha256(data).hexdigest()


# --- the state -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """One file of a commit; a large one lies in the storage and is known by its sha256."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return sha256(self.data)

    @property
    def pointer(self) -> bytes:
        head = b"version https://git-lfs.github.com/spec/v1\n"
        return head + f"oid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        return git_oid(self.pointer if self.large else self.data)

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass
class Repo:
    """One repository: commits by id, branches, tags, pull requests, large objects it may use."""

    id: str
    private: bool = True
    gated: str | bool = False
    members: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)
    objects: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": Stored(ATTRIBUTES, False)}, "initial commit")

    def commit(self, files: dict[str, Stored], title: str, branch: str | None = "main") -> str:
        """Add a commit and return its id."""
        facts = [self.id, title, len(self.titles), {k: v.oid for k, v in sorted(files.items())}]
        oid = hashlib.sha1(json.dumps(facts).encode()).hexdigest()
        self.commits[oid] = files
        self.titles.append(title)
        if branch is None:
            self.pulls.append(oid)
        else:
            self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """Return the commit that a branch, a tag, a pull request or an id names."""
        if revision in self.commits:
            return revision
        if match := re.fullmatch(r"refs/pr/(\d+)", revision):
            number = int(match[1]) - 1
            return self.pulls[number] if number < len(self.pulls) else None
        return self.branches.get(revision) or self.tags.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the bytes of every file but what the Hub adds."""
        commit = self.resolve(revision)
        assert commit is not None, revision
        return {n: f.data for n, f in self.commits[commit].items() if n != ".gitattributes"}


@dataclass
class Fault:
    """What goes wrong: ``action`` for the next ``times`` requests that fit.

    Actions: a status; ``drop`` (the connection ends before anything is done), ``lost`` (it is done
    and the reply never comes), ``corrupt`` (a byte of the reply flips), ``stall`` (no reply for
    a while), ``drip`` (it comes byte by byte), ``form`` (it is another JSON than it should be),
    ``echo`` (403 with the request's headers in the message), ``call`` (a function).
    """

    method: str
    path: str
    action: Any
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """What was asked: no header's value is kept, only whether a token was among them."""

    at: str
    method: str
    path: str
    token: bool
    received: int = 0
    sent: int = 0
    status: int = 0


@dataclass
class HubServer:
    """The Hub's state, and what was asked of it."""

    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    log: list[Request] = field(default_factory=list)
    xet: bool = True
    copying: bool = True
    xorbs: dict[str, "Xorb"] = field(default_factory=dict)
    xet_files: dict[str, list["Term"]] = field(default_factory=dict)
    xet_of: dict[str, str] = field(default_factory=dict)
    hub: str = ""
    store: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add_user(self, token: str, name: str, *, orgs: tuple[str, ...] = (), role: str = "write"):
        self.tokens[token] = {"name": name, "orgs": orgs, "role": role}

    def add_repo(self, repo: str, files: dict[str, bytes], **options: Any) -> str:
        """Add a repository with files and return the commit."""
        made = self.repos[repo] = Repo(repo, **options)
        stored = {name: self.keep(made, name, data) for name, data in files.items()}
        return made.commit({**made.commits[made.branches["main"]], **stored}, "files")

    def keep(self, repo: Repo, name: str, data: bytes) -> Stored:
        large = name.endswith(LARGE)
        if large:
            self.blobs[sha256(data)] = data
            repo.objects.add(sha256(data))
            self.xet_of.setdefault(sha256(data), sha256(b"xet" + data))
        return Stored(data, large)

    def fault(self, method: str, path: str, action: Any, times: int = 1, **headers: str) -> None:
        """Have the next requests fail."""
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.faults.append(Fault(method, path, action, times, named))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for found in self.faults:
                if found.times and found.method == method and re.search(found.path, path):
                    found.times -= 1
                    return found
        return None

    def asked(self, method: str, pattern: str) -> list[Request]:
        """Return the requests that fit."""
        return [r for r in self.log if r.method == method and re.search(pattern, r.path)]

    def uploaded(self) -> int:
        """Return the bytes that the storage has received."""
        return sum(r.received for r in self.log if r.at == "store" and r.method in ("PUT", "POST"))


# --- Xet -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Xorb:
    """A stored block: its bytes, and where each chunk begins and what it unpacks to."""

    raw: bytes
    offsets: tuple[int, ...]
    chunks: tuple[bytes, ...]


@dataclass(frozen=True)
class Term:
    """A run of chunks of one block."""

    xorb: str
    start: int
    stop: int
    size: int


def xet_hex(raw: bytes) -> str:
    """Return the hex form of a Xet hash: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def unpack_xorb(raw: bytes) -> Xorb:
    """Return a block with its chunks decoded."""
    offsets, chunks, position = [], [], 0
    while position + 8 <= len(raw) and raw[position] == 0:
        packed = int.from_bytes(raw[position + 1 : position + 4], "little")
        scheme = raw[position + 4]
        length = int.from_bytes(raw[position + 5 : position + 8], "little")
        body = raw[position + 8 : position + 8 + packed]
        data = body if scheme == 0 else unpack_lz4(body)
        if scheme == 2:
            data = ungroup(data)
        if len(data) != length or len(body) != packed:
            raise ValueError("a chunk has another length than its header says")
        offsets.append(position)
        chunks.append(bytes(data))
        position += 8 + packed
    return Xorb(raw[:position], (*offsets, position), tuple(chunks))


def ungroup(data: bytes) -> bytes:
    """Undo the grouping of bytes by their place in a word of four."""
    out = bytearray(len(data))
    position = 0
    for group in range(4):
        count = (len(data) - group + 3) // 4
        out[group::4] = data[position : position + count]
        position += count
    return bytes(out)


def unpack_lz4(data: bytes) -> bytes:
    """Return the content of an LZ4 frame (lz4_Frame_format.md); its checksums are not read."""
    if data[:4] != b"\x04\x22\x4d\x18":
        raise ValueError("no LZ4 frame")
    flags = data[4]
    position = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
    out = bytearray()
    while True:
        size = int.from_bytes(data[position : position + 4], "little")
        position += 4
        if size == 0:
            return bytes(out)
        block = data[position : position + (size & 0x7FFFFFFF)]
        if size >> 31:
            out += block
        else:
            _unpack_block(block, out)
        position += len(block) + (4 if flags & 16 else 0)


def _unpack_block(block: bytes, out: bytearray) -> None:
    position = 0

    def length(start: int) -> int:
        nonlocal position
        total = start
        if start == 15:
            while True:
                more = block[position]
                position += 1
                total += more
                if more != 255:
                    break
        return total

    while position < len(block):
        token = block[position]
        position += 1
        count = length(token >> 4)
        out += block[position : position + count]
        position += count
        if position >= len(block):
            return
        distance = int.from_bytes(block[position : position + 2], "little")
        position += 2
        count = length(token & 15) + 4
        begin = len(out) - distance
        if distance >= count:
            out += out[begin : begin + count]
        else:
            pattern = bytes(out[begin:])
            out += (pattern * (count // distance + 1))[:count]


def parse_shard(raw: bytes) -> Iterator[tuple[str, list[Term], str | None]]:
    """Yield each file of a shard: its Xet hash, its runs of chunks, its sha256."""
    position = 48
    while raw[position : position + 32] != b"\xff" * 32:
        file_hash = xet_hex(raw[position : position + 32])
        flags, count = struct.unpack("<II", raw[position + 32 : position + 40])
        position += 48
        terms = []
        for _ in range(count):
            xorb = xet_hex(raw[position : position + 32])
            _, size, start, stop = struct.unpack("<4I", raw[position + 32 : position + 48])
            terms.append(Term(xorb, start, stop, size))
            position += 48
        if flags >> 31:
            position += 48 * count
        stated = None
        if flags >> 30 & 1:
            stated = xet_hex(raw[position : position + 32])
            position += 48
        yield file_hash, terms, stated


# --- the two servers -----------------------------------------------------------------------------

ERRORS = {
    "RepoNotFound": (404, "Repository not found"),
    "RevisionNotFound": (404, "Invalid rev id"),
    "EntryNotFound": (404, "Entry not found"),
    "GatedRepo": (403, "Access to this model is restricted"),
}


class Refusal(Exception):
    """A reply that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **head: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.head = {name.replace("_", "-"): value for name, value in head.items()}


def refuse(code: str, **head: str) -> Refusal:
    """Return one of the Hub's own errors."""
    status, message = ERRORS[code]
    return Refusal(status, message, code, **head)


class Handler(BaseHTTPRequestHandler):
    """What both origins share: reading a request, faults, sending a reply."""

    protocol_version = "HTTP/1.1"
    state: HubServer
    at: str
    routes: list[tuple[str, str, Callable[..., Any]]]

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            pass  # the client has gone

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        split = urlsplit(self.path)
        self.where, self.query = split.path, parse_qs(split.query)
        named = self.headers.get("Authorization", "").removeprefix("Bearer ")
        leaked = any(t in f"{self.path} {self.headers}" for t in self.state.tokens)
        self.entry = Request(self.at, self.command, self.path, leaked)
        self.state.log.append(self.entry)
        self.user = self.state.tokens.get(named)
        self.named = named
        fault = self.state.take_fault(self.command, self.path)
        if fault is not None and fault.action == "drop":
            self.hang_up()
            return
        try:
            self.body = self.read_body()
        except ConnectionError:
            return
        self.entry.received = len(self.body)
        action = None if fault is None else fault.action
        if action == "stall":
            time.sleep(3)
            self.hang_up()
            return
        if callable(action):
            action()
        try:
            if isinstance(action, int):
                raise Refusal(action, "fault", "")
            if action == "echo":
                raise Refusal(403, f"no: {self.headers.get('Authorization')}")
            status, data, head = self.dispatch()
        except Refusal as error:
            status, head = error.status, {"X-Error-Message": error.message, **error.head}
            head |= {"X-Error-Code": error.code} if error.code else {}
            head |= {} if fault is None else fault.headers
            data = json.dumps({"error": error.message}).encode()
        if action == "lost":
            self.hang_up()
            return
        if action == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if action == "form":
            data = b'{"id": 5}'
        self.send(status, data, head, pause=0.1 if action == "drip" else 0)

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def hang_up(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def dispatch(self) -> tuple[int, bytes, dict[str, str]]:
        for method, pattern, function in self.routes:
            match = re.fullmatch(pattern, self.where)
            if match and self.command in method.split():
                with self.state.lock:
                    found = function(self, *(unquote(g) for g in match.groups(default="")))
                if isinstance(found, tuple):
                    return found
                return 200, json.dumps(found).encode(), {"Content-Type": "application/json"}
        raise Refusal(404, f"no such call: {self.command} {self.where}")

    def send(self, status: int, data: bytes, head: dict[str, str], pause: float = 0) -> None:
        self.entry.status = status
        self.send_response(status)
        head = {"Content-Length": str(len(data)), **head}
        for key, value in head.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD" and not pause:
            self.wfile.write(data)
        for byte in data if pause else b"":
            time.sleep(pause)
            try:
                self.wfile.write(bytes([byte]))
            except OSError:  # whoever asked has gone
                return
        if self.command != "HEAD":
            self.entry.sent = len(data)

    def ranged(self, data: bytes, head: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        head = {**head, "Accept-Ranges": "bytes"}
        span = self.headers.get("Range")
        if span is None:
            return 200, data, head
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return 416, b"", {**head, "Content-Range": f"bytes */{len(data)}"}
        head["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return 206, data[start:stop], head

    def json(self) -> Any:
        return json.loads(self.body)


class HubHandler(Handler):
    """The Hub: accounts, repositories, commits."""

    at = "hub"

    def repo(self, name: str, *, write: bool = False, files: bool = False) -> Repo:
        found = self.state.repos.get(name)
        if found is None or (found.private and not self.member(name)):
            raise refuse("RepoNotFound")
        if write and (not self.member(name) or self.user["role"] != "write"):
            raise Refusal(403, f"You don't have the rights to write to {name}")
        if files and found.gated and not self.member(name):
            if self.user is None or self.user["name"] not in found.members:
                raise refuse("GatedRepo")
        return found

    def member(self, name: str) -> bool:
        space = name.partition("/")[0]
        return self.user is not None and space in (self.user["name"], *self.user["orgs"])

    def at_revision(self, repo: Repo, revision: str) -> tuple[str, dict[str, Stored]]:
        commit = repo.resolve(revision)
        if commit is None:
            raise refuse("RevisionNotFound")
        return commit, repo.commits[commit]

    def whoami(self) -> Any:
        if self.user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        access = {"type": "access_token", "accessToken": {"role": self.user["role"]}}
        orgs = [{"name": org} for org in self.user["orgs"]]
        return {"type": "user", "name": self.user["name"], "orgs": orgs, "auth": access}

    def create(self) -> Any:
        if self.user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        asked = self.json()
        name = f"{asked.get('organization') or self.user['name']}/{asked['name']}"
        if not self.member(name) or self.user["role"] != "write":
            raise Refusal(403, f"You don't have the rights to create a model under {name}")
        if name in self.state.repos:
            body = {
                "error": "You already created it",
                "url": f"{self.state.hub}/{name}",
            }
            return 409, json.dumps(body).encode(), {}
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.state.repos[name] = Repo(name, private=private)
        return {"url": f"{self.state.hub}/{name}"}

    def validate_yaml(self) -> Any:
        errors = [{"message": "license is bogus"}] if "bogus" in self.json()["content"] else []
        warnings = [{"message": "empty or missing yaml metadata"}]
        if "---" in self.json()["content"]:
            warnings = []
        body = json.dumps({"errors": errors, "warnings": warnings}).encode()
        return 400 if errors else 200, body, {}

    def info(self, name: str, revision: str = "main") -> Any:
        repo = self.repo(name)
        commit, files = self.at_revision(repo, revision)
        reply = {"_id": "1", "id": name, "modelId": name, "sha": commit, "tags": []}
        reply |= {"private": repo.private, "gated": repo.gated, "disabled": False}
        reply["siblings"] = [{"rfilename": path} for path in files]
        card = files.get("README.md")
        if card is not None:
            found = re.findall(r"^(\w+): (\S.*)$", card.data.decode(), re.MULTILINE)
            reply["cardData"] = dict(found)
        return reply

    def entry_of(self, path: str, file: Stored, *, copying: bool = False) -> dict[str, Any]:
        """Return how a listing shows a file.

        A file that was put here by ``add_repo`` has a Xet hash that serves to copy it, and no
        chunks to download it by.
        """
        item = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
        if file.large:
            item["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}
            known = self.state.xet_of.get(file.sha256)
            if self.state.xet and (copying or known in self.state.xet_files):
                item["xetHash"] = known
        return item

    def tree(self, name: str, revision: str, under: str = "") -> Any:
        _, files = self.at_revision(self.repo(name, files=True), revision)
        under = under.strip("/")
        found = [p for p in files if not under or p.startswith(under + "/")]
        if under and not found:
            raise refuse("EntryNotFound")
        entries = [self.entry_of(path, files[path]) for path in found]
        folders = {p.rpartition("/")[0] for p in found if "/" in p}
        entries += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
        page, size = int(self.query.get("page", ["0"])[0]), 5
        head = {"Content-Type": "application/json"}
        if len(entries) > (page + 1) * size:  # in pages, so that a reader has to follow them
            url = f"{self.state.hub}{self.where}?recursive=True&page={page + 1}"
            head["Link"] = f'<{url}>; rel="next"'
        return 200, json.dumps(entries[page * size : (page + 1) * size]).encode(), head

    def paths_info(self, name: str, revision: str) -> Any:
        _, files = self.at_revision(self.repo(name, files=True), revision)
        asked = parse_qs(self.body.decode()).get("paths", [])
        return [self.entry_of(p, files[p], copying=True) for p in asked if p in files]

    def preupload(self, name: str, revision: str) -> Any:
        propose = "create_pr" in self.query
        repo = self.repo(name, write=not propose)
        _, files = self.at_revision(repo, revision)
        reply = []
        for asked in self.json()["files"]:
            path = asked["path"]
            item = {"path": path, "shouldIgnore": False}
            item["uploadMode"] = "lfs" if path.endswith(LARGE) else "regular"
            if path in files:
                item["oid"] = files[path].etag
            reply.append(item)
        return {"files": reply}

    def batch(self, name: str) -> Any:
        repo = self.repo(name)
        objects = []
        for asked in self.json()["objects"]:
            item = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] in self.state.blobs:
                repo.objects.add(asked["oid"])
            else:
                upload = {"href": f"{self.state.store}/lfs/{name}/{asked['oid']}"}
                verify = {"href": f"{self.state.hub}/{name}.git/info/lfs/verify"}
                item["actions"] = {"upload": upload, "verify": verify}
            objects.append(item)
        return {"transfer": "basic", "objects": objects}

    def verify(self, name: str) -> Any:
        asked = self.json()
        if len(self.state.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "no such object")
        return {}

    def xet_token(self, name: str, kind: str, revision: str) -> Any:
        propose = "create_pr" in self.query
        self.repo(name, write=kind == "write" and not propose, files=kind == "read")
        expiry = int(time.time()) + 3600
        token = f"xet-{kind}-{name}"
        body = {"accessToken": token, "casUrl": self.state.store, "exp": expiry}
        head = {"X-Xet-Access-Token": token, "X-Xet-Cas-Url": self.state.store}
        head["X-Xet-Token-Expiration"] = str(expiry)
        return 200, json.dumps(body).encode(), head

    def commit(self, name: str, revision: str) -> Any:
        propose = "create_pr" in self.query
        repo = self.repo(name, write=not propose)
        commit, before = self.at_revision(repo, revision)
        files, title = dict(before), ""
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                parent = value.get("parentCommit")
                if parent is not None and parent != commit and not propose:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise Refusal(400, f"unknown LFS object {value['oid']}")
                files[value["path"]] = Stored(self.state.blobs[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown operation {item['key']}")
        oid = repo.commit(files, title, None if propose else revision)
        reply = {"success": True, "commitOid": oid}
        reply["commitUrl"] = f"{self.state.hub}/{name}/commit/{oid}"
        if propose:
            reply["pullRequestUrl"] = f"{self.state.hub}/{name}/discussions/{len(repo.pulls)}"
        return reply

    def duplicate(self, name: str) -> Any:
        source = self.repo(name, files=True)
        asked = self.json()
        target = self.repo(asked["target"]["name"], write=True)
        if not self.state.copying:
            raise Refusal(403, "copying is not possible between these repositories")
        for file in asked["files"]:
            if file["sha256"] not in source.objects:
                raise Refusal(404, "no such object")
            target.objects.add(file["sha256"])
        return {"failed": []}

    def refs(self, name: str) -> Any:
        repo = self.repo(name)

        def named(kind: str, found: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in found.items()
            ]

        pulls = {str(n + 1): c for n, c in enumerate(repo.pulls)}
        reply = {"branches": named("heads", repo.branches), "tags": named("tags", repo.tags)}
        return {**reply, "converts": [], "pullRequests": named("pr", pulls)}

    def tag(self, name: str, revision: str) -> Any:
        repo = self.repo(name, write=True)
        wanted = self.json()["tag"]
        if wanted in repo.tags:
            raise Refusal(409, "Tag already exists")
        repo.tags[wanted] = self.at_revision(repo, revision)[0]
        return {}

    def branch(self, name: str, wanted: str) -> Any:
        repo = self.repo(name, write=True)
        if wanted in repo.branches:
            raise Refusal(409, "Reference already exists")
        start = (self.json() if self.body else {}).get("startingPoint") or "main"
        repo.branches[wanted] = self.at_revision(repo, start)[0]
        return {}

    def settings(self, name: str) -> Any:
        repo = self.repo(name, write=True)
        asked = self.json()
        if "visibility" in asked or "private" in asked:
            repo.private = asked.get("visibility") == "private" or asked.get("private") is True
        repo.gated = asked.get("gated", repo.gated)
        return {}

    def resolve(self, name: str, revision: str, path: str) -> Any:
        commit, files = self.at_revision(self.repo(name, files=True), revision)
        if path not in files:
            raise refuse("EntryNotFound", X_Repo_Commit=commit)
        file = files[path]
        head = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
        if not file.large:
            return self.ranged(file.data, head)
        head |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        head["Location"] = f"{self.state.store}/files/{file.sha256}"
        known = self.state.xet_of.get(file.sha256)
        if self.state.xet and known in self.state.xet_files:
            head["X-Xet-Hash"] = known
            auth = f"{self.state.hub}/api/models/{name}/xet-read-token/{commit}"
            head["Link"] = f'<{auth}>; rel="xet-auth"'
        return 302, b"", head

    def nothing(self, *_: str) -> Any:
        return {"standardEnvVars": [], "harnesses": {}}


NAME, REV = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
HubHandler.routes = [
    ("GET", "/api/whoami-v2", HubHandler.whoami),
    ("POST", "/api/repos/create", HubHandler.create),
    ("POST", "/api/validate-yaml", HubHandler.validate_yaml),
    ("GET", f"/api/models/{NAME}", HubHandler.info),
    ("GET", f"/api/models/{NAME}/revision/{REV}", HubHandler.info),
    ("GET", f"/api/models/{NAME}/tree/{REV}(/.*)?", HubHandler.tree),
    ("POST", f"/api/models/{NAME}/paths-info/{REV}", HubHandler.paths_info),
    ("POST", f"/api/models/{NAME}/preupload/{REV}", HubHandler.preupload),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", HubHandler.batch),
    ("POST", f"/{NAME}\\.git/info/lfs/verify", HubHandler.verify),
    ("GET", f"/api/models/{NAME}/xet-(read|write)-token/{REV}", HubHandler.xet_token),
    ("POST", f"/api/models/{NAME}/commit/{REV}", HubHandler.commit),
    ("POST", f"/api/models/{NAME}/lfs-files/duplicate", HubHandler.duplicate),
    ("GET", f"/api/models/{NAME}/refs", HubHandler.refs),
    ("POST", f"/api/models/{NAME}/tag/{REV}", HubHandler.tag),
    ("POST", f"/api/models/{NAME}/branch/{REV}", HubHandler.branch),
    ("PUT", f"/api/models/{NAME}/settings", HubHandler.settings),
    ("GET HEAD", f"/{NAME}/resolve/{REV}/(.+)", HubHandler.resolve),
    ("GET", "/api/agent-harnesses", HubHandler.nothing),
]


class StoreHandler(Handler):
    """The storage: large files whole (LFS) or in chunks (Xet). No token of the Hub comes here."""

    at = "store"

    def put(self, name: str, oid: str) -> Any:
        if sha256(self.body) != oid:
            raise Refusal(400, "these bytes have another sha256")
        self.state.blobs[oid] = self.body
        self.state.repos[name].objects.add(oid)
        return 200, b"", {"ETag": f'"{oid}"'}

    def file(self, oid: str) -> Any:
        if oid not in self.state.blobs:
            raise Refusal(404, "no such object")
        return self.ranged(self.state.blobs[oid], {"ETag": f'"{oid}"'})

    def unknown(self, *_: str) -> Any:
        raise Refusal(404, "not known")

    def xorb(self, name: str) -> Any:
        new = name not in self.state.xorbs
        try:
            self.state.xorbs[name] = unpack_xorb(self.body)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        return {"was_inserted": new}

    def shard(self) -> Any:
        repo = self.state.repos[self.named.removeprefix("xet-write-")]
        for file_hash, terms, stated in parse_shard(self.body):
            missing = [t.xorb for t in terms if t.xorb not in self.state.xorbs]
            if missing:
                raise Refusal(400, f"unknown xorb {missing[0]}")
            data = b"".join(self.term_bytes(term) for term in terms)
            if stated is None or sha256(data) != stated:
                raise Refusal(400, "the chunks make a file of another sha256")
            self.state.blobs[stated] = data
            self.state.xet_files[file_hash] = terms
            self.state.xet_of[stated] = file_hash
            repo.objects.add(stated)
        frames: list[dict[str, Any]] = [{"type": "validating", "verified": 1, "total": 1}]
        frames += [{"type": "committing", "stage": "syncing"}, {"type": "result"}]
        if self.where.startswith("/v1/"):
            return {"result": 1}
        return 200, "".join(json.dumps(f) + "\n" for f in frames).encode(), {}

    def term_bytes(self, term: Term) -> bytes:
        return b"".join(self.state.xorbs[term.xorb].chunks[term.start : term.stop])

    def reconstruction(self, file_hash: str) -> Any:
        terms = self.state.xet_files.get(file_hash)
        if terms is None:
            raise Refusal(404, "no such file")
        span = self.headers.get("Range")
        total = sum(term.size for term in terms)
        start, stop = 0, total
        if span is not None:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else total, total)
        if start >= total:
            raise Refusal(416, "past the end")
        wanted, position, offset = [], 0, 0
        for term in terms:
            if position < stop and position + term.size > start:
                offset = offset if wanted else start - position
                wanted.append(term)
            position += term.size
        info: dict[str, list[dict[str, Any]]] = {}
        for term in wanted:
            offsets = self.state.xorbs[term.xorb].offsets
            chunks = {"start": term.start, "end": term.stop}
            piece = {"start": offsets[term.start], "end": offsets[term.stop] - 1}
            url = f"{self.state.store}/xorb/{term.xorb}"
            info.setdefault(term.xorb, []).append({"range": chunks, "url": url, "url_range": piece})
        rows = [
            {
                "hash": term.xorb,
                "unpacked_length": term.size,
                "range": {"start": term.start, "end": term.stop},
            }
            for term in wanted
        ]
        return {"offset_into_first_range": offset, "terms": rows, "fetch_info": info}

    def xorb_bytes(self, name: str) -> Any:
        return self.ranged(self.state.xorbs[name].raw, {})

    def nothing(self, *_: str) -> Any:
        return {}


StoreHandler.routes = [
    ("PUT", f"/lfs/{NAME}/(\\w+)", StoreHandler.put),
    ("GET HEAD", r"/files/(\w+)", StoreHandler.file),
    ("GET", r"/v1/chunks/[\w-]+/(\w+)", StoreHandler.unknown),
    ("POST", r"/v1/xorb-grants/.*", StoreHandler.unknown),
    ("POST", r"/v1/xorbs/\w+/(\w+)", StoreHandler.xorb),
    ("POST", r"/v[12]/shards", StoreHandler.shard),
    ("GET", r"/v1/reconstructions/(\w+)", StoreHandler.reconstruction),
    ("GET", r"/xorb/(\w+)", StoreHandler.xorb_bytes),
    ("POST", "/v1/telemetry", StoreHandler.nothing),
]


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Yield a Hub that answers until the end of the block."""
    state = HubServer()
    servers = []
    for kind in (HubHandler, StoreHandler):
        bound = type(kind.__name__, (kind,), {"state": state})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), bound))
    state.hub = f"http://127.0.0.1:{servers[0].server_port}"
    state.store = f"http://localhost:{servers[1].server_port}"
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield state
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
