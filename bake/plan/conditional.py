"""Edits that are no affine maps: refused by name, with what of them is exact.

Their hooks decide token by token, and weights are the same for every token. What the plan can say
is what the affine map comes to that such an edit is where its condition holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from bake.edits import Edit, EditKind
from bake.errors import DirectionError
from bake.families import Layout
from bake.nonlinear import Nonlinear
from bake.plan.types import Exactness, Finding, Plan

_FITTED = (
    'allow = ["approximate"], which fits the nearest weights by least squares on your texts and '
    "measures them"
)


def refused(
    edits: Sequence[Edit], layout: Layout, compile_: Callable[[Sequence[Edit]], Plan]
) -> Plan | None:
    """Return a plan that refuses the edits that are no affine maps; None where all are.

    Args:
        edits: in the order of the recipe.
        layout: the model.
        compile_: makes a plan of affine edits.

    Raises:
        UsageError: an edit names a site that the model does not have.
        DirectionError: a map has another width than its site.
    """
    hard = {index: edit.map for index, edit in enumerate(edits) if isinstance(edit.map, Nonlinear)}
    if not hard:
        return None
    stood_in = {index: map_.always for index, map_ in hard.items()}
    tried = [
        (index, replace(edit, map=stood_in.get(index) or edit.map))
        for index, edit in enumerate(edits)
        if index not in hard or stood_in[index] is not None
    ]
    for index, map_ in hard.items():
        _check_width(edits[index], map_, layout)
    plan = compile_([edit for _, edit in tried])
    found: dict[int, list[Finding]] = {index: [] for index in range(len(edits))}
    for finding in plan.findings:
        index = tried[finding.edit][0]
        found[index].append(replace(finding, edit=index))
    for index, map_ in hard.items():
        found[index] = [_finding(index, edits[index], map_, found[index])]
    findings = tuple(finding for own in found.values() for finding in own)
    # Nothing of it is written: what the affine maps would change is not what was asked.
    return replace(
        plan,
        layout=layout,
        edits=tuple(edits),
        tensors=(),
        biases=(),
        config=(),
        findings=findings,
        notes=(),
        created_bytes=0,
    )


def _finding(index: int, edit: Edit, map_: Nonlinear, always: Sequence[Finding]) -> Finding:
    worst = max((f.exactness for f in always), key=list(Exactness).index, default=None)
    exact, remedy = "no part of it is an affine map", _FITTED
    if worst is not None:
        exact = f"the same map always on, without its condition, is {worst}"
        exact += f" here ({always[0].reason})"
        if worst is not Exactness.IMPOSSIBLE:
            remedy = f"{_always_on(edit)}, or {_FITTED}"
    reason = f"it is no affine map: {map_.why}, and weights are the same for every token; {exact}"
    impossible = Exactness.IMPOSSIBLE
    return Finding(index, edit.kind, edit.concept, edit.sites, impossible, reason, remedy)


def _always_on(edit: Edit) -> str:
    """Return how a recipe asks for the map without its condition."""
    kind = edit.kind if edit.inner is None else edit.inner
    plain = EditKind.SCALE if kind is EditKind.MASKED_SCALE else kind
    return f'kind = "{plain}" in place of kind = "{edit.kind}", which is that map always on'


def _check_width(edit: Edit, map_: Nonlinear, layout: Layout) -> None:
    for site in edit.sites:
        if layout.width(site) != map_.width:
            raise DirectionError(
                f"the direction {edit.concept!r} has width {map_.width}, but {site} has "
                f"{layout.width(site)}",
                fix="fit it on this model, or name the site that it was fitted at",
            )
