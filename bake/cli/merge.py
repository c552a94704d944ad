"""``bake merge``: fold a PEFT LoRA adapter into a checkpoint."""

from pathlib import Path
from typing import Any

import click

from bake.cli.options import FORCE, JOBS, OUT
from bake.cli.output import Output, bake_command


@bake_command("merge")
@click.argument("adapter")
@click.argument("base")
@OUT
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a base on the Hub.")
@click.option(
    "--tokenizer",
    type=click.Choice(["base", "adapter"]),
    default="base",
    help="Whose tokenizer, chat template and generation settings the result gets.",
)
@FORCE
@JOBS
def command(
    output: Output, adapter: str, base: str, out: Path, *, force: bool, **options: Any
) -> None:
    """Merge the PEFT adapter ADAPTER into the checkpoint BASE.

    Both are folders or Hub ids. The model is never loaded: untouched tensors keep their bytes,
    their order and their files. PEFT itself says, on a model without values, what the adapter's
    configuration means: patterns, saved modules, ties. What it would not load is refused.
    """
    from bake.artifact.staged import check_before
    from bake.cli.render import results
    from bake.jobs.merging import merge

    check_before(out, force=force)
    output.keeps(out)
    merged = merge(adapter, base, out, force=force, bars=output.bar, **options)
    output.present(data=merged.to_json, view=lambda: results.merged(merged))
