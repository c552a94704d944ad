"""Edited GGUF files equal the converted baked checkpoint, and all else in them is untouched."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import harness
import numpy as np
import pytest
import tiny
import torch
from exporting import convert_baked, written
from msgspec import structs
from torch import Tensor

from bake import __version__
from bake.affine import AffineMap, DenseMap, DiagonalMap, LowRankMap, translation
from bake.artifact.artifact import Artifact
from bake.checkpoints.gguf.codec import (
    FLOATS,
    decode,
    encode,
)
from bake.checkpoints.gguf.file import open_gguf
from bake.checkpoints.gguf.ggml import VARIABLE, load_ggml
from bake.checkpoints.gguf.grid import PLANES, ends, read_codes, read_grid, with_codes
from bake.checkpoints.gguf.rounding import allowed_error, encode_measured
from bake.checkpoints.gguf.types import BY_NAME, TYPES
from bake.edits import Edit, WeightUpdate
from bake.errors import CheckpointError, InexactPlan, InputError, UsageError
from bake.families import find_family, resolve
from bake.families.gguf import gguf_places
from bake.outputs.export import Export
from bake.outputs.gguf.edit import new_tensors
from bake.outputs.gguf.modelfile import modelfile
from bake.plan import Plan
from bake.rounding import Feedback
from bake.sites import Site, SiteKind

EPSILON = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}  # half a unit in the last place
APPROXIMATE = frozenset({"approximate"})
Tiny = Callable[..., Path]


def ablation(width: int, seed: int = 1) -> LowRankMap:
    unit = harness.vector(width, seed)
    unit = unit / unit.norm()
    return LowRankMap(-unit[:, None], unit[None], torch.zeros(width, dtype=torch.float64))


def affine(width: int) -> AffineMap:
    map_ = ablation(width)
    return map_.with_bias(0.7 * map_.right[0])


def site_width(base: harness.Base, kind: SiteKind) -> int:
    return base.layout.width(Site(kind, 1))


@dataclass(frozen=True)
class Case:
    """One edit, and whether it applies to a family."""

    kind: str
    at: str | Sequence[str]
    make: Callable[[harness.Base], AffineMap | WeightUpdate]


CASES = {
    "ablate the stream": Case("ablate", "resid", lambda b: ablation(b.layout.hidden)),
    "affine stream": Case("affine", "resid", lambda b: affine(b.layout.hidden)),
    "affine outputs": Case(
        "affine", ["attn_out.*", "mlp_out.1"], lambda b: affine(b.layout.hidden)
    ),
    "ablate outputs": Case(
        "ablate", ["attn_out.*", "mlp_out.*"], lambda b: ablation(b.layout.hidden)
    ),
    "offset in the middle": Case(
        "offset", "resid_post.1", lambda b: translation(harness.vector(b.layout.hidden))
    ),
    "turn the stream": Case(
        "rotate",
        "resid_post.1",
        lambda b: DenseMap(harness.orthogonal(b.layout.hidden), _zero(b.layout.hidden)),
    ),
    "norm output": Case(
        "linear",
        "ln1_out.1",
        lambda b: DenseMap(harness.matrix(b.layout.hidden), harness.vector(b.layout.hidden)),
    ),
    "norm gain": Case(
        "scale",
        "ln2_out.*",
        lambda b: DiagonalMap(harness.vector(b.layout.hidden), _zero(b.layout.hidden)),
    ),
    "last norm": Case(
        "linear",
        "ln_final_out",
        lambda b: DenseMap(harness.matrix(b.layout.hidden), _zero(b.layout.hidden)),
    ),
    "queries": Case("linear", "q.*", lambda b: DenseMap(*_map(site_width(b, SiteKind.Q)))),
    "keys, one head": Case("ablate", "k.1", lambda b: ablation(site_width(b, SiteKind.K))),
    "values": Case("ablate", "v.*", lambda b: ablation(site_width(b, SiteKind.V))),
    "heads": Case("ablate", "z.*", lambda b: ablation(site_width(b, SiteKind.Z))),
    "neurons": Case(
        "linear", "mlp_act.1", lambda b: DenseMap(*_map(site_width(b, SiteKind.MLP_ACT)))
    ),
    "key update": Case(
        "update",
        "k.1",
        lambda b: WeightUpdate(
            harness.matrix(site_width(b, SiteKind.K))[:, :2], harness.matrix(b.layout.hidden)[:2]
        ),
    ),
}


def _zero(width: int) -> Tensor:
    return torch.zeros(width, dtype=torch.float64)


def _map(width: int) -> tuple[Tensor, Tensor]:
    return harness.matrix(width), _zero(width)


def edits_of(base: harness.Base, case: Case) -> list[Edit]:
    return [harness.edit(base, case.kind, case.make(base), case.at)]


def export(base: harness.Base, plan: Plan, file: Path, out: Path, **options: Any) -> Artifact:
    """Edit a file; every tensor keeps its type unless the test says otherwise."""
    asked = {"gguf_type": "keep", **options}
    return written("gguf", plan, base.checkpoint, out, gguf=file, **asked)


# --- the same function as the checkpoint route ---------------------------------------------------

GGUF = [name for name in tiny.FAMILIES if tiny.TABLES[name].gguf is not None]
DISTINCT = ("llama", "gemma", "gpt2", "gpt_neox", "mixtral")
PAIRS = [(family, name) for family in DISTINCT for name in CASES]
PAIRS.remove(("mixtral", "neurons"))  # experts' neurons are no site
PAIRS += [(family, n) for family in GGUF if family not in DISTINCT for n in ("values", "queries")]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_converting_and_editing_commute(
    family: str, name: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    """The edited GGUF of the base holds the values of the converted baked checkpoint."""
    path = tiny_checkpoint(family)
    base = harness.base_at(path)
    plan = harness.plan_of(base, edits_of(base, CASES[name]))
    file = gguf_files.write(tmp_path / "base.gguf", path)
    try:
        baked = harness.bake(base, plan, tmp_path / "baked")
    except InexactPlan as refusal:
        with pytest.raises(InexactPlan) as same:
            export(base, plan, file, tmp_path / "out")
        # It names the carrier, and counts the edit's further reasons.
        assert same.value.what == refusal.what.replace(": impossible", " as gguf: impossible")
        assert same.value.why is not None and same.value.why.startswith(str(refusal.why))
        return
    if family == "gemma" and any(update.create for update in plan.tensors):
        with pytest.raises(InexactPlan, match=r"loads no output head of its own here"):
            export(base, plan, file, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    out = export(base, plan, file, tmp_path / "out").path
    found = gguf_files.values(out / "base.gguf")
    meant = {n: torch.from_numpy(v.copy()) for n, v in gguf_files.converted(baked)[1].items()}
    before = gguf_files.values(file)
    # Companion zeros are for a flag of config.json, which a GGUF file does not have.
    assert all(not meant[n].any() for n in meant.keys() - found.keys())
    assert found.keys() <= meant.keys()
    # The base was rounded to float32, then the result; an edit here enlarges a row's error by less
    # than the square root of its length, 40, and the maps' own size, 4.
    for tensor in found:
        bound = 32 * EPSILON["F32"] * float(meant[tensor].abs().max())
        assert float((found[tensor] - meant[tensor]).abs().max()) <= bound, tensor
    changed = [n for n in found if n not in before or not torch.equal(found[n], before[n])]
    assert changed == [n for n in found if n in _written(out)]


def _written(out: Path) -> set[str]:
    record = json.loads((out / "bake.json").read_text(encoding="utf-8"))
    return {tensor["name"] for tensor in record["gguf"]["tensors"]}


def test_pairs_are_mostly_exact(tiny_checkpoint: Tiny) -> None:
    """The control of the test above: most of its pairs compare tensors, few compare refusals."""
    exact = 0
    for family, name in PAIRS:
        base = harness.base_at(tiny_checkpoint(family))
        plan = harness.plan_of(base, edits_of(base, CASES[name]))
        exact += plan.exactness == "exact"
    assert exact > 0.8 * len(PAIRS)


def test_order_of_rows_matters(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A file whose queries are not interleaved is refused, where it would be edited wrongly."""
    path = tiny_checkpoint("llama")
    base = harness.base_at(path)
    plan = harness.plan_of(base, edits_of(base, CASES["queries"]))
    plain = tiny.tensors_of(path)["model.layers.1.self_attn.q_proj.weight"].numpy()
    file = gguf_files.write(tmp_path / "a.gguf", path, extra={"blk.1.attn_q.weight": plain})
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_q\.weight does not resemble") as error:
        export(base, plan, file, tmp_path / "out")
    assert "orders the rows in another way" in str(error.value)
    assert not (tmp_path / "out").exists()


# --- everything else is untouched ----------------------------------------------------------------

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # whole blocks of 32 values


def wide(tiny_checkpoint: Tiny, family: str = "llama", **options: Any) -> harness.Base:
    return harness.base_at(tiny_checkpoint(family, **{**WIDE, **options}))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_untouched_tensors_and_metadata_are_the_same_bytes(
    kind: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    base = wide(tiny_checkpoint)
    plan = harness.plan_of(base, edits_of(base, CASES["affine outputs"]))
    mixed = {"blk.0.attn_output.weight": "Q8_0", "token_embd.weight": "F16"}
    file = gguf_files.write(tmp_path / "base.gguf", base.path, kind, kinds=mixed)
    artifact = export(base, plan, file, tmp_path / "out", allow=APPROXIMATE)
    before, after = gguf_files.stored(file), gguf_files.stored(artifact.path / "base.gguf")
    written = _written(artifact.path)
    assert [name for name in after if name in before] == list(before)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == written & before.keys()
    assert {n for n in changed if n.endswith("weight")} == {
        *(f"blk.{layer}.attn_output.weight" for layer in range(3)),
        "blk.1.ffn_down.weight",
    }
    assert all(after[name][0] == before[name][0] for name in changed)  # each in its own type
    keys = gguf_files.metadata(artifact.path / "base.gguf")
    assert keys.pop("bake.version") == (["STRING"], __version__)
    assert keys.pop("bake.plan_digest") == (["STRING"], plan.digest)
    assert keys == gguf_files.metadata(file)
    assert list(keys) == list(gguf_files.metadata(file))


def test_created_biases_are_float32(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = wide(tiny_checkpoint, attention_bias=False, mlp_bias=False)
    plan = harness.plan_of(base, edits_of(base, CASES["affine outputs"]))
    file = gguf_files.write(tmp_path / "base.gguf", base.path, "Q8_0")
    out = export(base, plan, file, tmp_path / "out").path
    created = {n: v for n, v in gguf_files.stored(out / "base.gguf").items() if n.endswith("bias")}
    names = [f"blk.{layer}.attn_output.bias" for layer in range(3)]
    assert created.keys() == {*names, "blk.1.ffn_down.bias"}
    assert {kind for kind, _ in created.values()} == {"F32"}
    constant = 0.7 * ablation(64).right[0]
    for _, raw in created.values():
        found = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        assert torch.equal(found, constant.to(torch.float32))


def test_tied_head_gets_a_tensor_of_its_own(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = wide(tiny_checkpoint, tied=True)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate the stream"]))
    file = gguf_files.write(tmp_path / "base.gguf", base.path, "Q4_0")
    out = export(base, plan, file, tmp_path / "out").path
    before, after = gguf_files.stored(file), gguf_files.stored(out / "base.gguf")
    assert "output.weight" not in before
    assert after["output.weight"] == before["token_embd.weight"]  # the head is the old embedding
    assert after["token_embd.weight"] != before["token_embd.weight"]
    assert list(after)[-1] == "output.weight"


def test_a_head_that_is_stored_twice_keeps_its_bytes(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = wide(tiny_checkpoint, tied=True)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate the stream"]))
    embed = tiny.tensors_of(base.path)["model.embed_tokens.weight"].numpy()
    file = gguf_files.write(
        tmp_path / "base.gguf",
        base.path,
        "Q4_0",
        extra={"output.weight": embed},
        kinds={"output.weight": "Q8_0"},
    )
    out = export(base, plan, file, tmp_path / "out").path
    after = gguf_files.stored(out / "base.gguf")
    assert after["output.weight"] == gguf_files.stored(file)["output.weight"]
    assert list(after) == list(gguf_files.stored(file))


# --- rounding ------------------------------------------------------------------------------------


def test_edit_is_of_the_decoded_weights(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """In blocks, the result is what gguf-py makes of the decoded weights after the edit."""
    base = wide(tiny_checkpoint)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate outputs"]))
    file = gguf_files.write(tmp_path / "base.gguf", base.path, "Q8_0")
    out = export(base, plan, file, tmp_path / "out", rounding="nearest").path
    name = "blk.2.ffn_down.weight"
    old, found = gguf_files.values(file)[name], gguf_files.values(out / "base.gguf")[name]
    exact = ablation(64).linear(old.T).T
    kind = gguf.GGMLQuantizationType.Q8_0
    meant = gguf.quants.dequantize(gguf.quants.quantize(exact.numpy(), kind), kind)
    # Both round the same numbers, up to a last place of float64, which moves a code by one at most.
    difference = (found - torch.from_numpy(meant).to(torch.float64)).abs()
    assert float((difference > 0).double().mean()) < 0.01
    scale = float(exact.abs().max()) / 127
    assert float(difference.max()) <= 1.01 * scale
    assert float((found - old).abs().max()) > 10 * scale  # the effect


SIMPLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # gguf-py encodes them


@pytest.mark.parametrize("kind", SIMPLE)
def test_feedback_removes_what_nearest_leaves(
    kind: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    base = wide(tiny_checkpoint)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate the stream"]))
    file = gguf_files.write(tmp_path / "base.gguf", base.path, kind)
    name = "blk.1.ffn_down.weight"
    direction = ablation(64).right
    before = float((direction @ gguf_files.values(file)[name]).norm())
    leaks = {}
    for rounding in ("nearest", "feedback"):
        out = export(
            base, plan, file, tmp_path / rounding, rounding=rounding, allow=APPROXIMATE
        ).path
        found = gguf_files.values(out / "base.gguf")[name]
        leaks[rounding] = float((direction @ found).norm()) / before
        row = _row(out, name)
        # What the record says is so, up to float64's rounding of what was removed.
        assert row["leak"] == pytest.approx(leaks[rounding], rel=1e-4, abs=1e-14)
        assert row["rounding"] == rounding
        assert (row["type"], row["base_type"]) == (kind, kind)
    assert leaks["feedback"] < leaks["nearest"] / 20
    assert leaks["feedback"] < 0.01


def _row(out: Path, name: str) -> dict[str, Any]:
    record = json.loads((out / "bake.json").read_text(encoding="utf-8"))
    (row,) = (row for row in record["gguf"]["tensors"] if row["name"] == name)
    return dict(row)


def test_rounding_that_undoes_the_edit_is_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """In four bits an edit of rank one is smaller than a step: nearest gives the old weights."""
    base = harness.base_at(
        tiny_checkpoint("llama", hidden_size=512, intermediate_size=64, head_dim=16)
    )
    plan = harness.plan_of(
        base, [harness.edit(base, "ablate", ablation(512), ["attn_out.*", "mlp_out.*"])]
    )
    file = gguf_files.write(tmp_path / "base.gguf", base.path, "Q4_0")
    with pytest.raises(InexactPlan, match=r"rounding to Q4_0 leaves \d\d% of the edit") as error:
        export(base, plan, file, tmp_path / "out", rounding="nearest")
    assert "use --rounding feedback, or --gguf-type Q8_0" in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    name = "blk.1.ffn_down.weight"
    kept = export(base, plan, file, tmp_path / "kept", rounding="nearest", allow=APPROXIMATE)
    assert _row(kept.path, name)["change"] < 0.75
    assert _row(kept.path, name)["leak"] > 0.25
    fed = export(base, plan, file, tmp_path / "fed")
    assert _row(fed.path, name)["change"] == pytest.approx(1.0, abs=1e-3)
    assert _row(fed.path, name)["leak"] < 1e-3
    # Most codes are those of the base: only what the edit needs has moved.
    codes = [
        np.frombuffer(gguf_files.stored(path)[name][1], np.uint8)
        for path in (file, fed.path / "base.gguf")
    ]
    assert 0.005 < float((codes[0] != codes[1]).mean()) < 0.4


def test_types_without_feedback_are_rounded_to_nearest_and_say_so(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    base = wide(tiny_checkpoint)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate outputs"]))
    file = gguf_files.write(tmp_path / "base.gguf", base.path, "MXFP4")
    fed = export(base, plan, file, tmp_path / "a", allow=APPROXIMATE).path
    plain = export(base, plan, file, tmp_path / "b", rounding="nearest", allow=APPROXIMATE).path
    assert gguf_files.stored(fed / "base.gguf") == gguf_files.stored(plain / "base.gguf")
    assert _row(fed, "blk.1.ffn_down.weight")["rounding"] == "nearest"


@pytest.mark.parametrize(
    "name", ["values", "queries", "heads", "neurons", "key update", "affine stream", "norm output"]
)
def test_every_edit_survives_four_bits(name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Reader side, writer side, tables and updates: nearly all of every edit is in the file."""
    base = wide(tiny_checkpoint)
    plan = harness.plan_of(base, edits_of(base, CASES[name]))
    file = gguf_files.write(tmp_path / "base.gguf", base.path, "Q4_0")
    out = export(base, plan, file, tmp_path / "out").path
    record = json.loads((out / "bake.json").read_text(encoding="utf-8"))
    rows = [row for row in record["gguf"]["tensors"] if "change" in row]
    assert rows
    assert all(abs(row["change"] - 1) < 0.05 for row in rows)
    assert all(row["error"] < 0.25 for row in rows)
    (served,) = (v for v in record["plan"]["runtimes"] if v["runtime"] == "llama.cpp")
    assert (served["status"], served["reason"][:26]) == (
        "approximate",
        "the edited weights are rou",
    )


def test_edited_tensors_in_another_type(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = wide(tiny_checkpoint)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate outputs"]))
    kinds = {"blk.0.attn_output.weight": "F16"}
    file = gguf_files.write(tmp_path / "base.gguf", base.path, "Q4_0", kinds=kinds)
    out = export(base, plan, file, tmp_path / "out", gguf_type="Q8_0").path
    before, after = gguf_files.stored(file), gguf_files.stored(out / "base.gguf")
    assert after["blk.1.ffn_down.weight"][0] == "Q8_0"
    assert after["blk.0.attn_output.weight"][0] == "F16"  # not in blocks: it keeps its precision
    untouched = before.keys() - _written(out)
    assert len(untouched) > 20
    assert all(after[name] == before[name] for name in untouched)
    with pytest.raises(UsageError, match="there is no GGUF tensor type 'Q9'"):
        export(base, plan, file, tmp_path / "c", gguf_type="Q9")
    with pytest.raises(UsageError, match="rounding is 'up'"):
        export(base, plan, file, tmp_path / "c", rounding="up")


def test_the_smallest_type_within_the_limit_is_taken(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """By itself an export widens what noise would drown, and no further than the limit asks."""
    base = wide(tiny_checkpoint)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate the stream"]))
    file = gguf_files.write(tmp_path / "base.gguf", base.path, "Q4_0")
    taken, sizes = {}, []
    for limit in (1e-9, 0.05, 0.3, 1e9):
        out = export(base, plan, file, tmp_path / f"{limit}", gguf_type="auto", most_kl=limit)
        told = json.loads((out.path / "bake.json").read_text(encoding="utf-8"))["export"]
        assert told["storage"]["asked"] == {"embed": "auto", "writers": "auto"}
        assert told["storage"]["limit"] == limit
        taken[limit] = set(told["gguf_type"].values())
        for name, (kind, _) in gguf_files.stored(out.path / "base.gguf").items():
            if name in _written(out.path) and name.endswith("weight") and "norm" not in name:
                part = "embed" if name == "token_embd.weight" else "writers"
                assert kind == told["gguf_type"].get(part, "keep").replace("keep", "Q4_0"), name
        sizes.append((out.path / "base.gguf").stat().st_size)
        # What is written has the noise that samples promised.
        rows = json.loads((out.path / "bake.json").read_text(encoding="utf-8"))["gguf"]["tensors"]
        errors = [row["error"] for row in rows if "error" in row]
        assert (told["storage"]["lost"] <= limit) or limit == 1e-9
        assert max(errors) < {1e-9: 1e-3, 0.05: 0.06, 0.3: 0.2, 1e9: 1.0}[limit]
    assert taken[1e-9] == {"F16"} and taken[1e9] == {"keep"}
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[1] > sizes[-1]


def test_every_kind_of_tensor_has_a_type_of_its_own(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = wide(tiny_checkpoint)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate the stream"]))
    file = gguf_files.write(tmp_path / "base.gguf", base.path, "Q4_0")
    asked = {"embed": "Q8_0", "writers": "f16"}
    after = gguf_files.stored(
        export(base, plan, file, tmp_path / "out", gguf_type=asked).path / "base.gguf"
    )
    assert after["token_embd.weight"][0] == "Q8_0"
    assert after["blk.1.ffn_down.weight"][0] == "F16"
    assert after["blk.1.ffn_up.weight"][0] == "Q4_0"  # the edit does not reach it
    for wrong in ({"embeds": "Q8_0"}, {"embed": "Q9"}, "Q9"):
        with pytest.raises(UsageError, match="there is no"):
            export(base, plan, file, tmp_path / "c", gguf_type=wrong)


def test_matrices_can_be_asked_for_unrounded(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = wide(tiny_checkpoint)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate outputs"]))
    file = gguf_files.write(tmp_path / "base.gguf", base.path, "Q4_0")
    what = Export(plan, base.checkpoint, gguf=file, gguf_type="keep")
    name, model = "blk.1.ffn_down.weight", what.model()
    assert model is not None
    exact = torch.cat(list(new_tensors(what, model)[0][name].exact()))
    direction, old = ablation(64).right, gguf_files.values(file)[name]
    assert float((direction @ exact).norm()) < 1e-14 * float((direction @ old).norm())
    assert torch.allclose(exact, old - direction.T @ (direction @ old), rtol=0, atol=1e-15)
    out = export(base, plan, file, tmp_path / "out").path
    assert float((gguf_files.values(out / "base.gguf")[name] - exact).abs().max()) > 1e-3


def test_k_quants_are_edited_without_a_quantiser(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the scales that are there, new codes are all that an edit needs."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("bake.checkpoints.gguf.ggml.PACKAGES", ())
    base = wide(tiny_checkpoint, hidden_size=256, intermediate_size=256, head_dim=64)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate outputs"]))
    name = "blk.1.ffn_down.weight"
    weights = tiny.tensors_of(base.path)["model.layers.1.mlp.down_proj.weight"]
    raw = q4_k(weights.to(torch.float64))
    file = gguf_files.write(
        tmp_path / "base.gguf", base.path, kinds={name: "Q4_K"}, raw={name: raw}
    )
    out = export(base, plan, file, tmp_path / "out").path
    direction = ablation(256).right
    before, after = (gguf_files.values(f)[name] for f in (file, out / "base.gguf"))
    leak = float((direction @ after).norm() / (direction @ before).norm())
    assert leak < 1e-3
    assert _row(out, name)["leak"] == pytest.approx(leak, rel=1e-4)
    old, new = (gguf_files.stored(f)[name] for f in (file, out / "base.gguf"))
    assert old[0] == new[0] == "Q4_K"
    headers = [np.frombuffer(b, np.uint8).reshape(-1, 144)[:, :16] for _, b in (old, new)]
    assert np.array_equal(*headers)  # scales and minima stay
    # To nearest, blocks are quantised anew, and that takes a quantiser.
    with pytest.raises(UsageError, match="stored as Q4_K, which gguf-py decodes but") as error:
        export(base, plan, file, tmp_path / "b", rounding="nearest")
    assert "install llama-cpp-python or xllamacpp" in str(error.value)
    assert "(--gguf-type Q8_0)" in str(error.value)
    assert not (tmp_path / "b").exists()
    out = export(base, plan, file, tmp_path / "b", gguf_type="Q8_0").path
    assert gguf_files.stored(out / "base.gguf")[name][0] == "Q8_0"
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(InputError, match="is no ggml library"):
        export(base, plan, file, tmp_path / "other")


def q4_k(values: Tensor) -> np.ndarray[Any, Any]:
    """Encode rows of 256 values as Q4_K with one scale and one minimum for a whole row."""
    low = values.amin(dim=1, keepdim=True)
    scale = (values.amax(dim=1, keepdim=True) - low) / 15
    codes = ((values - low) / scale).round().to(torch.uint8).numpy()
    half = np.concatenate([scale.numpy(), -low.numpy()], axis=1).astype(np.float16)
    # Eight six-bit scales and minima of 1: four bytes of each, then 1 | 1 << 4 for the last four.
    ones = np.array([1] * 8 + [0x11] * 4, dtype=np.uint8)
    pairs = codes.reshape(-1, 4, 2, 32)
    nibbles = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
    rows = values.shape[0]
    return np.concatenate(
        [half.view(np.uint8), np.tile(ones, (rows, 1)), nibbles.reshape(rows, 128)], axis=1
    )


def test_values_that_overflow_leave_nothing(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = wide(tiny_checkpoint)
    huge = DiagonalMap(torch.full((64,), 1e9, dtype=torch.float64), _zero(64))
    plan = harness.plan_of(base, [harness.edit(base, "scale", huge, "mlp_out.1")])
    for kind in ("F16", "Q8_0"):
        file = gguf_files.write(tmp_path / f"{kind}.gguf", base.path, kind)
        with pytest.raises(
            InputError, match=r"the edited tensor blk\.1\.ffn_down\.weight does not"
        ):
            export(base, plan, file, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))


# --- split models --------------------------------------------------------------------------------


def test_split_model(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = wide(tiny_checkpoint, attention_bias=False, mlp_bias=False)
    plan = harness.plan_of(base, edits_of(base, CASES["affine outputs"]))
    whole = gguf_files.write(tmp_path / "whole.gguf", base.path, "Q8_0")
    gguf_files.write(tmp_path / "m.gguf", base.path, "Q8_0", split_max_tensors=9)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    single = export(base, plan, whole, tmp_path / "single").path
    split = export(base, plan, parts[0], tmp_path / "split").path
    assert sorted(p.name for p in split.glob("*.gguf")) == [p.name for p in parts]
    found: dict[str, tuple[str, bytes]] = {}
    for part in sorted(split.glob("*.gguf")):
        found |= gguf_files.stored(part)
    assert found == gguf_files.stored(single / "whole.gguf")
    before = gguf_files.metadata(parts[0])
    after = gguf_files.metadata(split / parts[0].name)
    assert before.pop("split.tensors.count")[1] + 4 == after.pop("split.tensors.count")[1]
    assert {k: v for k, v in after.items() if not k.startswith("bake.")} == before
    last = gguf_files.metadata(split / parts[-1].name)
    assert last["split.tensors.count"][1] == len(found)
    assert not any(key.startswith("bake.") for key in last)
    # Ollama reads no split model, so there is no Modelfile that would name one.
    assert (single / "Modelfile").read_text() == "FROM ./whole.gguf\n"
    assert not (split / "Modelfile").exists()


def test_part_of_a_split_model(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = wide(tiny_checkpoint)
    gguf_files.write(tmp_path / "m.gguf", base.path, split_max_tensors=20)
    first, second, *rest = sorted(tmp_path.glob("m-*.gguf"))
    assert len(open_gguf(first).parts) == 2 + len(rest)
    with pytest.raises(UsageError, match="is part 1 of a split model"):
        open_gguf(second)
    second.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"m-00002-of-\d{5}\.gguf: does not exist"):
        open_gguf(first)
    renamed = first.rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="and its name does not say so"):
        open_gguf(renamed)


# --- the wrong file ------------------------------------------------------------------------------


def test_file_of_another_model(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = wide(tiny_checkpoint)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate the stream"]))

    def refused(message: str, path: Path = base.path, **options: Any) -> str:
        file = gguf_files.write(tmp_path / "base.gguf", path, **options)
        with pytest.raises(CheckpointError, match=message) as error:
            export(base, plan, file, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(error.value)

    refused("of the architecture 'qwen2'; llama is 'llama' there", arch="qwen2")
    refused(r"lacks blk\.0\.attn_v\.weight", drop=("blk.0.attn_v.weight",))
    strange = {"blk.0.ffn_gate_shexp.weight": np.ones((4, 32))}
    refused("which stands for no tensor of the checkpoint", extra=strange)
    other = wide(tiny_checkpoint, seed=7).path
    assert "from other weights" in refused("differs from model.layers.0.input_layernorm", other)
    longer = wide(tiny_checkpoint, vocab_size=60).path
    refused(r"token_embd\.weight has the shape \[60, 64\] where", longer)
    norm = gguf_files.converted(base.path)[1]["output_norm.weight"] * 1.01
    refused("output_norm.weight differs", extra={"output_norm.weight": norm})
    # The control: unchanged, the file is taken.
    export(base, plan, gguf_files.write(tmp_path / "base.gguf", base.path), tmp_path / "out")


def test_recast_plan_needs_the_recast_checkpoint(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Qwen2's architecture has no bias behind the writers; Mistral's is Llama's, which has."""
    for family, message in (("qwen2", "is a GGUF of the architecture qwen2"), ("mistral", None)):
        base = harness.base_at(tiny_checkpoint(family))
        plan = harness.plan_of(base, edits_of(base, CASES["affine outputs"]), allow=["recast"])
        assert plan.exactness == "exact"
        file = gguf_files.write(tmp_path / f"{family}.gguf", base.path)
        if message is None:
            out = export(base, plan, file, tmp_path / "out").path
            assert "blk.1.ffn_down.bias" in gguf_files.stored(out / f"{family}.gguf")
            continue
        with pytest.raises(InexactPlan, match=message) as error:
            export(base, plan, file, tmp_path / "out")
        assert "convert it with --llama-cpp" in str(error.value)


def test_bias_that_llamacpp_refuses(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Qwen3 in transformers takes a bias in o_proj, and llama.cpp does not."""
    base = harness.base_at(tiny_checkpoint("qwen3", attention_bias=False))
    offset = translation(harness.vector(base.layout.hidden))
    plan = harness.plan_of(base, [harness.edit(base, "offset", offset, "attn_out.1")])
    assert plan.exactness == "exact"
    file = gguf_files.write(tmp_path / "base.gguf", base.path)
    with pytest.raises(InexactPlan, match=r"no slot for model\.layers\.1\.self_attn\.o_proj\.bias"):
        export(base, plan, file, tmp_path / "out")


def test_family_without_names(tiny_checkpoint: Tiny, tmp_path: Path) -> None:

    path = tiny_checkpoint("llama")
    config = tiny.config_of(path)
    family = structs.replace(find_family(config), gguf=None)
    with pytest.raises(UsageError, match="the table 'llama' says nothing of GGUF files"):
        gguf_places(resolve(family, config, *tiny.header_of(path)))


# --- the folder ----------------------------------------------------------------------------------


def test_output_folder(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = wide(tiny_checkpoint)
    plan = harness.plan_of(base, edits_of(base, CASES["ablate outputs"]))
    file = gguf_files.write(tmp_path / "base.Q8_0.gguf", base.path, "Q8_0")
    seen: list[tuple[int, int]] = []
    artifact = export(base, plan, file, tmp_path / "out", progress=lambda *pair: seen.append(pair))
    names = ["Modelfile", "bake.json", "bake/edits.safetensors", "base.Q8_0.gguf"]
    assert sorted(artifact.files) == names
    assert (
        sorted(str(p.relative_to(artifact.path)) for p in artifact.path.rglob("*.*")) == names[1:]
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0
    record = json.loads((artifact.path / "bake.json").read_text(encoding="utf-8"))
    assert (record["schema"], record["kind"]) == (2, "gguf")
    assert record["plan"]["digest"] == plan.digest
    assert record["gguf"]["base"] == [{"name": file.name, "bytes": file.stat().st_size}]
    assert artifact.bytes_edited == sum(
        len(raw)
        for name, (_, raw) in gguf_files.stored(artifact.path / file.name).items()
        if name in _written(artifact.path)
    )
    with pytest.raises(UsageError, match="exists and is not empty"):
        export(base, plan, file, tmp_path / "out")
    again = export(base, plan, file, tmp_path / "out", force=True)
    assert again.files[file.name] == artifact.files[file.name]  # same plan, same bytes
    with pytest.raises(UsageError, match="holds the base"):
        export(base, plan, again.path / file.name, tmp_path / "out", force=True)


def test_a_baked_file_can_be_baked_again(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """The keys of the first run give way to those of the second."""
    base = wide(tiny_checkpoint)
    plans = [harness.plan_of(base, edits_of(base, CASES[n])) for n in ("ablate outputs", "values")]
    file = gguf_files.write(tmp_path / "base.gguf", base.path)
    first = export(base, plans[0], file, tmp_path / "first").path
    second = export(base, plans[1], first / "base.gguf", tmp_path / "second").path
    keys = gguf_files.metadata(second / "base.gguf")
    assert keys["bake.plan_digest"][1] == plans[1].digest != plans[0].digest


def test_modelfile() -> None:
    assert modelfile("m.gguf") == "FROM ./m.gguf\n"
    assert modelfile("m.gguf", "a.gguf") == "FROM ./m.gguf\nADAPTER ./a.gguf\n"
    assert modelfile("../in here/m.gguf") == "FROM ../in here/m.gguf\n"
    for name in ("a\nb.gguf", "/m.gguf", 'a"b', " m.gguf"):
        with pytest.raises(UsageError, match="cannot be named in a Modelfile"):
            modelfile(name)


# --- the converter -------------------------------------------------------------------------------


def test_converting_what_llamacpp_would_not_serve(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """llama.cpp's converter drops an untied Gemma's head in silence; bake does not let it."""
    base = harness.base_at(tiny_checkpoint("gemma"))
    plan = harness.plan_of(base, edits_of(base, CASES["ablate the stream"]))
    baked = harness.bake(base, plan, tmp_path / "baked")
    with pytest.raises(InexactPlan, match=r"llama\.cpp would not serve this checkpoint") as error:
        convert_baked(baked, tmp_path / "out", llama_cpp=tmp_path)
    assert "its converter skips lm_head" in str(error.value)
    with pytest.raises(
        CheckpointError, match=r"holds no bake\.json, so it was not written by bake"
    ):
        convert_baked(base.path, tmp_path / "out", llama_cpp=tmp_path)


def test_converter_that_is_missing_or_fails(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    base = harness.base_at(tiny_checkpoint("llama"))
    plan = harness.plan_of(base, edits_of(base, CASES["ablate the stream"]))
    baked = harness.bake(base, plan, tmp_path / "baked")
    with pytest.raises(InputError, match="there is no converter at"):
        convert_baked(baked, tmp_path / "out", llama_cpp=tmp_path)
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1])\n"
        "out.write_bytes(b'GGUF' + sys.argv[sys.argv.index('--outtype') + 1].encode())\n"
    )
    artifact = convert_baked(baked, tmp_path / "out", llama_cpp=tmp_path, outtype="q8_0")
    assert (artifact.path / "baked-Q8_0.gguf").read_bytes() == b"GGUFq8_0"
    assert (artifact.path / "Modelfile").read_text() == "FROM ./baked-Q8_0.gguf\n"
    record = json.loads((artifact.path / "bake.json").read_text(encoding="utf-8"))
    assert record["kind"] == "gguf"
    assert record["plan"]["digest"] == plan.digest
    # The verdicts are on this file, not on the checkpoint that it was made of.
    served = {v["runtime"]: v["status"] for v in record["plan"]["runtimes"]}
    assert (served["llama.cpp"], served["ollama"]) == ("approximate", "not tested")
    assert served["vllm"] == served["mlx-lm"] == "refused"
    script.write_text("raise SystemExit('no')\n")
    with pytest.raises(Exception, match="converter failed with exit status 1"):
        convert_baked(baked, tmp_path / "other", llama_cpp=tmp_path)
    assert not (tmp_path / "other").exists()


# --- types ---------------------------------------------------------------------------------------


def test_types_are_those_of_ggml() -> None:
    """Number, block and bytes of a block, as ggml.h and ggml-common.h have them."""
    known = {kind.name: (kind.number, kind.block, kind.size) for kind in TYPES}
    ggml = {
        "F32": (0, 1, 4),
        "F16": (1, 1, 2),
        "Q4_0": (2, 32, 18),
        "Q4_1": (3, 32, 20),
        "Q5_0": (6, 32, 22),
        "Q5_1": (7, 32, 24),
        "Q8_0": (8, 32, 34),
        "Q2_K": (10, 256, 84),
        "Q3_K": (11, 256, 110),
        "Q4_K": (12, 256, 144),
        "Q5_K": (13, 256, 176),
        "Q6_K": (14, 256, 210),
        "IQ4_NL": (20, 32, 18),
        "F64": (28, 1, 8),
        "BF16": (30, 1, 2),
        "MXFP4": (39, 32, 17),
        "NVFP4": (40, 64, 36),
        "Q1_0": (41, 128, 18),
    }
    assert ggml.keys() >= {*PLANES, *FLOATS}
    assert {name: known[name] for name in ggml} == ggml


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1", "BF16", "F16"])
def test_codec_agrees_with_gguf_py(kind: str) -> None:
    values = harness.vector(6 * 64).reshape(6, 64)
    number = gguf.GGMLQuantizationType[kind]
    theirs = gguf.quants.quantize(values.numpy().astype(np.float32), number)
    ours = encode(values, BY_NAME[kind], "w")
    assert ours.numpy().tobytes() == theirs.tobytes()
    back = gguf.quants.dequantize(theirs, number).astype(np.float64)
    assert torch.equal(decode(ours, BY_NAME[kind], "w"), torch.from_numpy(back))


@pytest.mark.parametrize("kind", list(PLANES))
def test_codes_under_the_scales_that_are_there(kind: str) -> None:
    """Any codes can be written and read back, and gguf-py decodes them as the grid says."""
    generator = torch.Generator().manual_seed(3)
    size, block = BY_NAME[kind].size, BY_NAME[kind].block
    raw = torch.randint(0, 256, (5, 2 * size), generator=generator, dtype=torch.uint8)
    for start in _SCALES[kind]:  # the float16 scales: random bytes could be NaN
        raw.reshape(-1, size)[:, start : start + 2] = torch.tensor([0x66, 0x2E], dtype=torch.uint8)
    grid = read_grid(raw, BY_NAME[kind], lambda rows: decode(rows, BY_NAME[kind], "w"))
    number = gguf.GGMLQuantizationType[kind]

    def theirs(rows: Tensor) -> Tensor:
        return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), number).astype(np.float64))

    span = float(theirs(raw).abs().max())
    found = read_codes(raw, BY_NAME[kind])
    assert float((grid.values(found) - theirs(raw)).abs().max()) <= 2.0**-22 * span
    assert torch.equal(with_codes(raw, BY_NAME[kind], found), raw)
    assert (grid.low, grid.high) == ends(BY_NAME[kind])
    codes = torch.randint(grid.low, grid.high + 1, (5, 2 * block), generator=generator)
    other = with_codes(raw, BY_NAME[kind], codes.to(torch.float64))
    assert float((grid.values(codes) - theirs(other)).abs().max()) <= 2.0**-22 * span
    assert not torch.equal(other, raw)


# Where the float16 numbers of a block are, from ggml-common.h.
_SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def test_blocks_whose_scales_do_not_reach_are_encoded_anew() -> None:
    values = harness.vector(64 * 96).reshape(64, 96)
    kind = BY_NAME["Q4_0"]
    base = encode(values / 10, kind, "w")
    base[0, :18] = 0  # a block of zeros has no steps at all
    near = decode(base, kind, "w")
    near[7] *= 4
    near[0, 0] = 1.0
    direction = harness.vector(64, 1)[None]
    fed, errors = encode_measured(near, kind, "w", base=base, feedback=Feedback(direction, 0))
    scales = [raw.reshape(64, 3, 18)[:, :, :2] for raw in (base, fed)]
    same = (scales[0] == scales[1]).all(dim=2)
    assert not bool(same[7].any())
    assert not bool(same[0, 0])
    assert bool(same[1:7].all())
    assert bool(same[8:].all())
    assert torch.equal(decode(fed, kind, "w") - near, errors)


@pytest.mark.parametrize("size", [1.0, 3e-7, 60.0])
@pytest.mark.parametrize("shift", [0.0, 7.0])
@pytest.mark.parametrize("kind", SIMPLE[3:])
def test_no_value_is_further_off_than_its_grid_allows(kind: str, shift: float, size: float) -> None:
    """Kept scales and fresh ones, large values and those at float16's lower end, every code."""
    exact = size * (harness.vector(96 * 64).reshape(96, 64).to(torch.float64) + shift)
    base = encode(exact, BY_NAME[kind], "w")
    exact[5] *= 1.5  # beyond the scales that are there
    direction = harness.vector(96, 1)[None]
    for old in (base, None):
        fed, _ = encode_measured(
            exact, BY_NAME[kind], "w", base=old, feedback=Feedback(direction, 0)
        )
        allowed = allowed_error(fed, BY_NAME[kind], "w", "feedback")
        off = (decode(fed, BY_NAME[kind], "w") - exact).abs()
        assert allowed is not None
        assert bool((off <= allowed).all())
        # The control: of codes two steps further, hardly one passes.
        low, high = ends(BY_NAME[kind])
        codes = read_codes(fed, BY_NAME[kind])
        wrong = with_codes(fed, BY_NAME[kind], torch.where(codes + 3 <= high, codes + 3, codes - 3))
        moved = (decode(wrong, BY_NAME[kind], "w") - exact).abs()
        assert float((moved > allowed).double().mean()) > 0.99
        assert low < high


@pytest.mark.parametrize("kind", SIMPLE[3:])
def test_nearest_stays_within_its_bound(kind: str) -> None:
    exact = harness.vector(96 * 64).reshape(96, 64).to(torch.float64)
    raw, errors = encode_measured(exact, BY_NAME[kind], "w")
    allowed = allowed_error(raw, BY_NAME[kind], "w", "nearest")
    assert allowed is not None
    assert bool((errors.abs() <= allowed).all())
    assert not bool((errors.abs() <= allowed / 3).all())


def test_types_without_an_even_grid_have_no_bound() -> None:
    assert not {"MXFP4", *FLOATS} & set(PLANES)
    raw = encode(harness.vector(64).reshape(2, 32), BY_NAME["MXFP4"], "w")
    assert allowed_error(raw, BY_NAME["MXFP4"], "w", "nearest") is None


def test_library_that_computes_something_else(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"no")
    with pytest.raises(InputError, match="is no ggml library"):
        load_ggml(tmp_path / "lib.so")
    with pytest.raises(InputError, match="is no ggml library"):
        import _ctypes

        load_ggml(Path(_ctypes.__file__))  # a library, of other functions
