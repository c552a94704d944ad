"""Every limit is the derived one: each is computed here once more, as docs/verify.md has it.

A limit that is a thousand times too wide passes every sound bake, and every test that only asks
whether gross mistakes fail.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import written
from harness import Base, bake, base_at, edit, plan_of, vector
from test_verify import EXACT, baked, edits_of
from transformers import AutoModelForCausalLM

from bake import edits as make
from bake.edits import Edit
from bake.steer import steered
from bake.verify import serving
from bake.verify.compare import compare
from bake.verify.greedy import Generated, disagreement
from bake.verify.inputs import opened
from bake.verify.precision import double_precision
from bake.verify.report import Report, Row
from bake.verify.runner import Runner
from bake.verify.runtimes.registry import Runtimes
from bake.verify.runtimes.request import RuntimeResult
from bake.verify.target import target_of
from bake.verify.tolerance import logit_tolerance, logprob_tolerance, stream_tolerance
from bake.verify.verification import Verification

PROMPT = (3, 4, 5, 6, 7, 8, 9)
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16)}


def hooked(base: Base, edits: Sequence[Edit], dtype: torch.dtype) -> torch.Tensor:
    """Return the logits of the prompt under hooks, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=dtype, attn_implementation="eager"
    )
    wide = double_precision() if dtype is torch.float64 else nullcontext()
    with torch.no_grad(), wide, steered(model, base.layout, edits):
        logits: torch.Tensor = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
    return logits.double()


def rounding(base: Base, scale: float, dtype: torch.dtype) -> float:
    """Return what a product's rounding may move a logit by: 8 · u · √d · 2(L + 1) · s."""
    layout = base.layout
    return 8 * EPS[dtype] / 2 * math.sqrt(layout.hidden) * 2 * (layout.layers + 1) * scale


def near(value: float, share: float = 1e-9) -> Any:
    """Compare by the ratio alone: pytest's own absolute allowance is wider than these limits."""
    return pytest.approx(value, rel=share, abs=0)


def by_name(report: Report) -> dict[str, Row]:
    return {row.name: row for row in report.rows}


def test_tolerances_by_hand() -> None:
    """u is 2⁻²⁴ in float32, 2⁻⁸ in bfloat16; three layers make eight stages."""
    one = 8 * 2**-24 * 4 * 8 * 2
    assert logit_tolerance(torch.float32, layers=3, hidden=16, scale=2.0) == near(one)
    assert logprob_tolerance(torch.float32, layers=3, hidden=16, scale=2.0) == near(2 * one)
    stream = 8 * 2**-8 * 8 * 5
    assert stream_tolerance(torch.bfloat16, layers=3, scale=5.0) == near(stream)


@pytest.mark.parametrize("dtype", EPS, ids=["F64", "F32", "BF16"])
def test_a_checkpoint_is_held_to_the_derived_limits(
    dtype: torch.dtype, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=dtype))
    out = baked(base, tmp_path / "out")
    report = compare(Verification(out, base=str(base.path), prompts=[PROMPT], generate=0))
    rows = by_name(report)
    scale = float(hooked(base, edits_of(base), torch.float64).abs().max())

    def floor(name: str) -> float:
        words = (" − in float64", ", other batches")
        found = (rows[f"noise floor: hooked in {name}{word}"] for word in words)
        return max(row.value for row in found)

    def tolerance(dtype: torch.dtype, amplified: float = 4.0) -> float:
        share = EPS[dtype] / EPS[torch.float32]
        return rounding(base, scale, dtype) + amplified * floor("float32") * share

    limit = 4 * floor("bfloat16") if dtype is torch.bfloat16 else tolerance(dtype)
    assert rows[EXACT].limit == near(limit)
    assert rows["effect: hooked − base"].limit == near(tolerance(torch.float64))
    served = rows["baked in float32 − hooked in float64"].limit
    assert served == near(4 * floor("float32") + limit)
    if dtype is torch.bfloat16:
        assert rows["baked in bfloat16 − hooked in float64"].limit == near(limit)
    controls = [row for row in report.rows if row.group == "control"]
    assert controls and all(row.limit == near(limit) for row in controls)
    # The control: what the model amplifies is a part of the limit that can be told from none.
    assert tolerance(torch.float64) != near(tolerance(torch.float64, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
def test_a_runtime_is_held_to_the_derived_limit(
    dtype: torch.dtype,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice the tolerance of a logit in float32, and eight noise floors: no more, and no less."""
    base = base_at(tiny_checkpoint("mistral", dtype=dtype))
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), ["attn_out.*"])]
    record = {"base": {"model": str(base.path)}}
    out = written(
        "lora", plan_of(base, edits), base.checkpoint, tmp_path / "out", record=record
    ).path

    exact = hooked(base, edits, torch.float64)
    narrow = (hooked(base, edits, narrower) for narrower in {torch.float32, dtype})
    floor = max(float((logits - exact).abs().max()) for logits in narrow)
    tolerance = 2 * rounding(base, float(exact.abs().max()), torch.float32)
    limit = tolerance + 8 * floor

    runtimes = Runtimes(("peft",))
    asked = Verification(out, base=str(base.path), prompts=[PROMPT], runtimes=runtimes)
    with opened(asked) as inputs:
        target = target_of(Runner(inputs))
        assert target.limit == near(limit, 1e-3)

        def passed(error: float) -> bool | None:
            """Whether a runtime that is wrong by so many nats, in one token, passes."""
            table = target.logprobs.copy()
            table[2, 7] += error
            result = RuntimeResult("PEFT", "0", (table,), target.greedy.tokens, {})
            monkeypatch.setattr(serving, "_ask", lambda *args: result)
            found = serving.serve_all(inputs, runtimes, target)
            return next(r.passed for r in found.rows if r.name.startswith("peft: max |Δlog p|"))

        assert passed(limit / 2) is True
        # Wrong by more than is honest, and by less than a floor that is a thousand times too large.
        assert 2 * limit < tolerance + 8 * 1000 * floor
        assert passed(2 * limit) is False
        # An entry that is too small is as wrong as one that is too large.
        assert passed(-2 * limit) is False
    # The effect: the wrong entry is no larger than what the edit does, in the wider dtype.
    if dtype is torch.float32:
        assert target.effect > 2 * limit


def test_an_effect_within_rounding_is_none(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """It is not zero, and it proves nothing all the same."""
    base = base_at(tiny_checkpoint("llama"))
    for strength, passed in ((1e-14, False), (1e-6, True)):
        edits = [edit(base, "ablate", make.ablate(vector(24), strength=strength), ["attn_out.*"])]
        out = bake(base, plan_of(base, edits), tmp_path / str(strength))
        report = compare(Verification(out, base=str(base.path), prompts=[PROMPT], generate=0))
        effect = by_name(report)["effect: hooked − base"]
        assert effect.value > 0 and effect.passed is passed


def test_a_token_that_the_reference_is_sure_of_has_to_be_the_same() -> None:
    """Sure is a margin of more than twice the limit; behind an unsure one nothing is compared."""
    reference = Generated(((1, 2, 3),), ((0.5, 0.21, 0.05),))
    assert disagreement(reference, ((1, 9, 3),), 0.1) == (0, 1)
    assert disagreement(reference, ((1, 9, 3),), 0.11) is None
    assert disagreement(reference, ((1, 2, 9),), 0.1) is None
    unsure = replace(reference, margins=((0.5, 0.1, 0.5),))
    assert disagreement(unsure, ((1, 9, 9),), 0.1) is None


def test_a_number_that_is_none_passes_nothing() -> None:
    """A runtime that answers with NaN keeps no limit."""
    from bake.verify.report import above, at_most

    for row in (at_most("a", np.nan, 1.0), above("a", np.nan, 1.0, "control")):
        assert row.passed is False
    assert at_most("a", 1.0, 1.0).passed is True and above("a", 1.0, 1.0, "effect").passed is False
    assert at_most("a", 9.0, None).passed is above("a", 9.0, None, "floor").passed is None
