"""Keys in PEM, for signing and verifying: elliptic curves, as model-signing takes them."""

import hashlib
import importlib
from pathlib import Path
from typing import Any

from bake.errors import InputError, UsageError

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_LIMIT = 1 << 16
_MAKE = "make one with `openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem`"
_PUBLIC = "write it with `openssl ec -in KEY.pem -pubout -out PUB.pem`"


def module(name: str) -> Any:
    """Return a module of what signing needs.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"signatures need model-signing, and {error.name or name} is not installed",
            fix="pip install 'bake-directions[sign]'",
        ) from error


def load_private(path: Path, passphrase: bytes | None) -> tuple[Any, bytes | None]:
    """Return the public half of a private key, and what the private one is opened with.

    Args:
        path: a file in PEM.
        passphrase: of an encrypted key; None where there is none to be had.

    Raises:
        UsageError: the libraries are not installed.
        InputError: the file is no private key of a kind that signs models, or the passphrase is
            missing or wrong.
    """
    serialization = module("cryptography.hazmat.primitives.serialization")
    unsupported = module("cryptography.exceptions").UnsupportedAlgorithm
    _ = module("model_signing.signing")
    data = _read(path)
    encrypted = b"ENCRYPTED" in data
    secret = passphrase if encrypted else None
    if encrypted and not secret:
        raise InputError(
            "the key is encrypted, and there is no passphrase for it",
            where=str(path),
            fix="set BAKE_SIGNING_PASSPHRASE, or run where bake can ask for it",
        )
    try:
        key = serialization.load_pem_private_key(data, secret)
    except (ValueError, TypeError, unsupported) as error:
        if secret is not None:
            what = "the key cannot be opened: the passphrase is wrong, or the file is damaged"
            raise InputError(what, where=str(path)) from error
        raise InputError("is no private key in PEM", where=str(path), fix=_MAKE) from error
    _check_curve(key, path)
    return key.public_key(), secret


def load_public(path: Path) -> Any:
    """Return a public key.

    Raises:
        UsageError: the libraries are not installed.
        InputError: the file is no public key of a kind that signs models.
    """
    serialization = module("cryptography.hazmat.primitives.serialization")
    unsupported = module("cryptography.exceptions").UnsupportedAlgorithm
    _ = module("model_signing.verifying")
    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise InputError(
            "is a private key; a signature is verified with the public one",
            where=str(path),
            fix=_PUBLIC,
        )
    try:
        found = serialization.load_pem_public_key(data)
    except (ValueError, TypeError, unsupported) as error:
        raise InputError("is no public key in PEM", where=str(path), fix=_PUBLIC) from error
    _check_curve(found, path)
    return found


def public_pem(key: Any) -> tuple[str, bytes]:
    """Return the fingerprint of a public key, which a signature names it by, and its text."""
    serialization = module("cryptography.hazmat.primitives.serialization")
    pem = bytes(
        key.public_bytes(
            encoding=serialization.Encoding.PEM,
            format=serialization.PublicFormat.SubjectPublicKeyInfo,
        )
    )
    return hashlib.sha256(pem).hexdigest(), pem


def _check_curve(key: Any, path: Path) -> None:
    name = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    if name not in _CURVES:
        raise InputError(
            f"is a key of a kind that does not sign models ({name})",
            where=str(path),
            why=f"model-signing takes the elliptic curves {', '.join(_CURVES)}",
            fix=_MAKE,
        )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LIMIT:
            raise InputError(f"is {path.stat().st_size} bytes long, and no key", where=str(path))
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"the key cannot be read: {error.strerror}", where=str(path)) from error
