"""``bake diff`` on LoRA adapters: what they add to their base, and what cannot be told."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from exporting import written
from harness import base_at, edit, plan_of, vector
from peft_samples import base_of
from safetensors.torch import load_file, save_file
from test_merge import trained
from test_merge_kinds import make as adapted
from torch import Tensor

from bake import edits as make
from bake.checkpoints import open_checkpoint
from bake.cli import main
from bake.diff import diff
from bake.errors import InputError, UsageError
from bake.merge.merge import merge_adapter

PREFIX = "base_model.model."
NAMES = ("model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "base"
    sizes = {"hidden_size": 96, "intermediate_size": 128, "vocab_size": 200}
    model = tiny.make_model("llama", dtype=torch.bfloat16, attention_bias=False, **sizes)
    tiny.write_checkpoint(model, path)
    return path


def adapter(path: Path, base: Path, rank: int = 3, scale: float = 1.0, **more: Tensor) -> Path:
    """Write a random adapter as PEFT does."""
    path.mkdir()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(NAMES),
        "base_model_name_or_path": str(base),
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = dict(more)
    for name in NAMES:
        shape = tiny.header_of(base)[0][f"{name}.weight"]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, shape[1])
        tensors[f"{PREFIX}{name}.lora_B.weight"] = scale * torch.randn(shape[0], rank)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_an_adapter_has_the_rank_and_size_of_its_factors(
    base: Path, tmp_path: Path, scale: float
) -> None:
    """Also where it is far below the rounding of the base: nothing of a sum is rounded."""
    path = adapter(tmp_path / "a", base, scale=scale)
    found = diff(str(path), str(base))
    assert found.adapter and found.violations is None
    changes = {change.tensor: change for change in found.changes}
    assert set(changes) == {f"{name}.weight" for name in NAMES}
    tensors = load_file(path / "adapter_model.safetensors")
    weights = tiny.tensors_of(base)
    for name in NAMES:
        a, b = (tensors[f"{PREFIX}{name}.lora_{side}.weight"].double() for side in "AB")
        change = changes[f"{name}.weight"]
        expected = 2 * b @ a
        assert change.spectrum is not None and change.spectrum.rank == 3
        assert change.norm == pytest.approx(float(expected.norm()), rel=1e-6)
        size = float(weights[f"{name}.weight"].double().norm())
        assert change.relative == pytest.approx(float(expected.norm()) / size, rel=1e-6)


def test_an_ablation_as_an_adapter_shares_its_direction(base: Path, tmp_path: Path) -> None:
    opened = base_at(base)
    direction = vector(96)
    ablation = edit(opened, "ablate", make.ablate(direction), "attn_out.*")
    plan = plan_of(opened, [ablation])
    record = {"base": {"model": str(base), "revision": None, "path": str(base)}}
    written("lora", plan, opened.checkpoint, tmp_path / "out", record=record)
    found = diff(str(tmp_path / "out"), given={"mine": direction[None]})
    (space,) = found.subspaces
    assert (space.side, space.shared, space.dimension) == ("written", True, 1)
    assert dict(space.cosines)["mine"] > 0.999
    assert all(leak.ratio is not None and leak.ratio < 0.02 for leak in space.leaks)


def test_the_command_line_finds_the_base_in_the_adapter(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", base)
    done = CliRunner(env={"COLUMNS": "120"}).invoke(main, ["diff", str(path)])
    assert done.exit_code == 0, done.output
    assert "the adapter adds to 2 and leaves the others" in done.stdout
    data = json.loads(
        CliRunner(env={"COLUMNS": "120"}).invoke(main, ["diff", str(path), "--json"]).stdout
    )
    assert data["adapter"] is True and data["as_recorded"] is None


def test_what_an_adapter_stores_whole_is_compared_too(base: Path, tmp_path: Path) -> None:
    norm = {f"{PREFIX}model.norm.weight": torch.ones(96)}
    found = diff(str(adapter(tmp_path / "a", base, **norm)), str(base))
    changes = {change.tensor: change for change in found.changes}
    assert set(changes) == {*(f"{name}.weight" for name in NAMES), "model.norm.weight"}
    before = tiny.tensors_of(base)["model.norm.weight"].double()
    size = float((1 - before).norm() / before.norm())
    assert changes["model.norm.weight"].relative == pytest.approx(size, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["mlp"]}])
def test_a_tied_head_is_compared_with_the_embedding(
    options: dict[str, Any], tmp_path: Path, tiny_checkpoint: Any
) -> None:
    """Whatever a merge takes: here a head that the base's files do not hold."""
    tied = base_at(tiny_checkpoint("llama", tied=True))
    path = trained(tied, tmp_path / "a", target_modules=["lm_head", "q_proj"], **options)
    found = {change.tensor: change for change in diff(str(path), str(tied.path)).changes}
    merged = tiny.tensors_of(merge_adapter(path, tied.checkpoint, tmp_path / "out").path)
    before = tied.checkpoint.read("model.embed_tokens.weight").double()
    size = float((merged["lm_head.weight"] - before).norm() / before.norm())
    assert size > 1e-2 and "model.embed_tokens.weight" not in found
    assert found["lm_head.weight"].relative == pytest.approx(size, rel=1e-6)
    assert ("model.layers.0.mlp.up_proj.weight" in found) == ("modules_to_save" in options)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA, rank-stabilised": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "use_rslora": True},
    ),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 9},
            "exclude_modules": ["layers.0.self_attn.v_proj"],
        },
    ),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "biases of factors": ("llama", {"target_modules": ["o_proj", "q_proj"], "lora_bias": True}),
    "a table": ("bloom", {"target_modules": ["word_embeddings", "dense"]}),
    "a saved parent": (
        "gpt_neox",
        {"target_modules": ["dense_h_to_4h"], "modules_to_save": ["attention"]},
    ),
    "stacked experts": (
        "qwen2_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", KINDS)
def test_every_kind_that_is_merged_is_compared(case: str, tmp_path: Path) -> None:
    """What diff says of an adapter is what it says of the merge: the same tensors, as much."""
    architecture, options = KINDS[case]
    plain = base_of(architecture, False, "plain", tmp_path / "bases")
    path = adapted(plain, tmp_path / "a", **options)
    out = merge_adapter(path, open_checkpoint(plain.path), tmp_path / "out").path
    one, two = (
        {change.tensor: change.relative for change in diff(str(found), str(plain.path)).changes}
        for found in (path, out)
    )
    assert one.keys() == two.keys() and len(one) > 1
    for name, size in one.items():
        assert size is not None and size > 1e-3
        assert two[name] == pytest.approx(size, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "more", [{"peft_type": "VERA"}, {"init_lora_weights": "olora"}, {"a_future": 1}]
)
def test_what_is_not_merged_is_refused_in_the_same_words(
    more: dict[str, Any], tmp_path: Path
) -> None:
    plain = base_of("llama", False, "plain", tmp_path / "bases")
    path = adapted(plain, tmp_path / "a", target_modules=["q_proj"])
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **more}))
    with pytest.raises(InputError) as one:
        merge_adapter(path, open_checkpoint(plain.path), tmp_path / "no")
    with pytest.raises(InputError) as two:
        diff(str(path), str(plain.path))
    assert str(one.value) == str(two.value)


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", base)
    tiny.write_checkpoint(tiny.make_model("llama"), tmp_path / "other")
    with pytest.raises(InputError, match="base and configuration make it"):
        diff(str(path), str(tmp_path / "other"))


def test_a_base_cannot_be_an_adapter(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", base)
    with pytest.raises(UsageError, match="is an adapter"):
        diff(str(base), str(path))
