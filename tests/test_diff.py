"""What differs between two models: against changes that are made here, entry by entry."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from bake.checkpoints import open_checkpoint
from bake.checkpoints.source import Counted
from bake.diff import Diff, diff
from bake.diff.bytesource import Spool
from bake.diff.precision import half_step
from bake.diff.subspace import cosine
from bake.diff.weights import CheckpointWeights
from bake.errors import CheckpointError, UsageError

CONFIG = {"architectures": ["NobodyKnowsIt"], "model_type": "x"}


def write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint in one file."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    kept = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


def pair(tmp_path: Path, before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[str, str]:
    return str(write(tmp_path / "base", before)), str(write(tmp_path / "out", after))


def one(found: Diff) -> Any:
    (change,) = found.changes
    return change


# --- the grid of storage types ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)],
)
def test_half_a_step_is_where_rounding_turns(name: str, dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, -1.5, 3.0, 0.02, -1e-3, 60000.0, 0.0]]).to(dtype).double()
    half = half_step(values, name)
    away = values.sign() + (values == 0)
    # A little less than half a step rounds back, a little more does not.
    assert torch.equal((values + away * half * 0.99).to(dtype).double(), values)
    assert bool(((values + away * half * 1.01).to(dtype).double() != values).all())


# --- counts and norms ---------------------------------------------------------------------------


def test_a_change_by_hand(tmp_path: Path) -> None:
    weight = torch.randn(40, 30)
    delta = torch.zeros(40, 30)
    delta[3, 5], delta[3, 7], delta[20, 5] = 0.5, -2.0, 0.25
    before = {"a.w": weight, "a.same": weight.clone()}
    base, out = pair(tmp_path, before, {"a.w": weight + delta, "a.same": weight})
    found = diff(out, base)
    change = one(found)
    done = (weight + delta).double() - weight.double()
    assert (change.elements, change.rows, change.columns) == (3, 2, 2)
    assert change.norm == pytest.approx(float(done.norm()), rel=1e-14)
    assert change.relative == pytest.approx(float(done.norm() / weight.double().norm()), rel=1e-14)
    assert change.largest == float(done.abs().max())
    assert change.spectrum.rank == 2
    values = torch.linalg.svdvals(done)[:2]
    assert torch.allclose(change.spectrum.values[:2], values, rtol=1e-12)
    assert found.by_bytes == ("a.same",)
    assert found.violations is None and found.failure() is None
    assert not found.identical


def test_a_model_is_identical_to_itself(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(8, 8), "scalar": torch.tensor(1.0), "none": torch.empty(0, 4)}
    base, out = pair(tmp_path, tensors, tensors)
    found = diff(out, base)
    assert found.identical and found.by_bytes == ("none", "scalar", "w")
    assert found.read == {"base": 4 * 65, "out": 4 * 65}


def test_signs_of_zero_and_nan_are_compared_by_bytes(tmp_path: Path) -> None:
    weight = torch.ones(4, 4)
    weight[0, 0], weight[1, 1] = 0.0, math.nan
    other = weight.clone()
    other[0, 0] = -0.0
    base, out = pair(tmp_path, {"w": weight}, {"w": other})
    change = one(diff(out, base))
    assert change.elements == 1
    assert change.norm is None and change.spectrum is None
    assert "NaN or an infinity" in change.note
    json.dumps(diff(out, base).to_json(), allow_nan=False)


def test_scalars_vectors_and_stacks(tmp_path: Path) -> None:
    stack = torch.randn(3, 12, 10)
    changed = stack.clone()
    changed[1] += torch.outer(torch.randn(12), torch.randn(10))
    before = {"s": torch.tensor(1.0), "v": torch.ones(6), "e": stack}
    after = {"s": torch.tensor(2.0), "v": torch.arange(6.0) + 1, "e": changed}
    base, out = pair(tmp_path, before, after)
    found = {change.name: change for change in diff(out, base).changes}
    assert set(found) == {"s", "v", "e[1]"}  # two matrices of the stack are as they were
    assert found["s"].elements == 1
    assert (found["v"].elements, found["v"].largest) == (5, 5.0)
    assert found["e[1]"].spectrum is not None and found["e[1]"].spectrum.rank == 1
    assert found["e[1]"].matrix == (12, 10) and found["e[1]"].shape == (3, 12, 10)


def test_kernels_of_a_convolution_are_one_matrix(tmp_path: Path) -> None:
    image, causal = torch.randn(10, 3, 4, 4), torch.randn(50, 1, 4)
    after = {"image": image + 1, "causal": causal * 2}
    base, out = pair(tmp_path, {"image": image, "causal": causal}, after)
    found = {change.name: change for change in diff(out, base).changes}
    assert found["image"].matrix == (10, 48) and found["causal"].matrix == (50, 4)
    assert found["image"].spectrum is not None and found["image"].spectrum.rank == 1


def test_whole_numbers_are_counted_by_byte(tmp_path: Path) -> None:
    codes = torch.arange(64, dtype=torch.int32).reshape(8, 8)
    other = codes.clone()
    other[2, 2] = 1 << 20
    base, out = pair(tmp_path, {"q": codes}, {"q": other})
    change = one(diff(out, base))
    assert change.norm is None and "codes" in change.note
    assert change.elements == 2  # 18 lost its lowest byte, 1 << 20 has its third
    assert diff(out, base).to_json()["tensors"]["changed"][0]["rank"] is None


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    weight = torch.randn(8, 6)
    before = {"w": weight, "wide": weight, "gone": weight, "codes": weight}
    after = {
        "w": weight,
        "wide": weight[:, :5],
        "new": weight,
        "codes": torch.zeros(8, 6, dtype=torch.uint8),
    }
    base, out = pair(tmp_path, before, after)
    found = diff(out, base)
    assert found.created == ("new",) and found.missing == ("gone",)
    told = {row.name: (row.old, row.new) for row in found.reshaped}
    assert told["wide"] == (("F32", (8, 6)), ("F32", (8, 5)))
    assert told["codes"] == (("F32", (8, 6)), ("U8", (8, 6)))
    assert found.by_bytes == ("w",)


def test_another_storage_type_is_compared_by_value(tmp_path: Path) -> None:
    weight = torch.randn(32, 24)
    grid = weight.bfloat16()
    before = {"exact": grid, "rounded": weight, "edited": grid}
    step = torch.outer(torch.randn(32), torch.randn(24))
    after = {"exact": grid.float(), "rounded": grid, "edited": grid.float() + step}
    base, out = pair(tmp_path, before, after)
    found = diff(out, base)
    assert set(found.retyped) == {"exact", "rounded", "edited"}
    changes = {change.name: change for change in found.changes}
    assert set(changes) == {"rounded", "edited"}  # widening loses nothing
    assert changes["rounded"].dtypes == ("F32", "BF16")
    assert changes["rounded"].spectrum is not None and changes["rounded"].spectrum.rank == 0
    assert changes["edited"].spectrum is not None and changes["edited"].spectrum.rank == 1


def test_another_sharding_changes_nothing(tmp_path: Path) -> None:
    model = tiny.make_model("llama", dtype=torch.float32)
    tiny.write_checkpoint(model, tmp_path / "one")
    tiny.write_checkpoint(model, tmp_path / "many", max_shard_size="20KB")
    assert len(open_checkpoint(tmp_path / "many").shards) > 2
    found = diff(str(tmp_path / "many"), str(tmp_path / "one"))
    assert found.identical and len(found.by_bytes) == found.tensors


def test_an_untied_head_is_held_against_the_embedding(tmp_path: Path) -> None:
    tiny.write_checkpoint(tiny.make_model("llama", tied=True), tmp_path / "tied")
    tensors = tiny.tensors_of(tmp_path / "tied")
    config = {**tiny.config_of(tmp_path / "tied"), "tie_word_embeddings": False}
    head = tensors["model.embed_tokens.weight"].clone()
    same = write(tmp_path / "same", {**tensors, "lm_head.weight": head}, config)
    found = diff(str(same), str(tmp_path / "tied"))
    assert found.created == ("lm_head.weight",) and not found.changes
    assert "lm_head.weight" in found.by_bytes
    assert [key.key for key in found.config] == ["tie_word_embeddings"]
    head[4] += 1
    other = write(tmp_path / "other", {**tensors, "lm_head.weight": head}, config)
    change = one(diff(str(other), str(tmp_path / "tied")))
    assert (change.name, change.base_name) == ("lm_head.weight", "model.embed_tokens.weight")
    assert (change.rows, change.spectrum.rank) == (1, 1)


def test_names_with_a_prefix_are_found(tmp_path: Path) -> None:
    tiny.write_checkpoint(tiny.make_model("gpt2", tied=True), tmp_path / "base")
    tensors = tiny.tensors_of(tmp_path / "base")
    assert all(name.startswith("transformer.") for name in tensors)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    out = write(tmp_path / "out", bare, tiny.config_of(tmp_path / "base"))
    found = diff(str(out), str(tmp_path / "base"))
    assert not found.changes and not found.missing and not found.created
    assert found.renamed["wte.weight"] == "transformer.wte.weight"
    assert not found.identical


# --- the rank under rounding --------------------------------------------------------------------


def rounded(
    rank: int,
    *,
    scale: float,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = (384, 640),
    noise: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, the weight with an ablation of some directions, and the directions."""
    weight = (0.02 * torch.randn(shape)).to(dtype)
    basis = torch.linalg.qr(torch.randn(shape[0], rank).double())[0]
    wide = weight.double()
    meant = wide - scale * basis @ (basis.T @ wide)
    meant += noise * torch.randn(shape, dtype=torch.float64)
    return weight, meant.to(dtype), basis


@pytest.mark.parametrize("scale", [3.0, 1.0, 0.3, 0.1])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_rank_is_found_under_rounding(tmp_path: Path, rank: int, scale: float) -> None:
    """Down to changes that are smaller than the grid's steps, with no direction invented."""
    before, after, _ = rounded(rank, scale=scale)
    base, out = pair(tmp_path, {"w": before}, {"w": after})
    spectrum = one(diff(out, base)).spectrum
    assert spectrum.rank == rank
    # Effect: rounding has made the change one of full rank.
    delta = after.double() - before.double()
    assert int(torch.linalg.matrix_rank(delta)) > 300


def test_counting_singular_values_above_the_noise_would_invent_directions(tmp_path: Path) -> None:
    """Control: rounding is a function of a small change, and no independent noise."""
    before, after, _ = rounded(1, scale=0.3, shape=(512, 2048))
    base, out = pair(tmp_path, {"w": before}, {"w": after})
    spectrum = one(diff(out, base)).spectrum
    assert int((spectrum.values > spectrum.threshold).sum()) > 1
    assert spectrum.rank == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_rank_is_found_in_every_float_type(tmp_path: Path, dtype: torch.dtype) -> None:
    before, after, _ = rounded(3, scale=1.0, dtype=dtype, shape=(96, 160))
    base, out = pair(tmp_path, {"w": before}, {"w": after})
    assert one(diff(out, base)).spectrum.rank == 3


def test_arithmetic_in_bfloat16_adds_no_direction(tmp_path: Path) -> None:
    """What abliteration tools do: the product and the difference are both rounded."""
    before = (0.02 * torch.randn(384, 640)).bfloat16()
    vector = torch.nn.functional.normalize(torch.randn(384), dim=0).bfloat16()
    after = before - torch.outer(vector, vector @ before)
    base, out = pair(tmp_path, {"w": before}, {"w": after})
    assert one(diff(out, base)).spectrum.rank == 1


def test_a_change_of_full_rank_is_not_called_low(tmp_path: Path) -> None:
    before, after, _ = rounded(1, scale=1.0, noise=1e-3)
    base, out = pair(tmp_path, {"w": before}, {"w": after})
    found = one(diff(out, base))
    assert found.spectrum.rank is None and found.spectrum.most == 16
    assert found.explained < 0.99


@pytest.mark.parametrize(("noise", "rank"), [(1e-5, 1), (1e-4, None), (3e-4, None)])
def test_a_faint_change_of_full_rank_beside_a_direction_is_seen(
    tmp_path: Path, noise: float, rank: int | None
) -> None:
    """A step of the grid is about 1e-4 here: a tenth of it is lost, one is not."""
    before, after, _ = rounded(1, scale=1.0, noise=noise)
    base, out = pair(tmp_path, {"w": before}, {"w": after})
    assert one(diff(out, base)).spectrum.rank == rank


def test_rounding_alone_has_no_rank(tmp_path: Path) -> None:
    """Every value moved to its neighbour on the grid or not at all: nothing was meant."""
    before = (0.02 * torch.randn(256, 256)).bfloat16()
    bits = before.view(torch.int16) + torch.randint(0, 2, before.shape, dtype=torch.int16)
    base, out = pair(tmp_path, {"w": before}, {"w": bits.view(torch.bfloat16)})
    change = one(diff(out, base))
    assert change.elements > 30_000 and change.spectrum.rank == 0


@pytest.mark.parametrize(("rank", "most", "told"), [(4, 4, 4), (5, 4, None), (16, 16, 16)])
def test_the_largest_rank_that_is_told(
    tmp_path: Path, rank: int, most: int, told: int | None
) -> None:
    before, after, _ = rounded(rank, scale=1.0)
    base, out = pair(tmp_path, {"w": before}, {"w": after})
    assert one(diff(out, base, most_rank=most)).spectrum.rank == told


def test_a_constant_on_every_row_has_rank_one(tmp_path: Path) -> None:
    before = (0.02 * torch.randn(2000, 64)).bfloat16()
    after = (before.double() + 0.003 * torch.randn(64).double()).bfloat16()
    base, out = pair(tmp_path, {"w": before}, {"w": after})
    assert one(diff(out, base)).spectrum.rank == 1


def test_tiles_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, _ = rounded(2, scale=1.0, shape=(100, 70))
    base, out = pair(tmp_path, {"w": before}, {"w": after})
    whole = one(diff(out, base))
    monkeypatch.setattr("bake.diff.tiles.TILE", 7 * 70)
    tiled = one(diff(out, base))
    assert tiled.elements == whole.elements and tiled.spectrum.rank == 2
    assert tiled.norm == pytest.approx(whole.norm, rel=1e-14)
    assert torch.allclose(tiled.spectrum.values, whole.spectrum.values, rtol=1e-5)


def test_the_same_pair_gives_the_same_report(tmp_path: Path) -> None:
    before, after, _ = rounded(2, scale=1.0)
    base, out = pair(tmp_path, {"w": before}, {"w": after})
    assert diff(out, base).to_json() == diff(out, base).to_json()


def test_without_ranks(tmp_path: Path) -> None:
    before, after, _ = rounded(2, scale=1.0)
    base, out = pair(tmp_path, {"w": before}, {"w": after})
    found = diff(out, base, ranks=False)
    assert one(found).spectrum is None and found.subspaces == ()
    assert one(found).relative > 0


# --- what changes share -------------------------------------------------------------------------


def test_cosines_between_subspaces() -> None:
    space = torch.eye(6, dtype=torch.float64)[:2]
    assert cosine(space, torch.tensor([[3.0, 4, 0, 0, 0, 0]])) == pytest.approx(1)
    assert cosine(space, torch.tensor([[3.0, 0, 4, 0, 0, 0]])) == pytest.approx(0.6)
    both = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    assert cosine(space, both) == pytest.approx(0)
    twice = torch.tensor([[1.0, 0, 0, 0, 0, 0], [2.0, 0, 0, 0, 0, 0]])
    assert cosine(space, twice) == pytest.approx(1)


def writers(names: dict[str, Tensor]) -> list[str]:
    return [name for name in names if name.endswith(("o_proj.weight", "down_proj.weight"))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama wide enough for a shared direction to be no coincidence."""
    path = tmp_path_factory.mktemp("diff") / "base"
    sizes = {"hidden_size": 160, "intermediate_size": 224, "vocab_size": 300}
    model = tiny.make_model("llama", dtype=torch.bfloat16, mlp_bias=False, **sizes)
    tiny.write_checkpoint(model, path)
    return path


def abliterated(base: Path, out: Path, vector: Tensor, **options: Any) -> Path:
    """Orthogonalise every writer in plain torch, and save the model in other shards."""
    from safetensors import safe_open

    unit = torch.nn.functional.normalize(vector.float(), dim=0)
    tensors = tiny.tensors_of(base)
    for name in writers(tensors):
        wide = tensors[name].float()
        tensors[name] = (wide - torch.outer(unit, unit @ wide)).bfloat16()
    names = sorted(tensors)
    out.mkdir()
    shutil.copy(base / "config.json", out)
    index = {}
    for part in range(3):
        file = f"model-{part}.safetensors"
        own = {name: tensors[name].contiguous() for name in names[part::3]}
        save_file(own, out / file, metadata={"format": "pt"})
        with safe_open(out / file, framework="pt") as opened:
            index |= dict.fromkeys(opened.keys(), file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (out / "model.safetensors.index.json").write_text(text)
    return out


def test_a_foreign_abliteration_is_recognised(llama: Path, tmp_path: Path) -> None:
    vector = torch.randn(160)
    out = abliterated(llama, tmp_path / "out", vector)
    found = diff(str(out), str(llama), given={"mine": vector[None], "no": torch.randn(1, 160)})
    assert found.violations is None and found.plan is None
    tensors = writers(tiny.tensors_of(llama))
    assert {change.tensor for change in found.changes} == set(tensors)
    assert all(c.spectrum is not None and c.spectrum.rank == 1 for c in found.changes)
    assert set(found.sides.values()) == {"written"}
    (space,) = found.subspaces
    assert space.shared and (space.side, space.dimension) == ("written", 1)
    assert space.share > 0.99 and space.lowest[1] > 0.99 and space.angle < 5
    cosines = dict(space.cosines)
    assert cosines["mine"] > 0.999 and cosines["no"] < 0.5
    # What the writers still write of it: nothing but rounding. The embedding was left alone.
    assert len(space.leaks) == len(tensors)
    assert all(leak.ratio is not None and leak.ratio < 0.02 for leak in space.leaks)
    assert found.untouched_writers == ("model.embed_tokens.weight",)


def test_half_an_abliteration_leaves_half(llama: Path, tmp_path: Path) -> None:
    vector = torch.nn.functional.normalize(torch.randn(160), dim=0)
    tensors = tiny.tensors_of(llama)
    for name in writers(tensors):
        wide = tensors[name].float()
        tensors[name] = (wide - 0.5 * torch.outer(vector, vector @ wide)).bfloat16()
    out = write(tmp_path / "out", tensors, tiny.config_of(llama))
    (space,) = diff(str(out), str(llama)).subspaces
    assert space.shared
    assert all(leak.ratio == pytest.approx(0.5, abs=0.03) for leak in space.leaks)


def test_a_finetune_shares_nothing(llama: Path, tmp_path: Path) -> None:
    tensors = tiny.tensors_of(llama)
    for name in writers(tensors):
        noise = 0.05 * tensors[name].float().std() * torch.randn(tensors[name].shape)
        tensors[name] = (tensors[name].float() + noise).bfloat16()
    out = write(tmp_path / "out", tensors, tiny.config_of(llama))
    found = diff(str(out), str(llama))
    assert all(c.spectrum is not None and c.spectrum.rank is None for c in found.changes)
    (space,) = found.subspaces
    assert not space.shared and space.leaks == ()


def test_directions_of_their_own_are_not_shared(llama: Path, tmp_path: Path) -> None:
    """Control: rank 1 everywhere, and another direction in every tensor, as in a LoRA."""
    tensors = tiny.tensors_of(llama)
    for name in writers(tensors):
        left, right = torch.randn(tensors[name].shape[0]), torch.randn(tensors[name].shape[1])
        tensors[name] = (tensors[name].float() + 0.02 * torch.outer(left, right)).bfloat16()
    out = write(tmp_path / "out", tensors, tiny.config_of(llama))
    found = diff(str(out), str(llama))
    assert all(c.spectrum is not None and c.spectrum.rank == 1 for c in found.changes)
    assert not any(space.shared for space in found.subspaces)


def test_an_edit_of_readers_is_on_the_other_side(llama: Path, tmp_path: Path) -> None:
    vector = torch.nn.functional.normalize(torch.randn(160), dim=0)
    tensors = tiny.tensors_of(llama)
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight")):
            wide = tensors[name].float()
            tensors[name] = (wide - torch.outer(wide @ vector, vector)).bfloat16()
    out = write(tmp_path / "out", tensors, tiny.config_of(llama))
    found = diff(str(out), str(llama), given={"mine": vector[None]})
    (space,) = found.subspaces
    assert (space.side, space.shared, space.dimension) == ("read", True, 1)
    assert dict(space.cosines)["mine"] > 0.999
    assert space.leaks == () and found.untouched_writers != ()


def test_without_a_table_the_axes_are_compared(llama: Path, tmp_path: Path) -> None:
    vector = torch.randn(160)
    abliterated(llama, tmp_path / "out", vector)
    for folder in (tmp_path / "base", tmp_path / "out"):
        if not folder.exists():
            shutil.copytree(llama, folder)
        config = json.loads((folder / "config.json").read_text())
        text = json.dumps({**config, "architectures": ["NobodyKnowsIt"]})
        (folder / "config.json").write_text(text)
    found = diff(str(tmp_path / "out"), str(tmp_path / "base"), given={"mine": vector[None]})
    assert found.family is None and "NobodyKnowsIt" in (found.no_family or "")
    best = found.subspaces[0]
    assert (best.side, best.shared, best.dimension) == ("axis 0", True, 1)
    assert dict(best.cosines)["mine"] > 0.999
    assert not any(space.shared for space in found.subspaces if space.side == "axis 1")


def test_a_direction_of_another_width_is_refused(llama: Path, tmp_path: Path) -> None:
    out = abliterated(llama, tmp_path / "out", torch.randn(160))
    with pytest.raises(UsageError, match="width 9, and the changes have"):
        diff(str(out), str(llama), given={"short": torch.randn(1, 9)})


# --- what is kept on the way --------------------------------------------------------------------


def test_a_spool_fetches_every_byte_once(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(50, 20), "b": torch.randn(30, 20)}
    checkpoint = open_checkpoint(write(tmp_path / "base", tensors))
    counted = Counted(checkpoint.files)
    (tmp_path / "scratch").mkdir()
    spool = Spool(counted, tmp_path / "scratch")
    info = checkpoint.tensors["a"]
    spool.keep(info)

    def read(start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        spool.read_into(info.shard, info.start + start, memoryview(buffer))
        return bytes(buffer)

    whole = tensors["a"].numpy().tobytes()
    generator = np.random.default_rng(0)
    for low, high in np.sort(generator.integers(0, info.nbytes + 1, (200, 2)), axis=1):
        assert read(int(low), int(high)) == whole[low:high]
    assert read(0, info.nbytes) == whole and counted.count == info.nbytes
    spool.drop(info)
    assert list((tmp_path / "scratch").iterdir()) == []
    read(0, 8)
    assert counted.count == info.nbytes + 8  # control: without it, bytes come anew


def test_rows_of_a_stack_are_read_where_they_lie(tmp_path: Path) -> None:
    stack = torch.randn(3, 5, 4)
    weights = CheckpointWeights.of(open_checkpoint(write(tmp_path / "base", {"e": stack})))
    rows = weights.values("e", weights.rows("e", 4, 12))
    assert torch.equal(rows, stack.reshape(15, 4)[4:12])


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda p: p / "absent", CheckpointError, "is neither a folder here nor a Hub id"),
        (lambda p: p / "absent.gguf", CheckpointError, "does not exist; a GGUF model is a file"),
        (lambda p: "hf://justaname", UsageError, "names no repository"),
    ],
)
def test_what_is_no_model_is_refused(
    tmp_path: Path, make: Callable[[Path], object], error: type[Exception], told: str
) -> None:
    base = write(tmp_path / "base", {"w": torch.ones(2, 2)})
    with pytest.raises(error, match=told):
        diff(str(make(tmp_path)), str(base))


def test_a_model_that_does_not_name_its_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"w": torch.ones(2, 2)})
    with pytest.raises(UsageError, match="does not say what it was made from"):
        diff(str(base))


def test_a_hostile_header_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"w": torch.ones(2, 2)})
    out = write(tmp_path / "out", {"w": torch.ones(2, 2)})
    raw = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(
        raw.replace(b'"data_offsets":[0,16]', b'"data_offsets":[0,99]')
    )
    with pytest.raises(CheckpointError):
        diff(str(out), str(base))
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="link out of the folder"):
        diff(str(out), str(base))


def test_nothing_here_meets_the_code_that_makes_or_folds_plans() -> None:
    """A record that was held against the program that wrote it would prove nothing."""
    from test_layers import part, reached

    meets = {part(module) for name in ("bake.diff", "bake.diff.plot") for module in reached(name)}
    assert "diff" in meets and not meets & {"plan", "fold", "steer", "recipe"}
    assert "fold" in {part(module) for module in reached("bake.outputs.checkpoint")}
