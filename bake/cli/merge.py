"""``bake merge``: fold a PEFT LoRA adapter into a checkpoint."""

from dataclasses import replace
from pathlib import Path

import click

from bake.cli.options import PATH, table_options
from bake.cli.output import Output
from bake.cli.output import command as bake_command
from bake.errors import FamilyError
from bake.jobs.request import table_of


@bake_command("merge")
@click.argument("adapter")
@click.argument("base")
@click.option("--out", type=PATH, required=True, metavar="DIR", help="The folder to create.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a base on the Hub.")
@table_options
@click.option("--force", is_flag=True, help="Replace the artifact of bake that is at --out.")
def command(
    output: Output,
    adapter: str,
    base: str,
    out: Path,
    *,
    revision: str | None,
    family: Path | None,
    assume_harmless: tuple[str, ...],
    force: bool,
) -> None:
    """Merge the PEFT adapter ADAPTER into the checkpoint BASE.

    Both are folders or Hub ids. The model is never loaded: untouched tensors keep their bytes,
    their order and their files. Rank and alpha patterns, rank-stabilised scaling, biases and
    embedding factors are merged; what is no sum of base and factors (DoRA) is refused.
    """
    from bake.artifact.staged import check_before
    from bake.checkpoints import open_checkpoint
    from bake.checkpoints.adapter import find_adapter
    from bake.cli import render
    from bake.families.fit import layout_of
    from bake.merge.merge import merge_adapter, merge_notes

    check_before(out, force=force)
    found = find_adapter(adapter)
    checkpoint = open_checkpoint(base, revision=revision, complete=True)
    checkpoint = replace(checkpoint, harmless=assume_harmless)
    try:
        layout = layout_of(checkpoint, family)
    except FamilyError as error:
        if family is not None or assume_harmless:
            raise
        # A merge needs no table where names and storage are plain; merge_adapter refuses the rest.
        output.remark(f"merging without a family table: {error.what}")
        layout = None
    output.keeps(out)
    with output.bar(f"writing {out.name}") as move:
        made = merge_adapter(
            found.folder,
            checkpoint,
            out,
            layout=layout,
            published=found,
            family=None if family is None else table_of(family),
            force=force,
            progress=move,
        )
    notes = merge_notes(made)
    output.present(
        data=lambda: {**made.to_json(), "notes": list(notes)},
        view=lambda: [
            render.facts(
                [
                    ("written", str(made.path)),
                    ("files", str(len(made.files))),
                    ("bytes", f"{made.bytes_written:,}, of which {made.bytes_edited:,} are edited"),
                    *(("note", note) for note in notes),
                ]
            )
        ],
    )
