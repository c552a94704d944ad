"""What the record of a merge says of base, adapter and change, in the words of a plan.

So verification, seal and push read it as they read an export's.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bake.artifact.base import base_name, base_ref
from bake.artifact.schema import (
    AdapterRecord,
    FamilyRecord,
    KeyChange,
    PlanRecord,
    Provenance,
    TensorChange,
)
from bake.checkpoints import Checkpoint
from bake.checkpoints.adapter import FoundAdapter, adapter_digest
from bake.families import Layout
from bake.merge.peft_adapter import PeftAdapter

_BASE = "base_model_name_or_path"
_TIED = "tie_word_embeddings"


def merge_provenance(
    adapter: PeftAdapter,
    base: Checkpoint,
    out: Path,
    *,
    published: FoundAdapter | None = None,
    family: FamilyRecord | None = None,
) -> Provenance:
    """Return what a merge is made from, as its record says it.

    Args:
        adapter: what is merged.
        base: into what.
        out: the output folder, from which places are told.
        published: where on the Hub the adapter is from; None for a folder.
        family: the user's own table.
    """
    here = adapter.path.resolve()
    on_hub = None if published is None else published.repo
    return Provenance(
        base=base_ref(base, out=out),
        adapter=AdapterRecord(
            name=on_hub or here.name,
            path=None if on_hub else os.path.relpath(here, out.resolve()),
            sha256=adapter_digest(adapter.path),
            config={**adapter.config, _BASE: _named(adapter)},
            revision=None if published is None else published.commit,
        ),
        allow=(),
        target=(),
        family=family,
        assume_harmless=base.harmless,
    )


def merge_plan(
    adapter: PeftAdapter,
    base: Checkpoint,
    layout: Layout | None,
    *,
    names: Sequence[str],
    sides: Mapping[str, str],
) -> PlanRecord:
    """Return what a merge changes.

    A merge is exact: base and adapter compute (W + s B A) x, and so does what is merged, in real
    arithmetic. What is stored is rounded once.

    Args:
        adapter: what is merged.
        base: into what.
        layout: the base's family resolved, where there is a table.
        names: the tensors that are written anew.
        sides: whether the adapter adds to a tensor (``update``) or replaces it; a copy is not
            named.
    """
    changed = tuple(_changed(name, base, layout, sides) for name in names)
    untied = any(row.created for row in changed)
    keys = (KeyChange(key=_TIED, old=base.config.get(_TIED), new=False),) if untied else ()
    facts = [adapter_digest(adapter.path), list(names), [key.to_json() for key in keys]]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return PlanRecord(
        digest=f"sha256:{digest}",
        exactness="exact",
        family=None if layout is None else layout.family.name,
        findings=(),
        tensors=changed,
        biases=(),
        config=keys,
        runtimes=(),
        notes=tuple(_notes(adapter, base, untied=untied)),
        created_bytes=sum(row.bytes for row in changed if row.created),
    )


def _changed(
    name: str, base: Checkpoint, layout: Layout | None, sides: Mapping[str, str]
) -> TensorChange:
    """Return what the record says of one tensor; a head of its own is made from the embedding."""
    created = name not in base.tensors
    source = name
    if created:
        assert layout is not None
        source = layout.embed
    info = base.tensors[source]
    return TensorChange(
        name=name,
        source=source,
        shape=info.shape,
        created=created,
        sides=(sides.get(name, "copied"),),
        bytes=info.nbytes,
    )


def _notes(adapter: PeftAdapter, base: Checkpoint, *, untied: bool) -> list[str]:
    """Return what a reader should know: shapes alone do not tell a base from its finetunes."""
    notes = ["the output head is untied from the embedding"] if untied else []
    named = adapter.config.get(_BASE)
    if isinstance(named, str) and named and not _is_same(named, base):
        notes.append(
            f"the adapter names {_named(adapter)} as its base, and is merged into {base_name(base)}"
        )
    return notes


def _is_same(named: str, base: Checkpoint) -> bool:
    """Whether the model that an adapter names is this base, by its id or its place."""
    here = named == base.repo or Path(named).absolute() == base.path
    return here or base.path.as_posix().endswith(f"/{named.strip('/')}")


def _named(adapter: PeftAdapter) -> Any:
    """Return the base that an adapter names; of a place on one machine its last part."""
    named = adapter.config.get(_BASE)
    return Path(named).name if isinstance(named, str) and Path(named).is_absolute() else named
