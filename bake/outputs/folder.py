"""What every adapter carries beside its own files."""

from bake.artifact.artifact import Artifact
from bake.artifact.record import RECORD, new_record, record_text
from bake.artifact.staged import digests
from bake.edit_store import edit_files
from bake.outputs.export import CarrierRun
from bake.plan import Plan
from bake.plan.record import plan_record


def close_artifact(plan: Plan, kind: str, run: CarrierRun) -> Artifact:
    """Add edits and record to an adapter's own files, and return what there is in all."""
    folder = run.place.folder
    own = sum(path.stat().st_size for path in folder.iterdir())
    for name, data in edit_files(plan.reference, plan.edits).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    record = new_record(run.record, kind, plan_record(plan, kind), files=digests(folder))
    (folder / RECORD).write_text(record_text(record), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Artifact(kind, run.place.final, digests(folder), size, own)
