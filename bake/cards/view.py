"""What the templates print, put together from the facts of one artifact."""

from pathlib import PurePosixPath
from typing import Any

from bake.artifact.base_digests import BASE_TENSORS
from bake.artifact.carrier import KINDS
from bake.artifact.names import IMAGES
from bake.artifact.record import RECORD, VERIFICATION
from bake.cards import commands, figures, metadata, stored, terms
from bake.cards.changes import changes, gguf_digests, gguf_types, weight_files
from bake.cards.edits import (
    EditRow,
    asked_amounts,
    direction_rows,
    edit_rows,
    exactness_rank,
)
from bake.cards.facts import Facts
from bake.cards.fitted import Fitted, fitted
from bake.cards.methods import METHODS, READERS
from bake.cards.notices import concerns_safety, safety_words
from bake.cards.text import (
    Markdown,
    code,
    count,
    escape,
    fenced,
    linkable,
    printable,
    showable,
)
from bake.checkpoints.hub_names import is_commit, is_repository

UNVERIFIED = "**Unverified.**"
"""How the first line of a card begins whose artifact has no verification that passed."""
_RECIPE = f"{RECORD}: recipe"


def view(facts: Facts, repo: str | None, *, unverified: bool) -> dict[str, Any]:
    """Return the values of a card by the names that the templates know.

    Args:
        facts: of the artifact.
        repo: its id on the Hub, or None.
        unverified: it is published without relying on its verification.
    """
    edits = edit_rows(facts)
    return {
        **_head(facts, repo, edits, unverified=unverified),
        **_edited(facts, edits),
        **_measured(facts),
        **_use(facts, repo),
        **_terms(facts, edits),
        "exactness": exactness(facts, edits),
        "versions": _versions(facts),
    }


def _head(
    facts: Facts, repo: str | None, edits: tuple[EditRow, ...], *, unverified: bool
) -> dict[str, Any]:
    words = (f"*{word}*" for word in safety_words(facts))
    return {
        "metadata": Markdown(metadata.metadata(facts, repo)),
        "warning": warning(facts, unverified=unverified),
        "title": facts.title,
        "kind": facts.record.kind,
        "headline": headline(facts, edits),
        "spec": facts.spec,
        "safety": concerns_safety(facts),
        "safety_words": Markdown(", ".join(words)),
    }


def _edited(facts: Facts, edits: tuple[EditRow, ...]) -> dict[str, Any]:
    over = not KINDS[facts.record.kind].whole
    found = fitted(facts)
    return {
        "edits": edits,
        "methods": [METHODS[kind] for kind in _kinds(edits)],
        "fitted": found,
        "asked": [METHODS[kind] for kind in _asked_kinds(found)],
        "readers": Markdown(READERS),
        "directions": direction_rows(facts),
        "base": base_link(facts),
        "base_name": printable(facts.record.base.model),
        "base_repo": facts.base_repo or "",
        "base_digest": stored.text(facts.base, "digest", RECORD),
        "base_tensors": len(stored.mapping(facts.content, BASE_TENSORS, RECORD)),
        "base_dtypes": ", ".join(stored.mapping(facts.base, "dtypes", RECORD)),
        "changes": changes(facts),
        "merged": merged_name(facts) if facts.merged else Markdown(""),
        "merged_digest": stored.text(facts.merged, "sha256", RECORD),
        "notes": () if over else stored.words(facts.plan, "notes", RECORD),
        "plan_digest": facts.record.plan.digest,
        "adapter": _adapter(facts),
        "gguf_types": gguf_types(facts),
        "gguf_base": gguf_digests(facts),
        "converter": commands.converter(facts),
    }


def _measured(facts: Facts) -> dict[str, Any]:
    return {
        "conditions": figures.conditions(facts),
        "distances": figures.distances(facts),
        "judged": figures.judged(facts),
        "runtimes": figures.runtimes(facts),
        "behaviour": figures.behaviour(facts),
        "plots": plots(facts),
        "reports": [name for name in (VERIFICATION, "verify.md") if name in facts.names],
    }


def _use(facts: Facts, repo: str | None) -> dict[str, Any]:
    recipe = stored.mapping(facts.content, "recipe", RECORD)
    text = stored.text(recipe, "text", _RECIPE)
    return {
        "repo": repo or "",
        "commands": commands.commands(facts, repo),
        "verdicts": commands.verdicts(facts),
        "reproduce": commands.reproduce(facts, repo),
        "undo": commands.undo(facts, repo),
        "download_base": commands.download_base(facts),
        "check": commands.check(repo),
        "weights": weight_files(facts),
        "recipe": fenced(text, "toml") if text and showable(text) else Markdown(""),
        "recipe_digest": stored.text(recipe, "digest", _RECIPE),
    }


def _terms(facts: Facts, edits: tuple[EditRow, ...]) -> dict[str, Any]:
    kinds = (*_asked_kinds(fitted(facts)), *(k for k in _kinds(edits, fits=False)))
    papers = dict.fromkeys(p for kind in kinds for p in METHODS[kind].papers)
    return {
        "licence": "" if facts.licence.id is None else str(facts.licence),
        "base_licence": "" if facts.base_licence.id is None else str(facts.base_licence),
        "legal_files": terms.legal_files(facts),
        "shown_words": terms.shown_words(facts) or "",
        "attribution": terms.attribution(facts) or "",
        "licence_remark": terms.remark(facts) or "",
        "papers": tuple(papers),
    }


def _kinds(edits: tuple[EditRow, ...], *, fits: bool = True) -> tuple[str, ...]:
    """Return the kinds of edit, without those of stand-ins alone if so wanted."""
    return tuple(dict.fromkeys(row.kind for row in edits if fits or not row.stand_in))


def _asked_kinds(found: Fitted | None) -> tuple[str, ...]:
    return () if found is None else tuple(dict.fromkeys(edit.kind for edit in found.asked))


def warning(facts: Facts, *, unverified: bool) -> Markdown:
    """Return the first line of a card that has to warn, or nothing."""
    if facts.reason is not None:
        return Markdown(
            f"{UNVERIFIED} Nothing shows that this artifact does what it is meant to: "
            f"{escape(facts.reason)}."
        )
    if unverified:
        return Markdown(
            f"{UNVERIFIED} It was published without relying on a verification; what is measured "
            "below was not demanded."
        )
    return Markdown("")


def base_link(facts: Facts) -> Markdown:
    """Return the base: a link to its commit, or its name where it is a folder."""
    repo, record = facts.base_repo, facts.record
    if repo is None:
        return code(record.base.model)
    if not record.base.pinned or record.base.revision is None:
        return Markdown(f"[{escape(repo)}](https://huggingface.co/{repo})")
    page = f"https://huggingface.co/{repo}/tree/{record.base.revision}"
    return Markdown(f"[{escape(repo)} at commit {record.base.revision[:12]}]({page})")


def headline(facts: Facts, edits: tuple[EditRow, ...]) -> Markdown:
    """Return what was done, in one sentence."""
    if facts.merged:
        return Markdown(f"{base_link(facts)} with {merged_name(facts)} merged into its weights.")
    done = []
    for row in edits:
        if row.stand_in:
            continue
        amounts = f" ({'; '.join(row.amounts)})" if any(row.amounts) else ""
        concept = escape(row.concept)
        did = f"*{concept}* {row.method.did}{amounts}"
        done.append(f"{did} at {count(len(row.sites), 'site')}, {row.places}")
    if (found := fitted(facts)) is not None:
        for asked in found.asked:
            amounts = "; ".join(asked_amounts(facts, asked.kind, asked.concept))
            done.append(f"{asked.words}{amounts and f' ({amounts})'}, **approximately**")
    return Markdown(f"{base_link(facts)} with " + "; ".join(done) + ".")


def merged_name(facts: Facts) -> Markdown:
    """Return the adapter of a merge: a link to its commit, or its name."""
    name, revision = (stored.text(facts.merged, key, RECORD) for key in ("name", "revision"))
    if is_repository(name) and is_commit(revision):
        page = f"https://huggingface.co/{name}/tree/{revision}"
        return Markdown(f"[{escape(name)} at commit {revision[:12]}]({page})")
    return Markdown(f"the adapter {code(name)}")


def exactness(facts: Facts, edits: tuple[EditRow, ...]) -> str:
    """Return the class of exactness of the whole: that of the plan, as the record has it."""
    stated = stored.text(facts.plan, "exactness", RECORD)
    classes = [row.exactness for row in edits] + ([stated] if stated else [])
    return max(classes, key=exactness_rank, default="")


def plots(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Return the plots of the verification: file and title."""
    found = (name for name in facts.names if name.startswith("plots/"))
    return tuple(
        (name, PurePosixPath(name).stem.replace("-", " "))
        for name in found
        if PurePosixPath(name).suffix in IMAGES and linkable(name)
    )


def _adapter(facts: Facts) -> dict[str, int | float]:
    """Return rank and alpha of a LoRA, or of the one that was merged; empty for other kinds."""
    where = "adapter_config.json"
    config = facts.adapter or stored.mapping(facts.merged, "config", RECORD)
    rank = stored.whole(config, "r", where)
    alpha = stored.number(config, "lora_alpha", where)
    return {} if rank is None or alpha is None else {"rank": rank, "alpha": alpha}


def _versions(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Return every version that the records name, and what it is of."""
    found: dict[tuple[str, str], None] = {}
    made = stored.text(facts.content, "bake", RECORD)
    if made:
        found["bake, which wrote the artifact", made] = None
    verification = facts.verification or {}
    for name, version in stored.mapping(verification, "environment", VERIFICATION).items():
        if isinstance(version, str):
            found[f"{name}, in the verification", version] = None
    for record in stored.objects(verification, "runtimes", VERIFICATION):
        runtime = stored.text(record, "runtime", VERIFICATION)
        if version := stored.text(record, "version", VERIFICATION):
            found[f"{runtime}, as a runtime", version] = None
    return tuple(found)
