"""``bake plan``: what would change, exact or not, and why."""

from pathlib import Path
from typing import Any

from bake.cli.output import Output
from bake.cli.output import command as bake_command
from bake.cli.request import compile_request, recipe_options


@bake_command("plan")
@recipe_options
def command(output: Output, recipe: Path, **options: Any) -> None:
    """Say what RECIPE would change, whether that is exact, and why.

    Reads headers only, and writes nothing. The exit code is 0 when `bake export` would go ahead,
    and 3 when a finding is not exact and not allowed, or a target runtime refuses the result.
    """
    from bake.cli import render
    from bake.plan.record import plan_record

    request = compile_request(recipe, **options)
    output.present(
        data=lambda: {**request.record(), "plan": plan_record(request.plan)},
        view=lambda: render.plan(request, verbose=output.verbose),
        error=request.refusal(),
    )
