"""``bake.json``: one reader with its limits, one writer, and records of other versions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cards import KINDS, Change, artifact, example
from harness import base_at, edit, plan_of, vector

import bake
from bake import edits as make
from bake.artifact.record import RECORD, parse_record, read_record, record_text
from bake.cards.card import lint_card, render_card
from bake.errors import InputError
from bake.outputs.export import Export
from bake.outputs.write import export


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_version_1_is_read_and_written_as_version_2(kind: str) -> None:
    """Nothing but the number is new: the same keys, in the same order, with the same values."""
    earlier = of_version_1(kind)
    assert "schema" not in earlier
    record = parse_record(earlier, RECORD)
    written = json.loads(record_text(record))
    assert written == {**earlier, "schema": 2}
    assert [key for key in written if key != "schema"] == list(earlier)
    assert list(written["plan"]) == list(earlier["plan"])
    assert parse_record(written, RECORD) == record


def of_version_1(kind: str) -> dict[str, Any]:
    """Return a record as a bake wrote it before records had a version."""
    path = Path(__file__).parent / "records" / f"version-1-{kind}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_version_1_could_leave_out_what_is_null_now() -> None:
    earlier = of_version_1("checkpoint")
    earlier["base"] = {"model": "someone/model"}
    del earlier["allow"], earlier["base_tensors"], earlier["sketch"], earlier["files"]
    record = parse_record(earlier, RECORD)
    assert record.base.revision is None and record.base.card is None and record.files is None
    assert record.allow == () and record.base_tensors == {} and record.sketch is None
    with pytest.raises(InputError, match=r"allow is missing|base.* is missing"):
        parse_record({**earlier, "schema": 2}, RECORD)  # the control: version 2 says them


def test_a_record_of_a_newer_bake_is_refused_as_one() -> None:
    content = {**example("gguf", RECORD), "schema": 3, "something": "new"}
    with pytest.raises(InputError, match="is of version 3") as refused:
        parse_record(content, RECORD)
    assert refused.value.fix is not None and "pip install" in refused.value.fix


def at(*path: str | int, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        place: Any = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (at("schema", value=1), "schema"),
        (at("schema", value="2"), "schema"),
        (at("kind", value="poem"), "the kind 'poem' is unknown"),
        (at("kind", value=None), "kind is missing"),
        (at("something", value=1), "something is a key that nobody knows"),
        (at("x\x1b[2J", value=1), r"x\\x1b\[2J' is a key that nobody knows"),
        (at("base", "some", value=1), "base.some is a key that nobody knows"),
        (at("base", "model", value=None), "base.model is missing"),
        (at("base", "tensors", value=-1), "base.tensors"),
        (at("base", "tensors", value=10**40), "base.tensors"),
        (at("base", "tensors", value=True), "base.tensors is no number"),
        (at("plan", "findings", value="x"), "plan.findings is no list"),
        (at("plan", "findings", 0, value=1), "plan.findings is no list of objects"),
        (at("plan", "findings", 0, "sites", value=[1]), r"findings\[0\].sites is no list of texts"),
        (at("plan", "exactness", value="rather"), "plan.exactness"),
        (at("files", "config.json", value=1), "files is no object of texts"),
        (at("base_tensors", "x", value="sha256:abc"), "base_tensors"),
        (at("base_tensors", "x", value="sha256:" + "0" * 64 + "\n"), "base_tensors"),
        (at("verify", value={"most_kl": float("nan")}), "verify.most_kl"),
        (at("verify", value={"most_kl": float("inf")}), "verify.most_kl"),
    ],
)
def test_what_a_record_may_not_hold(change: Change, said: str, tmp_path: Path) -> None:
    out = artifact(tmp_path / "out", record=change)
    with pytest.raises(InputError, match=said) as refused:
        read_record(out)
    assert "\x1b" not in str(refused.value)
    assert read_record(artifact(tmp_path / "control")).kind == "checkpoint"


def test_a_record_has_one_set_of_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = artifact(tmp_path / "out")
    text = (out / RECORD).read_text(encoding="utf-8")
    for spoiled in ('{"kind": "x", ' + text[1:], '{"a":' * 100_000, "[]", "", "\ufeff" + text):
        (out / RECORD).write_text(spoiled, encoding="utf-8")
        with pytest.raises(InputError, match="no artifact of bake"):
            read_record(out)
    (out / RECORD).write_text('{"bake": ' + "9" * 5000 + "}", encoding="utf-8")
    with pytest.raises(InputError, match="no artifact of bake"):
        read_record(out)
    (out / RECORD).write_text(text, encoding="utf-8")
    assert read_record(out).kind == "checkpoint"
    monkeypatch.setattr("bake.artifact.record._LIMIT", len(text) - 1)
    with pytest.raises(InputError, match="no artifact of bake") as refused:
        read_record(out)
    assert "the limit is" in str(refused.value.why)


def test_an_export_that_is_told_nothing_names_its_base(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    plan = plan_of(base, [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "resid")])
    export(Export(plan, base.checkpoint), ["checkpoint"], tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert record.base.model == base.path.name and record.base.path is not None
    assert (tmp_path / "out" / record.base.path).resolve() == base.path.resolve()
    assert record.base.digest == base.checkpoint.digest() and record.plan.digest == plan.digest
    assert parse_record(json.loads(record_text(record)), RECORD) == record
    assert lint_card(render_card(tmp_path / "out"), tmp_path / "out") == ()


def test_the_name_of_the_record_stands_in_one_file() -> None:
    modules = Path(bake.__file__).parent.rglob("*.py")
    found = [path.name for path in modules if f'"{RECORD}"' in path.read_text(encoding="utf-8")]
    assert found == ["folder.py"]
