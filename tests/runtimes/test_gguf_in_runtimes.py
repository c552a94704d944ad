"""GGUF files in other types: edited, they load in the types they had and compute what they say.

The bases are made by llama.cpp's own converter from tiny checkpoints.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from exporting import convert_baked, written
from gguf_files import metadata
from install import GgufConverter
from reference import Reference, first_disagreement, largest_difference
from subject import (
    BROKEN,
    LINEAR,
    MODULES,
    STREAM,
    Spec,
    Subject,
    ablation,
    direction,
    heads_map,
    request,
    subject_at,
)
from tiny_checkpoints import (
    SHAPE,
    converted,
    plain_llama,
    randomised,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bake.checkpoints.gguf.codec import decode, encode
from bake.checkpoints.gguf.ggml import VARIABLE, load_ggml
from bake.checkpoints.gguf.types import BY_NAME
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.request import RuntimeResult

pytestmark = pytest.mark.runtimes

CASES: dict[str, tuple[Callable[[], PreTrainedModel], list[Spec]]] = {
    # The stream, with every bias in the way, and the queries (permuted weight and bias).
    "Llama": (lambda: tiny_llama(seed=3), [*STREAM, ("linear", heads_map(), "q.1")]),
    "Gemma 2": (tiny_gemma2, MODULES),
    "GPT-2": (tiny_gpt2, STREAM),
    "Mixtral": (tiny_mixtral, [*STREAM, ("linear", heads_map(), "q.2")]),
}


@dataclass(frozen=True, eq=False)
class Base:
    """A tiny model, its edits, and its GGUF in float32."""

    subject: Subject
    specs: list[Spec]
    file: Path


def based(
    make: Callable[[], PreTrainedModel], specs: list[Spec], folder: Path, converter: GgufConverter
) -> Base:
    subject = subject_at(make(), folder / "model")
    return Base(subject, specs, converted(subject.model, subject.checkpoint.path, converter))


@pytest.fixture(scope="module", params=CASES)
def base(
    request: pytest.FixtureRequest,
    gguf_converter: GgufConverter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Base:
    return based(*CASES[request.param], tmp_path_factory.mktemp("base"), gguf_converter)


def serve(file: Path, python: Path, adapter: Path | None = None) -> RuntimeResult:
    return ask(LLAMA_CPP, request(file, adapter), python)


def export(base: Base, file: Path, out: Path, **options: Any) -> Path:
    """Edit a file; every tensor keeps its type unless the test says otherwise."""
    plan = base.subject.plan(base.specs, targets=("llama.cpp",))
    asked = {"gguf_type": "keep", **options}
    artifact = written("gguf", plan, base.subject.checkpoint, out, gguf=file, **asked)
    return artifact.path / file.name


# --- other types and other files -----------------------------------------------------------------


def rewritten(
    source: Path,
    target: Path,
    kind: Callable[[str], str],
    *,
    ggml: Path | None = None,
    split: int = 0,
) -> list[Path]:
    """Write a file in other types, by gguf-py and ggml, and return its parts."""
    library = None if ggml is None else load_ggml(ggml)
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch, split_max_tensors=split)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        chosen = "F32" if tensor.data.ndim == 1 else kind(tensor.name)
        values = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        rows = torch.from_numpy(values).to(torch.float64).reshape(-1, values.shape[-1])
        raw = encode(rows, BY_NAME[chosen], tensor.name, ggml=library).numpy()
        shaped = raw.reshape(*values.shape[:-1], -1)
        if chosen == "F32":
            shaped = shaped.view(np.float32).reshape(values.shape)
        writer.add_tensor(tensor.name, shaped, raw_dtype=gguf.GGMLQuantizationType[chosen])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(target.parent.glob(f"{target.stem}*.gguf"))


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    return {
        tensor.name: (tensor.tensor_type.name, tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


def tensors_in(folder: Path) -> list[dict[str, Any]]:
    record = json.loads((folder / "bake.json").read_text(encoding="utf-8"))
    return list(record["gguf"]["tensors"])


def only_the_edit(file: Path, edited: Path) -> None:
    """Other tensors keep their bytes, all keep their types, and metadata gains bake's own keys."""
    before, after = stored(file), stored(edited)
    names = {row["name"] for row in tensors_in(edited.parent)}
    assert {n for n in before if before[n] != after[n]} == names & before.keys() != set()
    assert after.keys() - before.keys() == names - before.keys()
    assert all(after[name][0] == before[name][0] for name in before)
    keys, found = metadata(file), metadata(edited)
    assert found.keys() - keys.keys() == {"bake.version", "bake.plan_digest"}
    assert len(keys) > 15
    assert {name: found[name] for name in keys} == keys


def divergence(one: RuntimeResult | Reference, other: RuntimeResult) -> float:
    """Return the mean over all positions of KL(one ‖ other), in nats."""
    pairs = zip(one.prompt_logprobs, other.prompt_logprobs, strict=True)
    rows = [(np.exp(a) * (a - b)).sum(axis=-1, dtype=np.float64) for a, b in pairs]
    return float(np.concatenate(rows).mean())


def check_served(file: Path, edited: Path, python: Path) -> None:
    """Served in blocks, the edited file computes what its decoded weights say.

    In blocks llama.cpp rounds activations too, so the two are near and not equal.
    """
    (decoded,) = rewritten(file, file.with_name("decoded.gguf"), lambda _: "F32")
    (meant,) = rewritten(edited, file.with_name("meant.gguf"), lambda _: "F32")
    base, blocks = serve(decoded, python), serve(file, python)
    reference, result = serve(meant, python), serve(edited, python)
    effect = divergence(base, result)
    assert divergence(reference, result) < effect / 10
    assert divergence(base, blocks) < effect / 10  # the control: what blocks cost, edited or not


@pytest.mark.parametrize(("kind", "rounding"), [("Q8_0", "nearest"), ("Q4_0", "feedback")])
def test_edited_blocks_load_and_serve(
    base: Base, kind: str, rounding: str, llamacpp_python: Path, tmp_path: Path
) -> None:
    def chosen(name: str) -> str:
        return "F32" if name.startswith("position") else kind

    (file,) = rewritten(base.file, tmp_path / "base.gguf", chosen)
    edited = export(base, file, tmp_path / "out", rounding=rounding)
    only_the_edit(file, edited)
    check_served(file, edited, llamacpp_python)


def test_wider_types_are_served(base: Base, llamacpp_python: Path, tmp_path: Path) -> None:
    """What is promoted is read by llama.cpp beside the blocks that stay."""
    (file,) = rewritten(
        base.file, tmp_path / "base.gguf", lambda n: "F32" if n.startswith("position") else "Q4_0"
    )
    edited = export(base, file, tmp_path / "out", gguf_type="Q8_0")
    assert "Q8_0" in {kind for kind, _ in stored(edited).values()}
    check_served(file, edited, llamacpp_python)


def test_split_file_serves(base: Base, llamacpp_python: Path, tmp_path: Path) -> None:
    parts = rewritten(base.file, tmp_path / "part.gguf", lambda _: "F32", split=12)
    assert len(parts) > 2
    edited = export(base, parts[0], tmp_path / "out")
    base.subject.check(base.specs, serve(edited, llamacpp_python))


@pytest.mark.parametrize("base", ["Llama"], indirect=True)
def test_converted_checkpoint_serves(
    base: Base, gguf_converter: GgufConverter, llamacpp_python: Path, tmp_path: Path
) -> None:
    """The other way to a GGUF: llama.cpp's own converter on the baked checkpoint."""
    checkpoint = base.subject.checkpoint
    record = {"base": {"model": str(checkpoint.path)}}
    written(
        "checkpoint", base.subject.plan(base.specs), checkpoint, tmp_path / "baked", record=record
    )
    artifact = convert_baked(
        tmp_path / "baked",
        tmp_path / "out",
        llama_cpp=gguf_converter.script.parent,
        outtype="f32",
        python=gguf_converter.python,
    )
    file = artifact.path / "baked-F32.gguf"
    base.subject.check(base.specs, serve(file, llamacpp_python))
    # Both ways hold the same numbers, up to the two roundings to float32.
    edited = export(base, base.file, tmp_path / "edited")
    ours, theirs = stored(edited), stored(file)
    assert ours.keys() == theirs.keys()
    for name, (_, raw) in ours.items():
        one, two = (np.frombuffer(data, np.float32) for data in (raw, theirs[name][1]))
        assert np.abs(one - two).max() <= 32 * 2.0**-24 * np.abs(two).max(), name


# --- K-quants ------------------------------------------------------------------------------------


@pytest.fixture
def ggml(llamacpp_python: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ggml that the runtime's own package brings."""
    environment = llamacpp_python.parent.parent
    (library,) = environment.glob("lib/python*/site-packages/xllamacpp/xllamacpp*.so")
    monkeypatch.setenv(VARIABLE, str(library))
    return library


def wide_llama() -> PreTrainedModel:
    """A Llama whose rows are whole blocks of 256 values."""
    shape = {**SHAPE, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    return randomised(LlamaForCausalLM(LlamaConfig(**shape)), 21)


def q4_k_m(name: str) -> str:
    """Return the types of llama.cpp's Q4_K_M, roughly: six bits for the sensitive tensors."""
    return "Q6_K" if "ffn_down" in name or "attn_v" in name or "output.w" in name else "Q4_K"


MIXES: dict[str, Callable[[str], str]] = {"Q4_K_M": q4_k_m, "Q6_K": lambda _: "Q6_K"}


@pytest.mark.parametrize("mix", MIXES)
def test_k_quants_round_trip(
    mix: str, ggml: Path, gguf_converter: GgufConverter, llamacpp_python: Path, tmp_path: Path
) -> None:
    unit = direction(2, 256)
    specs: list[Spec] = [("affine", ablation(0.8, 2, 256), "resid")]
    base = based(wide_llama, specs, tmp_path, gguf_converter)
    (file,) = rewritten(base.file, tmp_path / "mixed.gguf", MIXES[mix], ggml=ggml)
    edited = export(base, file, tmp_path / "out")
    only_the_edit(file, edited)
    before, after, rows = stored(file), stored(edited), tensors_in(edited.parent)
    assert {row["type"] for row in rows if row["name"].endswith("weight")} >= {MIXES[mix]("x")}
    # What an ablated writer keeps of the component is what the record says, and next to nothing.
    (row,) = (row for row in rows if row["name"] == "blk.1.attn_output.weight")
    old, new = (
        decode(
            torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(256, -1),
            BY_NAME[kind],
            "w",
        )
        for kind, raw in (before[row["name"]], after[row["name"]])
    )
    leak = float((unit @ new).norm() / (unit @ old).norm())
    assert row["leak"] == pytest.approx(leak, rel=1e-4)
    assert leak < 1e-3
    # Rounding to nearest needs ggml's quantiser, and gives back much of what was removed.
    nearest = export(
        base, file, tmp_path / "b", rounding="nearest", allow=frozenset({"approximate"})
    )
    assert {n: kind for n, (kind, _) in stored(nearest).items()} == {
        n: kind for n, (kind, _) in before.items()
    }
    (row,) = (r for r in tensors_in(nearest.parent) if r["name"] == row["name"])
    assert row["leak"] > 0.02
    check_served(file, edited, llamacpp_python)


# --- adapters of bases in blocks -----------------------------------------------------------------


@torch.no_grad()
def in_blocks(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Round every matrix to blocks and back, in place, by gguf-py.

    Blocks lie along rows, so the order in which the converter writes the rows does not matter.
    """
    code = gguf.GGMLQuantizationType[kind]
    for parameter in model.parameters():
        if parameter.dim() == 2:
            blocks = gguf.quants.quantize(parameter.numpy(), code)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, code)))
    return model


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_adapter_of_a_base_in_blocks(
    kind: str, gguf_converter: GgufConverter, llamacpp_python: Path, tmp_path: Path
) -> None:
    """`--to gguf-lora --gguf FILE`: exact for the weights that are served, decoded.

    Two runs say so. On the decoded weights in float32 nothing else is rounded, and the adapter is
    the hooks to the promised 1e-4; the factors of the unquantised weights are not. On the blocks
    llama.cpp rounds the input of every product with a block matrix to eight bits, but not that of
    the factors: the base alone is some way off what its decoded weights say, and with the adapter
    it is as far off.
    """
    specs: list[Spec] = [*STREAM, *LINEAR]
    base = based(plain_llama, specs, tmp_path / "base", gguf_converter)
    (file,) = rewritten(base.file, tmp_path / "blocks.gguf", lambda _: kind)
    (decoded,) = rewritten(file, tmp_path / "decoded.gguf", lambda _: "F32")
    meant = subject_at(in_blocks(plain_llama(), kind), tmp_path / "meant")
    plan = base.subject.plan(specs, targets=("llama.cpp",))
    good, unquantised = (
        written("gguf-lora", plan, base.subject.checkpoint, tmp_path / name, gguf=model).path
        / "lora.gguf"
        for name, model in (("good", file), ("unquantised", None))
    )
    meant.check(specs, serve(decoded, llamacpp_python, good))
    meant.misses(specs, serve(decoded, llamacpp_python, unquantised))
    # On the blocks themselves: what their rounding costs the base, and no more than twice that.
    hooked, alone = meant.hooked(specs), serve(file, llamacpp_python)
    result = serve(file, llamacpp_python, good)
    cost = largest_difference(meant.plain, alone)
    assert BROKEN < cost < largest_difference(meant.plain, result) / 5
    assert largest_difference(hooked, result) < 2 * cost
    assert first_disagreement(hooked, result, 2 * cost) is None
    assert divergence(hooked, result) < divergence(hooked, alone) / 10
