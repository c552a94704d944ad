"""Which broken bakes are drawn: a mistake too small to be told says nothing, a blind eye does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from harness import bake, base_at, edit, plan_of, vector
from test_stored import Given, random

from bake import edits as make
from bake.errors import Inconclusive
from bake.jobs.planned import judged
from bake.verify import controls
from bake.verify.controls import TRIES, Control, sample
from bake.verify.evidence import ControlRun
from bake.verify.judgement import raise_unless_passed
from bake.verify.plan_measure import Equality, FixedPoint, PlanMeasure, Share
from bake.verify.questions import answers
from bake.verify.runs import Trace
from bake.verify.stored.check import FilesChecked, SpoiledTensor, check_files
from bake.verify.stored.deviation import Deviation
from bake.verify.verdict import files_rows
from bake.verify.verification import Verification

# --- which are drawn -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Came:
    """What came of a control in these tests."""

    name: str
    faint: bool


def drawn(outcomes: dict[str, bool | None], each: int = 1) -> tuple[list[Came], list[str]]:
    """Return what a group of controls yields, and what was tried."""
    tried: list[str] = []

    def try_out(control: Control) -> Came | None:
        tried.append(control.tensor)
        faint = outcomes[control.tensor]
        return None if faint is None else Came(control.tensor, faint)

    return list(sample([[Control("x", name) for name in outcomes]], each, try_out)), tried


def test_the_next_of_a_kind_stands_in_for_one_that_is_faint_or_breaks_nothing() -> None:
    found, tried = drawn({"a": None, "b": True, "c": False, "d": False})
    assert found == [Came("c", False)] and tried == ["a", "b", "c"]
    found, tried = drawn({"a": True, "b": False, "c": True, "d": False, "e": False}, each=2)
    assert found == [Came("b", False), Came("d", False)] and tried == ["a", "b", "c", "d"]


def test_a_kind_of_which_all_are_faint_is_said_to_be_and_is_not_tried_for_ever() -> None:
    found, tried = drawn({"a": True, "b": None, "c": True})
    assert found == [Came("a", True)] and tried == ["a", "b", "c"]
    assert drawn({"a": None}) == ([], ["a"])
    found, tried = drawn({f"w{number}": True for number in range(100)})
    assert found == [Came("w0", True)] and len(tried) == TRIES
    # Where all of a kind are asked for, as of stand-ins, each says what it is worth.
    found, tried = drawn({f"w{number}": number % 2 > 0 for number in range(30)}, each=30)
    assert len(found) == len(tried) == 30


# --- plans ---------------------------------------------------------------------------------------


def trace(logits: torch.Tensor) -> Trace:
    return Trace(logits, {}, (), 0.0)


def control(measure: PlanMeasure, broken: Trace, sound: Trace) -> ControlRun:
    missed, moved = measure.missed(broken), measure.moved(broken, sound)
    return ControlRun("x", "w", missed, measure.limit, moved, measure.enough)


def test_what_moves_a_plan_by_enough_is_beyond_the_limit_wherever_the_sound_one_is() -> None:
    """The sound plan errs by all of its limit, in the direction that hides most of a mistake."""
    meant, mistake = random(6, 9), 0.01 * random(6, 9, seed=1)
    largest = float(mistake.abs().max())
    for factor, told in ((2.1, True), (0.9, False)):
        limit = largest / factor
        sound = trace(meant - mistake * limit / largest)
        found = control(Equality(limit, meant), trace(sound.logits + mistake), sound)
        assert (found.value > limit) is told and found.faint is not told
    # Of divergences the square roots add up.
    base = meant + random(6, 9, seed=2)
    for factor, told in ((4.4, True), (0.9, False)):
        share = Share(0.0, meant, base).missed(trace(meant + mistake))
        limit = share / factor
        sound = trace(meant - mistake * (limit / share) ** 0.5)
        found = control(Share(limit, meant, base), trace(sound.logits + mistake), sound)
        assert (found.value > limit) is told and found.faint is not told
        assert found.moved == pytest.approx(share, rel=0.1)


def test_a_mistake_that_moves_the_plan_and_is_not_told_is_no_faint_one() -> None:
    """The control of the controls: a comparison that sees nothing of a mistake is found out."""
    seen = ControlRun("x", "w", value=0.0, limit=1e-9, moved=0.3, enough=2e-9)
    assert not seen.faint
    told = ControlRun("x", "w", value=0.3, limit=1e-9, moved=0.3, enough=2e-9)
    assert not told.faint


def test_a_mistake_beside_a_fixed_point_is_counted_along_the_edit_alone() -> None:
    direction = vector(8)
    edits = [make.Edit(make.EditKind.ABLATE, "c", ("here",), make.ablate(direction))]  # type: ignore[arg-type]
    x = random(5, 8)
    sound = x - (x @ direction)[:, None] * direction / direction.square().sum()
    across = torch.linalg.qr(torch.stack([direction, random(8)], dim=1))[0][:, 1]
    for mistake, seen in ((direction, True), (across, False)):
        measure = FixedPoint(1e-9, edits)
        broken = Trace(sound, {"here": sound + mistake}, (), 0.0)  # type: ignore[dict-item]
        whole = Trace(sound, {"here": sound}, (), 0.0)  # type: ignore[dict-item]
        found = control(measure, broken, whole)
        assert (found.moved > 0.01) is seen is not found.faint


def test_forgotten_writers_that_cost_little_of_a_relocated_edit_doubt_no_sound_bake(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one digest these are drawn first, with another they are not: the verdict is the same."""
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    map_ = make.affine(vector(base.layout.hidden), alpha=2.0)
    allow = frozenset({"relocate"})
    plan = plan_of(base, [edit(base, "affine", map_, "resid_mid.0")], allow=allow)
    out = bake(base, plan, tmp_path / "out", allow=allow)
    little, groups_of = "model.layers.0.self_attn.o_proj.weight", controls.groups_of

    def first(*given: object) -> tuple[tuple[Control, ...], ...]:
        found = groups_of(*given)  # type: ignore[arg-type]
        return tuple(tuple(sorted(g, key=lambda one: one.tensor != little)) for g in found)

    monkeypatch.setattr(controls, "groups_of", first)
    asked = Verification(out, base=str(base.path), generate=0)
    report = judged(asked)
    assert report.passed, report.rows
    (forgotten,) = (row for row in report.rows if "plan, forgotten tensor" in row.name)
    assert forgotten.passed and little not in forgotten.name
    # The control: a comparison that is blind to this tensor's mistake is not trusted.
    missed = Share.missed
    monkeypatch.setattr(Share, "missed", lambda self, broken: 0.0 * missed(self, broken))
    blind = judged(asked)
    assert blind.verdict == "inconclusive"
    with pytest.raises(Inconclusive):
        raise_unless_passed(blind)


# --- files ---------------------------------------------------------------------------------------


class Stored(Given):
    """Files that round a change of the base to whole steps."""

    def __init__(self, change: torch.Tensor, step: float = 1 / 64) -> None:
        before = (random(*change.shape, seed=3) / step).round() * step
        super().__init__(before + change, ((before + change) / step).round() * step, step)
        self.before = before

    def strays(self) -> list[str]:
        return []

    def base(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.before[start:stop]


def test_a_change_as_small_as_its_rounding_doubts_no_file() -> None:
    """Forgotten, it is within what rounding may do: nothing is said of it but that. With its sign
    turned it is not."""
    large = check_files(Stored(0.2 * random(64, 48)), "digest")  # type: ignore[arg-type]
    assert len(large.controls) == 3 and all(not one.faint for one in large.controls)
    assert all(one.deviation.score > 1 for one in large.controls)
    below = 0.6 / 64 * (2 * torch.rand(64, 48, generator=torch.Generator().manual_seed(4)) - 1)
    small = check_files(Stored(below.double()), "digest")  # type: ignore[arg-type]
    told = {one.control.kind: one.faint for one in small.controls}
    assert told == {"forgotten tensor": True, "flipped sign": False, "wrong block": False}
    assert all(one.deviation.score <= 1 for one in small.controls if one.faint)


def test_a_large_mistake_that_files_do_not_show_is_no_faint_one() -> None:
    """The control: a comparison that takes any value for the planned one is found out."""

    class Blind(Stored):
        def steps(self, name: str, start: int, stop: int, exact: torch.Tensor) -> torch.Tensor:
            wide = 1e3 if self.looked else self.step
            return torch.full_like(exact, wide)

        looked = True

        def directions(self, name: str) -> None:
            # Asked for once a comparison: of stored values first, then of the mistake by itself.
            self.looked = not self.looked

    blind = Blind(0.2 * random(64, 48))
    blind.looked = False  # the sound comparison, then every control twice
    found = check_files(blind, "digest")  # type: ignore[arg-type]
    assert any(one.deviation.held and not one.faint for one in found.controls)


def test_a_kind_that_cannot_be_told_is_shown_without_a_verdict_and_decides_nothing() -> None:
    def answer(*faint: bool) -> str:
        deviation = Deviation("w", 9, 0, 1.0, 1.0)
        spoiled = [SpoiledTensor(Control("x", f"w{i}"), deviation, f) for i, f in enumerate(faint)]
        spoiled += [SpoiledTensor(Control("y", "v"), Deviation("v", 9, 3, 1.0, 1.0), faint=False)]
        found = files_rows(FilesChecked((deviation,), (), tuple(spoiled)), ())
        assert [row.passed for row in found if "control" in row.name][-1] is True
        return next(one.verdict for one in answers(found) if one.key == "files")

    assert answer(True) == "passed"
    assert answer(True, False) == "inconclusive"  # the control: not told, and it had to be
