"""A signature says who vouches for an artifact; whatever is wrong with it is one clear line."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import data_of, error_of, run
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from folders import flip
from model_signing import hashing, signing
from published import (
    Worker,
    copy_of,
    hub_with,
    make_artifact,
    rewrite,
    sharded_base,
    worker_at,
    write_verification,
)

from bake.artifact.names import SIGNATURE, SUMS
from bake.errors import UsageError
from bake.publish.preflight import Terms, preflight
from bake.seal import seal, sign
from bake.seal.manifest import read_manifest

SECRET = b"correct horse"


def write_key(path: Path, key: Any, *, passphrase: bytes | None = None) -> Path:
    """Write a private key as ``path`` and its public half as ``path.pub``."""
    how: Any = pem.NoEncryption()
    if passphrase is not None:
        how = pem.BestAvailableEncryption(passphrase)
    path.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, how))
    public = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Private keys by name; ``.pub`` beside each is its public half."""
    folder = tmp_path_factory.mktemp("keys")
    curve = ec.generate_private_key(ec.SECP256R1())
    made = {
        "ours": write_key(folder / "ours.pem", curve),
        "other": write_key(folder / "other.pem", ec.generate_private_key(ec.SECP256R1())),
        "p384": write_key(folder / "p384.pem", ec.generate_private_key(ec.SECP384R1())),
        "p521": write_key(folder / "p521.pem", ec.generate_private_key(ec.SECP521R1())),
        "encrypted": write_key(folder / "encrypted.pem", curve, passphrase=SECRET),
        "koblitz": write_key(folder / "koblitz.pem", ec.generate_private_key(ec.SECP256K1())),
        "rsa": write_key(folder / "rsa.pem", rsa.generate_private_key(65537, 2048)),
        "ed25519": write_key(folder / "ed25519.pem", ed25519.Ed25519PrivateKey.generate()),
    }
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def artifact(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(base, tmp_path_factory.mktemp("made") / "out")


@pytest.fixture(scope="module")
def signed(artifact: Path, keys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = copy_of(artifact, tmp_path_factory.mktemp("signed") / "out")
    sign.sign(out, keys["ours"])
    return out


@pytest.fixture
def out(signed: Path, tmp_path: Path) -> Path:
    return copy_of(signed, tmp_path / "out")


def checked(out: Path, *args: object) -> dict[str, Any]:
    return data_of("check", out, *args)


def wrong(out: Path, *args: object, code: int = 4) -> str:
    """Return everything that ``bake check`` says of a folder that is not as it should be."""
    return error_of(data_of("check", out, *args, code=code))


def public(key: Path) -> Path:
    return key.with_suffix(".pub")


@pytest.mark.parametrize("name", ["ours", "p384", "p521"])
def test_a_signature_is_made_and_verified(
    artifact: Path, keys: dict[str, Path], tmp_path: Path, name: str
) -> None:
    out = copy_of(artifact, tmp_path / "out")
    said = wrong(out, "--seal", "--key", public(keys[name]))
    assert "model.sig is missing: the artifact is not signed" in said
    made = checked(out, "--sign", keys[name])
    found = checked(out, "--key", public(keys[name]))
    assert made["signature"] == found["signature"]
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    covered = names - {"README.md", SUMS, SIGNATURE}
    assert found["signature"]["status"] == "valid"
    assert found["signature"]["files"] == len(covered) > 5
    assert checked(out)["signature"] == {"status": "unverified"}
    # The control: the same signature and another key.
    assert "was made with another key" in wrong(out, "--key", public(keys["other"]))


def test_other_tools_verify_it(out: Path, keys: dict[str, Path]) -> None:
    """model-signing's own command, as a stranger would use it."""
    tool = [sys.executable, "-W", "ignore", "-m", "model_signing", "verify", "key"]
    args = ["--public_key", str(public(keys["ours"])), "--signature", str(out / SIGNATURE)]
    done = subprocess.run([*tool, *args, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (out / "config.json").write_text("{}")
    done = subprocess.run([*tool, *args, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Hash mismatch for 'config.json'" in done.stderr + done.stdout


def test_the_card_may_be_edited_and_sealed_again(out: Path, keys: dict[str, Path]) -> None:
    before = (out / SIGNATURE).read_bytes()
    with (out / "README.md").open("a") as card:
        card.write("\nA line from the Hub's pages.\n")
    said = wrong(out, "--key", public(keys["ours"]))
    assert said.startswith("README.md is not what SHA256SUMS lists")  # and nothing of the signature
    assert checked(out, "--seal", "--key", public(keys["ours"]))["signature"]["status"] == "valid"
    # Signing again changes nothing, so that a second push has nothing to send.
    assert checked(out, "--sign", keys["ours"])["signature"]["status"] == "valid"
    assert (out / SIGNATURE).read_bytes() == before
    (out / "README.md").unlink()
    assert checked(out, "--seal", "--key", public(keys["ours"]))["signature"]["status"] == "valid"


def test_what_is_not_the_card_ends_the_signature(out: Path, keys: dict[str, Path]) -> None:
    before = (out / SIGNATURE).read_bytes()
    write_verification(out, note="another one")
    for key in ((), ("--key", public(keys["ours"]))):
        said = wrong(out, "--seal", *key)
        assert "verify.json is not what was signed" in said and "sign again" in said
    assert checked(out, "--sign", keys["ours"])["signature"]["status"] == "valid"
    assert (out / SIGNATURE).read_bytes() != before
    # Another key takes the place of the first one.
    assert checked(out, "--sign", keys["other"])["signature"]["status"] == "valid"
    assert "another key" in wrong(out, "--key", public(keys["ours"]))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed file": (
        lambda out: (out / "config.json").write_text("{}"),
        "config.json is not what SHA256SUMS lists",
    ),
    "a changed shard": (
        lambda out: flip(next(out.glob("*.safetensors"))),
        "is not what SHA256SUMS lists",
    ),
    "an extra file": (
        lambda out: (out / "extra.txt").write_text("x"),
        "extra.txt is not listed in SHA256SUMS",
    ),
    "a missing file": (lambda out: (out / "verify.json").unlink(), "verify.json is missing"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_artifact(out: Path, keys: dict[str, Path], what: str) -> None:
    spoil, expected = SPOILED[what]
    spoil(out)
    said = wrong(out, "--key", public(keys["ours"]))
    assert expected in said.replace(": is ", " is ")
    found = data_of("check", out, "--key", public(keys["ours"]), code=4)
    assert found["signature"] == {"status": "invalid"}


@pytest.mark.parametrize("what", ["a changed file", "an extra file", "a missing file"])
def test_a_spoiled_artifact_that_was_sealed_again(
    out: Path, keys: dict[str, Path], what: str
) -> None:
    """Sums and record can be made anew by anybody; the signature cannot."""
    if what == "a changed file":
        write_verification(out, note="mine")
        expected = "verify.json is not what was signed"
    elif what == "an extra file":
        (out / "NOTICE").write_text("mine")
        expected = "NOTICE is not covered by model.sig"
    else:
        (out / "verify.json").unlink()
        expected = "verify.json is missing, and model.sig covers it"
    seal.seal(out)
    said = wrong(out, "--key", public(keys["ours"]))
    assert expected in said.replace(": is ", " is ")  # one problem, or one line of several


def altered(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the signed statement, and leave its signature as it is."""

    def outer(bundle: dict[str, Any]) -> None:
        envelope = bundle["dsseEnvelope"]
        payload = json.loads(base64.b64decode(envelope["payload"]))
        change(payload)
        envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()

    rewrite(out / SIGNATURE, outer)


def test_a_statement_that_was_made_to_fit(out: Path, keys: dict[str, Path]) -> None:
    """A changed file with its new hash in the statement: only the signature tells."""
    write_verification(out, note="mine")
    seal.seal(out)
    new = read_manifest(out).by_name()["verify.json"].sha256

    def fit(payload: dict[str, Any]) -> None:
        for row in payload["predicate"]["resources"]:
            if row["name"] == "verify.json":
                row["digest"] = new

    altered(out, fit)
    assert checked(out)["signature"]["status"] == "unverified"  # without a key nobody can tell
    said = wrong(out, "--key", public(keys["ours"]))
    assert "model.sig was not made with this key, or was altered" in said


def test_a_signature_that_leaves_files_out(
    artifact: Path, keys: dict[str, Path], tmp_path: Path
) -> None:
    """The statement may name what it ignores; bake decides that for itself."""
    out = copy_of(artifact, tmp_path / "out")
    seal.seal(out)
    config = signing.Config().use_elliptic_key_signer(private_key=keys["ours"])
    left = ["README.md", SUMS, SIGNATURE, "config.json"]
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=left))
    config.sign(out, out / SIGNATURE)
    said = wrong(out, "--key", public(keys["ours"]))
    assert "config.json is not covered by model.sig" in said


def bundle_of(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rewrite(out / SIGNATURE, change)


def _drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        for key in path[:-1]:
            found = found[key]
        del found[path[-1]]

    return change


def _put(value: object, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return change


MALFORMED: dict[str, Callable[[Path], object]] = {
    "empty": lambda out: (out / SIGNATURE).write_bytes(b""),
    "no JSON": lambda out: (out / SIGNATURE).write_bytes(b"PK\x03\x04"),
    "no object": lambda out: (out / SIGNATURE).write_text("[]"),
    "not UTF-8": lambda out: (out / SIGNATURE).write_bytes(b"\xff{}"),
    "deep": lambda out: (out / SIGNATURE).write_text("[" * 100_000),
    "a key twice": lambda out: (out / SIGNATURE).write_text('{"a": 1, "a": 2}'),
    "an empty object": lambda out: (out / SIGNATURE).write_text("{}"),
    "no key": lambda out: bundle_of(out, _drop("verificationMaterial", "publicKey", "hint")),
    "no hint": lambda out: bundle_of(out, _put("", "verificationMaterial", "publicKey", "hint")),
    "no envelope": lambda out: bundle_of(out, _drop("dsseEnvelope")),
    "no signature": lambda out: bundle_of(out, _put([], "dsseEnvelope", "signatures")),
    "no base64": lambda out: bundle_of(out, _put("%%", "dsseEnvelope", "payload")),
    "payload of no kind": lambda out: bundle_of(out, _put(7, "dsseEnvelope", "payload")),
    "payload no JSON": lambda out: bundle_of(out, _put("e30=x", "dsseEnvelope", "payload")),
    "empty payload": lambda out: bundle_of(out, _put("e30=", "dsseEnvelope", "payload")),
    "another predicate": lambda out: altered(out, _put("x", "predicateType")),
    "no resources": lambda out: altered(out, _put(None, "predicate", "resources")),
    "a digest of no kind": lambda out: altered(
        out, lambda p: p["predicate"]["resources"][0].update(digest=7)
    ),
    "another algorithm": lambda out: altered(
        out, lambda p: p["predicate"]["resources"][0].update(algorithm="blake3")
    ),
    "a name twice": lambda out: altered(
        out, lambda p: p["predicate"]["resources"].append(p["predicate"]["resources"][0])
    ),
    "another media type": lambda out: bundle_of(out, _put("text/plain", "mediaType")),
    "no media type": lambda out: bundle_of(out, _drop("mediaType")),
    "a signature of no kind": lambda out: bundle_of(
        out, _put([{"sig": 5}], "dsseEnvelope", "signatures")
    ),
    "a signature that is none": lambda out: bundle_of(
        out, _put([{"sig": "AAAA", "keyid": ""}], "dsseEnvelope", "signatures")
    ),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_signature(out: Path, keys: dict[str, Path], what: str) -> None:
    MALFORMED[what](out)
    said = wrong(out, "--key", public(keys["ours"]))
    assert said.startswith("model.sig ") and len(said.splitlines()) == 1, said


def test_a_missing_signature(out: Path, keys: dict[str, Path]) -> None:
    (out / SIGNATURE).unlink()
    assert checked(out)["signature"] == {"status": "none"}
    assert "the artifact is not signed" in wrong(out, "--key", public(keys["ours"]))


NO_PRIVATE = {
    "rsa": "is a key of a kind that does not sign models (RSA",
    "ed25519": "is a key of a kind that does not sign models (Ed25519",
    "koblitz": "does not sign models (secp256k1)",
    "public": "is no private key in PEM",
    "text": "is no private key in PEM",
    "broken": "is no private key in PEM",
    "none": "the key cannot be read: No such file",
    "folder": "the key cannot be read: Is a directory",
    "large": "and no key",
}


def key_of(what: str, keys: dict[str, Path], folder: Path) -> Path:
    """Return a file that is no key, or none of the right kind."""
    if what in keys:
        return keys[what]
    path = folder / "key.pem"
    if what == "public":
        return public(keys["ours"])
    if what == "text":
        path.write_text("my key")
    elif what == "broken":
        path.write_bytes(keys["ours"].read_bytes()[:80] + b"\n-----END PRIVATE KEY-----\n")
    elif what == "large":
        path.write_bytes(bytes(1 << 17))
    elif what == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("what", NO_PRIVATE)
def test_a_file_that_is_no_private_key(
    artifact: Path, keys: dict[str, Path], tmp_path: Path, what: str
) -> None:
    out = copy_of(artifact, tmp_path / "out")
    said = wrong(out, "--sign", key_of(what, keys, tmp_path))
    assert NO_PRIVATE[what] in said
    assert not (out / SIGNATURE).exists() and not (out / SUMS).exists()


@pytest.mark.parametrize("what", ["rsa", "private", "text", "none"])
def test_a_file_that_is_no_public_key(
    out: Path, keys: dict[str, Path], tmp_path: Path, what: str
) -> None:
    key = {"rsa": public(keys["rsa"]), "private": keys["ours"]}.get(what)
    said = wrong(out, "--key", key or key_of(what, keys, tmp_path))
    assert {
        "rsa": "does not sign models",
        "private": "is a private key; a signature is verified with the public one",
        "text": "is no public key in PEM",
        "none": "the key cannot be read",
    }[what] in said


def test_a_key_that_lies_in_the_artifact(out: Path, keys: dict[str, Path]) -> None:
    shutil.copy(keys["ours"], out / "key.txt")
    assert "would be published with it" in wrong(out, "--sign", out / "key.txt")
    shutil.copy(public(keys["ours"]), out / "key.txt")
    assert "proves nothing about it" in wrong(out, "--key", out / "key.txt")


def test_an_encrypted_key(
    artifact: Path, keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy_of(artifact, tmp_path / "out")
    monkeypatch.delenv("BAKE_SIGNING_PASSPHRASE", raising=False)
    assert "there is no passphrase for it" in wrong(out, "--sign", keys["encrypted"])
    monkeypatch.setenv("BAKE_SIGNING_PASSPHRASE", "wrong horse")
    said = wrong(out, "--sign", keys["encrypted"])
    assert "the passphrase is wrong" in said and "horse" not in said
    monkeypatch.setenv("BAKE_SIGNING_PASSPHRASE", SECRET.decode())
    result = run("check", out, "--sign", keys["encrypted"], "--json")
    assert result.exit_code == 0 and SECRET.decode() not in result.output
    assert checked(out, "--key", public(keys["ours"]))["signature"]["status"] == "valid"
    everything = b"".join(p.read_bytes() for p in out.rglob("*") if p.is_file())
    assert SECRET not in everything


def test_the_passphrase_is_asked_for(
    artifact: Path, keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bake.cli import check as command

    out = copy_of(artifact, tmp_path / "out")
    monkeypatch.delenv("BAKE_SIGNING_PASSPHRASE", raising=False)
    monkeypatch.setattr(command.sys, "stdin", type("", (), {"isatty": lambda self: True})())
    asked: list[tuple[str, dict[str, Any]]] = []

    def prompt(text: str, **options: Any) -> str:
        asked.append((text, options))
        return SECRET.decode()

    monkeypatch.setattr(command.click, "prompt", prompt)
    secret = command.passphrase_of(keys["encrypted"])
    assert secret == SECRET and asked[0][1] == {"hide_input": True, "err": True}
    assert command.passphrase_of(keys["ours"]) is None and len(asked) == 1
    assert sign.sign(out, keys["encrypted"], passphrase=secret).files


@pytest.mark.parametrize("name", ["model_signing.signing", "OpenSSL"])
def test_the_extra_is_missing(
    out: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for loaded in [m for m in sys.modules if m.split(".")[0] in (name.split(".")[0], "sigstore")]:
        monkeypatch.delitem(sys.modules, loaded)
    if name == "OpenSSL":  # undeclared by model-signing 1.1, which fails to import without it
        for loaded in [m for m in sys.modules if m.startswith("model_signing")]:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    said = wrong(out, "--sign", keys["ours"], code=UsageError.exit_code)
    assert "signatures need model-signing" in said
    assert "pip install 'bake-directions[sign]'" in said
    assert checked(out)["signature"]["status"] == "unverified"  # what needs no key needs no extra


def test_a_signed_artifact_may_be_published(out: Path, keys: dict[str, Path]) -> None:
    assert preflight(out, Terms()).problems == ()


# --- over the Hub --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    home = tmp_path_factory.mktemp("home") / "home"
    with hub_with(base) as state, worker_at(state, home) as worker:
        yield worker


def test_a_signature_survives_the_hub(
    worker: Worker, out: Path, keys: dict[str, Path], tmp_path: Path
) -> None:
    pushed = worker.push(out, "alice/signed")
    assert pushed.code == 0, pushed.out
    downloaded = worker.download("alice/signed")
    assert (downloaded / SIGNATURE).is_symlink()  # as the Hub's cache keeps it
    found = worker.run("check", downloaded, "--key", public(keys["ours"]))
    assert found.code == 0 and found.data["signature"]["status"] == "valid", found.out
    assert worker.run("check", downloaded, "--key", public(keys["other"])).code == 4

    # A folder with .cache and .gitattributes, as local_dir leaves it; the card edited on the web.
    local = tmp_path / "local"
    shutil.copytree(downloaded, local)
    (local / ".cache" / "huggingface").mkdir(parents=True)
    (local / ".cache" / "huggingface" / "x.metadata").write_text("x")
    (local / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert checked(local, "--key", public(keys["ours"]))["signature"]["status"] == "valid"

    # The same push again changes nothing, signature included; signing again neither.
    sign.sign(out, keys["ours"])
    again = worker.push(out, "alice/signed")
    assert again.code == 0 and again.data["unchanged"], again.out
