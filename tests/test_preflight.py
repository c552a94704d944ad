"""What may not be published: each promise broken once, and the artifact as it is beside it."""

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import programs
import pytest
from published import (
    CARD,
    copy_of,
    make_artifact,
    record_again,
    rewrite,
    sharded_base,
    write_verification,
)
from safetensors.torch import load_file, save_file

from bake.artifact.destination import Destination
from bake.artifact.frontmatter import card_metadata
from bake.cards import licences
from bake.cards.licences import LICENCES, Stated, check_licence
from bake.errors import InputError, UsageError
from bake.progress import Progress
from bake.publish import prepare
from bake.publish.options import PushOptions
from bake.publish.preflight import Terms, check_terms, preflight
from bake.seal import scan
from bake.seal.seal import Sealed

SHARD = "model-00001-of-00005.safetensors"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    return make_artifact(sharded_base(folder / "base"), folder / "out")


@pytest.fixture
def out(artifact: Path, tmp_path: Path) -> Path:
    return copy_of(artifact, tmp_path / "out")


def problems(out: Path, **terms: Any) -> list[str]:
    return [str(problem) for problem in preflight(out, Terms(**terms)).problems]


def only(out: Path, message: str, **terms: Any) -> None:
    """Require one problem, whose text holds the message in one line."""
    found = problems(out, **terms)
    assert len(found) == 1 and message in found[0] and "\n" not in found[0], found


def test_a_sound_artifact_has_no_problems(out: Path) -> None:
    found = preflight(out, Terms())
    assert found.problems == () and found.notes == ()
    assert set(found.names) == {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("meanwhile", ["nothing", "changed", "came"])
def test_what_is_sealed_is_what_was_checked(
    meanwhile: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes or comes between the checks and the hashes stops the push."""
    real = prepare.prepare

    def prepared(folder: Path, progress: Progress | None = None) -> Sealed:
        if meanwhile != "nothing":
            (folder / {"changed": "verify.json", "came": "LICENSE"}[meanwhile]).write_text("{}")
        return real(folder, progress)

    monkeypatch.setattr(prepare, "prepare", prepared)
    options = PushOptions(Destination("alice/checked"))
    before = set(out.iterdir())
    if meanwhile == "nothing":  # the control
        assert prepare.prepare_push(out, options, None, lambda text: None).tag.startswith("bake-")
        return
    with pytest.raises(InputError, match="changed while it was being checked"):
        prepare.prepare_push(out, options, None, lambda text: None)
    assert {path.name for path in set(out.iterdir()) - before} <= {"LICENSE"}  # no seal is written


# --- 1: safetensors only, names on a list, no pickle -------------------------------------------


@pytest.mark.parametrize(
    "name, what",
    {
        "pytorch_model.bin": "is of a kind (.bin) that is not published",
        "weights.pt": "is of a kind (.pt) that is not published",
        "model.onnx": "is of a kind (.onnx) that is not published",
        "data.pkl": "is of a kind (.pkl) that is not published",
        "other.gguf": "is no weight file of the kind checkpoint",
        "run.sh": "is of a kind (.sh) that is not published",
        "noextension": "is of a kind (no suffix) that is not published",
        "modeling_x.py": "is code, which is published with --allow code only",
        "onnx/config.json": "is in the folder onnx/, which is no part of an artifact",
        "bake/more/deep.json": "is in the folder bake/more/, which is no part of an artifact",
    }.items(),
)
def test_1_names_are_on_a_list(out: Path, name: str, what: str) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(b"x")
    only(out, what)


@pytest.mark.parametrize(
    "head, what",
    [
        (b"\x80\x04\x95\x10", "is a pickle"),
        (b"\x80\x02}q\x00.", "is a pickle"),
        (b"cos\nsystem\n(S'true'\ntR.", "is a pickle"),
        (b"PK\x03\x04 data.pkl", "is a zip archive"),
        (b"\x1f\x8b\x08\x00", "is an archive"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"\x7fELF\x02", "is a program"),
    ],
)
def test_1_pickles_and_archives_are_known_by_their_first_bytes(
    out: Path, head: bytes, what: str
) -> None:
    (out / "tokenizer.model").write_bytes(head + b"\0" * 40)
    only(out, what)
    (out / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")  # the control
    assert problems(out) == []


def test_1_a_picture_with_an_archive_at_its_end(out: Path, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02.")
    (out / "plots").mkdir()
    (out / "plots" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + (tmp_path / "x.zip").read_bytes())
    only(out, "has a zip archive at its end")


# --- 2: links, devices, hidden files, names ----------------------------------------------------


def test_2_links_and_devices(out: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    (out / "a.txt").symlink_to(secret)
    os.link(secret, out / "b.txt")
    os.mkfifo(out / "c.txt")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(out)
        server.bind("d.txt")
        os.chdir(here)
    found = "\n".join(problems(out))
    assert "a.txt: is a link" in found
    assert "b.txt: has 2 names on this disk (hard links)" in found
    assert "c.txt: is a device, a pipe or a socket" in found
    assert "d.txt: is a device, a pipe or a socket" in found


def test_2_a_folder_that_is_a_link(out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (out / "plots").symlink_to(tmp_path / "elsewhere")
    only(out, "plots: is a link")
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(InputError, match="is no folder"):
        preflight(tmp_path / "link", Terms())


@pytest.mark.parametrize("name", [".env", ".git/config", "bake/.token", ".gitattributes"])
def test_2_hidden_files(out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("x")
    only(out, "is a hidden file")


def test_2_names_that_two_systems_read_differently(out: Path) -> None:
    (out / "Config.json").write_text("{}")
    only(out, "config.json: differs from Config.json in upper and lower case only")
    (out / "Config.json").unlink()
    (out / "cafe\u0301.txt").write_text("x")
    only(out, "is not spelled in Unicode's composed form (NFC)")
    (out / "cafe\u0301.txt").unlink()
    (out / "a\x1b[31mb.txt").write_text("x")
    only(out, "has characters in its name")
    assert "\x1b" not in "".join(problems(out))


# --- 3, 4: the index and the headers -----------------------------------------------------------


def index_of(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    rewrite(out / "model.safetensors.index.json", change)


def test_3_the_index_and_the_files_agree(out: Path, artifact: Path) -> None:
    kept = (out / "model.safetensors.index.json").read_text()
    cases: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda i: i["weight_map"].update(a="../../etc/passwd"), "names a file outside the folder"),
        (lambda i: i["weight_map"].update(a="gone.safetensors"), "1 of 6 shards are missing"),
        (lambda i: i["weight_map"].update(a=SHARD), "which does not hold it"),
        (lambda i: i["weight_map"].__delitem__("model.norm.weight"), "index does not name"),
        (lambda i: i["metadata"].update(total_size=1), "total_size is 1, the tensors have"),
    ]
    for change, message in cases:
        index_of(out, change)
        only(out, message)
        (out / "model.safetensors.index.json").write_text(kept)
    twin = out / "model-00009-of-00009.safetensors"
    twin.write_bytes((out / SHARD).read_bytes())
    only(out, f"{twin.name}: holds weights that the index does not name")


def spoiled_header(out: Path, change: Callable[[bytes], bytes]) -> None:
    raw = (out / SHARD).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = change(raw[8:end])
    (out / SHARD).write_bytes(struct.pack("<Q", len(header)) + header + raw[end:])


HEADERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "space first": (lambda h: b" " + h, "does not begin with '{'"),
    "twice": (lambda h: h.rstrip()[:-1] + b',"__metadata__":{}}', "names the key"),
    "name": (lambda h: h.replace(b"model.", b"mo\\u0000l.", 1), "cannot be printed"),
    "dtype": (lambda h: h.replace(b"F32", b"F33", 1), "unknown dtype"),
    "metadata": (lambda h: h.replace(b'"pt"', b"17", 1), "is not an object of strings"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_4_headers_are_strict(out: Path, case: str) -> None:
    change, message = HEADERS[case]
    spoiled_header(out, change)
    only(out, message)


def test_4_length_and_size_of_a_header(out: Path) -> None:
    with (out / SHARD).open("ab") as file:
        file.write(b"tail")
    only(out, "has bytes after its last tensor")
    (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-8])
    only(out, "is truncated")
    long = b"{" + b" " * 25_000_001 + b"}"
    (out / SHARD).write_bytes(struct.pack("<Q", len(long)) + long)
    only(out, "has a header of 25000003 bytes; the Hub reads 25000000")


# --- 5: finite numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_5_an_edited_tensor_is_finite(out: Path, value: float) -> None:
    name = json.loads((out / "bake.json").read_text())["plan"]["tensors"][0]["name"]
    shard = next(p for p in sorted(out.glob("model-*.safetensors")) if name in load_file(p))
    tensors = load_file(shard)
    tensors[name][-1, -1] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    only(out, f"{shard.name}: {name} holds NaN or an infinity")


# --- 6: JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1, "a": 2}', "names the key 'a' twice"),
        ("[" * 100_000 + "]" * 100_000, "nests too deeply"),
        ('{"a": ', "is not valid JSON"),
        ("17", "is not a JSON object"),
    ],
)
def test_6_json_is_strict(out: Path, text: str, message: str) -> None:
    (out / "special_tokens_map.json").write_text(text)
    only(out, message)
    (out / "special_tokens_map.json").write_text('["a"]')
    assert problems(out) == []  # the control


def test_6_texts_have_a_limit_and_are_texts(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "notes.txt").write_bytes(b"\xff\xfe")
    only(out, "is not UTF-8 text")
    (out / "notes.txt").write_bytes(b"a\0b")
    only(out, "holds the character NUL")
    (out / "notes.txt").write_bytes(b"x" * 100_001)
    assert problems(out) == []
    monkeypatch.setattr(scan, "MAX_TEXT", 100_000)
    only(out, "is 100,001 bytes long; the limit for a text is 100,000")
    monkeypatch.setattr(scan, "MAX_FILES", 3)
    assert any("files are more than 3" in text for text in problems(out))


# --- 7: secrets --------------------------------------------------------------------------------

SECRETS = {
    "a Hugging Face token": "hf_" + "aB3" * 12,
    "an AWS key": "AKIA" + "A1B2" * 4,
    "a private key": "-----BEGIN " + "RSA PRIVATE KEY-----",
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "an OpenAI or Anthropic key": "sk-" + "ant-" + "a1B2" * 10,
    "a Slack token": "xoxb-" + "1234567890-" * 2,
    "a Google key": "AIza" + "a1B2c" * 7,
    "a password in an address": "https://user:" + "geheim@example.org/x",
}


@pytest.mark.parametrize("what", SECRETS)
def test_7_secrets_in_texts_and_in_metadata(out: Path, what: str) -> None:
    secret = SECRETS[what]
    (out / "notes.md").write_text(f"one\ntwo {secret}\n")
    only(out, f"notes.md: line 2 holds {what}")
    assert secret not in "".join(problems(out))  # the report must not spread it
    (out / "notes.md").unlink()
    tensors = load_file(out / SHARD)
    save_file(tensors, out / SHARD, metadata={"format": "pt", "note": secret})
    only(out, f"{SHARD}: its metadata holds {what}")


@pytest.mark.parametrize("where", ["tokenizer.json", "chat_template.jinja", "bake.json", "LICENSE"])
def test_7_every_text_is_read(out: Path, where: str) -> None:
    secret = SECRETS["a Hugging Face token"]
    if where == "bake.json":
        rewrite(out / where, lambda found: found["plan"]["notes"].append(secret))
    elif where.endswith(".json"):
        (out / where).write_text(json.dumps({"x": secret}))
    else:
        (out / where).write_text(secret)
    only(out, "holds a Hugging Face token")


@pytest.mark.parametrize("what", SECRETS)
@pytest.mark.parametrize("key", ["general.description", "general.tags", "tokenizer.chat_template"])
def test_7_secrets_in_a_gguf(tmp_path: Path, what: str, key: str) -> None:
    write_gguf(tmp_path / "m.gguf", **{key: ["plain", f"a {SECRETS[what]}"]})
    (found,) = scan.scan(tmp_path, ["m.gguf"])
    assert str(found) == f"m.gguf: its key {key} holds {what} (remove and revoke it)"
    write_gguf(tmp_path / "m.gguf", **{key: ["plain", "a"]})
    assert scan.scan(tmp_path, ["m.gguf"]) == []


def test_7_places_in_a_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", **{"quantize.imatrix.file": "/home/alice/imatrix.dat"})
    (found,) = scan.scan(tmp_path, ["m.gguf"])
    assert "m.gguf: its key quantize.imatrix.file names a home folder" in str(found)
    assert scan.scan(tmp_path, ["m.gguf"], paths=True) == []
    write_gguf(tmp_path / "m.gguf", **{"tokenizer.ggml.tokens": ["a", "/home/alice/x"]})
    assert scan.scan(tmp_path, ["m.gguf"]) == []  # vocabularies hold any text


@pytest.mark.parametrize("name", ["plot.png", "tokenizer.model", "LICENSE.pdf", "model.sig"])
def test_7_what_is_no_text_is_read_too(tmp_path: Path, name: str) -> None:
    plain = b"\x89PNG\r\n\x1a\n" + bytes(range(128, 256)) if name != "model.sig" else b"{}"
    (tmp_path / name).write_bytes(plain)
    assert scan.scan(tmp_path, [name]) == []
    (tmp_path / name).write_bytes(plain + SECRETS["an AWS key"].encode())
    (found,) = scan.scan(tmp_path, [name])
    assert "holds an AWS key" in str(found)


@pytest.mark.parametrize(
    "text", ["/home/alice/models/x", "/Users/alice/x", "C:\\Users\\alice\\x", "at /root/models"]
)
def test_7_home_folders(out: Path, text: str) -> None:
    (out / "notes.md").write_text(text)
    only(out, "notes.md: line 1 names a home folder (remove it, or --allow paths)")
    assert problems(out, allow=frozenset({"paths"})) == []
    (out / "notes.md").unlink()
    (out / "vocab.json").write_text(json.dumps({text: 1}))
    assert problems(out) == []  # vocabularies hold any text


def test_7_the_name_of_this_machine(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "notes.md").write_text("made on node-17.lab, not on node-170.lab")
    monkeypatch.setattr(socket, "gethostname", lambda: "node-17.lab")
    only(out, "notes.md: line 1 names this machine")
    monkeypatch.setattr(socket, "gethostname", lambda: "made")
    assert problems(out) == []  # a common word tells nothing


# --- 8 and 9 are in test_push.py: the token --- 10: the base's commit ---------------------------


def test_10_the_base_is_pinned(out: Path) -> None:
    for revision in (None, "main", "abc123"):
        rewrite(out / "bake.json", lambda f, r=revision: f["base"].update(revision=r))
        only(out, "bake.json: names no commit of the base")
    rewrite(out / "bake.json", lambda f: f["base"].update(revision="a" * 40))
    assert problems(out) == []


# --- 11, 12: code ------------------------------------------------------------------------------


def test_11_code_in_the_folder_is_never_run(out: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    code = f"from pathlib import Path\nPath({str(trap)!r}).write_text('x')\n"
    (out / "modeling_trap.py").write_text(code)
    (out / "conftest.py").write_text(code)
    rewrite(
        out / "config.json", lambda f: f.update(auto_map={"AutoConfig": "modeling_trap.TrapConfig"})
    )
    record_again(out)
    assert len(problems(out)) == 3
    assert problems(out, allow=frozenset({"code"})) == []
    script = (
        "import sys; from pathlib import Path; from bake.seal.seal import seal, check\n"
        "from bake.publish.preflight import Terms, preflight\n"
        "out = Path(sys.argv[1]); preflight(out, Terms()); seal(out); print(check(out).problems)"
    )
    done = programs.run(script, str(out), cwd=out)
    assert done.returncode == 0 and done.stdout.strip() == "()", done.stderr
    assert not trap.exists()


def test_12_a_config_that_names_code_is_reported(out: Path) -> None:
    rewrite(out / "config.json", lambda f: f.update(auto_map={"AutoModel": "other/repo--m.M"}))
    only(out, "config.json: names code that a reader would run (auto_map: ")
    assert "other/repo--m.M" in problems(out)[0]


# --- the card and the verification -------------------------------------------------------------


def test_without_a_card(out: Path) -> None:
    (out / "README.md").unlink()
    only(out, "README.md: there is no card (run `bake card`, or publish without with --no-card)")
    assert problems(out, no_card=True) == []


@pytest.mark.parametrize(
    "card, message",
    [
        ("---\na: [\n---\n", "has metadata that is no YAML"),
        ("---\n- a\n---\n", "has metadata that is no mapping of names"),
        ("---\n17: b\n---\n", "has metadata that is no mapping of names"),
        (CARD.replace("meta/base", "meta/other"), "names the base_model meta/other"),
        ("---\na: !!python/object/apply:os.system ['true']\n---\n", "is no YAML"),
    ],
)
def test_a_card_that_is_wrong(out: Path, card: str, message: str) -> None:
    (out / "README.md").write_text(card)
    only(out, message)


def test_a_card_is_read_as_the_hub_reads_it() -> None:
    assert card_metadata(CARD) == {"license": "apache-2.0", "base_model": "meta/base"}
    assert card_metadata("\ufeff# no metadata") == {}
    assert card_metadata("---\r\na: b\r\n---\r\n") == {"a": "b"}


def test_only_a_verification_of_this_plan_that_passed_counts(out: Path) -> None:
    failed = [{"name": "leak", "passed": False}, {"name": "other", "passed": True}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"plan_digest": "sha256:other"}, "verify.json is of another plan"),
        ({"passed": False}, "the verification failed"),
        ({"rows": failed}, "the verification failed: leak"),
        ({"rows": [{"name": "x", "passed": None}]}, "holds no comparison that passed"),
        ({"passed": "yes"}, "the verification failed"),
    ]
    for changes, message in cases:
        write_verification(out, **changes)
        only(out, message)
        only(out, "README.md: does not say in its first line", unverified=True)
        kept = (out / "README.md").read_text()
        (out / "README.md").write_text(CARD.replace("# A", "<!-- Unverified. -->\n\n# A"))
        only(out, "README.md: does not say in its first line", unverified=True)
        (out / "README.md").write_text(CARD.replace("# A", "**Unverified.**\n\n# A"))
        found = preflight(out, Terms(unverified=True))
        (out / "README.md").write_text(kept)
        assert found.problems == () and found.unverified is not None
        assert found.notes == ("the artifact is published without a verification that passed",)
    (out / "verify.json").unlink()
    only(out, "is no proof of this plan: there is no verify.json (run `bake verify`, or publish")
    (out / "verify.json").write_text('{"rows": 3}')
    assert problems(out)


def test_an_unknown_allowance_is_refused() -> None:
    with pytest.raises(UsageError, match="'everything' cannot be allowed"):
        Terms(allow=frozenset({"everything"}))


def test_other_kinds_have_their_own_weights(out: Path) -> None:
    for shard in out.glob("model*"):
        shard.unlink()
    rewrite(out / "bake.json", lambda found: found.update(kind="gguf"))
    only(out, ".gguf: an artifact of kind gguf has no such file")
    write_gguf(out / "model.gguf")
    (out / "Modelfile").write_text("FROM ./model.gguf\n")
    assert problems(out) == []
    (out / "model.gguf").write_bytes(b"GGML")
    only(out, "it does not begin with 'GGUF'")
    rewrite(out / "bake.json", lambda found: found.update(kind="poem"))
    with pytest.raises(InputError, match="the kind 'poem' is unknown"):
        preflight(out, Terms())


def write_gguf(path: Path, **metadata: str | list[str]) -> None:
    """Write a GGUF of one tensor with texts and lists of texts as its metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        write = writer.add_string if isinstance(value, str) else writer.add_array
        write(key, value)  # type: ignore[operator] # one of two kinds of value
    writer.add_tensor("a.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- licences ----------------------------------------------------------------------------------


def licence(base: str | None, ours: str | None, **options: Any) -> list[str]:
    defaults: dict[str, Any] = {"repo": "me/x", "names": ["LICENSE"], "notice": "", "card": "text"}
    found = check_licence(base=Stated(base), ours=Stated(ours), **{**defaults, **options})
    return [str(problem) for problem in found]


def test_a_licence_is_inherited_or_stricter() -> None:
    assert licence("mit", "mit") == []
    assert licence("apache-2.0", "gpl-3.0") == []
    assert licence("apache-2.0", "cc-by-nc-4.0") == []
    for base, ours in (
        ("gpl-3.0", "mit"),
        ("cc-by-nc-4.0", "apache-2.0"),
        ("gemma", "apache-2.0"),
        ("cc-by-nc-4.0", "openrail"),
        ("mit", "cc0-1.0"),
        ("mit", "my-own"),
        ("mit", "llama3.1"),
    ):
        notice = LICENCES[base].notice or ""
        (text,) = licence(base, ours, notice=notice)
        assert f"README.md: states {ours} where the base has {base}" in text
    (text,) = licence("mit", None)
    assert "states no licence; the base has mit" in text
    assert licence("mit", None, card=None) == []


def test_an_unknown_licence_is_refused() -> None:
    assert "the base states no licence" in licence(None, "mit")[0]
    assert "strange-1.0 is not known to bake" in licence("strange-1.0", "strange-1.0")[0]
    named = Stated("other", "tongyi-qianwen")
    options: dict[str, Any] = {"repo": "me/x", "notice": "", "card": "x"}
    assert check_licence(base=named, ours=named, names=["LICENSE"], **options) == []
    (found,) = check_licence(base=named, ours=named, names=[], **options)
    assert "other (tongyi-qianwen) wants a copy of the licence to travel" in str(found)
    other = Stated("other", "somebody-elses")
    assert check_licence(base=named, ours=other, names=["LICENSE"], **options)


LLAMA = "Built with Llama"


@pytest.mark.parametrize("version", ["3.1", "3.2", "3.3", "4"])
def test_llama_rules(version: str) -> None:
    name = f"llama{version}"
    notice = (
        f"Llama {version} is licensed under the Llama {version} Community License,\n"
        "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
    )
    right: dict[str, Any] = {
        "repo": "me/Llama-mood",
        "names": ["LICENSE", "NOTICE"],
        "notice": notice,
        "card": LLAMA,
    }
    assert licence(name, name, **right) == []
    for change, message in (
        ({"repo": "me/mood-Llama"}, "has a name that begins with 'Llama'"),
        ({"repo": "me/llama-mood"}, "has a name that begins with 'Llama'"),
        ({"names": ["NOTICE"]}, "wants a copy of the licence to travel"),
        ({"notice": "Llama"}, "NOTICE: has to say"),
        ({"card": "x"}, 'has to show "Built with Llama"'),
    ):
        (text,) = licence(name, name, **{**right, **change})
        assert message in text


def test_llama_3_and_gemma_rules() -> None:
    right: dict[str, Any] = {
        "repo": "me/Llama-3-mood",
        "notice": "Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
        "card": "Built with Meta Llama 3",
    }
    assert licence("llama3", "llama3", **right) == []
    (text,) = licence("llama3", "llama3", **{**right, "repo": "me/Llama-mood"})
    assert "has a name that begins with 'Llama 3'" in text
    terms = "ai.google.dev/gemma/terms"
    notice = f"Gemma is provided under and subject to the Gemma Terms of Use found at {terms}"
    assert licence("gemma", "gemma", notice=notice) == []
    assert "has to say" in licence("gemma", "gemma")[0]


def test_terms_come_from_the_card_and_the_notice(out: Path) -> None:
    found = preflight(out, Terms())
    assert check_terms(found, Terms(), base=Stated("apache-2.0"), repo="me/x") == ()
    refused = check_terms(found, Terms(), base=Stated("llama3.1"), repo="me/x")
    assert len(refused) == 5
    allowed = Terms(allow=frozenset({"licence"}))
    assert check_terms(found, allowed, base=Stated(None), repo="me/x") == ()


def test_stated_licences() -> None:
    assert licences.stated({"license": ["mit"]}) == Stated("mit")
    assert licences.stated({"license": "unknown"}) == Stated(None)
    assert licences.stated({"license": 3}) == Stated(None)
    assert licences.stated({"license": "other", "license_name": "X"}) == Stated("other", "x")


@pytest.fixture(autouse=True)
def _short_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give this machine a name that no text holds, whatever it is called."""
    monkeypatch.setattr(socket, "gethostname", lambda: "host-of-the-tests-0")
    yield
