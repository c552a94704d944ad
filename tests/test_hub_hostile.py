"""A thousand hostile folders: names, links, indexes, headers, cards, records. None is published.

Each is the same sound and sealed artifact with one thing spoiled, drawn from a seed. A push has to
refuse it as bad input, and the Hub must not have been asked to write anything.
"""

import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
from hub_server import HubServer
from published import BASE, CARD, TOKEN, hub_with, make_artifact, rewrite

from bake.artifact.destination import Destination
from bake.errors import InputError
from bake.publish.options import PushOptions
from bake.publish.push import push
from bake.seal.seal import check, seal

Spoil = Callable[[Path, random.Random], None]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Path]]:
    folder = tmp_path_factory.mktemp("hostile")
    model = tiny.make_model("llama", dtype=torch.float32, num_hidden_layers=1)
    tiny.write_checkpoint(model, folder / "base", max_shard_size="12KB")
    out = make_artifact(folder / "base", folder / "out")
    seal(out)
    with hub_with(folder / "base") as state:
        yield state, out


@pytest.fixture(autouse=True)
def _at_home(hub: tuple[HubServer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the client of this process talk to the server on this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub[0].hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


# --- what is spoiled ---------------------------------------------------------------------------


def add(name: str | bytes, data: bytes = b"x") -> Spoil:
    def spoil(out: Path, rng: random.Random) -> None:
        path = os.path.join(os.fsencode(out), os.fsencode(name))  # noqa: PTH118 # any bytes
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(data)

    return spoil


SUFFIXES = (
    ".bin .pt .pth .pkl .pickle .ckpt .h5 .onnx .gguf .npz .npy .zip .tar .gz .7z .exe".split()
)
SUFFIXES += (
    ".sh .py .pyc .so .dll .msgpack .tflite .db .sqlite .pem .key .log .bak .lock .docx".split()
)


def bad_name(out: Path, rng: random.Random) -> None:
    stem = "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 8)))
    make: list[Callable[[], str | bytes]] = [
        lambda: stem + rng.choice(SUFFIXES),
        lambda: "." + stem + rng.choice(["", ".json", ".safetensors", ".env"]),
        lambda: (
            rng.choice([".git/", ".cache2/", "onnx/", "a/b/c/", "bake/x/", "..a/"]) + stem + ".json"
        ),
        lambda: stem + rng.choice("\x01\x1b\x7f\u202e\u200b\u2028\ue000") + ".txt",
        lambda: stem + "e\u0301.txt",
        lambda: rng.choice(["CONFIG.json", "readme.md", "Bake.json", "Sha256sums"]),
        lambda: stem.encode() + b"\xff\xfe.txt",
        lambda: stem + "\\..\\x.txt",
        lambda: rng.choice(["id_rsa", "core", "Makefile", "credentials", "nohup.out", stem]),
    ]
    add(rng.choice(make)())(out, rng)


def some_file(out: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(p for p in out.rglob("*") if p.is_file() and p.name != "SHA256SUMS"))


def bad_link(out: Path, rng: random.Random) -> None:
    outside = out.parent / "outside.txt"
    outside.write_text("private")
    (out.parent / "elsewhere").mkdir(exist_ok=True)
    target = rng.choice(
        [outside, out.parent / "elsewhere", "/etc/passwd", "../outside.txt", "config.json", "x.txt"]
    )
    case = rng.randrange(5)
    if case == 0:  # one more
        (out / "x.txt").symlink_to(target)
    elif case == 1:  # in the place of a file of the artifact
        path = some_file(out, rng)
        path.unlink()
        path.symlink_to(target)
    elif case == 2:
        path = some_file(out, rng)
        os.link(path, out / "twin.json")
    elif case == 3:
        os.mkfifo(out / rng.choice(["x.txt", "x.safetensors", "plots"]))
    else:
        shutil.move(out / "bake", out.parent / "moved")
        (out / "bake").symlink_to(out.parent / "moved")


PLACES = ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "..", "x\0.safetensors"]
PLACES += ["..\\x.safetensors", "config.json", "gone.safetensors", "bake/edits.safetensors", "~/x"]


def bad_index(out: Path, rng: random.Random) -> None:
    path = out / INDEX
    found = json.loads(path.read_text())
    names = list(found["weight_map"])
    case = rng.randrange(9)
    if case == 0:
        found["weight_map"][rng.choice(names)] = rng.choice(PLACES)
    elif case == 1:
        found["weight_map"][f"extra.{rng.random()}"] = rng.choice(
            [*PLACES, *found["weight_map"].values()]
        )
    elif case == 2:
        del found["weight_map"][rng.choice(names)]
    elif case == 3:
        one = rng.choice(names)
        other = [n for n in names if found["weight_map"][n] != found["weight_map"][one]]
        found["weight_map"][one] = found["weight_map"][rng.choice(other)]
    elif case == 4:
        found["weight_map"][rng.choice(names)] = rng.choice([None, 3, [], {}])
    elif case == 5:
        found["metadata"] = rng.choice([{"total_size": rng.randrange(10**6)}, [], 3, "x"])
    elif case == 6:
        found = rng.choice([[], 3, None, {"weight_map": []}, {}, {"weight_map": {}}])
    if case == 7:
        path.write_text(path.read_text().replace("{", '{"weight_map": {}, ', 1))
    elif case == 8:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    else:
        path.write_text(json.dumps(found))


def bad_header(out: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(out.rglob("*.safetensors")))
    raw = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    case = rng.randrange(7)
    if case == 0:  # one bit of the header
        raw[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif case == 1:
        raw[:8] = struct.pack(
            "<Q", rng.choice([0, 1, end, end * 2, 2**40, 2**63, rng.randrange(end)])
        )
    elif case == 2:
        del raw[rng.randrange(len(raw)) :]
    elif case == 3:
        raw += rng.choice([b"\0", b"PK\x05\x06" + b"\0" * 18, b"x" * rng.randint(1, 99)])
    elif case == 4:
        header = json.loads(raw[8:end])
        name = rng.choice([key for key in header if key != "__metadata__"])
        field = rng.choice(["dtype", "shape", "data_offsets"])
        header[name][field] = rng.choice(["F8", [], [-1], [1, 2, 3], [2**63], [0, 1], None, True])
        raw = bytearray(with_header(json.dumps(header).encode(), raw[end:]))
    elif case == 5:
        header = json.loads(raw[8:end])
        name = rng.choice([key for key in header if key != "__metadata__"])
        header[rng.choice(["../" + name, "a\0", "a\n", name + "2", ""])] = header.pop(name)
        raw = bytearray(with_header(json.dumps(header).encode(), raw[end:]))
    else:
        raw = bytearray(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    path.write_bytes(raw)


def with_header(header: bytes, rest: bytes | bytearray) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(rest)


SECRETS = [
    "hf_" + "aB3" * 12,
    "AKIA" + "A1B2" * 4,
    "-----BEGIN " + "PRIVATE KEY-----",
    "/home/me/x/",
]
SECRETS += ["https://me:" + "geheim@x.org", "/Users/me/models", "ghp_" + "a1B2" * 9]


def bad_card(out: Path, rng: random.Random) -> None:
    card = rng.choice(
        [
            "",
            "no metadata",
            "---\na: [\n---\n",
            "---\n- a\n- b\n---\n",
            "---\na: !!python/object/apply:os.system ['true']\n---\n",
            "---\n" + "a: " + "[" * 3000 + "]" * 3000 + "\n---\n",
            CARD.replace(
                "apache-2.0", rng.choice(["mit0", "llama3", "unknown", "cc0-1.0", "x" * 99])
            ),
            CARD.replace(BASE, rng.choice(["meta/other", "../x", "[]", "17"])),
            CARD + rng.choice(SECRETS),
            CARD + "\0",
            CARD + "x" * 1_000_001,
            "\udcff" + CARD,
        ]
    )
    (out / "README.md").write_bytes(card.encode("utf-8", "surrogateescape"))


KEYS = {"kind", "plan", "base", "digest", "model", "revision", "tensors", "biases"}


def bad_record(out: Path, rng: random.Random) -> None:
    name = rng.choice(["bake.json", "verify.json", "config.json"])
    values = [None, 3, "x", [], {}, rng.choice(SECRETS)]

    def change(found: dict[str, Any]) -> None:
        if name == "verify.json":
            key = rng.choice(["passed", "rows", "plan_digest"])
            found[key] = rng.choice([None, 3, "x", [], {}, [{"passed": False}], [3]])
        elif name == "bake.json":
            at = rng.choice([found, found["plan"], found["base"]])
            at[rng.choice(sorted(set(at) & KEYS))] = rng.choice(values)
        else:
            key = rng.choice(["auto_map", "transformers_weights", *found])
            found[key] = rng.choice([*values, {"AutoModel": "evil/repo--m.M"}])

    before = (out / name).read_bytes()
    if rng.random() < 0.2:
        (out / name).write_bytes(before[: rng.randrange(len(before) - 2)])
    else:
        rewrite(out / name, change)
    if json_or_none(out / name) == json.loads(before):
        bad_record(out, rng)


def json_or_none(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def bad_bytes(out: Path, rng: random.Random) -> None:
    """Anything that the export wrote, changed after it was sealed."""
    sealed = [p for p in out.rglob("*") if p.is_file() and p.name not in LATER]
    path = rng.choice(sorted(sealed))
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


LATER = ("README.md", "verify.json", "SHA256SUMS", "provenance.json")
KINDS: tuple[Spoil, ...] = (
    bad_name,
    bad_link,
    bad_index,
    bad_header,
    bad_card,
    bad_record,
    bad_bytes,
)


def spoiled(sound: Path, out: Path, seed: int) -> str:
    """Make a folder with one thing spoiled and return which kind of thing."""
    shutil.rmtree(out.parent, ignore_errors=True)
    shutil.copytree(sound, out)
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    kind(out, rng)
    return kind.__name__


def refused(state: HubServer, out: Path, seed: int, kind: str) -> str:
    """Push a folder, see that nothing was written, and return why it was refused."""
    start = len(state.log)
    try:
        push(out, PushOptions(Destination("alice/hostile"), timeout=5))
    except InputError as error:
        text = str(error)
        assert "\x1b" not in text and TOKEN not in text, (seed, kind)
        assert not any(secret in text for secret in SECRETS if "_" in secret), (seed, kind)
    except OSError as error:
        pytest.fail(f"seed {seed}, {kind}: {error!r}")
    else:
        pytest.fail(f"seed {seed}, {kind}: published")
    asked = state.log[start:]
    assert all(request.method == "GET" for request in asked), (seed, kind)
    assert set(state.repos) == {BASE}, (seed, kind)
    return text


def test_the_sound_artifact_would_be_published(hub: tuple[HubServer, Path], tmp_path: Path) -> None:
    """The control: what is spoiled below is accepted as it is, up to the first write."""
    sound = hub[1]
    out = tmp_path / "case" / "out"
    shutil.copytree(sound, out)
    assert check(out).problems == ()
    told = push(out, PushOptions(Destination("alice/hostile"), dry_run=True, timeout=5))
    assert told.dry_run and told.notes[-1] == "alice/hostile would be created, private"
    assert len(told.notes) == 2 and "the base is not on this machine" in told.notes[0]
    assert len(told.uploaded) + len(told.copied) == len([p for p in out.rglob("*") if p.is_file()])


@pytest.mark.parametrize("part", range(2))
def test_hostile_folders_are_refused(
    part: int, hub: tuple[HubServer, Path], tmp_path: Path
) -> None:
    run(hub, tmp_path, range(part * 70, (part + 1) * 70))


@pytest.mark.slow
def test_a_thousand_hostile_folders_are_refused(
    hub: tuple[HubServer, Path], tmp_path: Path
) -> None:
    run(hub, tmp_path, range(1000))


def sealed_by_its_author(out: Path) -> None:
    """Make sums and record say what is there: whoever spoils a folder can also seal it."""
    for name in ("SHA256SUMS", "bake/provenance.json"):
        if (out / name).is_file() and not (out / name).is_symlink():
            (out / name).unlink()
    found = json_or_none(out / "bake.json")
    if isinstance(found, dict) and not (out / "bake.json").is_symlink():
        for name in found.get("files", {}):
            if (out / name).is_file():
                digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
                found["files"][name] = f"sha256:{digest}"
        (out / "bake.json").write_text(json.dumps(found))


BY_THEMSELVES = (bad_name, bad_link, bad_index, bad_header, bad_card)


@pytest.mark.parametrize("kind", BY_THEMSELVES)
def test_each_kind_is_refused_for_itself_and_not_for_its_sums(
    kind: Spoil, hub: tuple[HubServer, Path], tmp_path: Path
) -> None:
    state, sound = hub
    reasons = set()
    for seed in range(25):
        out = tmp_path / "case" / "out"
        shutil.rmtree(out.parent, ignore_errors=True)
        shutil.copytree(sound, out)
        kind(out, random.Random(seed))
        sealed_by_its_author(out)
        reasons.add(refused(state, out, seed, kind.__name__))
    assert not any("SHA256SUMS" in reason or "seal" in reason for reason in reasons)
    assert len(reasons) >= 8  # they are spoiled in different ways, and each is told


def run(hub: tuple[HubServer, Path], tmp_path: Path, seeds: range) -> None:
    state, sound = hub
    seen: dict[str, int] = {}
    for seed in seeds:
        out = tmp_path / "case" / "out"
        kind = spoiled(sound, out, seed)
        refused(state, out, seed, kind)
        seen[kind] = seen.get(kind, 0) + 1
    assert len(seen) == len(KINDS) and min(seen.values()) >= 9
