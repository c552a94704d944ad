"""Sign an artifact with a key, and verify the signature. Needs model-signing, the extra ``sign``.

The signature is that of OpenSSF's model signing (https://github.com/ossf/model-signing-spec): the
sha256 of every file in an in-toto statement, in a DSSE envelope, in a Sigstore bundle. It covers
every file but the card, which may be edited on the Hub's pages, ``SHA256SUMS``, which names the
card, itself, and what the Hub adds. Any tool that speaks the format verifies it.
"""

import base64
import binascii
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bake.artifact.names import CARD, HUBS_OWN, SIGNATURE, SUMS, Problem
from bake.checkpoints import strictjson
from bake.checkpoints.folder import regular_file
from bake.errors import CheckpointError, InputError, first_line
from bake.progress import Progress
from bake.seal.keys import load_private, load_public, module, public_pem
from bake.seal.manifest import Manifest, compare_hashes, write_text
from bake.seal.seal import Check, seal

UNSIGNED = frozenset({CARD, SUMS, SIGNATURE, *HUBS_OWN})
"""What a signature leaves out."""

_IGNORED = (".cache", *sorted(UNSIGNED))
_PREDICATE = "https://model_signing/signature/v1.0"
_LIMIT = 64_000_000
_MEANING = {
    "missing": (f"is missing, and {SIGNATURE} covers it", ""),
    "extra": (f"is not covered by {SIGNATURE}", "remove it, or sign"),
    "changed": ("is not what was signed", "sign again"),
}
_REFUSED = (ValueError, LookupError, TypeError, AttributeError)  # what the library raises


@dataclass(frozen=True, slots=True)
class Signed:
    """A signature that was made or verified.

    Attributes:
        key: the sha256 of the public key, by which its owner can be asked for it.
        files: how many files it covers.
    """

    key: str
    files: int


def sign(
    folder: Path,
    key: Path,
    *,
    passphrase: bytes | None = None,
    progress: Progress | None = None,
) -> Signed:
    """Seal an artifact and write ``model.sig``, its signature.

    A signature that is valid for these files and this key is kept, so that nothing changes when
    there is nothing new to sign.

    Args:
        folder: the artifact.
        key: a private key in PEM: an elliptic curve, P-256, P-384 or P-521.
        passphrase: of an encrypted key.
        progress: called with the bytes that are hashed and their total.

    Raises:
        UsageError: model-signing is not installed.
        InputError: the key is none, or lies in the artifact; or the artifact cannot be sealed.
    """
    folder = folder.resolve()
    _refuse_inside(folder, key, "would be published with it")
    public_key, secret = load_private(key, passphrase)
    manifest = seal(folder, progress)
    fingerprint, pem = public_pem(public_key)
    with tempfile.TemporaryDirectory(prefix="bake-sign-") as scratch:
        public = Path(scratch) / "public.pem"
        public.write_bytes(pem)
        if (folder / SIGNATURE).exists() and not check_signature(folder, manifest, public):
            return Signed(fingerprint, len(_covered(manifest)))
        target = Path(scratch) / SIGNATURE
        config = module("model_signing.signing").Config()
        config.use_elliptic_key_signer(private_key=key, password=secret)
        config.set_hashing_config(_hashing())
        config.sign(folder, target)
        write_text(folder, SIGNATURE, target.read_text(encoding="utf-8"))
        wrong = check_signature(folder, manifest, public)
    if wrong:
        (folder / SIGNATURE).unlink()
        raise InputError(
            f"changed while it was being signed: {wrong[0]}", where=str(folder), fix="run again"
        )
    return Signed(fingerprint, len(_covered(manifest)))


def check_signed(folder: Path, found: Check, key: Path | None) -> tuple[Signed | None, Check]:
    """Add to a check what there is to say of the signature.

    Without a key a signature is only held against the files, which tells one that is out of date.

    Args:
        folder: the artifact, or a download of it.
        found: what the check found.
        key: the public key in PEM, from elsewhere than the artifact.

    Raises:
        UsageError: a key is named, and model-signing is not installed.
        InputError: the key is none, or came with the artifact.
    """
    signed: Signed | None = None
    problems: list[Problem] = []
    if key is not None:
        folder = folder.resolve()
        _refuse_inside(folder, key, "proves nothing about it")
        fingerprint, _ = public_pem(load_public(key))
        problems = check_signature(folder, found.manifest, key)
        signed = None if problems else Signed(fingerprint, len(_covered(found.manifest)))
    elif SIGNATURE in found.manifest.by_name():
        problems = out_of_date(folder, found.manifest)
    known = {problem.where for problem in found.problems}
    fresh = [problem for problem in problems if problem.where not in known]
    return signed, replace(found, problems=(*found.problems, *fresh))


def _refuse_inside(folder: Path, key: Path, why: str) -> None:
    if folder in key.resolve().parents:
        raise InputError(
            f"a key that lies in the artifact {why}",
            where=str(key),
            fix="keep it elsewhere" if "published" in why else "get it from whoever signed",
        )


def check_signature(folder: Path, manifest: Manifest, key: Path) -> list[Problem]:
    """Return what is wrong with an artifact's signature, for a public key that is known to be one.

    The statement is compared with the files here, strictly and name by name, and its signature is
    verified by model-signing, which hashes every file again.
    """
    problems = out_of_date(folder, manifest)
    if problems:
        return problems
    config = module("model_signing.verifying").Config()
    config.use_elliptic_key_verifier(public_key=key)
    config.set_hashing_config(_hashing())
    try:
        config.verify(folder, folder / SIGNATURE)
    except module("cryptography.exceptions").InvalidSignature:
        return [_problem("was not made with this key, or was altered", "ask whoever signed")]
    except _REFUSED as error:
        if "Key mismatch" in str(error):
            what = "was made with another key than the one that is named"
            return [_problem(what, "use the public key of whoever you trust to have signed")]
        return [_problem(f"is refused by model-signing: {first_line(error)}", "sign again")]
    return []


def out_of_date(folder: Path, manifest: Manifest) -> list[Problem]:
    """Return where a signature does not state the files that are here; it needs no key.

    It tells a signature that is out of date. It does not tell who made it.
    """
    try:
        stated = _stated(folder)
    except InputError as error:
        return [_problem(error.what, error.fix or "sign again")]
    return [
        Problem(name, *_MEANING[state])
        for name, state in compare_hashes(stated, _covered(manifest))
    ]


def _covered(manifest: Manifest) -> dict[str, str]:
    """Return the sha256 of every file that a signature covers."""
    return {file.name: file.sha256 for file in manifest.files if file.name not in UNSIGNED}


def _stated(folder: Path) -> Mapping[str, str]:
    """Return the sha256 that a signature states, by name; its form is checked and nothing else.

    Raises:
        InputError: there is none, or it is malformed.
    """
    try:
        path = regular_file(folder.resolve(), SIGNATURE)
    except (CheckpointError, OSError) as error:
        raise InputError("is missing: the artifact is not signed") from error
    if path.stat().st_size > _LIMIT:
        raise InputError(f"is {path.stat().st_size} bytes long; the limit is {_LIMIT}")
    try:
        bundle = _object(path.read_bytes())
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
        envelope = bundle["dsseEnvelope"]
        payload = _object(base64.b64decode(envelope["payload"], validate=True))
        predicate = payload["predicate"]
        resources = [
            (row["name"], row["algorithm"], row["digest"]) for row in predicate["resources"]
        ]
        whole = payload["predicateType"] == _PREDICATE and len(envelope["signatures"]) == 1
    except (CheckpointError, binascii.Error, LookupError, TypeError, AttributeError) as error:
        brief = (error.what if isinstance(error, CheckpointError) else first_line(error))[:120]
        raise InputError(f"is no signature of a model ({brief})") from error
    texts = all(isinstance(value, str) for row in resources for value in row)
    names = {name for name, _, _ in resources}
    if not whole or not texts or not hint or len(names) != len(resources):
        raise InputError("is no signature of a model, or of a form that bake does not verify")
    if predicate.get("serialization", {}).get("method") != "files" or any(
        algorithm != "sha256" for _, algorithm, _ in resources
    ):
        raise InputError("does not state the sha256 of whole files, as bake's signatures do")
    return {name: digest for name, _, digest in resources}


def _object(data: bytes) -> dict[str, Any]:
    return strictjson.parse_object(strictjson.decode(data, where=SIGNATURE), where=SIGNATURE)


def _hashing() -> Any:
    """Return model-signing's configuration: whole files, through the links of the Hub's cache."""
    config = module("model_signing.hashing").Config()
    config.use_file_serialization(hashing_algorithm="sha256", allow_symlinks=True)
    config.set_allow_symlinks(True)
    config.set_ignored_paths(paths=[Path(name) for name in _IGNORED], ignore_git_paths=True)
    return config


def _problem(what: str, fix: str) -> Problem:
    return Problem(SIGNATURE, what, fix)
