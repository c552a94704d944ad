"""The file of edits: what was written comes back, and nothing else is believed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from bake import edits as make
from bake.affine import DenseMap, DiagonalMap, LowRankMap
from bake.edit_store import FORMAT, Map, dump_edits, load_edits
from bake.edits import Edit, EditKind, WeightUpdate
from bake.errors import InputError
from bake.nonlinear import Clamp, Gated, Masked, Measure, NormPreserving
from bake.sites import parse_site


def vector(width: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator, dtype=torch.float64)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return vector(rows * columns, seed).reshape(rows, columns)


def edit(kind: str, map_: Map, *sites: str, concept: str = "c") -> Edit:
    return Edit(EditKind(kind), concept, tuple(map(parse_site, sites)), map_)


MASKED = Masked(vector(), vector(seed=1), vector(seed=2), vector(seed=3))


def all_kinds() -> tuple[Edit, ...]:
    shared = make.ablate(vector())
    return (
        edit("ablate", shared, "resid_pre.0", "resid_post.3", concept="refusal"),
        edit("affine", make.affine(vector(), mean=vector(seed=1), alpha=0.5), "resid_mid.2"),
        edit("erase", make.erase(matrix(4, 2), matrix(2, 4, 1)), "embed"),
        edit("offset", make.offset(vector(), coefficient=-2), "ln_final_out"),
        edit("scale", make.scale(vector(), shift=vector(seed=2)), "mlp_act.1"),
        edit("rotate", make.rotate(torch.linalg.qr(matrix(4, 4))[0]), "resid_post.1"),
        edit("rotate", make.reflect(vector()), "z.2.h5", concept="Höflichkeit, \u2026\n\0"),
        edit("linear", make.linear(matrix(4, 4), shift=vector()), "attn_out.0"),
        edit("update", make.update(matrix(2, 4), matrix(2, 6)), "mlp_out.1"),
        edit("clamp", Clamp(matrix(4, 1), matrix(1, 4), vector(), -1.0, math.inf), "mlp_out.0"),
        edit("masked-scale", MASKED, "mlp_out.0"),
        edit("norm-preserving", NormPreserving(shared), "mlp_out.2"),
        edit("gate", Gated(MASKED, vector(), 0.5, False, Measure.COSINE), "mlp_out.2"),
        edit("ablate", shared, "attn_out.3"),
    )


def fields(map_: Map) -> tuple[Tensor, ...]:
    match map_:
        case LowRankMap(left, right, bias):
            return left, right, bias
        case DiagonalMap(scale, bias):
            return scale, bias
        case DenseMap(full, bias):
            return full, bias
        case WeightUpdate(left, right):
            return left, right
        case Clamp(left, right, mean):
            return left, right, mean
        case Masked(scale, bias, low, high):
            return scale, bias, low, high
        case NormPreserving(inner):
            return fields(inner)
        case Gated(inner, condition):
            return *fields(inner), condition
    raise AssertionError(type(map_).__name__)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "edits.safetensors"


def test_what_was_written_comes_back(path: Path) -> None:
    edits = all_kinds()
    assert {str(e.kind) for e in edits} == {str(kind) for kind in EditKind}
    path.write_bytes(dump_edits(edits))
    found = load_edits(path)
    assert len(found) == len(edits)
    for new, old in zip(found, edits, strict=True):
        assert (new.kind, new.concept, new.sites) == (old.kind, old.concept, old.sites)
        assert type(new.map) is type(old.map)
        assert all(
            torch.equal(*pair) for pair in zip(fields(new.map), fields(old.map), strict=True)
        )
        assert all(tensor.dtype == torch.float64 for tensor in fields(new.map))


def test_a_map_at_two_edits_is_stored_once_and_is_one_map_again(path: Path) -> None:
    edits = all_kinds()
    content = dump_edits(edits)
    assert sum(name.endswith(".left") for name in load(content)) == 7
    path.write_bytes(content)
    found = load_edits(path)
    assert found[0].map is found[-1].map
    assert found[0].map is not found[1].map


def test_the_same_edits_give_the_same_bytes(path: Path) -> None:
    content = dump_edits(all_kinds())
    assert dump_edits(all_kinds()) == content
    path.write_bytes(content)
    assert dump_edits(load_edits(path)) == content
    assert dump_edits(all_kinds()[1:]) != content


def test_an_edit_of_nothing_is_a_file_too(path: Path) -> None:
    path.write_bytes(dump_edits(()))
    assert load_edits(path) == ()


def test_a_translation_has_no_factors_and_comes_back(path: Path) -> None:
    path.write_bytes(dump_edits([edit("offset", make.offset(vector()), "resid_post.0")]))
    (found,) = load_edits(path)
    assert isinstance(found.map, LowRankMap)
    assert found.map.left.shape == (4, 0)
    assert found.map.is_translation()


# Hostile and broken files


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(InputError, match="the edits cannot be read") as caught:
        load_edits(path)
    assert caught.value.where == str(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the edits cannot be read"):
        load_edits(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\x80\x04pickle", b"\xff" * 64, (1 << 60).to_bytes(8, "little")]
)
def test_bytes_that_are_no_safetensors(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match="the edits cannot be read"):
        load_edits(path)


def test_a_file_cut_short(path: Path) -> None:
    content = dump_edits(all_kinds())
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match="the edits cannot be read"):
        load_edits(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"format": "other", "version": "1", "edits": "[]"},
        {"format": FORMAT, "edits": "[]"},
        {"format": FORMAT, "version": "2", "edits": "[]"},
    ],
)
def test_a_file_of_another_format(path: Path, metadata: dict[str, str] | None) -> None:
    path.write_bytes(save({"0.bias": vector()}, metadata=metadata))
    with pytest.raises(InputError, match=f"the file is not in the format {FORMAT} 1"):
        load_edits(path)


GOOD_ROW = {"kind": "scale", "concept": "c", "sites": ["mlp_act.0"], "map": 0, "form": "diagonal"}
GOOD_TENSORS = {"0.scale": vector(), "0.bias": vector(seed=1)}


def write(path: Path, edits: str, tensors: dict[str, Tensor]) -> None:
    metadata = {"format": FORMAT, "version": "1", "edits": edits}
    path.write_bytes(save({name: t.contiguous() for name, t in tensors.items()}, metadata=metadata))


def test_the_cases_below_start_from_a_good_file(path: Path) -> None:
    write(path, json.dumps([GOOD_ROW]), GOOD_TENSORS)
    (found,) = load_edits(path)
    assert found.sites == (parse_site("mlp_act.0"),)


@pytest.mark.parametrize(
    "edits",
    [
        "", "{", "null", "3", '"text"', '{"kind": "scale"}', "[null]", "[[]]", '["row"]', "[{}]",
        "[" * 100_000, '[{"map": ' + "9" * 5000 + "}]", "[NaN]",
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_a_list_of_edits_that_is_none(path: Path, edits: str) -> None:
    write(path, edits, GOOD_TENSORS)
    with pytest.raises(InputError, match="the edits are malformed") as caught:
        load_edits(path)
    assert caught.value.where == str(path)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "explode"),
        ("kind", 3),
        ("sites", ["resid_pst.3"]),
        ("sites", ["mlp_act.*"]),
        ("sites", ["mlp_act.0", "../../etc"]),
        ("sites", "mlp_act.0"),
        ("sites", [3]),
        ("sites", None),
        ("map", "first"),
        ("map", None),
        ("map", 1),
        ("map", -1),
        ("form", "pickle"),
        ("form", "lowrank"),
        ("form", None),
    ],
)
def test_a_row_with_a_wrong_value(path: Path, key: str, value: Any) -> None:
    write(path, json.dumps([{**GOOD_ROW, key: value}]), GOOD_TENSORS)
    with pytest.raises(InputError, match="the edits are malformed"):
        load_edits(path)


@pytest.mark.parametrize("key", GOOD_ROW)
def test_a_row_with_a_missing_key(path: Path, key: str) -> None:
    row = {name: value for name, value in GOOD_ROW.items() if name != key}
    write(path, json.dumps([row]), GOOD_TENSORS)
    with pytest.raises(InputError, match=f"the edits are malformed: KeyError.*{key}"):
        load_edits(path)


def test_one_map_has_one_form(path: Path) -> None:
    """The second row would be handed the first row's map, whatever form it names."""
    rows = [GOOD_ROW, {**GOOD_ROW, "form": "dense"}]
    write(path, json.dumps(rows), GOOD_TENSORS)
    with pytest.raises(InputError, match=r"the edits are malformed: KeyError\('0\.full'\)"):
        load_edits(path)


Make = Callable[[], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("form", "make_tensors", "what"),
    [
        ("diagonal", lambda: {"0.scale": vector()}, "0.bias"),
        ("diagonal", lambda: {"0.scale": vector(5), "0.bias": vector()}, "do not fit each other"),
        ("diagonal", lambda: {"0.scale": vector() / 0, "0.bias": vector()}, "not finite"),
        ("diagonal", lambda: {"0.scale": vector().int(), "0.bias": vector()}, "floating-point"),
        (
            "lowrank",
            lambda: {"0.left": matrix(4, 2), "0.right": matrix(3, 4), "0.bias": vector()},
            "do not fit each other",
        ),
        ("dense", lambda: {"0.full": matrix(4, 3), "0.bias": vector()}, "do not fit each other"),
        ("dense", lambda: {"0.full": vector(), "0.bias": matrix(4, 1)}, "do not fit each other"),
        ("update", lambda: {"0.left": matrix(4, 2), "0.right": matrix(3, 4)}, "do not fit"),
        ("update", lambda: {"0.left": matrix(4, 2), "0.right": matrix(2, 4) / 0}, "not finite"),
        ("update", lambda: {"0.left": torch.tensor(1.0), "0.right": vector()}, "malformed"),
    ],
)
def test_tensors_that_make_no_map(path: Path, form: str, make_tensors: Make, what: str) -> None:
    write(path, json.dumps([{**GOOD_ROW, "form": form}]), make_tensors())
    with pytest.raises(InputError, match=what) as caught:
        load_edits(path)
    assert caught.value.where == str(path)
