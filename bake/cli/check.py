"""``bake check``: whether an artifact's files are those that were sealed, and who signed them."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.options import PATH
from bake.cli.output import Output, bake_command
from bake.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bake.seal.seal import Check
    from bake.seal.sign import Signed

PASSPHRASE = "BAKE_SIGNING_PASSPHRASE"
"""The environment variable that holds the passphrase of an encrypted key."""


@bake_command("check")
@click.argument("out", type=PATH)
@click.option("--base", type=PATH, metavar="DIR", help="Compare untouched tensors with this base.")
@click.option("--seal", is_flag=True, help="Write SHA256SUMS and the statement first.")
@click.option("--sign", type=PATH, metavar="KEY", help="Seal and sign with this private key first.")
@click.option("--key", type=PATH, metavar="PUB", help="Verify the signature with this public key.")
def command(
    output: Output,
    out: Path,
    *,
    base: Path | None,
    seal: bool,
    sign: Path | None,
    key: Path | None,
) -> None:
    """Check that the files of OUT are those that were sealed.

    Reads every byte and compares it with SHA256SUMS; checks that the index and the headers agree,
    and that the statement of how the artifact was made fits its record. OUT may be a download.
    With --key it also tells whether the owner of that key has signed these files.
    Keys are elliptic curves in PEM; the passphrase of an encrypted one is asked for, or read from
    the environment variable BAKE_SIGNING_PASSPHRASE.
    """
    from bake.seal import seal as sealing
    from bake.seal.sign import check_signed
    from bake.seal.sign import sign as sign_it

    _refuse_remote(out)
    passphrase = passphrase_of(sign)
    with output.bar(f"reading {out.name}") as move:
        new = None
        if sign is not None:
            new = sign_it(out, sign, passphrase=passphrase, progress=move)
        elif seal:
            sealing.seal(out, move)
        found = sealing.check(out, base=base, progress=move)
        signed, found = check_signed(out, found, key)
    failure = found.failure()
    # A signature that was made just now has been verified with the other half of its key.
    signed = signed if key is not None or failure is not None else new
    signature = _signature(signed, found.manifest.by_name(), named=key is not None)
    output.present(
        data=lambda: _data(found, signature),
        view=lambda: [_facts(found, signature)],
        error=failure,
    )


def _data(found: "Check", signature: dict[str, Any]) -> dict[str, Any]:
    return {
        "folder": found.folder,
        "kind": found.record.kind,
        "plan_digest": found.record.plan.digest,
        "digest": found.manifest.digest,
        "files": len(found.manifest.files),
        "bytes": found.manifest.size,
        "verified": found.unverified is None,
        "signature": signature,
        "problems": [str(problem) for problem in found.problems],
    }


def _facts(found: "Check", signature: dict[str, Any]) -> "RenderableType":
    from bake.cli.render.pieces import facts

    return facts(
        [
            ("artifact", f"{found.folder} ({found.record.kind})"),
            ("files", f"{len(found.manifest.files)} with {found.manifest.size:,} bytes"),
            ("digest", found.manifest.digest),
            ("plan", found.record.plan.digest),
            ("verified", "yes" if found.unverified is None else f"no: {found.unverified}"),
            ("signed", _words(signature)),
            ("intact", "no" if found.problems else "yes"),
        ]
    )


def _refuse_remote(out: Path) -> None:
    """Refuse an address on the Hub: what is checked is every byte of a download."""
    from bake.checkpoints.hub_names import HUB_PREFIX
    from bake.jobs.recorded import is_artifact

    text = str(out).replace("hf:/", HUB_PREFIX, 1) if str(out).startswith("hf:/") else str(out)
    if out.exists() or not is_artifact(text):
        return
    repo, _, revision = text.removeprefix(HUB_PREFIX).partition("@")
    pinned = f" --revision {revision}" if revision else ""
    folder = repo.rpartition("/")[2]
    raise UsageError(
        f"{text} is no folder here, and what is checked is every byte of one",
        fix=f"hf download {repo}{pinned} --local-dir {folder}, then bake check {folder}",
    )


def passphrase_of(key: Path | None) -> bytes | None:
    """Return the passphrase of an encrypted key, asked for where the environment has none.

    It is asked for before a progress bar is drawn, and never an argument, which other users see.
    """
    if key is None or not key.is_file() or b"ENCRYPTED" not in key.read_bytes()[: 1 << 16]:
        return None
    if found := os.environ.get(PASSPHRASE):
        return found.encode()
    if not sys.stdin.isatty():
        return None
    return str(click.prompt(f"Passphrase of {key}", hide_input=True, err=True)).encode()


def _signature(signed: "Signed | None", files: dict[str, Any], *, named: bool) -> dict[str, Any]:
    from bake.artifact.names import SIGNATURE

    if signed is not None:
        return {"status": "valid", "key": signed.key, "files": signed.files}
    if named:
        return {"status": "invalid"}
    return {"status": "unverified" if SIGNATURE in files else "none"}


def _words(signature: dict[str, Any]) -> str:
    if signature["status"] == "valid":
        return f"yes, over {signature['files']} files, by the key {signature['key']}"
    return {
        "unverified": "yes, by whom is not verified: name a public key with --key",
        "invalid": "no valid signature",
        "none": "no",
    }[signature["status"]]
