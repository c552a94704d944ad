"""``bake plan``: what would change, exact or not, and why."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.options import DEQUANTIZE, PATH, names_artifact, planned_again, recipe_options
from bake.cli.output import Output, bake_command
from bake.jobs.request import compile_request

if TYPE_CHECKING:
    from bake.cli.render.pieces import Fact
    from bake.plan import Plan


@bake_command("plan")
@recipe_options
@click.option(
    "--gguf", type=PATH, metavar="FILE", help="Show what storing the edit in this GGUF costs."
)
@DEQUANTIZE
def command(
    output: Output,
    recipe: str,
    *,
    base: str | None,
    gguf: Path | None,
    dequantize: bool,
    **options: Any,
) -> None:
    """Say what RECIPE would change, whether that is exact, and why.

    Reads headers only (of --gguf and of a quantised base some rows), and writes nothing. The exit
    code is 0 when `bake export` would go ahead, and 3 when a finding is not exact and not allowed,
    or a target runtime refuses the result.

    For an ARTIFACT (a folder, owner/name or hf://owner/name@revision) the plan is made again from
    the edits and the record in it and from its base. The exit code is 1 when it is not the plan
    of the record.
    """
    from bake.cli.render import plans, rounding
    from bake.cli.render.pieces import facts
    from bake.jobs.storage import coded_storage, storage
    from bake.plan.record import plan_record

    again = planned_again(recipe, base, **options) if names_artifact(recipe, base) else None
    if again is None:
        request = compile_request(Path(recipe), bars=output.bar, **options)
    else:
        request = again.request
    found = None if gguf is None else storage(request, gguf)
    codes = coded_storage(request, dequantize=dequantize)
    error = request.refusal() if again is None else again.failure()
    output.present(
        data=lambda: {
            **request.provenance().to_json(),
            "plan": plan_record(request.plan).to_json(),
            "carriers": _carriers(request.plan),
            **({} if found is None else {"storage": found.to_json()}),
            **({} if codes is None else {"quantised": codes.to_json()}),
            **({} if again is None else {"again": again.to_json()}),
        },
        view=lambda: [
            *plans.plan(request, verbose=output.verbose > 1),
            *([] if found is None else [rounding.storage(found)]),
            *([] if codes is None else [rounding.coded_storage(codes)]),
            *([] if again is None else plans.again(again)),
        ],
        brief=lambda: (
            []
            if error is not None
            else [
                facts([*plans.brief(request), *([] if again else [_next(recipe, options)])]),
                *([] if found is None else [rounding.storage(found)]),
                *([] if codes is None else [rounding.coded_storage(codes)]),
                *([] if again is None else plans.again(again)),
            ]
        ),
        error=error,
    )


def _next(recipe: str, options: dict[str, Any]) -> "Fact":
    """Return the export of the plan that was shown, with what was said beside the recipe."""
    from bake.cli.options import spelled
    from bake.cli.render.pieces import next_step

    return next_step("bake", "export", recipe, *spelled(options), "--out", "DIR")


def _carriers(plan: "Plan") -> dict[str, Any]:
    """Return every carrier with what it does with the edits, and what the runtimes make of it."""
    from bake.artifact import CARRIERS
    from bake.plan.record import plan_record

    found = {carrier: plan_record(plan, carrier).to_json() for carrier in CARRIERS}
    keys = ("exactness", "findings", "runtimes")
    return {carrier: {key: record[key] for key in keys} for carrier, record in found.items()}
