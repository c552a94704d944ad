"""Each core table that is widened, once: one edit behind a block, and controls.

Where a gated layer computes the edit, the widened model is the hooked one, and so it is widened
rightly. Elsewhere it is widened without an edit, since what an edit loses there is the norms'.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from core import CORE
from harness import RELATIVE, Base, bake, base_at, edit, logits, plain_logits, plan_of
from test_relocation import distance, edit_of, only_widened

from bake.plan import Exactness, Plan
from bake.verify.precision import double_precision

ALLOW = frozenset({"widen"})
WIDENED = tuple(sorted(name for name in CORE if tiny.TABLES[name].widen is not None))


def controls(base: Base, plan: Plan) -> dict[str, Plan]:
    """Return plans in which something that makes up for the width is forgotten."""
    widen = base.layout.family.widen
    assert widen is not None
    config = tuple(change for change in plan.config if change.key != widen.eps)
    found = {"the epsilon": replace(plan, config=config)}
    for update in plan.tensors:
        others = tuple(u for u in plan.tensors if u is not update)
        if update.replacement is not None and "a gain" not in found:
            changed = replace(update, replacement=update.replacement * 1.001)
            found["a gain"] = replace(plan, tensors=(*others, changed))
        if update.added is not None and "neurons" not in found:
            changed = replace(update, added=None)
            found["neurons"] = replace(plan, tensors=(*others, changed))
        kinds = {
            p.site.kind for x in base.layout.linears if x.weight == update.name for p in x.parts
        }
        if update.outputs and kinds & set(widen.same_eps) and "what a norm divides" not in found:
            changed = replace(update, outputs=())
            found["what a norm divides"] = replace(plan, tensors=(*others, changed))
    return found


@pytest.mark.parametrize("name", WIDENED)
def test_a_core_table_widens(
    name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(name))
    asked = [edit(base, "linear", edit_of("affine", base.layout.hidden), "resid_post.1")]
    plan, hooked = plan_of(base, asked, allow=ALLOW), plain_logits(base)
    assert plan.exactness is Exactness.RELOCATED and plan.widened, plan.findings[0].reason
    scale = float(hooked.abs().max())
    if plan.computes:
        plain, hooked = hooked, logits(base.model, base, asked)
        scale = distance(hooked, plain)
    else:
        plan = only_widened(base)

    def off(one: Plan, folder: str) -> float:
        with torch.no_grad(), double_precision():
            model = tiny.load(bake(base, one, tmp_path / folder, allow=ALLOW))
            return distance(model(tiny.tokens(), use_cache=False).logits, hooked) / scale

    assert off(plan, "out") <= (RELATIVE if plan.computes else 1e-12)
    # What it is declared as is a model of the table still.
    written = tiny.config_of(tmp_path / "out")
    assert written.keys() - base.checkpoint.config.keys() <= base.layout.family.dims.said_by
    broken = controls(base, plan)
    widen = base.layout.family.widen
    assert widen is not None and len(broken) == 2 + bool(widen.same_eps) + plan.computes
    for what, one in broken.items():
        assert off(one, what) > 1e-10 + 10 * RELATIVE * plan.computes, what
