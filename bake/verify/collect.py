"""Everything that a verification runs: base, hooked, planned and stored model, and the controls."""

import torch

from bake.verify.as_system import run_as_system, system_rows
from bake.verify.broken import BrokenPlans
from bake.verify.decoded import run_decoded
from bake.verify.evidence import Evidence
from bake.verify.fixed_point import stream_sites
from bake.verify.greedy import Generated
from bake.verify.inputs import GREEDY, SAMPLES, Inputs
from bake.verify.leak import Written, leaks, written
from bake.verify.limits import Limits
from bake.verify.loss import Divergence, divergence
from bake.verify.metrics import largest_difference
from bake.verify.moved import DRAWS, MOST_DRAWS, moved
from bake.verify.runner import Runner
from bake.verify.runs import Trace
from bake.verify.transcript import Transcript


def collect(runner: Runner) -> Limits:
    """Run everything, one model in memory at a time, and return what it is held to, with it."""
    evidence, before = _references(runner)
    limits = Limits(runner.inputs, evidence)
    _run_plan(runner, limits, before)
    evidence.decoded = run_decoded(runner)
    if runner.inputs.baked is not None:
        _run_stored(runner, evidence)
    _draw_for_files(runner, limits)
    evidence.seconds = runner.seconds
    return limits


def _references(runner: Runner) -> tuple[Evidence, tuple[Written, ...]]:
    """Run what everything is held against, base and reference, and how far rounding takes it.

    What the base's writers add comes with it, for the plan's to be laid beside.
    """
    inputs, double = runner.inputs, torch.float64
    texts = _answers(runner)
    base = runner.trace("base model", "base", double, sites=inputs.sites, writes=_writes(runner))
    before = _written(runner, base)
    hooked = meant = runner.reference(double, sites=inputs.sites)
    if inputs.artifact.fitted is not None:
        name = "base and stand-ins as hooks"
        meant = runner.trace(name, "base", double, inputs.artifact.fitted)
    sites = tuple(site for site in inputs.sites if site in hooked.streams)
    evidence = Evidence(runner.transcript, base.without_activations(), hooked, meant, sites, texts)
    evidence.add("base", base)
    del base
    narrow = runner.reference(torch.float32)
    evidence.amplified = largest_difference(narrow.logits, hooked.logits)
    del narrow
    for number in range(DRAWS if inputs.files.rounds else 0):
        evidence.draws.append(_draw(runner, evidence, number))
    return evidence, before


def _run_plan(runner: Runner, limits: Limits, before: tuple[Written, ...]) -> None:
    """Run the plan, of which nothing is rounded, and broken ones in its place."""
    inputs, evidence, double = runner.inputs, limits.evidence, torch.float64
    system = run_as_system(runner) if inputs.asked.as_system else None
    held = stream_sites(inputs.nulled)
    sites = tuple(dict.fromkeys((*inputs.sites, *held)))
    planned = runner.trace("planned model", "planned", double, sites=sites, writes=_writes(runner))
    evidence.missed = largest_difference(planned.logits, evidence.meant.logits)
    evidence.leaks = leaks(before, _written(runner, planned))
    evidence.held = {site: planned.streams[site] for site in held if site in planned.streams}
    evidence.add("planned", planned)
    if system is not None:
        hooked, base = evidence.hooked.logits, evidence.base.logits
        evidence.system = system_rows(system, hooked, base, planned.logits)
        del system
    whole = planned if inputs.artifact.fitted is not None else None
    del planned
    evidence.controls = BrokenPlans(runner, held, limits, whole).runs()


def _run_stored(runner: Runner, evidence: Evidence) -> None:
    """Run the artifact's own weights."""
    inputs = runner.inputs
    dtype = torch.float64 if inputs.storage == torch.float64 else torch.float32
    stored = runner.trace("stored model", "stored", dtype, sites=inputs.sites)
    if inputs.generate:
        evidence.texts["baked"] = runner.stored_text(stored, _shown(inputs))
    evidence.add("stored", stored)


def _writes(runner: Runner) -> bool:
    """Whether what every writer adds is recorded: a merge has no directions."""
    return runner.inputs.layout is not None


def _written(runner: Runner, trace: Trace) -> tuple[Written, ...]:
    layout = runner.inputs.layout
    return () if layout is None else written(layout, runner.inputs.artifact.edits, trace.writes)


def draw_further(runner: Runner, evidence: Evidence) -> None:
    """Draw the floor further, where it was drawn at all and three draws have not been enough.

    In a mixture one token that chooses another expert costs ten times what rounding costs
    otherwise. Whether three draws hold such a token is chance, and so is whether the files do.
    """
    if 0 < len(evidence.draws) < MOST_DRAWS:
        for number in range(len(evidence.draws), MOST_DRAWS):
            evidence.draws.append(_draw(runner, evidence, number))
        evidence.seconds = runner.seconds


def _draw_for_files(runner: Runner, limits: Limits) -> None:
    """Draw further where the stored weights lose more than the first draws allow.

    Where they lose more than may be lost at all, no floor would pass them.
    """
    evidence = limits.evidence
    if evidence.storage is None or not evidence.draws:
        return
    effect, lost = evidence.storage
    allowed = limits.loss(effect, limits.floor.over(effect))
    if allowed is not None and allowed < lost.over(effect) <= limits.most:
        draw_further(runner, evidence)


def _draw(runner: Runner, evidence: Evidence, number: int) -> Divergence:
    """Return how far a run over moved weights lies from that over weights that were not."""
    unmoved = evidence.base if runner.inputs.artifact.merged else evidence.hooked
    return divergence(unmoved.logits, moved(runner, number).logits, runner.transcript.speaking)


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
