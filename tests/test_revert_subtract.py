"""Without its base an edit is subtracted where that can be done, within the stated bound."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from harness import Base, base_at, edit, matrix, orthogonal, vector
from published import rewrite
from reverting import bake_local, files_of, flip, refused, reverted

from bake import edits as make
from bake.affine import AffineMap, DenseMap, DiagonalMap, LowRankMap
from bake.edits import Edit
from bake.revert.inverse import inverse, is_singular, magnitude

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
HIDDEN = "hidden"
Edits = Callable[[Base], Sequence[Edit]]


@dataclass(frozen=True)
class Case:
    """Edits of one model that can be undone."""

    family: str
    edits: Edits
    allow: tuple[str, ...] = ()
    tied: bool | None = None
    overrides: tuple[tuple[str, object], ...] = ()


def positive(width: int, seed: int) -> torch.Tensor:
    return vector(width, seed).abs() + 0.5


def unit(width: int) -> torch.Tensor:
    return vector(width) / vector(width).norm()


def _half(b: Base) -> list[Edit]:
    return [edit(b, "ablate", make.ablate(vector(b.layout.hidden), strength=0.5), "attn_out.*")]


def _several(b: Base) -> list[Edit]:
    """Return edits that meet at one site, in order, and on both sides of one weight."""
    width = b.layout.hidden
    return [
        edit(b, "linear", make.linear(0.2 * matrix(width) + torch.eye(width)), "mlp_out.1"),
        edit(b, "scale", make.scale(positive(width, 1), shift=vector(width, 2)), "mlp_out.1"),
        edit(b, "update", make.update(vector(width, 3), vector(40, 4)), "mlp_out.1"),
        edit(b, "scale", make.scale(positive(40, 5), shift=vector(40, 6)), "mlp_act.1"),
        edit(b, "offset", make.offset(vector(width, 7)), ["resid_post.0", "resid_post.1"]),
    ]


CASES = {
    "offset": Case(
        "llama", lambda b: [edit(b, "offset", make.offset(vector(b.layout.hidden)), "resid_post.1")]
    ),
    "offset in the embedding": Case(
        "llama",
        lambda b: [edit(b, "offset", make.offset(vector(b.layout.hidden)), "resid_pre.0")],
        tied=True,
    ),
    "offset, created biases": Case(
        "llama",
        lambda b: [edit(b, "offset", make.offset(vector(b.layout.hidden)), "resid_post.1")],
        overrides=(("mlp_bias", False),),
    ),
    "offset, recast": Case(
        "mistral",
        lambda b: [edit(b, "offset", make.offset(vector(b.layout.hidden)), "resid_post.1")],
        allow=("recast",),
    ),
    "half an ablation": Case("llama", _half),
    "a reflection": Case(
        "llama", lambda b: [edit(b, "rotate", make.reflect(vector(b.layout.hidden)), "attn_out.*")]
    ),
    "a rotation": Case(
        "llama",
        lambda b: [edit(b, "rotate", make.rotate(orthogonal(b.layout.hidden)), "mlp_out.*")],
    ),
    "a scale of a norm": Case(
        "gemma",
        lambda b: [edit(b, "scale", make.scale(positive(b.layout.hidden, 3)), "ln2_out.*")],
    ),
    "a scale and a shift of a norm": Case(
        "gpt2",
        lambda b: [
            edit(
                b,
                "scale",
                make.scale(positive(b.layout.hidden, 3), shift=vector(b.layout.hidden)),
                "ln1_out.*",
            )
        ],
    ),
    "a map of a norm's output": Case(
        "llama",
        lambda b: [
            edit(
                b,
                "linear",
                make.linear(matrix(b.layout.hidden) + 2 * torch.eye(b.layout.hidden)),
                "ln1_out.1",
            )
        ],
    ),
    "queries, part of a fused weight": Case(
        "gpt2",
        lambda b: [edit(b, "scale", make.scale(positive(24, 8), shift=vector(24, 9)), "q.*")],
    ),
    "several, in order": Case("llama", _several),
    "several, transposed": Case("gpt2", _several),
}


def base_of(case: Case, dtype: torch.dtype, tiny_checkpoint: Callable[..., Path]) -> Base:
    options = {"tied": case.tied, **dict(case.overrides)}
    return base_at(tiny_checkpoint(case.family, dtype=dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_what_comes_back_is_within_the_stated_bound(
    name: str, dtype: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    case = CASES[name]
    base = base_of(case, DTYPES[dtype], tiny_checkpoint)
    baked = bake_local(base.path, case.edits(base), tmp_path / "out", allow=case.allow)
    said = reverted(baked, tmp_path / "back", "--without-base")

    original, edited = tiny.tensors_of(base.path), tiny.tensors_of(baked)
    back = tiny.tensors_of(tmp_path / "back")
    assert back.keys() == original.keys()
    rows = {row["name"]: row for row in said["tensors"]}
    # The effect: something was edited, and by more than what is left.
    assert rows or said["removed"]
    assert bool(rows) == (name not in ("offset, created biases", "offset, recast"))
    for tensor, value in original.items():
        found, row = back[tensor], rows.get(tensor)
        assert found.dtype == value.dtype
        differ = (found.double() - value.double()).abs()
        if row is None:
            assert torch.equal(found, value) and torch.equal(edited[tensor], value)
            continue
        assert float(differ.max()) <= row["bound"]
        assert int((found != value).sum()) <= row["uncertain"] <= row["elements"] == value.numel()
        moved = float((edited[tensor].double() - value.double()).abs().max())
        assert moved > 4 * row["bound"], tensor
    assert said["relative"] == max((r["bound"] / r["largest"] for r in rows.values()), default=0)
    assert said["bound"] == max((row["bound"] for row in rows.values()), default=0)
    # Config, index and header are the base's own, and so is every other file.
    for file in base.path.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
        else:
            size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
            restored = (tmp_path / "back" / file.name).read_bytes()
            assert restored[:size] == file.read_bytes()[:size]
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in base.path.iterdir()}
    assert said["same_layout"] and not said["bit_for_bit"]


def test_the_order_of_edits_matters(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The control: the inverses in the wrong order miss the base by far more than the bound."""
    base = base_of(CASES["several, in order"], torch.float32, tiny_checkpoint)
    edits = _several(base)[:2]
    baked = bake_local(base.path, edits, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    said = reverted(baked, tmp_path / "back", "--without-base")
    bound = next(row["bound"] for row in said["tensors"] if row["name"] == name)
    value = tiny.tensors_of(baked)[name].double()
    wrong = value.T
    for step in edits:
        assert isinstance(step.map, AffineMap)
        wrong = inverse(step.map).linear(wrong)
    original = tiny.tensors_of(base.path)[name].double()
    assert float((wrong.T - original).abs().max()) > 100 * bound


def test_an_untouched_copy_gives_the_embedding_exactly(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """An ablation cannot be subtracted, but a head that was untied has the embedding as it was."""
    base = base_at(tiny_checkpoint("llama", dtype=torch.bfloat16, tied=True))
    ablation = edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "embed")
    baked = bake_local(base.path, [ablation], tmp_path / "out")
    assert files_of(baked)["config.json"] != files_of(base.path)["config.json"]
    said = reverted(baked, tmp_path / "back", "--without-base")
    assert files_of(tmp_path / "back") == files_of(base.path)
    assert said["uncertain"] == 0 and said["bound"] == 0.0
    assert said["removed"] == ["lm_head.weight"]


REFUSED = {
    "ablate": lambda b: make.ablate(vector(b.layout.hidden)),
    "affine": lambda b: make.affine(vector(b.layout.hidden), alpha=2.0),
    "erase": lambda b: make.erase(unit(b.layout.hidden)[:, None], unit(b.layout.hidden)[None]),
    "scale": lambda b: make.scale((torch.arange(b.layout.hidden) % 3).double()),
    "linear": lambda b: make.linear(torch.outer(vector(24), vector(24, 1))),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_gone_is_refused(
    kind: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    edits = [edit(base, kind, REFUSED[kind](base), "attn_out.1", name="mood")]
    baked = bake_local(base.path, edits, tmp_path / "out")
    said = refused(baked, tmp_path / "back", "--without-base", code=3)
    assert f"the {kind} edit 'mood' cannot be subtracted from model.layers.1.self_attn.o" in said
    assert "is gone from the weights" in said and "--base MODEL" in said
    assert reverted(baked, tmp_path / "back")["bit_for_bit"]  # and with the base it is exact


def test_a_gain_that_was_multiplied_into_its_readers_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    turn = edit(base, "rotate", make.rotate(orthogonal(base.layout.hidden)), "resid_post.1")
    baked = bake_local(base.path, [turn], tmp_path / "out")
    said = refused(baked, tmp_path / "back", "--without-base", code=3)
    assert "nothing here tells the factors apart" in said and "layernorm.weight" in said


def test_a_zero_scale_of_a_norm_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    factor = torch.ones(24, dtype=torch.float64)
    factor[3] = 0
    baked = bake_local(
        base.path, [edit(base, "scale", make.scale(factor), "ln1_out.0")], tmp_path / "out"
    )
    said = refused(baked, tmp_path / "back", "--without-base", code=3)
    assert "cannot be subtracted from model.layers.0.input_layernorm.weight" in said


def offset_of(tiny_checkpoint: Callable[..., Path], out: Path) -> Path:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32, mlp_bias=False))
    shift = edit(base, "offset", make.offset(vector(base.layout.hidden)), "resid_post.1")
    return bake_local(base.path, [shift], out)


def test_another_plan_than_the_recorded_is_not_subtracted(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    baked = offset_of(tiny_checkpoint, tmp_path / "out")
    rewrite(baked / "config.json", lambda c: {**c, "attention_bias": False})
    refused(baked, tmp_path / "back", "--without-base")

    baked = offset_of(tiny_checkpoint, tmp_path / "other")

    def other(record: dict[str, dict[str, list[dict[str, object]]]]) -> None:
        record["plan"]["biases"][0]["zero"] = not record["plan"]["biases"][0]["zero"]

    rewrite(baked / "bake.json", other)
    said = refused(baked, tmp_path / "back", "--without-base")
    assert "do not lead to the recorded plan" in said


def test_what_is_not_known_of_the_layout_is_said(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A config that somebody has reformatted is the base's in content, and not to the byte."""
    baked = offset_of(tiny_checkpoint, tmp_path / "out")
    config = json.loads((baked / "config.json").read_text())
    (baked / "config.json").write_text(json.dumps(config))
    said = reverted(baked, tmp_path / "back", "--without-base")
    assert not said["same_layout"]
    original = tiny.config_of(tiny_checkpoint("llama", dtype=torch.float32, mlp_bias=False))
    assert tiny.config_of(tmp_path / "back") == original


def test_missing_edits_and_tensors(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    baked = offset_of(tiny_checkpoint, tmp_path / "out")
    (baked / "bake" / "edits.safetensors").unlink()
    assert "the edits cannot be read" in refused(baked, tmp_path / "back", "--without-base")

    baked = offset_of(tiny_checkpoint, tmp_path / "other")

    def more(record: dict[str, dict[str, list[dict[str, object]]]]) -> None:
        record["plan"]["biases"].append({"name": "no.such.bias", "created": True})

    rewrite(baked / "bake.json", more)
    assert "it lacks no.such.bias" in refused(baked, tmp_path / "back", "--without-base")


def test_a_shard_that_was_changed_since(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Nothing but the record says what untouched tensors were, so the shards have to be its."""
    baked = offset_of(tiny_checkpoint, tmp_path / "out")
    shard = sorted(baked.glob("*.safetensors"))[0]
    flip(shard, -1)
    said = refused(baked, tmp_path / "back", "--without-base")
    assert f"{shard.name} is not what the record lists" in said
    flip(shard, -1)
    assert reverted(baked, tmp_path / "back", "--without-base")["uncertain"] == 0


def test_a_truncated_shard(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    baked = offset_of(tiny_checkpoint, tmp_path / "out")
    shard = next(baked.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "truncated" in refused(baked, tmp_path / "back", "--without-base")
    assert "truncated" in refused(baked, tmp_path / "back")
    flip(baked / "config.json", 0)
    refused(baked, tmp_path / "back")


MAPS = {
    "low rank": lambda: make.ablate(vector(9), strength=0.3).with_bias(vector(9, 1)),
    "translation": lambda: make.offset(vector(9)),
    "diagonal": lambda: make.scale(positive(9, 2), shift=vector(9, 3)),
    "dense": lambda: make.linear(matrix(9), shift=vector(9, 4)),
    "wide": lambda: LowRankMap(matrix(9)[:, :5], matrix(9, 1)[:5], vector(9, 2)),
}


@pytest.mark.parametrize("name", MAPS)
def test_inverse_and_magnitude(name: str) -> None:
    map_ = MAPS[name]()
    assert not is_singular(map_)
    x = torch.stack([vector(9, seed) for seed in range(4)])
    assert torch.allclose(inverse(map_)(map_(x)), x, atol=1e-11)
    assert float((map_(x) - x).abs().max()) > 0.1
    assert bool((magnitude(map_).matrix() >= map_.matrix().abs() - 1e-15).all())
    assert type(inverse(map_)) is type(map_) is type(magnitude(map_))


def test_singular_maps_are_told() -> None:
    for map_ in (
        make.ablate(vector(9)),
        DiagonalMap(torch.arange(9).double(), torch.zeros(9).double()),
        DenseMap(torch.outer(vector(9), vector(9, 1)), torch.zeros(9).double()),
    ):
        assert is_singular(map_)
