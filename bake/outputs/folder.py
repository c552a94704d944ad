"""What every adapter carries beside its own files, and what a carrier does not hold."""

import json
from typing import Any

from bake import __version__
from bake.artifact.artifact import Artifact
from bake.artifact.record import RECORD
from bake.artifact.staged import digests
from bake.edit_store import edit_files
from bake.outputs.export import CarrierRun
from bake.plan import Exactness, Plan
from bake.plan.carriers import carrier_findings, carrier_runtimes
from bake.plan.record import findings_record, plan_record, runtimes_record


def close_artifact(plan: Plan, kind: str, run: CarrierRun) -> Artifact:
    """Add edits and record to an adapter's own files, and return what there is in all."""
    folder = run.place.folder
    own = sum(path.stat().st_size for path in folder.iterdir())
    for name, data in edit_files(plan.reference, plan.edits).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    findings = plan_record(plan) | carrier_record(plan, kind)
    content = {"bake": __version__, "kind": kind, **run.record, "plan": findings}
    content["files"] = digests(folder)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Artifact(kind, run.place.final, digests(folder), size, own)


def carrier_record(plan: Plan, kind: str, *, codes: bool = False) -> dict[str, Any]:
    """Return what of the plan's record is another for this carrier than for a checkpoint.

    Args:
        plan: the plan.
        kind: the carrier.
        codes: whether it is a GGUF file whose edited weights are stored in a few bits each.
    """
    findings = carrier_findings(plan, kind)
    worst = max((f.exactness for f in findings), key=list(Exactness).index)
    return {
        "exactness": str(worst),
        "findings": findings_record(findings),
        "runtimes": runtimes_record(carrier_runtimes(plan, kind, codes=codes)),
    }
