"""What the record of a merge says of base, adapter and change, in the words of a plan.

So verification, seal and push read it as they read an export's.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bake.checkpoints import Checkpoint
from bake.families import Layout
from bake.merge.peft_adapter import PeftAdapter

_BASE = "base_model_name_or_path"
_TIED = "tie_word_embeddings"


def merge_record(
    adapter: PeftAdapter,
    base: Checkpoint,
    layout: Layout | None,
    out: Path,
    *,
    names: Sequence[str],
    sides: Mapping[str, str],
) -> dict[str, Any]:
    """Return the record's base, adapter and plan.

    A merge is exact: base and adapter compute (W + s B A) x, and so does what is merged, in real
    arithmetic. What is stored is rounded once.

    Args:
        adapter: what is merged.
        base: into what.
        layout: the base's family resolved, where there is a table.
        out: the output folder, from which places are told.
        names: the tensors that are written anew.
        sides: whether the adapter adds to a tensor (``update``) or replaces it; a copy is not
            named.
    """
    changed = [_changed(name, base, layout, sides) for name in names]
    untied = any(row["created"] for row in changed)
    config = [{"key": _TIED, "old": base.config.get(_TIED), "new": False}] if untied else []
    digest, place = adapter.digest(), out.resolve()
    facts = [digest, list(names), config]
    plan = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    local = base.revision is None
    return {
        "base": {
            "model": _label(base),
            "revision": base.revision,
            "digest": base.digest(),
            "path": os.path.relpath(base.path, place) if local else None,
        },
        "adapter": {
            "name": adapter.path.resolve().name,
            "path": os.path.relpath(adapter.path.resolve(), place),
            "sha256": digest,
            "config": {**adapter.config, _BASE: _named(adapter)},
        },
        "plan": {
            "digest": f"sha256:{plan}",
            "exactness": "exact",
            "family": None if layout is None else layout.family.name,
            "findings": [],
            "tensors": changed,
            "biases": [],
            "config": config,
            "runtimes": [],
            "notes": _notes(adapter, base, untied=untied),
            "created_bytes": sum(row["bytes"] for row in changed if row["created"]),
        },
    }


def _changed(
    name: str, base: Checkpoint, layout: Layout | None, sides: Mapping[str, str]
) -> dict[str, Any]:
    """Return what the record says of one tensor; a head of its own is made from the embedding."""
    created = name not in base.tensors
    source = name
    if created:
        assert layout is not None
        source = layout.embed
    info = base.tensors[source]
    return {
        "name": name,
        "source": source,
        "shape": list(info.shape),
        "created": created,
        "sides": [sides.get(name, "copied")],
        "bytes": info.nbytes,
    }


def _notes(adapter: PeftAdapter, base: Checkpoint, *, untied: bool) -> list[str]:
    """Return what a reader should know: shapes alone do not tell a base from its finetunes."""
    notes = ["the output head is untied from the embedding"] if untied else []
    named = adapter.config.get(_BASE)
    if isinstance(named, str) and named and not _is_same(named, base):
        told = _named(adapter)
        notes.append(f"the adapter names {told} as its base, and is merged into {_label(base)}")
    return notes


def _is_same(named: str, base: Checkpoint) -> bool:
    """Whether the model that an adapter names is this base, by its id or its place."""
    here = named == base.source.partition("@")[0] or Path(named).absolute() == base.path
    return here or base.path.as_posix().endswith(f"/{named.strip('/')}")


def _named(adapter: PeftAdapter) -> Any:
    """Return the base that an adapter names; of a place on one machine its last part."""
    named = adapter.config.get(_BASE)
    return Path(named).name if isinstance(named, str) and Path(named).is_absolute() else named


def _label(base: Checkpoint) -> str:
    """Return the base's name for the record: no place on this machine, which others read."""
    if base.revision is not None:
        return base.source.partition("@")[0]  # the commit is recorded beside it
    return base.path.name if Path(base.source).is_absolute() else base.source
