"""Everything that a verification runs: base, hooked, planned and stored model, and the controls."""

from collections.abc import Sequence

import torch

from bake.verify.as_system import run_as_system
from bake.verify.broken import BrokenPlans
from bake.verify.decoded import run_decoded
from bake.verify.evidence import Evidence
from bake.verify.fixed_point import stream_sites
from bake.verify.greedy import Generated
from bake.verify.inputs import GREEDY, SAMPLES, Inputs
from bake.verify.limits import Limits
from bake.verify.loss import Divergence, mean_of, split
from bake.verify.metrics import compare_logits, divergences, largest_difference
from bake.verify.moved import DRAWS, MOST_DRAWS, moved
from bake.verify.runner import Runner
from bake.verify.runs import Trace
from bake.verify.tolerance import LOSS_FACTOR
from bake.verify.transcript import Transcript


def collect(runner: Runner) -> Limits:
    """Run everything, one model in memory at a time, and return what it is held to, with it."""
    inputs, double = runner.inputs, torch.float64
    texts = _answers(runner)
    sites, held, writes = inputs.sites, stream_sites(inputs.nulled), inputs.layout is not None
    everything = tuple(dict.fromkeys((*sites, *held)))
    narrow = runner.reference(torch.float32)
    drawn = [moved(runner, number) for number in range(DRAWS)] if inputs.files.rounds else []
    base = runner.trace("base model", "base", double, sites=sites, writes=writes)
    hooked = runner.reference(double, sites=sites)
    system = run_as_system(runner) if inputs.asked.as_system else None
    meant = hooked
    if inputs.artifact.fitted is not None:
        name = "base and stand-ins as hooks"
        meant = runner.trace(name, "base", double, inputs.artifact.fitted)
    planned = runner.trace("planned model", "planned", double, sites=everything, writes=writes)
    evidence = Evidence(runner.transcript, base, hooked, planned, meant, narrow, texts)
    evidence.system = system
    evidence.missed = largest_difference(planned.logits, meant.logits)
    evidence.draws = _draws(runner, evidence, drawn)
    limits = Limits(inputs, evidence)
    evidence.controls = BrokenPlans(runner, held, limits).runs()
    evidence.decoded = run_decoded(runner)
    others = {"base": base, "planned": planned}
    if inputs.baked is not None:
        dtype = double if inputs.storage == double else torch.float32
        others["stored"] = evidence.stored = runner.trace(
            "stored model", "stored", dtype, sites=sites
        )
        if inputs.generate:
            texts["baked"] = runner.stored_text(evidence.stored, _shown(inputs))
    last = [site for site in sites[-1:] if site in hooked.streams]
    evidence.compared = compare_logits(
        hooked.logits,
        {name: trace.logits for name, trace in others.items()},
        hidden={n: (hooked.streams[s], t.streams[s]) for n, t in others.items() for s in last},
    )
    _draw_for_files(runner, evidence)
    evidence.seconds = runner.seconds
    return limits


def draw_further(runner: Runner, evidence: Evidence) -> None:
    """Draw the floor further, where it was drawn at all and three draws have not been enough.

    In a mixture one token that chooses another expert costs ten times what rounding costs
    otherwise. Whether three draws hold such a token is chance, and so is whether the files do.
    """
    if 0 < len(evidence.draws) < MOST_DRAWS:
        for number in range(len(evidence.draws), MOST_DRAWS):
            evidence.draws += _draws(runner, evidence, [moved(runner, number)])
        evidence.seconds = runner.seconds


def _draw_for_files(runner: Runner, evidence: Evidence) -> None:
    """Draw further where the stored weights lose more than the first draws allow."""
    if evidence.storage is None or not evidence.draws:
        return
    effect, lost = evidence.storage
    if lost.over(effect) > LOSS_FACTOR * mean_of(evidence.draws).over(effect):
        draw_further(runner, evidence)


def _draws(runner: Runner, evidence: Evidence, drawn: Sequence[Trace]) -> list[Divergence]:
    """Return how far runs over moved weights lie from that over weights that were not."""
    if not drawn:
        return []
    unmoved = evidence.base if runner.inputs.artifact.merged else evidence.hooked
    apart = divergences(unmoved.logits, [trace.logits for trace in drawn])
    return [split(kl, runner.transcript.speaking) for kl in apart]


def _answers(runner: Runner) -> dict[str, Generated]:
    """Let the reference answer every prompt, and make the answers part of what is run."""
    inputs = runner.inputs
    prompts, count = inputs.prompts.tokens, inputs.generate
    # What runtimes write is compared even where nobody asks for answers.
    wanted = count or (GREEDY if inputs.asked.runtimes is not None else 0)
    if not wanted:
        return {}
    hooked = runner.reference_text(prompts, wanted)
    runner.transcript = Transcript(prompts, tuple(tokens[:count] for tokens in hooked.tokens))
    texts = {"hooked": hooked}
    if count:
        texts["base"] = runner.greedy("base model", "base", prompts[: _shown(inputs)], count)
    return texts


def _shown(inputs: Inputs) -> int:
    """Return how many texts of base and artifact are read: all where they are scored."""
    return len(inputs.prompts.tokens) if inputs.scores else SAMPLES
