"""``Target``: what every runtime is held against, the reference over the tokens that it serves."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from bake.verify.evidence import Evidence
from bake.verify.greedy import Generated
from bake.verify.inputs import GREEDY, PROMPTS
from bake.verify.limits import Limits
from bake.verify.loss import Divergence, divergence

LogProbs = Float[Tensor, "tokens vocab"]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """The reference in float64, and how near to it a runtime has to be."""

    prompts: tuple[tuple[int, ...], ...]
    """What the greedy text follows."""
    spoken: tuple[tuple[int, ...], ...]
    """The same prompts with the hooked model's answers."""
    hooked: LogProbs
    """Log-probabilities of the hooked model over ``spoken``, in float64."""
    base: LogProbs
    """Those of the base model."""
    speaking: Bool[Tensor, " tokens"]
    """The tokens after which an answer's are chosen."""
    greedy: Generated
    """What the hooked model writes after each of ``prompts``, as far as runtimes are asked to."""
    limits: Limits
    decoded: tuple[LogProbs, LogProbs] | None = None
    """Those of base and artifact as their files decode, where that was run: what a runtime that
    computed as transformers does would serve."""

    def loss(self, logprobs: Tensor) -> Divergence:
        """Return how far some log-probabilities over ``spoken`` lie from the hooked model's."""
        return divergence(self.hooked, logprobs, self.speaking)

    @property
    def effect(self) -> Divergence:
        """How far the base lies from the hooked model."""
        return self.loss(self.base)

    def first(self, count: int) -> "Target":
        """Return the same over the first few prompts."""
        rows = sum(map(len, self.spoken[:count]))
        return Target(
            self.prompts[:count],
            self.spoken[:count],
            self.hooked[:rows],
            self.base[:rows],
            self.speaking[:rows],
            self.greedy.first(count, GREEDY),
            self.limits,
            None if self.decoded is None else (self.decoded[0][:rows], self.decoded[1][:rows]),
        )


def target_of(evidence: Evidence, limits: Limits) -> Target:
    """Return what every runtime is held against.

    Args:
        evidence: the runs of the bench: base and reference.
        limits: what rounding and storage may cost.
    """
    transcript, text = evidence.transcript, evidence.texts["hooked"]
    rows = transcript.rows(PROMPTS)
    return Target(
        prompts=transcript.prompts[:PROMPTS],
        spoken=transcript.tokens[:PROMPTS],
        hooked=evidence.hooked.logits[:rows].log_softmax(-1),
        base=evidence.base.logits[:rows].log_softmax(-1),
        speaking=transcript.speaking[:rows],
        greedy=text.first(PROMPTS, GREEDY),
        limits=limits,
        decoded=None if evidence.decoded is None else evidence.decoded.logprobs,
    )
