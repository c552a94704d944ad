"""Every system's artifact, damaged at random: a clean error or a valid direction, and no code run.

Bytes are overwritten, cut, doubled and moved, and what the files hold (tensors, dictionaries, JSON)
is replaced by what no writer gives. Each mutant has a seed of its own, which its failure names.
"""

import io
import json
import os
import pickle
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from systems import SYSTEMS, Sizes, System

from bake.directions import describe, read_directions
from bake.errors import BakeError
from bake.recipe import first_recipe

SIZES = Sizes(hidden=24, inner=40, layers=3, attention=32, heads=4)
SAMPLE, ALL = 180, 2000
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir", "os.remove", "os.rename")
RUNS += ("subprocess.Popen", "socket.connect", "shutil.rmtree", "ctypes.dlopen")

_seen: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and (
        event in RUNS or (event == "open" and str(arguments[1] or "r")[0] in "wax+")
    ):
        _seen.append(f"{event} {arguments!r:.80}")


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Yield what is run, written or connected to inside the context."""
    global _seen  # an audit hook stays for good, and looks only here
    _seen = found = []
    try:
        yield found
    finally:
        _seen = None


# --- what a file holds, replaced -----------------------------------------------------------------


def strange_tensor(draw: random.Random, sound: torch.Tensor) -> Any:
    shape = list(sound.shape)
    flat = sound.detach().clone()
    return draw.choice(
        [
            lambda: flat * float("nan"),
            lambda: flat * float("inf"),
            lambda: flat * 0,
            lambda: flat.double() * 1e300,
            lambda: flat[..., :-1].contiguous(),
            lambda: flat[None].expand(3, *shape),  # one row that claims to be three
            lambda: flat.reshape(-1)[:1].expand(10**6),
            lambda: flat.reshape(-1)[:0],
            lambda: flat.to(torch.int64),
            lambda: flat.to(torch.complex64),
            lambda: flat > 0,
            lambda: flat.to_sparse(),
            lambda: flat.T if flat.dim() == 2 else flat[:, None],
            lambda: flat.half(),
            lambda: torch.zeros((), dtype=flat.dtype),
            lambda: None,
            lambda: "text",
            lambda: [flat],
            lambda: {0: flat},
            lambda: 10**400,
        ]
    )()


def strange(draw: random.Random, value: Any, depth: int = 0) -> Any:
    """Return a value with one thing in it that is another."""
    if isinstance(value, torch.Tensor):
        return strange_tensor(draw, value)
    if isinstance(value, dict) and value and (depth == 0 or draw.random() < 0.8):
        key = draw.choice(list(value))
        rest = dict(value)
        match draw.randrange(5):
            case 0:
                del rest[key]
            case 1:
                rest[draw.choice(["", "x", -1, 10**9, 1.5, "../../x", "1" * 400])] = rest[key]
            case 2:
                rest = {draw.choice([str(key) + "0", "99999", -3]): v for v in rest.values()}
            case _:
                rest[key] = strange(draw, rest[key], depth + 1)
        return rest
    if isinstance(value, list | tuple) and value and (depth == 0 or draw.random() < 0.8):
        items = list(value)
        place = draw.randrange(len(items))
        if draw.random() < 0.3:
            del items[place]
        else:
            items[place] = strange(draw, items[place], depth + 1)
        return type(value)(items) if isinstance(value, tuple) else items
    nested: Any = []
    for _ in range(draw.choice([1, 60])):
        nested = [nested]
    return draw.choice([None, True, -1, 0, 1e999, "", "\ud800", "ä" * 999, 2**70, {}, nested])


def retold_torch(draw: random.Random, data: bytes) -> bytes:
    value = torch.load(io.BytesIO(data), weights_only=False)  # our own file
    out = io.BytesIO()
    torch.save(strange(draw, value), out)
    return out.getvalue()


def retold_json(draw: random.Random, data: bytes) -> bytes:
    text = json.dumps(strange(draw, json.loads(data)))
    if draw.random() < 0.2:
        text = text.replace("{", '{"twice": 1, "twice": 2, ', 1)
    return text.encode("utf-8", "surrogatepass")


def retold_npz(draw: random.Random, data: bytes) -> bytes:
    held = dict(np.load(io.BytesIO(data)))
    name = draw.choice(list(held))
    other = strange_tensor(draw, torch.from_numpy(held[name]))
    plain = isinstance(other, torch.Tensor) and not other.is_sparse
    held[draw.choice([name, "x"])] = other.numpy() if plain else np.array(str(other), object)
    out = io.BytesIO()
    np.savez(out, **held)
    return out.getvalue()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = str(proof)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.proof,)


def hostile(draw: random.Random, data: bytes, proof: Path) -> bytes:
    """Return a file of the same kind whose pickle calls a function."""
    payload = pickle.dumps(Payload(proof), protocol=draw.choice([2, 4]))
    if data[:2] == b"PK":
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            for entry in old.infolist():
                kept = old.read(entry)
                new.writestr(entry, payload if entry.filename.endswith("data.pkl") else kept)
        return out.getvalue()
    if data[:6] == b"\x93NUMPY":
        made = io.BytesIO()
        rows = {"model.layers.0.mlp": {"first_direction": 1, "second_direction": Payload(proof)}}
        np.save(made, rows, allow_pickle=True)  # type: ignore[arg-type]
        return made.getvalue()
    return payload


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Return a file with some bytes of it overwritten, cut, doubled or moved."""
    found = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        start = draw.randrange(len(found))
        end = min(len(found), start + draw.choice([1, 1, 2, 4, 8, 64]))
        match draw.randrange(7):
            case 0:
                found[start:end] = bytes(draw.randrange(256) for _ in range(end - start))
            case 1:
                found[start:end] = b"\xff" * (end - start)
            case 2:
                found[start:end] = b"\0" * (end - start)
            case 3:
                del found[start : len(found) if draw.random() < 0.2 else end]
            case 4:
                found[start:start] = found[start:end]
            case 5:
                found += found[:end] if draw.random() < 0.2 else b"\0" * 3
            case 6:
                digits = [n for n, byte in enumerate(found) if chr(byte).isdecimal()]
                for place in draw.sample(digits, min(3, len(digits))):
                    found[place] = ord(draw.choice("0123456789"))
        if not found:
            return b""
    return bytes(found)


def mutant(draw: random.Random, path: Path, proof: Path) -> bytes:
    """Return what a file is replaced by."""
    data = path.read_bytes()
    chance = draw.random()
    retell: Callable[[random.Random, bytes], bytes] | None = None
    if data[:2] == b"PK":
        retell = retold_npz if path.suffix == ".npz" else retold_torch
    elif data[:1] == b"{":
        retell = retold_json
    if chance < 0.1:
        return hostile(draw, data, proof)
    if retell is not None and chance < 0.6:
        return retell(draw, data)
    return damaged(draw, data)


# --- the mutants ---------------------------------------------------------------------------------


def read(path: Path, options: dict[str, Any]) -> bool:
    """Read an artifact and say what it holds; whether it was read."""
    try:
        found = read_directions(path, **options)
    except BakeError as error:
        assert str(error) and "Traceback" not in str(error)
        return False
    for item in found.items:
        for tensor in item.tensors.values():
            assert bool(torch.isfinite(tensor).all()) and tensor.numel()
    assert describe(found)
    assert first_recipe(found, str(path), options)
    return True


def try_mutant(system: System, seed: int, folder: Path) -> bool:
    draw = random.Random(f"{system.name} {seed}")
    folder.mkdir()
    made = system.make(folder, SIZES)
    options = {key: value for key, value in made.options.items() if key not in ("layer",)}
    for key in ("minus",):
        if key in options:
            options[key] = Path(options[key])
    if seed == 0:
        assert read(folder / made.file, options)  # the control: whole, it is read
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    chosen, proof = draw.choice(files), folder / "proof"
    chosen.write_bytes(mutant(draw, chosen, proof))
    with watched() as run:
        sound = read(folder / made.file, options)
    assert not run and not proof.exists(), f"{system.name}, seed {seed}: {run}"
    return sound


def mutate(folder: Path, count: int) -> tuple[int, int]:
    """Return how many mutants were read, and how many refused."""
    tally = [0, 0]
    for number in range(count):
        system, seed = SYSTEMS[number % len(SYSTEMS)], number // len(SYSTEMS)
        try:
            sound = try_mutant(system, seed, folder / str(number))
        except Exception as error:
            error.add_note(f"{system.name}, seed {seed}")
            raise
        tally[0 if sound else 1] += 1
    return tally[0], tally[1]


def test_a_sample_of_mutants(tmp_path: Path) -> None:
    sound, refused = mutate(tmp_path, SAMPLE)
    assert sound > 5 and refused > SAMPLE // 3


@pytest.mark.slow
def test_two_thousand_mutants(tmp_path: Path) -> None:
    sound, refused = mutate(tmp_path, ALL)
    assert sound > 100 and refused > ALL // 3


def test_what_watches_sees_what_is_run(tmp_path: Path) -> None:
    """The control: the payload of a hostile mutant runs where it is unpickled."""
    with watched() as run:
        pickle.loads(pickle.dumps(Payload(tmp_path / "proof")))
    assert (tmp_path / "proof").exists() and any("os.mkdir" in event for event in run)
