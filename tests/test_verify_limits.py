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
from harness import Base, bake, base_at, edit, plan_of, vector
from test_verify import EXACT, baked, edits_of
from transformers import AutoModelForCausalLM

from bake import edits as make
from bake.artifact.record import read_record
from bake.edits import Edit
from bake.errors import Inconclusive
from bake.jobs.planned import judged
from bake.steer import steered
from bake.verify import serving
from bake.verify.greedy import Generated, disagreement
from bake.verify.judgement import raise_unless_passed
from bake.verify.precision import double_precision
from bake.verify.report import Report
from bake.verify.rows import Row
from bake.verify.runtimes.registry import Runtimes
from bake.verify.served_rows import SERVED, ServedRun
from bake.verify.target import Target
from bake.verify.tolerance import logit_tolerance, logprob_tolerance, stream_tolerance
from bake.verify.verdict import FLOOR, LOST
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


def moved(base: Base, names: Sequence[str], draw: int) -> torch.Tensor:
    """Return the hooked logits in float32, each value of some weights off by up to half a step."""
    model = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=torch.float32, attn_implementation="eager"
    )
    for name, weight in model.named_parameters():
        if name in names:
            # Each tensor has its own numbers: equal ones in all blocks would add up.
            seed = [draw, *name.encode()]
            raw = np.random.SFC64(seed).random_raw(-(-weight.numel() // 4)).view(np.int16)
            error = torch.from_numpy(raw[: weight.numel()]).float().reshape(weight.shape) / 2**16
            assert float(error.abs().max()) <= 0.5
            step = 2.0 ** (torch.frexp(weight.abs()).exponent - 1) * EPS[torch.bfloat16]
            weight.data += error * step
    with torch.no_grad(), steered(model, base.layout, edits_of(base)):
        logits: torch.Tensor = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
    return logits.double()


def mean_kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Return the mean KL(p ‖ q) of logits, in nats."""
    x, y = p.log_softmax(-1), q.log_softmax(-1)
    return float((x.exp() * (x - y)).sum(-1).mean())


@pytest.mark.parametrize("dtype", EPS, ids=["F64", "F32", "BF16"])
def test_a_checkpoint_is_held_to_the_derived_limits(
    dtype: torch.dtype, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=dtype))
    out = baked(base, tmp_path / "out")
    report = judged(Verification(out, base=str(base.path), prompts=[PROMPT], generate=0))
    rows = by_name(report)
    edits = edits_of(base)
    exact, plain = hooked(base, edits, torch.float64), hooked(base, (), torch.float64)
    scale, effect = float(exact.abs().max()), float((exact - plain).abs().max())
    amplified = float((hooked(base, edits, torch.float32) - exact).abs().max())
    share = EPS[torch.float64] / EPS[torch.float32]
    tolerance = rounding(base, scale, torch.float64) + 4 * amplified * share
    assert rows["effect: hooked − base"].limit == near(tolerance, 1e-6)
    # Nothing of the plan is rounded, so that the storage type has no part in its limit.
    assert rows[EXACT].limit == near(max(1e-9 * effect, tolerance), 1e-6)
    controls = [row for row in report.rows if row.group == "plan control"]
    assert controls and all(row.limit == near(rows[EXACT].limit) for row in controls)
    # The control: what the model amplifies is a part of the limit that can be told from none.
    assert tolerance != near(rounding(base, scale, torch.float64), 1e-6)

    whole, slack = mean_kl(exact, plain), (2 * rounding(base, scale, torch.float32)) ** 2 / 2
    floor = 0.0
    if dtype is torch.bfloat16:
        plan = read_record(out).plan
        names = [row.name for row in (*plan.tensors, *plan.biases)]
        draws = [mean_kl(exact, moved(base, names, draw)) for draw in range(3)]
        floor = sum(draws) / 3 / whole
        assert floor > 100 * slack / whole
    assert rows[LOST].limit == near(min(0.05, 3 * floor + slack / whole), 1e-3)
    assert rows[FLOOR].value == near(floor, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
def test_a_runtime_is_held_to_the_derived_limit(
    dtype: torch.dtype,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three times what storage and runtime lose of it unedited: no more, and no less."""
    base = base_at(tiny_checkpoint("llama", dtype=dtype))
    out = baked(base, tmp_path / "out")
    runtimes, answer = Runtimes(("transformers",)), dict[str, Any]()

    def run(name: str, asked: Runtimes, target: Target, unedited: int) -> ServedRun:
        """Answer with what lies between the hooked model and the base, and with the base."""
        logprobs = target.hooked + answer["error"] * (target.base - target.hooked)
        few = target.first(1)
        bare = few.base + answer["own"] * (few.hooked - few.base)
        answer["target"] = target
        return ServedRun("0", {}, target.greedy.tokens, logprobs, bare, 1)

    monkeypatch.setattr(serving, "_run", run)

    def row(error: float, own: float) -> Row:
        answer.update(error=error, own=own)
        asked = Verification(
            out, base=str(base.path), prompts=[PROMPT], generate=0, runtimes=runtimes
        )
        return by_name(judged(asked))[f"transformers: {SERVED}"]

    exact = row(0.0, 0.0)
    target: Target = answer["target"]
    scale = float(hooked(base, edits_of(base), torch.float64).abs().max())
    slack = (2 * rounding(base, scale, torch.float32)) ** 2 / 2 / target.effect.prompts
    floor = target.limits.floor.over(target.effect)
    assert (floor > 0) is (dtype is torch.bfloat16)
    assert exact.passed and exact.limit == near(3 * floor + slack, 1e-6)
    # KL is of second order in the error, so that its root meets a share.
    tiny_error = 1e-3
    unit = row(tiny_error, 0.0).value / tiny_error**2

    def error_of(share: float) -> float:
        return math.sqrt(share / unit)

    assert row(error_of(exact.limit / 2), 0.0).passed is True
    # Wrong by more than is honest, and by less than a floor that is a thousand times too large.
    assert row(error_of(exact.limit * 2), 0.0).passed is False
    # What the runtime loses of the base is its own floor, and no fault of the artifact's.
    loose = row(error_of(exact.limit * 2), error_of(exact.limit))
    assert loose.limit > 2 * exact.limit and loose.passed is True


def test_an_effect_within_rounding_is_none(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """It is not zero, and it proves nothing all the same."""
    base = base_at(tiny_checkpoint("llama"))
    for strength, passed in ((1e-14, False), (1e-6, True)):
        edits = [edit(base, "ablate", make.ablate(vector(24), strength=strength), ["attn_out.*"])]
        out = bake(base, plan_of(base, edits), tmp_path / str(strength))
        report = judged(Verification(out, base=str(base.path), prompts=[PROMPT], generate=0))
        effect = by_name(report)["effect: hooked − base"]
        assert effect.value > 0 and effect.passed is passed
        assert report.answers[0].verdict == ("passed" if passed else "inconclusive")


def test_a_limit_that_the_base_keeps_answers_nothing(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """An effect below what arithmetic in float32 may cost is lost and found alike."""
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    edits = [edit(base, "ablate", make.ablate(vector(24), strength=1e-4), ["attn_out.*"])]
    out = bake(base, plan_of(base, edits), tmp_path / "out")
    asked = Verification(out, base=str(base.path), prompts=[PROMPT], generate=0, most_kl=1e9)
    report = judged(asked)
    assert by_name(report)["control: nothing edited, share lost"].passed is False
    assert report.answers[2].verdict == report.verdict == "inconclusive"
    with pytest.raises(Inconclusive, match="nothing edited"):
        raise_unless_passed(report)


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
    from bake.verify.rows import above, at_most

    for row in (at_most("a", np.nan, 1.0, "", "plan"), above("a", np.nan, 1.0, "effect")):
        assert row.passed is False
    assert at_most("a", 1.0, 1.0, "", "plan").passed is True
    assert above("a", 1.0, 1.0, "effect").passed is False
    assert at_most("a", 9.0, None, "", "plan").passed is None
    assert above("a", 9.0, None, "floor").passed is None
