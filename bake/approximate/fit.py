"""``calibrate``: stand-ins for edits without an exact fold, fitted writer by writer.

At the last writer before the edit, and then at each later one, what the hooked model's stream has
and the edited one's lacks is regressed on the writer's own input. The first fit makes up for the
hook; the later ones correct what it left, and are kept while the divergence on unseen text falls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from bake.affine import translation
from bake.approximate.regression import Moments, Solution, regress
from bake.approximate.runs import batches_of, divergence, observe
from bake.approximate.writers import Place, places_for
from bake.edits import Edit, EditKind, WeightUpdate
from bake.errors import InputError, UsageError
from bake.families import Layout
from bake.progress import Progress, Tally
from bake.sites import Site, SiteKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FALL = 0.98  # of the divergence before: what a correction has to reach to be worth its rank
_PARTS = 5  # of the prompts one part chooses the penalty, one measures, and the others fit


@dataclass(frozen=True, slots=True)
class Settings:
    """How stand-ins are fitted.

    Attributes:
        rank: the most that one writer's update may have.
        corrections: at how many later writers what is left is corrected; None for all.
        constant: whether biases may be used where the architecture has slots for them.
    """

    rank: int = 8
    corrections: int | None = None
    constant: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"the rank of a fit is {self.rank}, and has to be 1 or more")
        if self.corrections is not None and self.corrections < 0:
            raise UsageError(f"there cannot be {self.corrections} corrections")


@dataclass(frozen=True, slots=True)
class Fit:
    """One writer's update, and what it explained."""

    site: Site
    rank: int
    ridge: float
    r2: float
    """Explained share of the missing difference's variance, on text that the fit has not seen."""
    kl: float
    """Mean KL(hooked ‖ edited) after this update, in nats, on the text that chose it."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Stand-ins for the edits without an exact fold."""

    edits: tuple[Edit, ...]
    """Updates and offsets, which stand beside the edits that are exact."""
    fits: tuple[Fit, ...]
    effect: float
    """Mean KL(hooked ‖ base with the exact edits) on held-out text, in nats."""
    tokens: int
    """How many the fit has seen."""
    kl: float
    """Mean KL(hooked ‖ edited) on held-out text, which nothing was fitted to or chosen by."""
    held_out: int
    """Tokens of that text."""

    @property
    def share(self) -> float:
        """What is lost: the divergence over the effect's own."""
        return self.kl / self.effect


def calibrate(
    model: "PreTrainedModel",
    layout: Layout,
    *,
    asked: Sequence[Edit],
    kept: Sequence[Edit],
    prompts: Sequence[Sequence[int]],
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Return weight updates and offsets that stand in for edits without an exact fold.

    Args:
        model: the base, in eval mode, in float32 or better.
        layout: its layout.
        asked: all edits, in the order in which they act where several meet at one site.
        kept: those of them that act in both models; the others are stood in for.
        prompts: token ids of the calibration texts, at least five.
        settings: ranks and corrections.
        progress: called with the writers that are done, and how many there are.

    Raises:
        InputError: fewer than five prompts, or texts on which the edits have no effect.
        UsageError: the architecture has no writer that could take an update, or none of them
            predicts anything of what the edits do.
    """
    chosen = Settings() if settings is None else settings
    split = _split(prompts)
    hard = tuple(edit for edit in asked if edit not in kept)
    places = places_for(layout, hard, kept)
    if not places:
        raise UsageError(
            "there is no writer that could take a fitted update",
            why="writers before a post-norm, experts, and outputs that another edit maps take none",
            fix="choose sites with an exact fold, or leave the other edits out",
        )
    effect = divergence(model, layout, asked, kept, split.held_out)
    if effect <= 0:
        raise InputError(
            "the edits have no effect on the calibration texts",
            fix="give texts on which the hooks change something",
        )
    places = places[: None if chosen.corrections is None else 1 + chosen.corrections]
    concept = "+".join(dict.fromkeys(edit.concept for edit in hard))
    fitting = _Fitting(model, layout, tuple(asked), tuple(kept), concept, split, chosen)
    stand_ins, fits = fitting.stand_ins(places, progress)
    if not fits:
        raise _unpredicted(layout, hard, chosen)
    kl = divergence(model, layout, asked, (*kept, *stand_ins), split.held_out)
    counts = _tokens(split.fit), _tokens(split.held_out)
    return Calibration(stand_ins, fits, effect, counts[0], kl, counts[1])


def _unpredicted(layout: Layout, hard: Sequence[Edit], settings: Settings) -> UsageError:
    """Return why no writer took a stand-in, with what would change that."""
    sites = {site for edit in hard for site in edit.sites}
    if Site(SiteKind.LN_FINAL_OUT) in sites:
        why = f"{SiteKind.LN_FINAL_OUT} lies behind every writer, and stand-ins are fitted in them"
        last = Site(SiteKind.RESID_POST, layout.layers - 1)
        fix = f'act on what the final norm reads: at = "{last}"'
    elif settings.corrections is not None:
        why = f"{1 + settings.corrections} writers were tried, the first that the edits can reach"
        fix = "leave corrections out of [calibrate], so that all later ones are"
    else:
        why = "what the writers read says nothing of the component that the hooks change"
        fix = (
            "give more texts, of other kinds too; if that does not help, no weights stand in for it"
        )
    return UsageError(
        "no writer predicts what the edits do on the calibration texts", why=why, fix=fix
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    fit: list[Tensor]
    choose: list[Tensor]
    held_out: list[Tensor]


def _split(prompts: Sequence[Sequence[int]]) -> _Split:
    if len(prompts) < _PARTS:
        raise InputError(
            f"{len(prompts)} calibration texts are too few: fitting, choosing and measuring need "
            f"texts of their own, {_PARTS} at least",
            fix="give more of them, one a line",
        )
    parts: list[list[Sequence[int]]] = [list(prompts[i::_PARTS]) for i in range(_PARTS)]
    rest = [prompt for part in parts[2:] for prompt in part]
    return _Split(batches_of(rest), batches_of(parts[1]), batches_of(parts[0]))


def _tokens(batches: Sequence[Tensor]) -> int:
    return sum(batch.numel() for batch in batches)


@dataclass(frozen=True, slots=True, eq=False)
class _Fitting:
    """What stand-ins are fitted for, and to what."""

    model: "PreTrainedModel"
    layout: Layout
    asked: tuple[Edit, ...]
    kept: tuple[Edit, ...]
    concept: str
    split: _Split
    settings: Settings

    def stand_ins(
        self, places: Sequence[Place], progress: Progress | None
    ) -> tuple[tuple[Edit, ...], tuple[Fit, ...]]:
        """Return the stand-ins at those writers where the divergence falls, and what each did."""
        found: tuple[Edit, ...] = ()
        fits: tuple[Fit, ...] = ()
        reached, tally = self._reached(found), Tally(len(places), progress)
        for place in places:
            solution = self._solution(place, (*self.kept, *found))
            if solution is not None:
                tried = (*found, *self._edits(place, solution))
                kl = self._reached(tried)
                if kl < _FALL * reached:
                    found, reached = tried, kl
                    fit = Fit(place.site, solution.rank, solution.ridge, solution.r2, kl)
                    fits = (*fits, fit)
            tally.advance(1)
        return found, fits

    def _reached(self, stand_ins: Sequence[Edit]) -> float:
        """Return the divergence of some stand-ins on the text that chooses."""
        now = (*self.kept, *stand_ins)
        return divergence(self.model, self.layout, self.asked, now, self.split.choose)

    def _solution(self, place: Place, now: Sequence[Edit]) -> Solution | None:
        """Return what a writer can make up for of the difference behind it."""
        writer, live = place.writer, place.writer.live
        assert live is not None
        constant = self.settings.constant and writer.bias.state != "never"
        width = writer.inputs
        moments = []
        for batches in (self.split.fit, self.split.choose):
            summed = Moments(width, self.layout.hidden, constant=constant)
            for tokens in batches:
                hooked = observe(self.model, self.layout, self.asked, tokens, (place.watch,))
                edited = observe(self.model, self.layout, now, tokens, (live, place.watch))
                missing = hooked[place.watch].double() - edited[place.watch].double()
                summed.add(edited[live], missing / place.branch.gain)
            moments.append(summed)
        return regress(*moments, rank=self.settings.rank)

    def _edits(self, place: Place, found: Solution) -> tuple[Edit, ...]:
        sites = (place.site,)
        update = Edit(EditKind.UPDATE, self.concept, sites, WeightUpdate(found.left, found.right))
        if found.constant is None or not bool(found.constant.any()):
            return (update,)
        return update, Edit(EditKind.OFFSET, self.concept, sites, translation(found.constant))
