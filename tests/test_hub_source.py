"""The Hub as a source, against a server on this machine that speaks the few calls it takes.

The client reads its settings when it is imported, so each story runs in a process of its own. The
Hub is on 127.0.0.1 and the store that it redirects large files to on localhost: two origins, which
lets a test see that the token goes to the first alone.
"""

import hashlib
import json
import os
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import programs
import pytest
import torch
from safetensors.torch import save

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_" + "T" * 34
TENSORS = {"a": torch.arange(300000, dtype=torch.float32).reshape(3000, 100), "b": torch.ones(5)}
OTHER = {"c": torch.full((4, 2), 7, dtype=torch.bfloat16)}
SHARDS = {"model-1-of-2.safetensors": save(TENSORS), "model-2-of-2.safetensors": save(OTHER)}
SIDE = {"tokenizer.json": b'{"x": 1}', "README.md": b"# card", "[odd] name*.txt": b"odd"}
SIDE |= {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx", ".gitattributes": b"* lfs"}
SIDE |= {"additional_chat_templates/tools.jinja": b"{{ x }}"}


def repository() -> dict[str, bytes]:
    names = {name: file for file in SHARDS for name in (TENSORS if "1-of" in file else OTHER)}
    index = json.dumps({"metadata": {"total_size": 1200036}, "weight_map": names}).encode()
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors.index.json": index}
    return {**files, **SHARDS, **SIDE}


def etag(name: str, data: bytes) -> str:
    if name.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """What the server holds and what was asked of it.

    ``faults`` changes the answer for a path that contains the key: a status, "stall", "no range",
    "wrong range", "short", "flip" or "drop"; a list is used up one by one.
    """

    files: dict[str, bytes] = field(default_factory=repository)
    faults: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    hub: str = ""
    store: str = ""

    def fault(self, path: str) -> Any:
        for key, found in self.faults.items():
            if key in path:
                return (found.pop(0) if found else None) if isinstance(found, list) else found
        return None


ERRORS = {
    "gated": (403, "GatedRepo", "gated"),
    "no repo": (404, "RepoNotFound", "none"),
    "no revision": (404, "RevisionNotFound", "none"),
    "401": (401, "", "bad token"),
    "403": (403, "", "no rights"),
    "429": (429, "", "too many"),
    "500": (500, "", "broken"),
    "503": (503, "", "busy"),
}


def handler(state: Hub, at_store: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        entry: dict[str, Any]

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(self.path)
            if path.startswith("/set/"):
                state.faults = json.loads(path.removeprefix("/set/"))
                self.entry = {}
                self.send(200, b"{}", {}, body)
                return
            self.entry = {
                "at": "store" if at_store else "hub",
                "method": self.command,
                "path": path.partition("?")[0],
                "range": self.headers.get("Range"),
                "token": TOKEN in str(self.headers.get("Authorization")),
                "agent": self.headers.get("User-Agent", ""),
                "sent": 0,
            }
            state.log.append(self.entry)
            fault = state.fault(path)
            if fault in ERRORS:
                status, code, message = ERRORS[fault]
                extra = {"X-Error-Code": code} if code else {}
                self.send(status, b"{}", {**extra, "X-Error-Message": message}, body)
            elif fault == "stall":
                time.sleep(1.5)  # the client waits for one second
            elif at_store:
                self.bytes_of(path.removeprefix("/"), fault, {}, body)
            elif path.startswith("/api/models/"):
                self.api(path, body)
            elif "/resolve/" in path:
                self.resolve(path.partition("/resolve/")[2].partition("/")[2], fault, body)
            else:
                self.send(404, b"{}", {}, body)

        def api(self, path: str, body: bool) -> None:
            if "/tree/" in path:
                entries: list[dict[str, Any]] = []
                for name, data in state.files.items():
                    item = {"type": "file", "path": name, "size": len(data)}
                    item["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                    if name.endswith(".safetensors"):
                        sha = etag(name, data)
                        item["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 120}
                    entries.append(item)
                reply: Any = entries
            else:
                siblings = [{"rfilename": name} for name in state.files]
                reply = {"_id": "1", "id": "o/n", "modelId": "o/n", "sha": COMMIT}
                reply |= {"siblings": siblings, "tags": [], "private": False}
            self.send(200, json.dumps(reply).encode(), {}, body)

        def resolve(self, name: str, fault: Any, body: bool) -> None:
            if name not in state.files:
                self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
                return
            tag = etag(name, state.files[name])
            head = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}
            if name.endswith(".safetensors"):
                head |= {"X-Linked-Etag": f'"{tag}"', "Location": f"{state.store}/{name}"}
                head["X-Linked-Size"] = str(len(state.files[name]))
                self.send(302, b"", head, body)
            else:
                self.bytes_of(name, fault, head, body)

        def bytes_of(self, name: str, fault: Any, head: dict[str, str], body: bool) -> None:
            data = state.files[name]
            if fault == "flip":
                data = data[:-1] + bytes([data[-1] ^ 1])
            span = self.headers.get("Range")
            head = {**head, "Accept-Ranges": "bytes"}
            if span is None or fault == "no range":
                self.send(200, data, head, body)
                return
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(data)) + 1, len(data))
            if fault == "wrong range":
                start, stop = start + 1, stop + 1
            head["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            part = data[start:stop]
            self.send(206, part, head, body, cut=len(part) // 2 if fault == "short" else None)

        def send(
            self,
            status: int,
            data: bytes,
            head: dict[str, str],
            body: bool,
            cut: int | None = None,
        ) -> None:
            self.send_response(status)
            for key, value in {**head, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.entry["sent"] = len(data)
                self.wfile.write(data[:cut])
            self.close_connection = True

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()
    servers = [
        ThreadingHTTPServer(("127.0.0.1", 0), handler(state, at_store))
        for at_store in (False, True)
    ]
    state.hub = f"http://127.0.0.1:{servers[0].server_port}"
    state.store = f"http://localhost:{servers[1].server_port}"
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield state
    for server in servers:
        server.shutdown()
        server.server_close()


PRELUDE = """
import json, time, urllib.parse, urllib.request
from pathlib import Path
real = time.sleep
time.sleep = lambda seconds: real(min(seconds, 0.02))  # the client waits between its tries
import bake.checkpoints as b
from bake.checkpoints import open_checkpoint
from bake.errors import BakeError

def outcome(*args, **options):
    try:
        return open_checkpoint(*args, **options)
    except BakeError as error:
        return [type(error).__name__, error.exit_code, str(error)]

def meddle(hub, path, fault):
    setting = urllib.parse.quote(json.dumps({path: fault}), safe="")
    urllib.request.urlopen(hub + "/set/" + setting).close()

def tell(value):
    print("RESULT" + json.dumps(value))
"""


def run(hub: Hub, home: Path, script: str, **env: str) -> Any:
    """Run a story in a process whose Hub is this server, and return what it tells."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSF"))}
    environment = {
        **clean,
        "HF_ENDPOINT": hub.hub,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": programs.RESOURCES,
        **env,
    }
    done = programs.run(
        PRELUDE + textwrap.dedent(script), env=environment, kind=programs.COMMAND, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.rpartition("RESULT")[2])


def test_headers_and_tensors_are_read_by_range(hub: Hub, tmp_path: Path) -> None:
    hub.faults["/model-2-of-2.safetensors"] = [None, "503"]  # the first try at the store
    told = run(
        hub,
        tmp_path,
        """
        c = open_checkpoint("o/n")
        rows = c.read_rows("a", 10, 12)
        tell({
            "revision": c.revision, "source": c.source, "complete": c.complete,
            "config": dict(c.config), "shards": c.shards, "side": c.side_files,
            "left_out": c.left_out, "names": list(c.tensors), "sizes": c.shard_sizes,
            "rows": rows.tolist(), "c": c.read("c").tolist(), "dtype": str(c.read("c").dtype),
            "digest": c.tensor_digest("b"), "repr": repr(c), "late": outcome("o/n").path.is_dir(),
        })
        """,
    )
    assert told["rows"] == TENSORS["a"][10:12].tolist()
    assert (told["c"], told["dtype"]) == (OTHER["c"].tolist(), "torch.bfloat16")
    assert told["digest"] == hashlib.sha256(TENSORS["b"].numpy().tobytes()).hexdigest()
    assert (told["revision"], told["source"], told["complete"]) == (COMMIT, "o/n", False)
    assert told["names"] == ["a", "b", "c"] and told["shards"] == list(SHARDS)
    assert told["sizes"] == {name: len(data) for name, data in SHARDS.items()}
    expected = {"tokenizer.json", "[odd] name*.txt", "additional_chat_templates/tools.jinja"}
    assert set(told["side"]) == expected
    assert set(told["left_out"]) == {"README.md", "pytorch_model.bin", "onnx/"}
    assert told["late"] and TOKEN not in told["repr"]

    asked = [entry for entry in hub.log if "model-" in entry["path"]]
    assert all(entry["range"] is not None for entry in asked)
    sent = sum(entry["sent"] for entry in asked if entry["at"] == "store")
    assert 0 < sent < sum(map(len, SHARDS.values())) / 3  # effect: not the whole files
    assert "bytes=0-65535" in {entry["range"] for entry in asked}
    assert any(entry["token"] for entry in asked if entry["at"] == "hub")
    assert not any(entry["token"] for entry in hub.log if entry["at"] == "store")
    assert all("bake/" in entry["agent"] for entry in asked)
    assert not any("tokenizer" in e["path"] or "pytorch" in e["path"] for e in hub.log)


def test_a_complete_checkpoint_is_downloaded_checked_and_found_again_offline(
    hub: Hub, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    out = tmp_path / "out"
    export = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from exporting import write_new

        def export(c):
            record = {{"bake.json": b"{{}}"}}
            write_new(c, Path({str(out)!r}), closing=lambda files: record, force=True)
    """
    told = run(
        hub,
        home,
        export
        + """
        c = open_checkpoint("o/n", complete=True)
        export(c)
        tell({"revision": c.revision, "complete": c.complete, "path": str(c.path),
              "a": float(c.read("a").double().sum()), "left_out": c.left_out,
              "names": [str(p.relative_to(c.path)) for p in c.path.rglob("*") if p.is_file()]})
        """,
    )
    wanted = {
        n for n in hub.files if n not in ("pytorch_model.bin", "onnx/model.onnx", ".gitattributes")
    }
    assert set(told["names"]) == wanted
    assert (told["revision"], told["complete"]) == (COMMIT, True)
    # Whole numbers, whose sum is exact in float64 in whatever order it is taken.
    assert told["a"] == float(TENSORS["a"].double().sum())
    assert not any("pytorch_model" in e["path"] or "onnx" in e["path"] for e in hub.log)
    for name in wanted - {"README.md"}:
        assert (out / name).read_bytes() == hub.files[name]
        assert not (out / name).is_symlink()
    assert not any(entry["token"] for entry in hub.log if entry["at"] == "store")

    hub.log.clear()
    offline = run(
        hub,
        home,
        export
        + f"""
        c = open_checkpoint("o/n", complete=True)
        export(c)
        again = open_checkpoint("o/n@{COMMIT}")
        tell({{"revision": c.revision, "complete": c.complete,
              "again": again.digest() == c.digest(),
              "other": outcome("o/n@v2"), "none": outcome("o/none", complete=True)}})
        """,
        HF_HUB_OFFLINE="1",
    )
    assert hub.log == []
    assert (offline["revision"], offline["complete"], offline["again"]) == (COMMIT, True, True)
    for missing in (offline["other"], offline["none"]):
        assert missing[:2] == ["HubError", 5]
        assert "in the cache and the Hub is switched off" in missing[2]

    pinned = run(  # online, but a commit that is in the cache needs nobody
        hub, home, f'c = open_checkpoint("o/n", revision="{COMMIT}"); tell(c.complete)'
    )
    assert pinned is False and hub.log == []

    # Nobody answers, which is no reason to do without what is here; what is not here is an error.
    alone = run(
        hub,
        home,
        """
        c = open_checkpoint("o/n", complete=True)
        tell([c.revision, c.complete, outcome("o/n@v2"), outcome("o/none")])
        """,
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert alone[:2] == [COMMIT, True]
    assert all(found[:2] == ["HubError", 5] and "cannot reach" in found[2] for found in alone[2:])

    # a side file that goes missing is noticed, because the cache knows what the commit holds
    snapshot = Path(told["path"])
    (snapshot / "tokenizer.json").unlink()
    lost = run(
        hub,
        home,
        'tell([outcome("o/n", complete=True), outcome("o/n").complete])',
        HF_HUB_OFFLINE="1",
    )
    assert lost[0][0] == "HubError" and "missing: tokenizer.json" in lost[0][2]
    assert lost[1] is False


def test_a_damaged_download_is_refused(hub: Hub, tmp_path: Path) -> None:
    """A large file is known by its sha256, one that Git keeps by another kind of hash."""
    told = run(
        hub,
        tmp_path,
        f"""
        told = []
        for name, fault in [("large", "/model-2-of"), ("small", "/tokenizer.json"), ("good", "no")]:
            meddle({hub.hub!r}, fault, "flip")
            told.append(outcome("o/" + name, complete=True))
        tell([*told[:2], told[2].complete])
        """,
    )
    for (kind, code, text), file in zip(
        told[:2], ("model-2-of-2.safetensors of o/large", "tokenizer.json of o/small"), strict=True
    ):
        assert (kind, code) == ("HubError", 5)
        assert f"{file} is not what the Hub states" in text
        assert "remove that file and run again" in text
    assert told[2] is True  # the control


FAILURES: dict[str, tuple[str, Any, str]] = {
    "not found": ("/api/models/", "no repo", "is not on the Hub, or your token cannot see it"),
    "gated": ("/api/models/", "gated", "is gated and this account is not on its list"),
    "gated file": ("/resolve/", "gated", "is gated and this account is not on its list"),
    "revision": ("/api/models/", "no revision", "o/n has no revision 'v9'"),
    "bad token": ("/api/models/", "401", "does not accept your token for o/n"),
    "no rights": ("/api/models/", "403", "your token has no right to read o/n"),
    "rate": ("/api/models/", "429", "the Hub limits the rate of your requests"),
    "broken": ("/api/models/", "500", "the Hub answered 500 for o/n"),
    "timeout": ("/api/models/", "stall", "did not answer in time"),
    "slow store": ("model-1-of", "stall", "did not answer in time"),
    "no ranges": ("model-1-of", "no range", "does not send byte ranges (status 200)"),
    "wrong range": ("model-1-of", "wrong range", "does not send byte ranges (status 206)"),
    "short body": ("model-1-of", "short", "cannot reach"),
    "always busy": ("model-1-of", "503", "the Hub answered 503 for o/n"),
}


def test_failures_are_told_in_one_line_each(hub: Hub, tmp_path: Path) -> None:
    """One process, which has the server change its fault before each attempt."""
    faults = {name: [path, fault] for name, (path, fault, _) in FAILURES.items()}
    script = f"""
        from bake.checkpoints import hub_patience
        hub_patience.time.sleep = lambda seconds: None
        told = {{}}
        for name, (path, fault) in {faults!r}.items():
            meddle({hub.hub!r}, path, fault)
            told[name] = outcome("o/n@v9")
        tell(told)
    """
    told = run(hub, tmp_path, script)
    for name, (_, _, message) in FAILURES.items():
        kind, code, text = told[name]
        assert (kind, code) == ("HubError", 5), (name, text)
        assert message in text.splitlines()[0], (name, text)
        assert len(text.splitlines()) <= 3, (name, text)
    assert "accept the terms at" in told["gated"][2]


def test_nobody_at_the_address_and_a_repository_without_weights(hub: Hub, tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    told = run(hub, tmp_path, 'tell(outcome("o/n"))', HF_ENDPOINT=closed)
    assert told[:2] == ["HubError", 5] and f"cannot reach {closed}" in told[2]

    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    told = run(hub, tmp_path, 'tell([outcome("o/n"), outcome("o/n@v1", revision="v2")])')
    assert told[0][:2] == ["CheckpointError", 4]
    assert "has weights in another format only" in told[0][2]
    assert told[1] == ["UsageError", 2, "two revisions are named: 'v1' and 'v2'"]


def test_a_poisoned_index_on_the_hub_is_refused(hub: Hub, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    told = run(hub, tmp_path, 'tell(outcome("o/n", complete=True))')
    assert told[:2] == ["CheckpointError", 4]
    assert "the index names a file outside the folder" in told[2]
    assert not any("secret" in entry["path"] for entry in hub.log)
