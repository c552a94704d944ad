"""``bake revert``: from a baked model back to its base."""

from pathlib import Path

import click

from bake.cli.options import FORCE, JOBS, OUT
from bake.cli.output import Output, bake_command


@bake_command("revert")
@click.argument("artifact", metavar="OUT")
@OUT
@click.option(
    "--base",
    metavar="MODEL",
    help="The base: a folder or a Hub id; for a GGUF its file. The recorded one else.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of --base on the Hub.")
@FORCE
@JOBS
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
def command(
    output: Output,
    artifact: str,
    out: Path,
    *,
    base: str | None,
    revision: str | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Write the base of the baked model OUT to a new folder.

    OUT is a folder, a download or hf://owner/name. The result is the base's, bit for bit: only
    the edited tensors are read of the base, and every file is compared with the base's by hash.
    """
    from bake.artifact.staged import check_before
    from bake.cli.render import results
    from bake.jobs.reverting import prepare_reversal

    check_before(out, force=force)
    output.keeps(out)
    reversal = prepare_reversal(artifact, base=base, revision=revision, bars=output.bar)
    for note in (*reversal.notes, f"the base is {reversal.base}"):
        output.remark(note)
    if dry_run:
        found = {
            "dry_run": True,
            "out": str(out),
            "base": reversal.base,
            "bytes_from_base": reversal.edited_bytes,
        }
        said = (
            "dry run: {out} would be restored with {bytes_from_base:,} bytes of tensors of {base}"
        )
        output.present(data=lambda: found, view=lambda: [said.format_map(found)])
        return
    reverted = reversal.write(out, force=force)
    output.present(data=reverted.to_json, view=lambda: results.reverted(reverted))
