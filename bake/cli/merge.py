"""``bake merge``: fold a PEFT LoRA adapter into a checkpoint."""

from pathlib import Path

import click

from bake.cli.export import check_out, kept_at
from bake.cli.output import KEPT, Output
from bake.cli.output import command as bake_command
from bake.cli.request import PATH, layout_of
from bake.errors import FamilyError


@bake_command("merge")
@click.argument("adapter", type=PATH)
@click.argument("base")
@click.option("--out", type=PATH, required=True, metavar="DIR", help="The folder to create.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a base on the Hub.")
@click.option("--family", type=PATH, metavar="FILE", help="Your own family table.")
@click.option("--force", is_flag=True, help="Replace the checkpoint that is at --out.")
def command(
    output: Output,
    adapter: Path,
    base: str,
    out: Path,
    *,
    revision: str | None,
    family: Path | None,
    force: bool,
) -> None:
    """Merge the PEFT adapter ADAPTER into the checkpoint BASE.

    The model is never loaded: untouched tensors keep their bytes, their order and their files.
    Rank and alpha patterns, rank-stabilised scaling, biases and embedding factors are merged;
    what is no sum of base and factors (DoRA) is refused.
    """
    from bake.checkpoints import open_checkpoint
    from bake.cli import render
    from bake.outputs.merge import merge_adapter

    check_out(out, force=force)
    checkpoint = open_checkpoint(base, revision=revision, complete=True)
    try:
        layout = layout_of(checkpoint, family)
    except FamilyError as error:
        if family is not None:
            raise
        # A merge needs no table where names and storage are plain; merge_adapter refuses the rest.
        output.remark(f"merging without a family table: {error.what}")
        layout = None
    click.get_current_context().meta[KEPT] = kept_at(out)
    record = {"base": {"model": base, "revision": checkpoint.revision}}
    with render.progress(f"writing {out.name}", visible=not output.quiet) as move:
        made = merge_adapter(
            adapter, checkpoint, out, layout=layout, record=record, force=force, progress=move
        )
    output.present(
        data=lambda: {
            "kind": made.kind,
            "path": str(made.path),
            "files": dict(made.files),
            "bytes_written": made.bytes_written,
            "bytes_edited": made.bytes_edited,
        },
        view=lambda: [
            render.facts(
                [
                    ("written", str(made.path)),
                    ("files", str(len(made.files))),
                    ("bytes", f"{made.bytes_written:,}, of which {made.bytes_edited:,} are edited"),
                ]
            )
        ],
    )
