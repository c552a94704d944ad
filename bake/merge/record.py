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
    KeyChange,
    PlanRecord,
    Provenance,
    TensorChange,
)
from bake.checkpoints import Checkpoint
from bake.checkpoints.adapter import FoundAdapter, adapter_digest
from bake.errors import FamilyError
from bake.families import Family, find_family
from bake.merge.runtimes import merged_runtimes
from bake.merge.work import Item, Work

_BASE = "base_model_name_or_path"


def merge_provenance(
    adapter: Path,
    config: Mapping[str, Any],
    base: Checkpoint,
    out: Path,
    *,
    published: FoundAdapter | None = None,
) -> Provenance:
    """Return what a merge is made from, as its record says it.

    Args:
        adapter: the folder of what is merged.
        config: its configuration.
        base: into what.
        out: the output folder, from which places are told.
        published: where on the Hub the adapter is from; None for a folder.
    """
    here = adapter.resolve()
    on_hub = None if published is None else published.repo
    return Provenance(
        base=base_ref(base, out=out),
        adapter=AdapterRecord(
            name=on_hub or here.name,
            path=None if on_hub else os.path.relpath(here, out.resolve()),
            sha256=adapter_digest(adapter),
            config={**config, _BASE: _named(config)},
            revision=None if published is None else published.commit,
        ),
        allow=(),
        target=(),
        family=None,
        assume_harmless=base.harmless,
    )


def merge_plan(
    adapter: Path, config: Mapping[str, Any], work: Work, *, left: Sequence[str] = ()
) -> PlanRecord:
    """Return what a merge changes.

    A merge is exact: base and adapter compute (W + s B A) x, and so does what is merged, in real
    arithmetic. What is stored is rounded once.

    Args:
        adapter: the folder of what is merged.
        config: its configuration.
        work: what becomes of the base.
        left: files of the adapter that differ from the base's and do not go with the result.
    """
    changed = tuple(_changed(name, item, work.base) for name, item in work.items.items())
    keys = tuple(
        KeyChange(key=key, old=work.base.config.get(key), new=new)
        for key, new in work.config.items()
    )
    facts = [adapter_digest(adapter), list(work.items), [key.to_json() for key in keys]]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    family = _family(work.base)
    return PlanRecord(
        digest=f"sha256:{digest}",
        exactness="exact",
        family=None if family is None else family.name,
        loader=None if family is None else family.loader,
        findings=(),
        tensors=changed,
        biases=(),
        config=keys,
        runtimes=merged_runtimes(work.result),
        notes=tuple(_notes(config, work, left)),
        created_bytes=sum(row.bytes for row in changed if row.created),
    )


def _family(base: Checkpoint) -> Family | None:
    """Return the table of the base's class, or None: a merge needs none."""
    try:
        return find_family(base.config)
    except FamilyError:
        return None


def _changed(name: str, item: Item, base: Checkpoint) -> TensorChange:
    """Return what the record says of one tensor; what was tied is made from the other one."""
    info = base.tensors[item.source]
    return TensorChange(
        name=name,
        source=item.source,
        shape=info.shape,
        created=name not in base.tensors,
        sides=(item.side,),
        bytes=info.nbytes,
    )


def _notes(config: Mapping[str, Any], work: Work, left: Sequence[str]) -> list[str]:
    """Return what a reader should know: shapes alone do not tell a base from its finetunes."""
    notes = ["the output head is untied from the embedding"] if work.config else []
    named = config.get(_BASE)
    if isinstance(named, str) and named and not _is_same(named, work.base):
        notes.append(
            f"the adapter names {_named(config)} as its base, and is merged into "
            f"{base_name(work.base)}"
        )
    if left:
        notes.append(
            f"the adapter's own {', '.join(left)} stay behind, for the tokenizer, template and "
            "generation settings are the base's; --tokenizer adapter takes the adapter's"
        )
    if work.base.unindexed:
        notes.append(
            f"{', '.join(work.base.unindexed)} of the base stay behind: no index names them"
        )
    return notes


def _is_same(named: str, base: Checkpoint) -> bool:
    """Whether the model that an adapter names is this base, by its id or its place."""
    here = named == base.repo or Path(named).absolute() == base.path
    return here or base.path.as_posix().endswith(f"/{named.strip('/')}")


def _named(config: Mapping[str, Any]) -> Any:
    """Return the base that an adapter names; of a place on one machine its last part."""
    named = config.get(_BASE)
    return Path(named).name if isinstance(named, str) and Path(named).is_absolute() else named
