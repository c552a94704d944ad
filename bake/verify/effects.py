"""The side effects of an edit, beside its purpose: base, hooked and baked model compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bake.verify.evidence import Evidence
from bake.verify.prompts import PromptSet, load_tokenizer
from bake.verify.scores import perplexity, score

MODELS = ("base", "hooked", "baked")


def effects(
    evidence: Evidence, prompts: PromptSet, scores: Sequence[str], out: Path
) -> dict[str, Any]:
    """Return perplexity on neutral text and the scores, each of base, hooked and baked.

    Args:
        evidence: the runs.
        prompts: which of them are neutral text is said there.
        scores: what the generated texts are scored by.
        out: the artifact, whose tokenizer turns tokens into text.
    """
    found: dict[str, Any] = {}
    exact = evidence.exact
    if prompts.neutral:
        logits = (evidence.base.logits, exact.hooked.logits, exact.baked.logits)
        values = (perplexity(table, prompts.tokens, prompts.neutral) for table in logits)
        found["perplexity"] = {
            name: value.to_json()
            for name, value in zip(MODELS, values, strict=True)
            if value is not None
        }
    if scores:
        tokenizer = load_tokenizer(out)
        texts = {
            name: [
                str(tokenizer.decode(list(ids), skip_special_tokens=True))
                for ids in evidence.texts[name].tokens
            ]
            for name in MODELS
        }
        for spec in scores:
            found[spec] = {name: score(spec, texts[name]).to_json() for name in MODELS}
    return found
