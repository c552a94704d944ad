"""``bake check``: whether an artifact's files are those that were sealed."""

from pathlib import Path

import click

from bake.cli.output import Output
from bake.cli.output import command as bake_command
from bake.cli.request import PATH


@bake_command("check")
@click.argument("out", type=PATH)
@click.option("--base", type=PATH, metavar="DIR", help="Compare untouched tensors with this base.")
@click.option("--seal", is_flag=True, help="Write SHA256SUMS and the statement first.")
def command(output: Output, out: Path, *, base: Path | None, seal: bool) -> None:
    """Check that the files of OUT are those that were sealed.

    Reads every byte and compares it with SHA256SUMS; checks that the index and the headers agree,
    and that the statement of how the artifact was made fits its record. OUT may be a download.
    """
    from bake.cli import render
    from bake.publish import seal as sealing

    with render.progress(f"reading {out.name}", visible=not output.quiet) as move:
        if seal:
            sealing.seal(out, move)
        found = sealing.check(out, base=base, progress=move)
    failure = found.failure()
    output.present(
        data=lambda: {
            "folder": found.folder,
            "kind": found.kind,
            "plan_digest": found.plan_digest,
            "digest": found.digest,
            "files": found.files,
            "bytes": found.size,
            "verified": found.unverified is None,
            "problems": [str(problem) for problem in found.problems],
        },
        view=lambda: [
            render.facts(
                [
                    ("artifact", f"{found.folder} ({found.kind})"),
                    ("files", f"{found.files} with {found.size:,} bytes"),
                    ("digest", found.digest),
                    ("plan", found.plan_digest),
                    ("verified", "yes" if found.unverified is None else f"no: {found.unverified}"),
                    ("intact", "yes" if failure is None else "no"),
                ]
            )
        ],
        error=failure,
    )
