"""What storage and runtime cost of an edit: the divergence that they add, over that of the edit.

The divergence of the base from the hooked model is the effect, all of the edit. What is stored and
served diverges from the hooked model too, and the ratio is the share of the edit that is lost.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from bake.verify.metrics import divergences


@dataclass(frozen=True, slots=True)
class Divergence:
    """Mean KL(hooked ‖ model) in nats: over the tokens of prompts, and over those of answers."""

    prompts: float
    answers: float | None
    """None where no answer was generated."""

    def over(self, effect: "Divergence") -> float:
        """Return the share of an effect, the larger one of prompts and answers.

        A part in which the edit does nothing tells nothing of what is lost of it.
        """
        pairs = [(self.prompts, effect.prompts)]
        if self.answers is not None and effect.answers is not None:
            pairs.append((self.answers, effect.answers))
        return max((lost / whole for lost, whole in pairs if whole), default=float("inf"))

    @property
    def largest(self) -> float:
        """The larger of the two."""
        return max(self.prompts, self.answers or 0.0)


def divergence(
    hooked: Float[Tensor, "tokens vocab"],
    other: Float[Tensor, "tokens vocab"],
    speaking: Bool[Tensor, " tokens"],
) -> Divergence:
    """Return how far a model lies from the hooked one.

    Args:
        hooked: logits or log-probabilities of the hooked model.
        other: those of the model.
        speaking: the tokens that an answer's are chosen after.
    """
    (found,) = divergences(hooked, [other])
    return split(found, speaking)


def split(kl: Float[Tensor, " tokens"], speaking: Bool[Tensor, " tokens"]) -> Divergence:
    """Return the means of a divergence at every token, over prompts and over answers."""
    rest, spoken = kl[~speaking], kl[speaking]
    answers = float(spoken.mean()) if len(spoken) else None
    return Divergence(float(rest.mean()) if len(rest) else 0.0, answers)


def mean_of(draws: "list[Divergence]") -> Divergence:
    """Return the mean of some draws."""
    prompts = sum(draw.prompts for draw in draws) / len(draws)
    answers = [draw.answers for draw in draws if draw.answers is not None]
    return Divergence(prompts, sum(answers) / len(answers) if answers else None)


def rounding_divergence(tolerance: float) -> float:
    """Return the KL that log-probabilities which err by no more than ``tolerance`` may add.

    For q = p·exp(δ) with |δ| ≤ t, KL(p ‖ q) is Var(δ) / 2 to second order, since both sum to one,
    and a variance within ±t is at most t².
    """
    return tolerance * tolerance / 2
