"""Sums, statement and ``bake check``: what was sealed is there, or each difference is told."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from published import (
    copy_of,
    make_artifact,
    record_again,
    rewrite,
    sharded_base,
    write_verification,
)
from safetensors.torch import load_file, save_file

from bake.artifact.names import SUMS
from bake.cli import main
from bake.errors import InputError
from bake.seal.manifest import read_manifest, read_sums
from bake.seal.provenance import BUILD_TYPE, STATEMENT_TYPE
from bake.seal.seal import check, seal

STATEMENT = "bake/provenance.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several shards, so that some of them are untouched."""
    return sharded_base(tmp_path_factory.mktemp("sharded") / "base")


@pytest.fixture(scope="module")
def sealed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = make_artifact(base, tmp_path_factory.mktemp("made") / "out")
    seal(out)
    return out


@pytest.fixture
def out(sealed: Path, tmp_path: Path) -> Path:
    return copy_of(sealed, tmp_path / "out")


def problems(folder: Path, **options: Path) -> list[str]:
    return [str(problem) for problem in check(folder, **options).problems]


def test_a_sealed_artifact_passes_and_the_same_export_gives_the_same_bytes(
    base: Path, out: Path, tmp_path: Path
) -> None:
    found = check(out)
    assert found.problems == () and found.unverified is None and found.failure() is None
    assert found.manifest.digest == hashlib.sha256((out / SUMS).read_bytes()).hexdigest()
    assert found.manifest.digest == read_manifest(out).digest

    again = make_artifact(base, tmp_path / "again")
    assert seal(again).digest == found.manifest.digest
    seal(again)  # and sealing twice changes nothing
    for name in (SUMS, STATEMENT):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    other = make_artifact(base, tmp_path / "other", at=("attn_out.1",))
    assert seal(other).digest != found.manifest.digest  # the control: another edit


def test_sha256sum_reads_the_sums(out: Path) -> None:
    tool = shutil.which("sha256sum") or shutil.which("shasum")
    assert tool is not None
    done = subprocess.run([tool, "-c", SUMS], cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == len(read_sums(out)) == len(list(files(out))) - 1


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_every_file_is_covered_once_in_order(out: Path) -> None:
    listed = read_sums(out)
    assert set(listed) == files(out) - {SUMS}
    assert list(listed) == sorted(listed)
    for name, digest in listed.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest


def test_missing_extra_and_changed_files_are_one_line_each(out: Path) -> None:
    (out / "generation_config.json").unlink()
    (out / "extra.txt").write_text("x")
    config = out / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    found = problems(out)
    for line in (
        "generation_config.json: is missing",
        "extra.txt: is not listed in SHA256SUMS",
        "config.json: is not what SHA256SUMS lists",
    ):
        assert sum(line in text for text in found) == 1, found
    assert all("\n" not in text for text in found)

    result = CliRunner().invoke(main, ["check", str(out), "--json"])
    assert result.exit_code == 4
    content = json.loads(result.stdout)
    assert content["problems"] == found
    assert content["error"]["what"] == f"{len(found)} things are wrong"
    shown = CliRunner().invoke(main, ["check", str(out)])
    assert shown.exit_code == 4 and "intact    no" in shown.stdout
    assert "extra.txt: is not listed in SHA256SUMS" in shown.stderr


def test_one_flipped_bit_anywhere_is_found(out: Path) -> None:
    for name in sorted(files(out)):
        path = out / name
        kept = path.read_bytes()
        for place in (0, len(kept) // 2, len(kept) - 1):
            spoiled = bytearray(kept)
            spoiled[place] ^= 1
            path.write_bytes(bytes(spoiled))
            try:
                assert problems(out), (name, place)
            except InputError:
                assert name in (SUMS, "bake.json"), name  # without them there is nothing to check
        path.write_bytes(kept)
    assert problems(out) == []  # the control


def test_what_the_hub_and_downloads_add_is_no_part_of_it(out: Path) -> None:
    (out / ".gitattributes").write_text("* -text\n")
    (out / ".cache" / "huggingface").mkdir(parents=True)
    (out / ".cache" / "huggingface" / "x.metadata").write_text("y")
    assert problems(out) == []
    (out / ".hidden").write_text("z")
    assert [text.partition(" (")[0] for text in problems(out)] == [
        ".hidden: is not listed in SHA256SUMS"
    ]


SPOILED_SUMS = {
    "empty": ("", "lists no file"),
    "no file": ("\n", "line 1 is not a sha256 and a name"),
    "short": ("ab  config.json\n", "line 1 is not a sha256 and a name"),
    "upper case": ("A" * 64 + "  config.json\n", "line 1 is not a sha256 and a name"),
    "one space": ("a" * 64 + " config.json\n", "line 1 is not a sha256 and a name"),
    "twice": (("a" * 64 + "  config.json\n") * 2, "line 2 names config.json again"),
    "cut": ("a" * 64 + "  config.json", "does not end with a whole line"),
    "control": ("a" * 64 + "  con\x1b[31mfig\n", "line 1 is not a sha256 and a name"),
}


@pytest.mark.parametrize("case", SPOILED_SUMS)
def test_malformed_sums_are_refused(case: str, out: Path) -> None:
    text, message = SPOILED_SUMS[case]
    (out / SUMS).write_text(text)
    with pytest.raises(InputError) as caught:
        check(out)
    assert message in str(caught.value)


def test_a_name_out_of_the_folder_in_the_sums_is_only_missing(out: Path) -> None:
    """Names in the sums are compared with those that are there; none is opened."""
    with (out / SUMS).open("a") as file:
        file.write("a" * 64 + "  ../../etc/passwd\n")
    assert any("../../etc/passwd: is missing" in text for text in problems(out))


def test_without_sums_or_record_there_is_nothing_to_check(out: Path, tmp_path: Path) -> None:
    (out / SUMS).unlink()
    with pytest.raises(InputError, match="there is no SHA256SUMS"):
        check(out)
    result = CliRunner().invoke(main, ["check", str(out), "--seal"])
    assert result.exit_code == 0, result.output
    assert "intact    yes" in result.stdout
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"this is no artifact of bake: bake\.json cannot be read"):
        check(tmp_path / "empty")


def test_a_second_seal_takes_the_card_and_no_other_change(out: Path) -> None:
    before = (out / SUMS).read_text()
    (out / "README.md").write_text("---\nlicense: mit\n---\n")
    write_verification(out, note="again")
    (out / "extra.txt").write_text("new")
    assert seal(out).digest != hashlib.sha256(before.encode()).hexdigest()
    assert problems(out) == []

    sums = (out / SUMS).read_bytes()
    shard = out / "model-00001-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError) as caught:
        seal(out)
    assert "model-00001-of-00005.safetensors is not what SHA256SUMS lists" in str(caught.value)
    assert (out / SUMS).read_bytes() == sums


def test_the_statement_is_in_toto_and_says_what_it_was_made_from(base: Path, out: Path) -> None:
    found = json.loads((out / STATEMENT).read_text())
    assert found["_type"] == STATEMENT_TYPE == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    listed = read_sums(out)
    subjects = {item["name"]: item["digest"]["sha256"] for item in found["subject"]}
    later = {STATEMENT, "README.md", "verify.json"}
    assert subjects == {name: sha for name, sha in listed.items() if name not in later}
    build = found["predicate"]["buildDefinition"]
    assert build["buildType"] == BUILD_TYPE
    record = json.loads((out / "bake.json").read_text())
    assert build["externalParameters"]["plan"] == record["plan"]["digest"]
    first, second = build["resolvedDependencies"]
    commit = record["base"]["revision"]
    assert first["uri"] == f"pkg:huggingface/meta/base@{commit}"
    assert first["digest"] == {"gitCommit": commit}
    assert second == {"name": "direction mood", "digest": {"sha256": "2" * 64}}


def test_a_statement_of_other_facts_is_refused_even_when_the_sums_list_it(out: Path) -> None:
    def lie(content: dict[str, object]) -> None:
        content["predicate"]["buildDefinition"]["externalParameters"]["plan"] = "sha256:0"  # type: ignore[index]

    rewrite(out / STATEMENT, lie)
    relist(out)
    assert problems(out) == [
        f"{STATEMENT}: does not state these files and this record (seal the artifact again)"
    ]
    (out / STATEMENT).write_text("[]")
    relist(out)
    assert problems(out) == [f"{STATEMENT}: is not a JSON object"]
    (out / STATEMENT).unlink()
    relist(out)
    assert "the file bake/provenance.json is missing" in problems(out)[0]


def relist(out: Path) -> None:
    """Write sums of whatever is there, as somebody who tampers would."""
    (out / SUMS).write_text(read_manifest(out).sums)


def test_index_headers_and_record_are_checked_beside_the_sums(out: Path) -> None:
    index = out / "model.safetensors.index.json"
    kept = index.read_bytes()
    rewrite(index, lambda found: found["metadata"].update(total_size=5))
    relist(out)
    assert any("total_size is 5, the tensors have" in text for text in problems(out))
    rewrite(index, lambda found: found["weight_map"].update({"model.norm.weight": "../x"}))
    relist(out)
    assert any("names a file outside the folder" in text for text in problems(out))
    index.write_bytes(kept)
    rewrite(out / "bake.json", lambda found: found["plan"]["tensors"][0].update(name="nobody"))
    relist(out)
    assert any("the plan names nobody, which" in text for text in problems(out))


def test_untouched_tensors_are_those_of_the_base(base: Path, out: Path) -> None:
    """Promise 5, second half; the sums are made to agree, so that only the base can tell."""
    assert problems(out, base=base) == []
    record = json.loads((out / "bake.json").read_text())
    changed = {row["name"] for row in record["plan"]["tensors"]}
    assert (
        changed
        == {"model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.bias"}
        & changed
    )
    shard = next(
        p for p in sorted(out.glob("model-*.safetensors")) if not changed & load_file(p).keys()
    )
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    (out / STATEMENT).unlink()
    (out / SUMS).unlink()
    record_again(out)
    seal(out)
    assert problems(out) == []  # the control: without the base nobody could know
    assert problems(out, base=base) == [
        f"{shard.name}: {name} differs from the base, and the plan leaves it alone"
    ]


def test_the_edited_tensors_of_the_base_are_those_of_the_record(
    base: Path, out: Path, tmp_path: Path
) -> None:
    """Promise 10: the record has the sha256 of what was edited, so another base is seen at once."""
    name = "model.layers.0.self_attn.o_proj.weight"
    other = copy_of(base, tmp_path / "other")
    shard = next(p for p in sorted(other.glob("model-*.safetensors")) if name in load_file(p))
    tensors = load_file(shard)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    said = f"{shard.name}: {name} of this base is not the one that bake.json says was edited"
    assert problems(out, base=other) == [f"{said} (name the base that it names)"]
    assert problems(out, base=base) == []  # the control


def test_what_is_on_the_hub_is_downloaded_before_it_is_checked() -> None:
    for text, name in (("hf://alice/model@v1", "--revision v1 "), ("alice/model", "")):
        result = CliRunner().invoke(main, ["check", text])
        assert result.exit_code == 2, result.output
        fix = f"hf download alice/model {name}--local-dir model, then bake check model"
        assert fix in " ".join(result.stderr.split())


def test_a_record_that_lists_files_is_held_to_them(out: Path) -> None:
    """Before an artifact is sealed for the first time, its record is what there is."""
    config = hashlib.sha256((out / "config.json").read_bytes()).hexdigest()
    (out / SUMS).unlink()
    rewrite(out / "bake.json", lambda f: f.update(files={"config.json": f"sha256:{config}"}))
    seal(out)
    assert problems(out) == []
    (out / SUMS).unlink()
    rewrite(out / "config.json", lambda found: found.update(extra=1))
    with pytest.raises(InputError, match=r"config\.json is not what bake\.json lists"):
        seal(out)
    rewrite(out / "bake.json", lambda f: f.update(files={"gone.txt": "sha256:0"}))
    with pytest.raises(InputError, match=r"gone\.txt is missing, and bake\.json lists it"):
        seal(out)


def test_a_link_out_of_the_folder_is_refused(out: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("s")
    (out / "extra.txt").symlink_to(secret)
    with pytest.raises(InputError, match="is a link out of the folder"):
        check(out)
