"""``bake diff`` on what bake made: the record is held against the bytes, and lies are found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import NO_BIAS
from click.testing import Result
from commands import run
from exporting import written
from harness import bake, base_at, edit, orthogonal, plan_of, vector
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake import edits as make
from bake.diff import Diff, diff
from bake.diff.record import read_claims
from bake.diff.sources import open_model
from bake.edits import Edit
from bake.errors import UsageError
from bake.merge.merge import merge_adapter

RECIPES = Path(__file__).parent.parent / "recipes"


def run_diff(*args: object) -> Result:
    return run("diff", *args, columns=120)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The quickstart's model in bfloat16, and its recipe exported from it by the command line."""
    folder = tmp_path_factory.mktemp("quickstart")
    base, out = folder / "base", folder / "out"
    shutil.copytree(RECIPES / "quickstart" / "model", base)
    for file in base.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2))
    recipe = RECIPES / "quickstart.toml"
    result = run("export", recipe, "--model", base, "--out", out)
    assert result.exit_code == 0, result.output
    return base, out


@pytest.fixture
def spoiled(half: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the artifact that a test may spoil."""
    return Path(shutil.copytree(half[1], tmp_path / "spoiled"))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of one shard."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][name])


def patch(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2))


# --- an honest artifact -------------------------------------------------------------------------


def test_the_quickstart_is_what_its_record_says(half: tuple[Path, Path]) -> None:
    base, out = half
    result = run_diff(
        base, out, "--json", "--direction", RECIPES / "quickstart" / "mood.safetensors"
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["as_recorded"] is True and data["violations"] == []
    tensors = data["tensors"]
    assert len(tensors["changed"]) == 13 and {row["rank"] for row in tensors["changed"]} == {1}
    assert tensors["created"] == ["lm_head.weight"] and "lm_head.weight" in tensors["same_by_bytes"]
    assert len(tensors["same_by_bytes"]) + len(tensors["changed"]) == tensors["total"]
    (space,) = data["subspaces"]
    assert (space["side"], space["shared"], space["dimension"]) == ("written", True, 1)
    assert space["share"] > 0.99
    assert space["cosines"]["edit mood"] > 0.9999
    assert space["cosines"]["mood.safetensors: vector of resid_post.2"] > 0.9999
    # bfloat16 keeps about half a percent of what was taken out (and the embedding's constant).
    assert max(leak["ratio"] for leak in space["leaks"]) < 0.05
    assert data["config"] == [{"key": "tie_word_embeddings", "old": "true", "new": "false"}]


def test_the_base_is_found_in_the_record(half: tuple[Path, Path]) -> None:
    base, out = half
    result = run_diff(out)
    assert result.exit_code == 0, result.output
    for told in (
        str(base.resolve()),
        "43 the same to the last byte, 13 changed, 1 new",
        "model.layers.0-5.self_attn.o_proj.weight",
        "1 direction of what writers add to the residual stream (width 128)",
        "is taken out of what 13 of 13 writers add",
        "cosine with edit mood: 1.0000",
        "lm_head.weight, a copy of the base's embedding",
        "nothing differs but what the plan names",
    ):
        assert told in " ".join(result.stdout.split()) or told in result.stdout.replace("\n", "")


def test_verbose_lists_every_tensor(half: tuple[Path, Path]) -> None:
    joined = run_diff(*half, "-v").stdout.replace("\n", "")
    assert joined.count("down_proj") >= 6 and "layers.0-5" not in joined
    assert run_diff(*half, "-q").stdout == ""


# --- dishonest ones -----------------------------------------------------------------------------


def expect(base: Path, out: Path, *told: str) -> None:
    """Expect exactly these violations, each with a line that holds the fragment."""
    result = run_diff(base, out, "--json", "--no-rank")
    assert result.exit_code == 1, result.output
    data = json.loads(result.stdout)
    assert data["as_recorded"] is False
    assert len(data["violations"]) == len(told), data["violations"]
    for line, fragment in zip(data["violations"], told, strict=True):
        assert fragment in line
    assert data["error"]["exit_code"] == 1


def test_one_flipped_bit_is_found(half: tuple[Path, Path], spoiled: Path) -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    from bake.checkpoints import open_checkpoint

    info = open_checkpoint(spoiled).tensors[name]
    path = spoiled / info.shard
    raw = bytearray(path.read_bytes())
    raw[info.start + 1001] ^= 1
    path.write_bytes(raw)
    expect(half[0], spoiled, f"{name} differs in 1 value, and the plan does not edit it")
    shown = run_diff(half[0], spoiled)
    assert shown.exit_code == 1
    assert "NO: 1 difference from the record" in shown.stdout
    assert name in shown.stderr.replace("\n", "")


def test_an_edit_that_was_left_out_is_found(half: tuple[Path, Path], spoiled: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    original = load_file(shard_of(half[0], name))[name]
    rewrite(shard_of(spoiled, name), lambda tensors: tensors.update({name: original}))
    expect(half[0], spoiled, f"{name} is as it was, and the plan edits it")


def test_a_changed_head_is_found(half: tuple[Path, Path], spoiled: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"][5] *= 2

    rewrite(shard_of(spoiled, "lm_head.weight"), change)
    expect(half[0], spoiled, "lm_head.weight should be a copy of model.embed_tokens.weight")


def test_a_rank_that_the_edits_do_not_allow_is_found(
    half: tuple[Path, Path], spoiled: Path
) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        wide = tensors[name].float()
        extra = torch.outer(torch.randn(wide.shape[0]), torch.randn(wide.shape[1]))
        tensors[name] = (wide + 0.1 * wide.std() * extra).bfloat16()

    rewrite(shard_of(spoiled, name), change)
    (line,) = diff(str(spoiled), str(half[0])).violations or ()
    assert line == f"{name} changes by rank 2; the edits allow 1"


def test_another_form_of_a_tensor_is_found(half: tuple[Path, Path], spoiled: Path) -> None:
    norm, edited = "model.norm.weight", "model.layers.0.self_attn.o_proj.weight"
    for name in (norm, edited):
        rewrite(
            shard_of(spoiled, name),
            lambda t, name=name: t.update({name: t[name].float()}),  # type: ignore[misc]
        )
    expect(
        half[0],
        spoiled,
        f"{edited} is F32 [128, 128]; from {edited} it should be BF16 [128, 128]",
        f"{norm} is F32 [128] and was BF16 [128], and the plan does not edit it",
    )


def test_tensors_that_come_and_go_are_found(half: tuple[Path, Path], spoiled: Path) -> None:
    gone = "model.layers.5.input_layernorm.weight"
    path = shard_of(spoiled, gone)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[gone]
        tensors["model.extra.weight"] = torch.ones(3)

    rewrite(path, change)

    def reindex(index: Any) -> None:
        del index["weight_map"][gone]
        index["weight_map"]["model.extra.weight"] = path.name

    patch(spoiled / "model.safetensors.index.json", reindex)
    expect(
        half[0],
        spoiled,
        f"{gone} is missing: the base has it",
        "model.extra.weight is new, and the plan does not create it",
    )


def test_the_config_may_change_as_planned_only(half: tuple[Path, Path], spoiled: Path) -> None:
    patch(spoiled / "config.json", lambda c: c.update(rms_norm_eps=1e-5, tie_word_embeddings=True))
    expect(
        half[0],
        spoiled,
        "config.json rms_norm_eps is 1e-05 and was 1e-06; the plan leaves it alone",
        "config.json tie_word_embeddings is true; the plan sets it to false",
    )


def test_nested_keys_are_named_by_their_path(half: tuple[Path, Path], spoiled: Path) -> None:
    patch(spoiled / "config.json", lambda c: c["rope_parameters"].update(rope_theta=5e5))
    expect(half[0], spoiled, "config.json rope_parameters.rope_theta is 500000.0 and was 10000.0")


def test_side_files_may_not_change(half: tuple[Path, Path], spoiled: Path) -> None:
    patch(spoiled / "tokenizer_config.json", lambda c: c.update(bos_token="</s>"))
    (spoiled / "generation_config.json").unlink()
    (spoiled / "chat_template.jinja").write_text("{{ messages }}")
    (spoiled / "extra.safetensors").write_bytes(b"x")
    (spoiled / "README.md").write_text("# A card is no violation")
    expect(
        half[0],
        spoiled,
        "the file chat_template.jinja was added, and the record does not list it",
        "the file extra.safetensors was added, and the record does not list it",
        "the file generation_config.json is missing, and the plan leaves it alone",
        "the file tokenizer_config.json differs, and the plan leaves it alone",
    )


def test_another_base_is_found(half: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(half[0], tmp_path / "other"))
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(shard_of(other, name), lambda t: t.update({name: 2 * t[name]}))
    expect(other, half[1], f"{name} differs in 49,152 values, and the plan does not edit it")


# --- other plans --------------------------------------------------------------------------------


def families() -> list[Any]:
    names = ("llama", "gpt2", "gpt_neox", "mixtral", "phi3", "gemma")
    return [pytest.param(name, id=name) for name in names]


def check(base_path: Path, out: Path, edits: list[Edit], **options: Any) -> Diff:
    base = base_at(base_path)
    bake(base, plan_of(base, edits, **options), out)
    found = diff(str(out), str(base_path))
    assert found.violations == (), found.violations
    return found


@pytest.mark.parametrize("family", families())
def test_every_family_passes(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_checkpoint(family)
    base = base_at(path)
    ablation = edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "resid")
    found = check(path, tmp_path / "out", [ablation])
    matrices = [c for c in found.changes if c.matrix[1] > 1]
    assert matrices and all(c.spectrum is not None and c.spectrum.rank == 1 for c in matrices)
    assert found.untouched_writers == ()


def test_readers_biases_and_rotations_pass(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_checkpoint("llama")
    base = base_at(path)
    width = base.layout.hidden
    offset = edit(base, "offset", make.offset(vector(width)), "resid_post.1")
    found = check(path, tmp_path / "offset", [offset])
    assert [change.tensor for change in found.changes] == ["model.layers.1.mlp.down_proj.bias"]
    rotation = edit(base, "rotate", make.rotate(orthogonal(width)), "resid_pre.1")
    turned = check(path, tmp_path / "rotated", [rotation])
    assert any(side == "read" for side in turned.sides.values())
    reader = edit(base, "ablate", make.ablate(vector(width)), "ln1_out.*")
    check(path, tmp_path / "reader", [reader])


def test_a_recast_and_a_subspace_pass(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen2")
    base = base_at(path)
    width = base.layout.hidden
    offset = edit(base, "offset", make.offset(vector(width)), "resid_post.1")
    found = check(path, tmp_path / "recast", [offset], allow=("recast",))
    assert {"architectures", "model_type", "mlp_bias"} <= {key.key for key in found.config}
    plane = make.ablate(torch.stack([vector(width, 1), vector(width, 2)]))
    found = check(path, tmp_path / "plane", [edit(base, "ablate", plane, "resid")])
    assert {c.spectrum.rank for c in found.changes if c.spectrum and c.matrix[1] > 1} == {2}
    assert found.subspaces[0].dimension == 2 and found.subspaces[0].shared


def test_created_biases_and_zeros_are_checked(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_checkpoint("llama", attention_bias=False, mlp_bias=False)
    base = base_at(path)
    offset = edit(base, "offset", make.offset(vector(base.layout.hidden)), "resid_post.1")
    found = check(path, tmp_path / "out", [offset])
    assert not found.changes and len(found.created) == 9  # three layers of gate, up and down
    name = "model.layers.0.mlp.gate_proj.bias"
    rewrite(shard_of(tmp_path / "out", name), lambda t: t.update({name: t[name] + 1}))
    expect(path, tmp_path / "out", f"{name} should hold zeros, and does not")


def test_a_created_bias_has_the_size_of_the_plan(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_checkpoint("llama", attention_bias=False, mlp_bias=False)
    base = base_at(path)
    offset = edit(base, "offset", make.offset(vector(base.layout.hidden)), "resid_post.1")
    check(path, tmp_path / "out", [offset])
    name = "model.layers.1.mlp.down_proj.bias"
    rewrite(shard_of(tmp_path / "out", name), lambda t: t.update({name: torch.ones(3)}))
    expect(path, tmp_path / "out", f"{name} is F32 [3], and the plan has [24]")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"kind": "merge", "base": {"model": "x"}}',
        '{"kind": "checkpoint", "plan": {}}',
        '{"kind": "checkpoint", "plan": 1}',
    ],
)
def test_a_malformed_record_is_refused(
    half: tuple[Path, Path], spoiled: Path, content: str
) -> None:
    (spoiled / "bake.json").write_text(content)
    result = run_diff(half[0], spoiled)
    assert result.exit_code == 4
    assert "bake.json" in result.stderr


def test_claims_are_read_from_the_record_alone(half: tuple[Path, Path], tmp_path: Path) -> None:
    claims, reason = read_claims(open_model(str(half[1]), tmp_path))
    assert claims is not None and reason is None
    assert claims.tensors["lm_head.weight"].same
    assert claims.tensors["model.embed_tokens.weight"].rank == 2  # a direction, and a constant
    assert claims.tensors["model.layers.0.mlp.down_proj.weight"].rank == 1


# --- options ------------------------------------------------------------------------------------


def test_wrong_input_is_refused(half: tuple[Path, Path], tmp_path: Path) -> None:
    base, out = half
    for args, code, told in (
        ((), 2, "Missing argument"),
        ((base, out, out), 2, "3 models are named"),
        ((base, out, "--plot", tmp_path / "x.pdf"), 2, "name a .png or .svg file"),
        ((base, out, "--plot", tmp_path / "no" / "x.png"), 2, "there is no folder"),
        ((base, out, "--most-rank", "0"), 2, "--most-rank"),
        ((base, tmp_path / "absent"), 4, "neither a folder here nor a Hub id"),
        ((base, out, "--direction", tmp_path / "absent.npy"), 4, "no such file"),
        ((base, out, "--family", tmp_path / "absent.toml"), 4, "cannot be read"),
        ((base, base / "tokenizer.json"), 4, "is a file; a checkpoint is a folder"),
    ):
        result = run_diff(*args)
        assert result.exit_code == code, (args, result.output)
        assert told in " ".join(result.stderr.split()), (args, result.stderr)


def test_nothing_is_drawn_where_nothing_changed(half: tuple[Path, Path], tmp_path: Path) -> None:
    result = run_diff(half[0], half[0], "--plot", tmp_path / "x.png")
    assert result.exit_code == 0 and "nothing is drawn" in result.stderr
    assert "identical  every tensor, and the config" in result.stdout
    assert not (tmp_path / "x.png").exists()


def test_a_strangers_text_does_not_reach_the_terminal(
    half: tuple[Path, Path], spoiled: Path
) -> None:
    patch(spoiled / "config.json", lambda c: c.update({"a\x1b[2J": "b\x1b]0;x\x07\x9b"}))
    (spoiled / "na\x1bme.txt").write_text("x")
    result = run_diff(half[0], spoiled)
    assert result.exit_code == 1
    assert not {"\x1b", "\x07", "\x9b"} & set(result.stdout + result.stderr)
    assert "a\\x1b[2J" in result.stdout


def test_the_plot_is_drawn(half: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a.png", "a.svg", "b.svg"):
        assert run_diff(*half, "--plot", tmp_path / name).exit_code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text()
    assert "13 of 57 tensors changed; one direction holds" in svg and "down_proj" in svg


def test_a_moved_base_is_told(half: tuple[Path, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(half[1], tmp_path / "somewhere" / "else"))
    with pytest.raises(UsageError, match="is not at "):
        diff(str(out))


def test_another_base_is_one_line(half: tuple[Path, Path], tmp_path: Path) -> None:
    base, out = half
    other = Path(shutil.copytree(base, tmp_path / "other"))
    name = "model.layers.0.mlp.down_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][0, 0] += 1

    rewrite(shard_of(other, name), change)
    found = diff(str(out), str(other)).violations or ()
    said = f"this is not the base that the artifact was made of: {name} is not what bake.json says"
    assert any(line.startswith(said) for line in found)
    assert not any("is not the base" in line for line in diff(str(out), str(base)).violations or ())


def test_a_merge_is_held_to_its_record(tmp_path: Path, tiny_checkpoint: Any) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan = plan_of(base, [edit(base, "ablate", make.ablate(vector(24)), "resid")])
    written("lora", plan, base.checkpoint, tmp_path / "lora", record={"base": {"model": "x"}})
    out = tmp_path / "out"
    merge_adapter(tmp_path / "lora", base.checkpoint, out)
    found = diff(str(out), str(base.checkpoint.path))
    assert found.violations == () and found.plan is not None and found.changes
    name = "model.norm.weight"  # which no adapter of this plan has
    rewrite(
        next(out.glob("*.safetensors")), lambda tensors: tensors.update({name: tensors[name] * 2})
    )
    (line,) = diff(str(out), str(base.checkpoint.path)).violations or ()
    assert line.startswith(f"{name} differs") and "the plan does not edit it" in line


def test_a_widened_model_has_the_shapes_of_its_record(tmp_path: Path, tiny_checkpoint: Any) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.bfloat16))
    asked = [edit(base, "ablate", make.ablate(vector(24)), "resid_post.1")]
    out = bake(
        base, plan_of(base, asked, allow={"widen"}), tmp_path / "out", allow=frozenset({"widen"})
    )
    assert diff(str(out), str(base.path)).violations == ()
    name = "model.norm.weight"
    for change, word in (
        (lambda tensor: tensor[:24].clone(), "the plan has [64]"),
        (lambda tensor: tensor.to(torch.float16), "it should be BF16 [64]"),
    ):
        shard = next(out.glob("*.safetensors"))
        kept = load_file(shard)
        rewrite(shard, lambda tensors, to=change: tensors.update({name: to(tensors[name])}))
        (line,) = diff(str(out), str(base.path)).violations or ()
        assert line.startswith(name) and word in line
        rewrite(shard, lambda tensors, old=kept: tensors.update(old))


def test_tensors_of_a_tiny_model_are_all_accounted_for(half: tuple[Path, Path]) -> None:
    found = diff(str(half[1]), str(half[0]))
    names = {*found.by_bytes, *found.by_hash, *(change.tensor for change in found.changes)}
    assert names == set(tiny.header_of(half[1])[0])
