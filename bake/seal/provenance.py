"""How an artifact was made, as an in-toto statement in the shape of SLSA's provenance.

Statement: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, predicate:
https://slsa.dev/spec/v1.0/provenance. No level of SLSA is claimed. The statement holds no time, so
that the same export gives the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bake.artifact.names import CARD, OUTSIDE, STATEMENT, Problem, problem_of
from bake.artifact.record import read_json
from bake.artifact.schema import AdapterRecord, BaseRef, DirectionRecord, Record
from bake.artifact.verification import VERIFICATION
from bake.errors import InputError
from bake.seal.manifest import Manifest

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:bake-directions:export:v1"

_LATER = (CARD, VERIFICATION, STATEMENT)
_LATER_FOLDERS = ("plots/", "verify/", "verify.")


def made_by_export(name: str) -> bool:
    """Tell whether a file is what the export wrote, and not the card or a verification."""
    return name not in OUTSIDE and name not in _LATER and not name.startswith(_LATER_FOLDERS)


def statement(record: Record, manifest: Manifest) -> str:
    """Return the text of the statement: the export's files, and what they were made from."""
    subjects = [
        {"name": file.name, "digest": {"sha256": file.sha256}}
        for file in manifest.files
        if made_by_export(file.name)
    ]
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "kind": record.kind,
                "plan": record.plan.digest,
                "recipe": None if record.recipe is None else record.recipe.digest,
                "allow": list(record.allow),
                "target": list(record.target),
            },
            "resolvedDependencies": [
                _base(record.base),
                *_directions(record.directions),
                *_adapter(record.adapter),
            ],
        },
        "runDetails": {
            "builder": {
                "id": "urn:bake-directions",
                "version": {"bake-directions": record.bake},
            }
        },
    }
    whole = {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _base(base: BaseRef) -> dict[str, Any]:
    """Return the base as a dependency, by its commit where it is on the Hub."""
    found: dict[str, Any] = {"name": "base"}
    if base.on_hub:
        found["uri"] = f"pkg:huggingface/{base.repo}@{base.revision}"
        if base.pinned:
            found["digest"] = {"gitCommit": base.revision}
    if base.digest is not None:
        found["annotations"] = {"layoutSha256": base.digest}
    return found


def _directions(directions: Mapping[str, DirectionRecord]) -> list[dict[str, Any]]:
    return [
        {
            "name": f"direction {name}",
            "digest": {"sha256": found.digest.removeprefix("sha256:")},
        }
        for name, found in sorted(directions.items())
    ]


def _adapter(adapter: AdapterRecord | None) -> list[dict[str, Any]]:
    """Return the adapter of a merge as a dependency; its digest is over its two files'."""
    if adapter is None:
        return []
    return [{"name": f"adapter {adapter.name}", "digest": {"sha256": adapter.sha256}}]


def check_statement(folder: Path, record: Record, manifest: Manifest) -> list[Problem]:
    """Return what is wrong with the statement of an artifact."""
    again = "seal the artifact again"
    try:
        found = read_json(folder, STATEMENT)
    except InputError as error:
        return [problem_of(error, STATEMENT)]
    except OSError:
        return [Problem(STATEMENT, "is missing", again)]
    if found.get("_type") != STATEMENT_TYPE or found.get("predicateType") != PREDICATE_TYPE:
        return [Problem(STATEMENT, "is no in-toto statement of a build")]
    if found != json.loads(statement(record, manifest)):
        return [Problem(STATEMENT, "does not state these files and this record", again)]
    return []
