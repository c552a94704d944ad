"""Edits of quantised bases: in their format, dequantised, as adapters; planned and verified."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import data_of, error_of, run, write_recipe
from quantising import FORMATS, quantise
from safetensors.torch import load_file, save_file

from bake.artifact.record import read_record
from bake.checkpoints import open_checkpoint
from bake.checkpoints.planned import PlannedModel, PlannedTensor
from bake.checkpoints.quantised.rounding import Recoded
from bake.checkpoints.quantised.view import decoded, left_alone
from bake.errors import UsageError
from bake.jobs.planned import planned_of
from bake.jobs.recorded import Source
from bake.outputs.coded import coded_edits
from bake.seal.weights import check_finite, check_unchanged, check_weights
from bake.verify.inputs import opened
from bake.verify.models import load
from bake.verify.runtimes.registry import Runtimes
from bake.verify.stored.check import FilesChecked, check_files
from bake.verify.verification import Verification

Checkpoints = Callable[..., Path]
FOUR_BITS = ("W4A16", "NVFP4", "GPTQ of 4 bits")


@pytest.fixture
def base(tiny_checkpoint: Checkpoints, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a quantised base, whose widths are whole blocks."""

    def made(name: str, **options: object) -> Path:
        plain = tiny_checkpoint(
            "llama",
            dtype=torch.bfloat16,
            hidden_size=32,
            intermediate_size=48,
            attention_bias=False,
            mlp_bias=False,
        )
        return quantise(plain, tmp_path / "base", name, **options)  # type: ignore[arg-type]

    return made


def recipe_of(folder: Path, base: Path, more: str = "") -> Path:
    recipe = write_recipe(folder, base, more=more)
    import numpy as np

    np.save(folder / "mood.npy", np.random.default_rng(0).standard_normal(32))
    return recipe


def export(folder: Path, base: Path, *more: object, to: str = "out") -> Path:
    out = folder / to
    found = run("export", recipe_of(folder, base), "--out", out, *more)
    assert found.exit_code == 0, found.stderr
    return out


def checked(base: Path, out: Path, runtimes: Runtimes | None = None) -> FilesChecked:
    asked = Verification(out, base=str(base), runtimes=runtimes)
    planned = planned_of(Source(out, str(out), published=False), asked)
    with opened(asked, planned) as inputs:
        return check_files(inputs.files, planned.model.digest)


def held(found: FilesChecked) -> bool:
    return not found.strays and all(one.held for one in found.deviations)


def rewrite(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {k: t.clone() for k, t in load_file(out / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, out / "model.safetensors")


def codes_of(base: Path, part: str) -> str:
    """Return the name of the codes of the first weight whose name holds a part."""
    coded = decoded(open_checkpoint(base)).coded
    return next(one.codes.name for name, one in sorted(coded.items()) if part in name)


@pytest.mark.parametrize("name", FORMATS)
def test_an_edit_is_written_back_in_the_format(
    name: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    """Every tensor keeps its type and shape; a code of an edited weight, or of another, fails."""
    path = base(name)
    out = export(tmp_path, path, "--allow", "approximate")
    before, after = (load_file(one / "model.safetensors") for one in (path, out))
    assert {k: (t.dtype, t.shape) for k, t in after.items()} == {
        k: (t.dtype, t.shape) for k, t in before.items()
    }
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == FORMATS[name]()[0]
    found = checked(path, out)
    assert held(found) and len(found.deviations) == 7
    assert all(one.deviation.score > 1 for one in found.controls) and found.controls
    # What is edited moves along the direction and stays where the edit does not reach.
    edited, other = codes_of(path, "o_proj"), codes_of(path, "q_proj")
    assert not torch.equal(before[edited].view(torch.uint8), after[edited].view(torch.uint8))
    assert torch.equal(before[other].view(torch.uint8), after[other].view(torch.uint8))
    for wrong in (edited, other):
        spoiled = tmp_path / f"spoiled-{wrong}"
        shutil.copytree(out, spoiled)

        def flip(tensors: dict[str, torch.Tensor], wrong: str = wrong) -> None:
            codes = tensors[wrong].view(torch.uint8)
            codes[0, :2] ^= 0x77

        rewrite(spoiled, flip)
        assert not held(checked(path, spoiled))


def test_no_runtime_is_said_to_serve_a_quantised_base_exactly(
    base: Callable[..., Path], tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Nobody ran a family in a format; of a base in floating point the table's runs hold."""

    def verdicts(path: Path) -> dict[str, str]:
        found = data_of("plan", recipe_of(tmp_path, path))
        return {one["runtime"]: one["status"] for one in found["plan"]["runtimes"]}

    plain = tiny_checkpoint("llama", dtype=torch.bfloat16, hidden_size=32)
    codes, floats = verdicts(base("W4A16")), verdicts(plain)
    assert "exact" not in codes.values() and "not tested" in codes.values()
    assert "exact" in floats.values()


@pytest.mark.parametrize("name", FORMATS)
def test_a_dequantised_checkpoint_is_one_of_no_format(
    name: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    path = base(name, alone=("model.layers.1.mlp.up_proj.weight",))
    out = export(tmp_path, path, "--dequantize")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    made = open_checkpoint(out)
    view = decoded(open_checkpoint(path))
    assert decoded(made) is made and made.tensors.keys() == view.tensors.keys()
    assert {info.dtype for info in made.tensors.values()} == {"BF16"}
    untouched = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(made.read(untouched), view.read(untouched).to(torch.bfloat16))
    assert held(checked(path, out))
    model = load(made, torch.float32, hooked=False).model  # as any user loads it
    assert model.config.num_hidden_layers == 3

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[untouched][0, 0] += 1

    rewrite(out, nudge)
    assert not held(checked(path, out))


def test_the_plan_says_which_and_what_it_costs(base: Callable[..., Path], tmp_path: Path) -> None:
    """Four bits lose more than eight, and bfloat16 next to nothing."""
    lost = {}
    for name in ("block FP8", "W4A16"):
        path = base(name)
        data = data_of("plan", recipe_of(tmp_path, path))["quantised"]
        assert (data["edited"], data["weights"]) == (6, 21)
        back, floats = data["ways"]
        assert back["taken"] and not floats["taken"] and name in back["as"]
        assert floats["bytes"] > back["bytes"] and floats["lost"] < 1e-3 < back["lost"]
        lost[name] = back["lost"]
        shutil.rmtree(path)
    assert lost["W4A16"] > 5 * lost["block FP8"]


def test_rounding_that_undoes_an_edit_is_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    path = base("W4A16")
    recipe, out = recipe_of(tmp_path, path), tmp_path / "out"
    found = run("export", recipe, "--rounding", "nearest", "--out", out)
    assert found.exit_code == 3 and "rounding to W4A16 leaves" in found.stderr
    assert not out.exists()


def test_a_recipe_says_it_as_well_and_the_record_makes_it_again(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    path, again = base("block FP8"), tmp_path / "again"
    recipe = recipe_of(tmp_path, path, "[export]\ndequantize = true\n")
    out = tmp_path / "out"
    assert run("export", recipe, "--out", out).exit_code == 0
    assert json.loads((out / "bake.json").read_text())["export"] == {"dequantize": True}
    assert run("export", out, "--out", again).exit_code == 0
    coded = export(tmp_path, path, to="coded")
    record = json.loads((coded / "bake.json").read_text())
    assert "export" not in record and len(record["codes"]) == 6
    assert {one["type"] for one in record["codes"]} == {"block FP8"}
    assert run("export", coded, "--out", tmp_path / "coded-again").exit_code == 0


def test_an_adapter_needs_decoding_alone(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its factors added to the decoded weights are the planned ones, whatever the codes."""
    path = base("W4A16")
    out = export(tmp_path, path, "--to", "lora")
    monkeypatch.setattr(Runtimes, "find", lambda self, kind, **options: None)
    served = Runtimes(("peft",))
    assert held(checked(path, out, runtimes=served))
    (file,) = out.glob("*.safetensors")
    factors = {k: t.clone() for k, t in load_file(file).items()}
    next(iter(factors.values())).mul_(1.01)
    save_file(factors, file)
    assert not held(checked(path, out, runtimes=served))


def test_a_head_that_is_untied_is_left_alone_by_name(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """It is added in floating point, and to the list of what the loader looks for no codes of."""
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    plain = tiny_checkpoint("llama", dtype=torch.bfloat16, tied=True, **sizes)
    path = quantise(plain, tmp_path / "base", "block FP8")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["model.embed_tokens"]
    (path / "config.json").write_text(json.dumps(config))
    out = export(tmp_path, path, "--allow", "approximate")
    made = json.loads((out / "config.json").read_text())
    listed = made["quantization_config"]["modules_to_not_convert"]
    assert listed == ["model.embed_tokens", "lm_head"] and made["tie_word_embeddings"] is False
    assert open_checkpoint(out).tensors["lm_head.weight"].dtype == "BF16"
    assert held(checked(path, out))
    named = {"quantization_config": {"ignore": ["lm_head"]}}
    assert left_alone(named, ["lm_head.weight"]) == {}
    assert left_alone({}, ["lm_head.weight"]) == {}
    other = {"quantization_config": {"exclude_modules": []}}  # Model Optimizer's word
    assert left_alone(other, ["lm_head.weight"]) == {
        "quantization_config": {"exclude_modules": ["lm_head"]}
    }


def test_another_shape_is_not_written_as_codes(base: Callable[..., Path]) -> None:
    view = decoded(open_checkpoint(base("block FP8")))
    name = "model.layers.0.self_attn.o_proj.weight"
    wide = PlannedTensor(name, "BF16", (40, 32), lambda: iter(()))
    planned = PlannedModel("", {name: wide}, "{}")
    with pytest.raises(UsageError, match="gets another shape") as error:
        coded_edits(planned, view, lambda name: None, "nearest")
    assert "--dequantize" in str(error.value.fix)
    same = replace(wide, shape=view.coded[name].shape)
    planned = PlannedModel("", {name: same}, "{}")
    assert coded_edits(planned, view, lambda name: None, "nearest").keys() == {name}


def test_what_an_earlier_run_wrote_is_measured_as_a_worker_measures(
    base: Callable[..., Path],
) -> None:
    """With one thread, whatever the caller's: sums of another order are another record."""
    view = decoded(open_checkpoint(base("block FP8")))
    name = next(name for name in view.coded if "o_proj" in name)
    seen: list[int] = []

    def tiles() -> Iterator[torch.Tensor]:
        seen.append(torch.get_num_threads())
        yield view.read(name).to(torch.float64)

    planned = PlannedModel("0", {name: PlannedTensor(name, "BF16", (32, 32), tiles)}, "{}")
    edit = coded_edits(planned, view, lambda name: None, "nearest")[name]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert edit.measured().rounding == {"nearest"}
        assert set(seen) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_dequantising_what_is_not_quantised_is_refused(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_checkpoint("llama", dtype=torch.bfloat16))
    for command in (["plan", recipe], ["export", recipe, "--out", tmp_path / "out"]):
        found = data_of(*command, "--dequantize", code=2)
        assert "is not quantised, so that nothing is to be dequantised" in error_of(found)
    assert not (tmp_path / "out").exists()


def test_a_revert_and_a_diff_are_refused_by_name(base: Callable[..., Path], tmp_path: Path) -> None:
    path = base("block FP8")
    out = export(tmp_path, path)
    back = tmp_path / "back"
    found = data_of("revert", out, "--out", back, code=4)
    assert "an edit of a quantised base is not reverted" in error_of(found)
    assert not back.exists()
    found = data_of("diff", path, out, code=2)
    assert "this base stores codes and scales" in error_of(found)


def test_an_integrity_check_reads_values(base: Callable[..., Path], tmp_path: Path) -> None:
    """Of both ways; a code that is no number, and a weight that no plan changes, are found."""
    path = base("block FP8")
    for name, more in (("coded", ()), ("plain", ("--dequantize",))):
        out = export(tmp_path, path, *more, to=name)
        record = read_record(out)
        assert check_finite(out, record) == check_unchanged(out, record, path) == []
        assert check_weights(out, record) == []
    coded, edited, other = tmp_path / "coded", codes_of(path, "o_proj"), codes_of(path, "q_proj")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[edited].view(torch.uint8)[0, 0] = 0x7F
        tensors[other].view(torch.uint8)[0, 0] ^= 1

    record = read_record(coded)
    rewrite(coded, spoil)
    assert [one.what for one in check_finite(coded, record)] == [
        f"{edited} holds NaN or an infinity"
    ]
    (found,) = check_unchanged(coded, record, path)
    assert found.what == f"{other} differs from the base, and the plan leaves it alone"


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--dequantize",)])
def test_a_verification_judges_it(
    base: Callable[..., Path], tmp_path: Path, more: tuple[str, ...]
) -> None:
    out = export(tmp_path, base("block FP8"), *more)
    report = data_of("verify", out, "--report", tmp_path / "report")
    rows = {row["name"]: row for row in report["rows"]}
    lost = next(row for name, row in rows.items() if name.startswith("lost in storage"))
    assert lost["passed"] and (lost["value"] > 1e-3) is not bool(more)


@pytest.mark.parametrize("name", ["W4A16", "FP8 by channel", "bitsandbytes NF4"])
def test_scales_that_are_larger_than_they_need_be_are_no_larger_tolerance(
    name: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    """Under them each value is one of its two neighbours, which lie as far apart as one likes."""
    path = base(name)
    out = export(tmp_path, path, "--allow", "approximate")
    assert held(checked(path, out))
    view = decoded(open_checkpoint(out))
    weight = next(one for key, one in sorted(view.coded.items()) if "o_proj" in key)
    (scales,) = weight.scales.names
    exact = weight.values(0, weight.matrix[0])
    coarse = out.parent / "coarse"
    shutil.copytree(out, coarse)
    rewrite(coarse, lambda tensors: tensors.update({scales: tensors[scales] * 64}))
    other = decoded(open_checkpoint(coarse)).coded[weight.name]
    codes = torch.cat(list(other.codes.stored(Recoded(other, lambda: iter([exact])).codes())))
    rewrite(coarse, lambda tensors: tensors.update({weight.codes.name: codes}))
    assert not held(checked(path, coarse))


@pytest.mark.parametrize("more", [(), ("--dequantize",)])
def test_codes_and_scales_may_lie_in_different_shards(
    more: tuple[str, ...], base: Callable[..., Path], tmp_path: Path
) -> None:
    """Dequantised, a shard of nothing but scales is left out, and the index knows of none."""
    path = base("W4A16")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    apart = {key: 2 if key.endswith(("_scale", "_shape")) else 1 for key in tensors}
    shards = {key: f"model-0000{number}-of-00002.safetensors" for key, number in apart.items()}
    for shard in set(shards.values()):
        save_file({k: t for k, t in tensors.items() if shards[k] == shard}, path / shard)
    index = {"metadata": {}, "weight_map": shards}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    out = export(tmp_path, path, "--allow", "approximate", *more)
    assert held(checked(path, out))
    assert len(list(out.glob("*.safetensors"))) == (1 if more else 2)
    found = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert found.keys() == decoded(open_checkpoint(out)).as_stored.tensors.keys()
    wrong = codes_of(path, "q_proj") if not more else "model.layers.0.self_attn.q_proj.weight"
    shard = out / found[wrong]
    spoiled = {k: t.clone() for k, t in load_file(shard).items()}
    spoiled[wrong].view(torch.uint8)[0, :2] ^= 0x77
    save_file(spoiled, shard)
    assert not held(checked(path, out))


@pytest.mark.parametrize("more", [(), ("--dequantize",)])
def test_transformers_loads_what_block_fp8_becomes(
    more: tuple[str, ...], base: Callable[..., Path], tmp_path: Path
) -> None:
    """Its own decoding of the edited weights is bake's; that of the base's is not."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    path = base("block FP8")
    out = export(tmp_path, path, "--allow", "approximate", *more)
    asked = {} if more else {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **asked)
    ours, before = (decoded(open_checkpoint(one)) for one in (out, path))
    name = "model.layers.0.self_attn.o_proj.weight"
    have = model.get_parameter(name).detach().double()
    assert torch.allclose(have, ours.read(name).double(), rtol=2.0**-8, atol=1e-9)
    assert not torch.allclose(have, before.read(name), rtol=2.0**-8, atol=1e-9)
