"""Which type the edited tensors of a GGUF are stored in, and what that costs.

Rounding adds noise to an edited tensor. To second order the mean KL that a small change of the
weights causes is a quadratic form in it, so what noise costs beside what the edit does goes with
the ratio of their square sums, ν = Σ error² / Σ change². Noise has no direction, and an edit moves
the stream along one that matters, so less than ν of the edit's KL is lost, and ν is what is
reckoned with: between 0.08 ν and 0.84 ν are, with two directions on the model of docs/gguf.md.
``auto`` takes the smallest file of which ν is within the limit.

ν is measured before anything is written, on a few rows of a few of the tensors.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from bake.checkpoints.gguf.codec import (
    FEEDBACK,
    FLOATS,
    can_encode,
    check_encodable,
)
from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.gguf.ggml import Ggml
from bake.checkpoints.gguf.grid import PLANES
from bake.checkpoints.gguf.rounding import encode_measured
from bake.checkpoints.gguf.storage import AUTO, KEEP, PARTS
from bake.checkpoints.gguf.types import BY_NAME, GgmlType
from bake.outputs.functionals import guarded
from bake.outputs.gguf.tensor import MatrixEdit
from bake.rounding import Feedback, Rounding

CANDIDATES = ("Q5_1", "Q6_K", "Q8_0", "F16")
"""What ``auto`` tries beside the type that is there."""
_SAMPLES, _ROWS = 4, 1 << 17  # tensors of each kind, and values of each


@dataclass(frozen=True, slots=True)
class Trial:
    """The edited tensors of one kind, stored in one type."""

    word: str
    """``keep``, or the type."""
    nbytes: int
    noise: float
    """Σ error², as far as samples tell."""


@dataclass(frozen=True, slots=True)
class Part:
    """What is known of one kind of tensors."""

    name: str
    change: float
    """Σ change²."""
    norm: float
    """Σ value²."""
    trials: tuple[Trial, ...]

    def trial(self, word: str) -> Trial | None:
        """Return what was tried under a word, or None."""
        return next((trial for trial in self.trials if trial.word == word), None)


@dataclass(frozen=True, slots=True)
class Choice:
    """A type for every kind of tensor, and what it comes to."""

    types: Mapping[str, str]
    """By the kind of tensor: ``keep``, or the type."""
    nbytes: int
    """Of the edited tensors."""
    lost: float
    """ν: what may be lost of the edit's KL, by the noise."""
    noise: float
    """Σ error² over Σ value², the root of it."""

    def kind(self, edit: MatrixEdit) -> GgmlType:
        """Return the type that a tensor is stored in."""
        return _kind(edit, self.types.get(edit.part, KEEP))


def measured(
    edits: Iterable[MatrixEdit],
    model: Gguf,
    asked: Mapping[str, str],
    rounding: Rounding,
    ggml: Ggml | None,
) -> tuple[Part, ...]:
    """Return what the types that are asked for make of the edited tensors stored in blocks.

    Raises:
        UsageError: a type that nothing here encodes.
        CheckpointError: rows of a tensor are no whole blocks of a type.
    """
    grouped: defaultdict[str, list[MatrixEdit]] = defaultdict(list)
    for edit in edits:
        if edit.folds and edit.kind.name not in FLOATS:
            grouped[edit.part].append(edit)
    return tuple(
        _part(part, grouped[part], model, asked[part], rounding, ggml)
        for part in PARTS
        if part in grouped
    )


def chosen(parts: Sequence[Part], limit: float) -> Choice:
    """Return the smallest that is within the limit, of what was tried.

    Where nothing is, the least noise there is.
    """
    found = [choice_of(parts, trials) for trials in product(*(part.trials for part in parts))]
    within = [choice for choice in found if choice.lost <= limit]
    if within:
        return min(within, key=lambda choice: (choice.nbytes, choice.lost))
    return min(found, key=lambda choice: (choice.lost, choice.nbytes))


def choice_of(parts: Sequence[Part], trials: Sequence[Trial]) -> Choice:
    """Return what one trial for each part comes to."""
    noise, change = sum(t.noise for t in trials), sum(part.change for part in parts)
    norm = sum(part.norm for part in parts)
    return Choice(
        {part.name: trial.word for part, trial in zip(parts, trials, strict=True)},
        sum(trial.nbytes for trial in trials),
        noise / change if change else 0.0,
        (noise / norm) ** 0.5 if norm else 0.0,
    )


def _part(
    name: str,
    edits: Sequence[MatrixEdit],
    model: Gguf,
    asked: str,
    rounding: Rounding,
    ggml: Ggml | None,
) -> Part:
    words = [asked]
    if asked == AUTO:
        words = [w for w in (KEEP, *CANDIDATES) if all(_fits(e, w, ggml) for e in edits)]
    for edit in edits:
        _check(edit, _kind(edit, words[0]), rounding, ggml)
    every = max(1, len(edits) // _SAMPLES)
    samples = [_Sample(edit, model) for edit in edits[every // 2 :: every]]
    share = sum(sample.exact.numel() for sample in samples) / sum(edit.numel for edit in edits)
    return Part(
        name,
        sum(sample.change for sample in samples) / share,
        sum(float(sample.exact.square().sum()) for sample in samples) / share,
        tuple(
            Trial(
                word,
                sum(_kind(e, word).tensor_bytes(e.shape, where=e.name) for e in edits),
                sum(sample.noise(word, rounding, ggml) for sample in samples) / share,
            )
            for word in words
        ),
    )


class _Sample:
    """Some rows of one edited tensor."""

    def __init__(self, edit: MatrixEdit, model: Gguf) -> None:
        self.edit = edit
        rows = max(1, _ROWS // edit.shape[-1])
        self.fold, self.old, base, exact = edit.sample(model)
        self.old, self.exact = self.old[:rows], exact[:rows]
        self.change = float((self.exact - base[:rows]).square().sum())

    def noise(self, word: str, rounding: Rounding, ggml: Ggml | None) -> float:
        """Return the square sum of the errors in one type."""
        kind, feedback = _kind(self.edit, word), None
        guard = guarded(self.fold) if rounding == "feedback" and kind.name in FEEDBACK else None
        if guard is not None:
            rows = guard.rows if guard.axis == 1 else guard.rows[:, : self.exact.shape[0]]
            feedback = Feedback(rows, guard.axis)
        old = self.old if kind == self.edit.kind and feedback is not None else None
        errors = encode_measured(
            self.exact, kind, self.edit.name, base=old, feedback=feedback, ggml=ggml
        )[1]
        return float(errors.square().sum())


def _fits(edit: MatrixEdit, word: str, ggml: Ggml | None) -> bool:
    kind = _kind(edit, word)
    return edit.shape[-1] % kind.block == 0 and (kind.name in PLANES or can_encode(kind, ggml))


def _check(edit: MatrixEdit, kind: GgmlType, rounding: Rounding, ggml: Ggml | None) -> None:
    """Raise unless the tensor can be written in the type."""
    kind.row_bytes(edit.shape[-1], where=edit.name)
    recoded = kind == edit.kind and kind.name in FEEDBACK and rounding == "feedback"
    if not recoded or any(guarded(fold) is None for fold in edit.folds.values()):
        check_encodable(kind, ggml, edit.name)


def _kind(edit: MatrixEdit, word: str) -> GgmlType:
    return edit.kind if word == KEEP or edit.kind.name in FLOATS else BY_NAME[word]
