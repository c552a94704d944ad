"""An adapter computes what the hooks and the baked checkpoint compute, in PEFT on a live model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from adapters import NO_BIAS, config_of, factors_of, peft_logits, peft_warnings, rewritten
from exporting import written
from harness import RELATIVE, Base, bake, base_at, edit, logits, matrix, plan_of, vector
from safetensors.torch import load_file, save_file

from bake import edits as make
from bake.affine import AffineMap
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.edits import Edit, WeightUpdate
from bake.errors import InexactPlan, InputError, UsageError
from bake.plan import Exactness
from bake.plan.lowrank import low_rank, rank_of, targets_of
from bake.publish.preflight import Terms, preflight
from bake.sites import Site, SiteKind

Checkpoints = Callable[..., Path]
Build = Callable[[int], AffineMap | WeightUpdate]


def ablate(n: int) -> AffineMap:
    return make.ablate(vector(n))


def subspace(n: int) -> AffineMap:
    return make.ablate(torch.stack([vector(n, 3), vector(n, 4)]), strength=0.5)


def affine(n: int) -> AffineMap:
    return make.affine(vector(n), mean=vector(n, 1), alpha=0.7)


def oblique(n: int) -> AffineMap:
    left, right = vector(n, 5), vector(n, 6)
    factors = (left / (left @ right)).unsqueeze(1), right.unsqueeze(0)
    return make.erase(*factors, mean=vector(n, 7))


def offset(n: int) -> AffineMap:
    return make.offset(vector(n))


def few_channels(n: int) -> AffineMap:
    factor = torch.ones(n, dtype=torch.float64)
    factor[1], factor[5] = -2.0, 0.25
    return make.scale(factor)


# Family, config, kind, map, sites: every way in which an adapter carries an edit.
CARRIED: dict[str, tuple[str, dict[str, object], str, Build, str | list[str]]] = {
    "llama, every stream site": ("llama", NO_BIAS, "ablate", ablate, "resid"),
    "llama, a tied head": ("llama", {**NO_BIAS, "tied": True}, "ablate", ablate, "resid"),
    "llama, affine": ("llama", NO_BIAS, "affine", affine, "resid"),
    "llama, affine, a tied head": ("llama", {**NO_BIAS, "tied": True}, "affine", affine, "resid"),
    "llama, oblique with mean": ("llama", NO_BIAS, "erase", oblique, "resid"),
    "llama, an offset from the embedding on": ("llama", NO_BIAS, "offset", offset, "embed"),
    "llama, half a subspace": ("llama", NO_BIAS, "ablate", subspace, ["attn_out.*", "mlp_out.1"]),
    "llama, square o_proj": ("llama", {**NO_BIAS, "square": True}, "ablate", ablate, "attn_out.1"),
    "llama, inputs of readers": ("llama", NO_BIAS, "ablate", ablate, "ln2_out.1"),
    "llama, an input beside biases": ("llama", {}, "ablate", ablate, "z.1"),
    "llama, one head": ("llama", NO_BIAS, "ablate", lambda n: ablate(8), "q.1.h2"),
    "llama, some neurons": ("llama", NO_BIAS, "scale", few_channels, "mlp_act.2"),
    "llama, the head": ("llama", NO_BIAS, "ablate", ablate, "ln_final_out"),
    "llama, a tied head's own": (
        "llama",
        {**NO_BIAS, "tied": True},
        "ablate",
        ablate,
        "ln_final_out",
    ),
    "mistral": ("mistral", {}, "ablate", ablate, "resid"),
    "qwen2": ("qwen2", {}, "affine", affine, "resid"),
    "qwen3": ("qwen3", {"attention_bias": False}, "ablate", ablate, "resid"),
    "gemma, a scaled embedding": ("gemma", {"attention_bias": False}, "affine", affine, "resid"),
    "gemma2, before the post-norms": (
        "gemma2",
        {"attention_bias": False},
        "ablate",
        ablate,
        ["attn_out.*", "mlp_out.*"],
    ),
    "gemma3, before the post-norms": (
        "gemma3",
        {"attention_bias": False},
        "ablate",
        ablate,
        ["attn_out.*", "mlp_out.*"],
    ),
    "gemma3, a scaled embedding": ("gemma3", {"attention_bias": False}, "offset", offset, "embed"),
    "olmo2": ("olmo2", {"attention_bias": False}, "ablate", ablate, "mlp_out.*"),
    "phi3, fused rows": ("phi3", {}, "ablate", ablate, ["resid"]),
    "phi3, one of the fused": ("phi3", {}, "linear", lambda n: subspace(n), "k.1"),
    "gpt2, stored the other way": ("gpt2", {}, "ablate", ablate, ["ln1_out.1", "ln2_out.2"]),
    "gpt2, input of a writer": ("gpt2", {}, "ablate", subspace, "z.1"),
    "gpt_neox, interleaved heads": ("gpt_neox", {}, "ablate", ablate, "ln1_out.1"),
    "mixtral, every expert": ("mixtral", {}, "ablate", ablate, "resid"),
    "mixtral, routers too": ("mixtral", {}, "ablate", ablate, "ln2_out.1"),
}


def planned(case: str, checkpoints: Checkpoints) -> tuple[Base, list[Edit]]:
    family, options, kind, build, at = CARRIED[case]
    base = base_at(checkpoints(family, **options))
    first = (at if isinstance(at, str) else at[0]).replace("*", "1")
    site = Site(SiteKind.EMBED)
    if first not in ("resid", "embed"):
        word, _, layer = first.partition(".")
        site = Site(SiteKind(word), int(layer[0]) if layer else None)
    return base, [edit(base, kind, build(base.layout.width(site)), at)]


@pytest.mark.parametrize("case", CARRIED)
def test_adapter_equals_hooks(case: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base, edits = planned(case, tiny_checkpoint)
    out = written("lora", plan_of(base, edits), base.checkpoint, tmp_path / "out").path
    hooked, plain = logits(base.model, base, edits), logits(base.model, base)
    effect = float((hooked - plain).abs().max())
    assert effect > 1e-2
    assert float((peft_logits(base, out) - hooked).abs().max()) <= RELATIVE * effect
    # The control: the same factors at half their scale are another function.
    half = rewritten(out, tmp_path / "half", factors_of(out), lora_alpha=config_of(out)["r"] / 2)
    assert float((peft_logits(base, half) - hooked).abs().max()) > 1e-3 * effect


@pytest.mark.parametrize("case", CARRIED)
def test_adapter_equals_checkpoint(case: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """In float32, as runtimes compute: the two carriers of one plan are one function."""
    base, edits = planned(case, lambda *a, **k: tiny_checkpoint(*a, dtype=torch.float32, **k))
    plan = plan_of(base, edits)
    adapter = written("lora", plan, base.checkpoint, tmp_path / "lora").path
    checkpoint = bake(base, plan, tmp_path / "checkpoint")
    with torch.no_grad():
        baked = tiny.load(checkpoint, torch.float32)(tiny.tokens(), use_cache=False).logits
        plain = tiny.load(base.path, torch.float32)(tiny.tokens(), use_cache=False).logits
    adapted = peft_logits(base, adapter, torch.float32)
    # A float32 model's own rounding: its logits' size × epsilon × two branches × terms of a sum.
    size = float(baked.abs().max())
    bound = torch.finfo(torch.float32).eps * size * 2 * base.layout.layers * 56
    assert bound <= 1e-4 * size
    assert float((adapted - baked).abs().max()) <= bound
    assert float((plain - baked).abs().max()) > 100 * bound
    assert {t.dtype for t in factors_of(adapter).values()} == {torch.float32}


def test_update_composes_with_edits_around_it(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    for family, options in (("llama", NO_BIAS), ("phi3", {}), ("gpt2", {})):
        base = base_at(tiny_checkpoint(family, **options))
        hidden, heads = base.layout.hidden, base.layout.width(Site(SiteKind.Z, 1))
        edits = [
            edit(base, "update", make.update(vector(heads, 3), vector(hidden, 4)), "q.2"),
            edit(base, "ablate", make.ablate(vector(hidden, 6)), "ln1_out.2"),
        ]
        if family != "gpt2":  # its biases are always there, and a LoRA holds none
            edits.append(edit(base, "ablate", make.ablate(vector(heads, 5)), "q.2"))
        out = tmp_path / family
        written("lora", plan_of(base, edits), base.checkpoint, out)
        hooked = logits(base.model, base, edits)
        effect = float((hooked - logits(base.model, base)).abs().max())
        assert effect > 1e-2
        assert float((peft_logits(base, out) - hooked).abs().max()) <= RELATIVE * effect


def test_a_lost_module_is_seen(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    edits = [edit(base, "ablate", ablate(base.layout.hidden), "resid")]
    out = written("lora", plan_of(base, edits), base.checkpoint, tmp_path / "out").path
    hooked, tensors = logits(base.model, base, edits), factors_of(out)
    name = "base_model.model.model.layers.2.self_attn.o_proj.lora_B.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    broken = rewritten(out, tmp_path / "broken", tensors)
    assert float((peft_logits(base, broken) - hooked).abs().max()) > 1e-3


def test_the_config_says_everything_that_a_runtime_could_overlook(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """One rank, scale 1, no patterns, no bias: what llama.cpp's converter or vLLM would drop."""
    base = base_at(tiny_checkpoint("mixtral"))
    hidden = base.layout.hidden
    edits = [
        edit(base, "ablate", ablate(hidden), "resid"),
        edit(base, "ablate", make.ablate(vector(hidden, 9)), "ln2_out.1"),
    ]
    record = {"base": {"model": "owner/name", "revision": "0123abcd"}}
    out = written(
        "lora", plan_of(base, edits), base.checkpoint, tmp_path / "out", record=record
    ).path
    config, tensors = config_of(out), factors_of(out)
    assert config["base_model_name_or_path"] == "owner/name"
    assert config["revision"] == "0123abcd"
    assert config["r"] == config["lora_alpha"] == 1
    assert (config["bias"], config["lora_bias"], config["use_rslora"]) == ("none", False, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None
    assert not any("bias" in name or "base_layer" in name for name in tensors)
    ranks = {t.shape[1] if "_B" in name else t.shape[0] for name, t in tensors.items()}
    assert ranks == {1}
    # All projections of every expert have factors, those of an unedited one zeros.
    experts = [name for name in tensors if ".experts." in name]
    assert len(experts) == 3 * 3 * 3 * 2  # layers, experts, projections, factors
    idle = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1"
    assert not bool(tensors[f"{idle}.lora_B.weight"].any())
    assert bool(tensors[f"{idle.replace('layers.0', 'layers.1')}.lora_B.weight"].any())


def test_files(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """No config.json of its own: runtimes read the base's, with every key as its author left it."""
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan = plan_of(base, [edit(base, "ablate", ablate(base.layout.hidden), "resid")])
    done: list[tuple[int, int]] = []
    record = {
        "base": {"model": "m"},
        "recipe": {"title": "t", "file": "t.toml", "digest": "", "text": ""},
    }
    artifact = written(
        "lora",
        plan,
        base.checkpoint,
        tmp_path / "out",
        record=record,
        progress=lambda part, whole: done.append((part, whole)),
    )
    names = ["adapter_config.json", "adapter_model.safetensors", "bake.json"]
    assert sorted(artifact.files) == [*names, "bake/edits.safetensors"]
    found = json.loads((artifact.path / "bake.json").read_text())
    assert (found["kind"], found["recipe"], found["plan"]["digest"]) == (
        "lora",
        record["recipe"],
        plan.digest,
    )
    assert found["plan"]["exactness"] == "exact"
    assert found["files"]["adapter_config.json"] == artifact.files["adapter_config.json"]
    assert done[-1][0] == done[-1][1] == (artifact.path / names[1]).stat().st_size
    assert artifact.bytes_written == sum(
        path.stat().st_size for path in artifact.path.rglob("*") if path.is_file()
    )


def test_the_base_is_found_from_any_folder(
    tiny_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT takes a name that is no Hub id for a folder below the one that it is run in."""
    from peft import AutoPeftModelForCausalLM

    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan = plan_of(base, [edit(base, "ablate", ablate(base.layout.hidden), "resid")])
    monkeypatch.chdir(base.path.parent)
    near = open_checkpoint(base.path.name)
    out = written("lora", plan, near, tmp_path / "out").path
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with peft_warnings():
        model = AutoPeftModelForCausalLM.from_pretrained(out)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    # The control: the name alone is found where it lies and nowhere else.
    assert not Path(base.path.name).exists()
    # A folder of this machine is nobody else's business.
    problems = [str(problem) for problem in preflight(out, Terms(no_card=True)).problems]
    assert any("names the base by a folder of this machine" in problem for problem in problems)
    allowed = preflight(out, Terms(no_card=True, allow=frozenset({"paths"}))).problems
    assert not any("folder of this machine" in str(problem) for problem in allowed)


def test_same_plan_same_bytes(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan = plan_of(base, [edit(base, "ablate", ablate(base.layout.hidden), "resid")])
    one, two = (written("lora", plan, base.checkpoint, tmp_path / name) for name in ("one", "two"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert one.files[name] == two.files[name]


def test_a_constant_along_the_direction_needs_no_rank_of_its_own(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Rank 1 carries an affine edit in the embedding's rows; an offset takes a rank of its own."""
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan = plan_of(base, [edit(base, "affine", affine(base.layout.hidden), "resid")])
    assert {rank_of(t.update) for t in targets_of(plan) if t.update is not None} == {1}
    both = [
        edit(base, "ablate", ablate(base.layout.hidden), "resid"),
        edit(base, "offset", make.offset(vector(base.layout.hidden, 8)), "embed"),
    ]
    table = next(t for t in targets_of(plan_of(base, both[::-1])) if t.role == "embed")
    assert table.update is not None and rank_of(table.update) == 2
    change = low_rank(table.update)
    assert change.constant is not None and bool(change.constant.any())


def test_only_edited_tensors_are_read_and_never_whole(
    tiny_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan = plan_of(base, [edit(base, "ablate", ablate(base.layout.hidden), "mlp_out.*")])
    seen: list[tuple[str, int]] = []
    original = Checkpoint.read_rows

    def read_rows(self: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        seen.append((name, stop - start))
        return original(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read_rows", read_rows)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read whole"))
    monkeypatch.setattr("bake.tiles.TILE_VALUES", 120)  # three rows of 40
    tiled = written("lora", plan, base.checkpoint, tmp_path / "tiled")
    assert {name for name, _ in seen} == {
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)
    }
    assert max(rows for _, rows in seen) == 3
    assert sum(rows for _, rows in seen) == 3 * 24  # every row once
    monkeypatch.undo()
    whole = written("lora", plan, base.checkpoint, tmp_path / "whole")
    tensors = factors_of(whole.path)
    for name, tensor in factors_of(tiled.path).items():
        assert torch.allclose(tensor, tensors[name], rtol=0, atol=1e-13)


REFUSED = {
    "a bias that exists": ("llama", {}, "ablate", ablate, "resid", "changes model.layers.0"),
    "a bias that is made": ("llama", NO_BIAS, "offset", offset, "resid_post.1", "creates model."),
    "a norm": ("llama", NO_BIAS, "scale", lambda n: make.scale(vector(n)), "ln1_out.1", "no norm"),
    "full rank": (
        "llama",
        NO_BIAS,
        "linear",
        lambda n: make.linear(matrix(n)),
        "attn_out.1",
        "has rank 24: factors would be as large as the weight",
    ),
    "GPT-2's biases": ("gpt2", {}, "ablate", ablate, "resid", "c_proj.bias"),
    "a post-norm": ("gemma2", {}, "ablate", ablate, "resid", "does not pass through a norm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    family, options, kind, build, at, words = REFUSED[case]
    base = base_at(tiny_checkpoint(family, **options))
    plan = plan_of(base, [edit(base, kind, build(base.layout.hidden), at)])
    with pytest.raises(InexactPlan, match=f"cannot {kind} 'c' at .* as lora: impossible") as error:
        written("lora", plan, base.checkpoint, tmp_path / "out")
    assert error.value.why is not None and words in error.value.why
    assert list(tmp_path.iterdir()) == []


def test_nulling_stays_nulling(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """The oblique projector before a post-norm is low-rank: the adapter is the checkpoint."""
    base = base_at(tiny_checkpoint("gemma2", attention_bias=False))
    edits = [edit(base, "ablate", ablate(base.layout.hidden), "resid")]
    plan = plan_of(base, edits, allow=["nulling"])
    with pytest.raises(InexactPlan, match="as lora: nulling"):
        written("lora", plan, base.checkpoint, tmp_path / "out")
    allow = frozenset({"nulling"})
    out = written("lora", plan, base.checkpoint, tmp_path / "out", allow=allow).path
    assert json.loads((out / "bake.json").read_text())["plan"]["exactness"] == Exactness.NULLING
    baked = logits(tiny.load(bake(base, plan, tmp_path / "baked", allow=allow)), base)
    assert float((peft_logits(base, out) - baked).abs().max()) <= RELATIVE
    naive = logits(base.model, base)
    assert float((naive - baked).abs().max()) > 1e-2


def test_a_plan_without_weights(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    nothing = make.ablate(vector(base.layout.hidden), strength=0.0)
    plan = plan_of(base, [edit(base, "ablate", nothing, "resid")])
    with pytest.raises(UsageError, match="the plan changes no weight"):
        written("lora", plan, base.checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_in_the_way(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan = plan_of(base, [edit(base, "ablate", ablate(base.layout.hidden), "resid")])
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists and is not empty"):
        written("lora", plan, base.checkpoint, out)
    with pytest.raises(UsageError, match="was not written by bake, so it is not replaced"):
        written("lora", plan, base.checkpoint, out, force=True)
    assert (out / "thesis.txt").read_text() == "years of work"
    mine = tmp_path / "mine"
    written("lora", plan, base.checkpoint, mine)
    written("lora", plan, base.checkpoint, mine, record={"allow": ["again"]}, force=True)
    assert json.loads((mine / "bake.json").read_text())["allow"] == ["again"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_what_was_there_comes_back_when_the_last_rename_fails(
    tiny_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    plan = plan_of(base, [edit(base, "ablate", ablate(base.layout.hidden), "resid")])
    out = written("lora", plan, base.checkpoint, tmp_path / "out", record={"allow": ["first"]}).path
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "files":
            raise OSError(28, "No space left on device", str(target))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(InputError, match="cannot write the output: No space left on device"):
        written("lora", plan, base.checkpoint, out, force=True)
    assert json.loads((out / "bake.json").read_text())["allow"] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_factor_that_is_not_finite_leaves_nothing(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = base_at(tiny_checkpoint("llama", dtype=torch.float32, **NO_BIAS))
    shutil.copytree(source.path, tmp_path / "base")
    (shard,) = (tmp_path / "base").glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, shard, metadata={"format": "pt"})
    plan = plan_of(source, [edit(source, "ablate", make.ablate(vector(24)), "mlp_out.1")])
    with pytest.raises(InputError, match="does not fit its dtype"):
        written("lora", plan, open_checkpoint(tmp_path / "base"), tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
