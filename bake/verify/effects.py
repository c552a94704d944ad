"""The side effects of an edit, beside its purpose: base, hooked and baked model compared."""

from dataclasses import asdict
from typing import Any

from bake.verify.evidence import Evidence
from bake.verify.inputs import Inputs
from bake.verify.scores import perplexity, scorer
from bake.verify.tokenizer import load_tokenizer

MODELS = ("base", "hooked", "baked")


def effects(evidence: Evidence, inputs: Inputs) -> dict[str, Any]:
    """Return perplexity on neutral text and the scores, each of base, hooked and baked.

    Args:
        evidence: the runs.
        inputs: their prompts say which are neutral text, the artifact's tokenizer turns tokens into
            text, and what was asked names the scores.
    """
    numbers: dict[str, Any] = {}
    exact, prompts, scores = evidence.exact, inputs.prompts, inputs.asked.scores
    if prompts.neutral:
        logits = (evidence.base.logits, exact.reference.logits, exact.baked.logits)
        values = (perplexity(table, prompts.tokens, prompts.neutral) for table in logits)
        numbers["perplexity"] = {
            name: asdict(value)
            for name, value in zip(MODELS, values, strict=True)
            if value is not None
        }
    if scores:
        tokenizer = load_tokenizer(inputs.artifact.path)
        texts = {
            name: [
                str(tokenizer.decode(list(ids), skip_special_tokens=True))
                for ids in evidence.texts[name].tokens
            ]
            for name in MODELS
        }
        for spec in scores:
            score = scorer(spec)
            numbers[spec] = {name: asdict(score(texts[name])) for name in MODELS}
    return numbers
