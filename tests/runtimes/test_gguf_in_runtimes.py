"""GGUF files that bake edits, in llama.cpp: they equal hooks, and load in the types they had.

The bases are made by llama.cpp's own converter from tiny checkpoints.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from install import GgufConverter
from reference import Reference, first_disagreement, largest_difference, reference_logprobs
from tiny_checkpoints import HIDDEN, SHAPE, VOCAB, randomised, tiny_llama, write
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from bake.affine import AffineMap, LowRankMap
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.ggml import VARIABLE, load_ggml
from bake.checkpoints.gguf_codec import decode, encode
from bake.checkpoints.gguf_types import BY_NAME
from bake.edits import Edit, EditKind
from bake.families import Layout
from bake.outputs.checkpoint import export_checkpoint
from bake.outputs.gguf import export_gguf
from bake.outputs.gguf_convert import convert_checkpoint
from bake.plan import Plan, compile_plan
from bake.sites import expand
from bake.steer import steered
from bake.verify.compare import layout_of
from bake.verify.runtimes import llamacpp
from bake.verify.runtimes.base import RuntimeRequest, RuntimeResult
from bake.verify.runtimes.converter import convert

pytestmark = pytest.mark.runtimes

TOLERANCE = 1e-4  # nats, in float32: what the project promises
NEW_TOKENS = 16
PROMPTS = ((1,), (1, 17, 200, 45, 9), tuple(range(1, 60, 5)))


def far_from_zero(model: PreTrainedModel, gates: str, downs: str) -> PreTrainedModel:
    """Drive the activations out of [-10, 10] and undo the scale behind them.

    In between, ggml's CPU code looks GELU up in a table of float16 (ggml/src/ggml-cpu/vec.h), which
    costs some thousandths of a nat, edited or not, and would hide what is measured here.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if gates in name:
                parameter.mul_(1000)
            if name.endswith(f"{downs}.weight"):
                parameter.mul_(1e-3)
    return model


def tiny_gemma2() -> PreTrainedModel:
    shape = {**SHAPE, "tie_word_embeddings": True, "attention_bias": False}
    config = Gemma2Config(
        **shape, query_pre_attn_scalar=32, sliding_window=128, attn_implementation="eager"
    )
    model = far_from_zero(randomised(Gemma2ForCausalLM(config), 11), "gate_proj", "down_proj")
    with torch.no_grad():  # the head is the embedding, so its rows are those of a linear layer
        model.model.embed_tokens.weight.mul_(HIDDEN**-0.5)
    return model


def tiny_gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=3,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    return far_from_zero(randomised(GPT2LMHeadModel(config), 12), "c_fc", "mlp.c_proj")


def tiny_mixtral() -> PreTrainedModel:
    shape = {key: value for key, value in SHAPE.items() if key != "attention_bias"}
    config = MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)
    return randomised(MixtralForCausalLM(config), 13)


def direction(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(HIDDEN, generator=generator, dtype=torch.float64)
    return vector / vector.norm()


def ablation(constant: float = 0.0, seed: int = 0) -> AffineMap:
    unit = direction(seed)
    return LowRankMap(-unit[:, None], unit[None], constant * unit)


@dataclass(frozen=True)
class Case:
    make: Callable[[], PreTrainedModel]
    edits: Sequence[tuple[str, AffineMap, str | list[str]]]
    allow: tuple[str, ...] = ()


def queries() -> AffineMap:
    generator = torch.Generator().manual_seed(5)
    factors = torch.randn(2, 4 * 32, generator=generator, dtype=torch.float64) / 8
    return LowRankMap(factors.T.contiguous(), factors, torch.zeros(128, dtype=torch.float64))


CASES = {
    "Llama": Case(
        lambda: tiny_llama(seed=3),
        # The stream, a constant at the queries (permuted weight and bias), and module outputs.
        [("affine", ablation(0.8), "resid"), ("linear", queries(), "q.1")],
    ),
    "Gemma 2": Case(tiny_gemma2, [("ablate", ablation(), ["attn_out.*", "mlp_out.*"])]),
    "GPT-2": Case(tiny_gpt2, [("affine", ablation(0.8), "resid")]),
    "Mixtral": Case(
        tiny_mixtral, [("affine", ablation(0.8), "resid"), ("linear", queries(), "q.2")]
    ),
}


@dataclass(frozen=True, eq=False)
class Base:
    """A tiny model on disk, its plan, its GGUF in float32, and what it computes under hooks."""

    checkpoint: Checkpoint
    layout: Layout
    plan: Plan
    edits: tuple[Edit, ...]
    file: Path
    model: PreTrainedModel
    plain: Reference
    hooked: Reference


@pytest.fixture(scope="module", params=CASES)
def base(
    request: pytest.FixtureRequest,
    gguf_converter: GgufConverter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Base:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("base")
    model = case.make()
    checkpoint = open_checkpoint(written(model, folder / "model"))
    layout = layout_of(checkpoint)
    edits = tuple(
        Edit(EditKind(kind), "c", expand(at, layers=layout.layers, stream=layout.stream), map_)
        for kind, map_, at in case.edits
    )
    plan = compile_plan(
        edits,
        layout,
        gain=lambda name: checkpoint.read(name).to(torch.float64),
        config=checkpoint.config,
        targets=("llama.cpp",),
    )
    file = folder / "base.gguf"
    script = gguf_converter.script
    if isinstance(model, GPT2LMHeadModel):
        script = patched(script, folder / "convert.py")
    convert(checkpoint.path, file, converter=script, python=gguf_converter.python)
    plain = reference_logprobs(model, PROMPTS, NEW_TOKENS)
    with steered(model, layout, edits):
        hooked = reference_logprobs(model, PROMPTS, NEW_TOKENS)
    return Base(checkpoint, layout, plan, edits, file, model, plain, hooked)


def written(model: PreTrainedModel, folder: Path) -> Path:
    """Save the model with a vocabulary that its own converter takes."""
    write(model, folder)
    if isinstance(model, GPT2LMHeadModel):
        (folder / "tokenizer.model").unlink()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["n_ctx"] = config["n_positions"]
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        byte_level_tokenizer(folder)
    return folder


def patched(script: Path, path: Path) -> Path:
    """Write a script that runs the converter on a vocabulary whose pre-tokenizer it cannot know.

    It recognises byte-level vocabularies by a hash of what they make of a text.
    """
    path.write_text(
        "import runpy, sys\n"
        f"sys.path[:0] = [{str(script.parent)!r}, {str(script.parent / 'gguf-py')!r}]\n"
        "from conversion.base import TextModel\n"
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n",
        encoding="utf-8",
    )
    return path


def byte_level_tokenizer(folder: Path) -> None:
    """Write the byte-level tokenizer of VOCAB tokens that GPT-2's converter recognises."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *alphabet]
    words += [a + b for a in alphabet for b in alphabet][: VOCAB - len(words)]
    merges = [(word[0], word[1]) for word in words[3 + len(alphabet) :]]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def serve(file: Path, python: Path) -> RuntimeResult:
    return llamacpp.run(RuntimeRequest(file, PROMPTS, NEW_TOKENS, VOCAB, "float32"), python)


def export(base: Base, file: Path, out: Path, **options: Any) -> Path:
    artifact = export_gguf(base.plan, base.checkpoint, file, out, record={}, **options)
    return artifact.path / file.name


def test_edited_float32_file_equals_hooks(
    base: Base, llamacpp_python: Path, tmp_path: Path
) -> None:
    result = serve(export(base, base.file, tmp_path / "out"), llamacpp_python)
    assert largest_difference(base.hooked, result) <= TOLERANCE
    assert first_disagreement(base.hooked, result, TOLERANCE) is None
    # The effect, and the control: the unedited file is far away from the hooks and is the base.
    assert largest_difference(base.plain, result) > 0.05
    control = serve(base.file, llamacpp_python)
    assert largest_difference(base.plain, control) <= TOLERANCE
    assert largest_difference(base.hooked, control) > 0.05


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


def divergence(one: RuntimeResult, other: RuntimeResult) -> float:
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
    before, after = stored(file), stored(edited)
    names = {row["name"] for row in tensors_in(edited.parent)}
    assert {n for n in before if before[n] != after[n]} == names & before.keys()
    assert all(after[name][0] == before[name][0] for name in before)
    check_served(file, edited, llamacpp_python)


def test_split_file_serves(base: Base, llamacpp_python: Path, tmp_path: Path) -> None:
    parts = rewritten(base.file, tmp_path / "part.gguf", lambda _: "F32", split=12)
    assert len(parts) > 2
    edited = export(base, parts[0], tmp_path / "out")
    result = serve(edited, llamacpp_python)
    assert largest_difference(base.hooked, result) <= TOLERANCE


@pytest.mark.parametrize("base", ["Llama"], indirect=True)
def test_converted_checkpoint_serves(
    base: Base, gguf_converter: GgufConverter, llamacpp_python: Path, tmp_path: Path
) -> None:
    """The other way to a GGUF: llama.cpp's own converter on the baked checkpoint."""
    record = {"base": {"model": str(base.checkpoint.path)}}
    export_checkpoint(base.plan, base.checkpoint, tmp_path / "baked", record=record)
    artifact = convert_checkpoint(
        tmp_path / "baked",
        tmp_path / "out",
        llama_cpp=gguf_converter.script.parent,
        outtype="f32",
        python=gguf_converter.python,
    )
    file = artifact.path / "baked-F32.gguf"
    assert largest_difference(base.hooked, serve(file, llamacpp_python)) <= TOLERANCE
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
    from transformers import LlamaConfig, LlamaForCausalLM

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
    model = wide_llama()
    checkpoint = open_checkpoint(write(model, tmp_path / "model"))
    layout = layout_of(checkpoint)
    generator = torch.Generator().manual_seed(2)
    unit = torch.randn(256, generator=generator, dtype=torch.float64)
    unit = unit / unit.norm()
    map_ = LowRankMap(-unit[:, None], unit[None], 0.8 * unit)
    sites = expand("resid", layers=layout.layers, stream=layout.stream)
    edits = (Edit(EditKind("affine"), "c", sites, map_),)
    plan = compile_plan(
        edits,
        layout,
        gain=lambda name: checkpoint.read(name).to(torch.float64),
        config=checkpoint.config,
        targets=("llama.cpp",),
    )
    single = tmp_path / "f32.gguf"
    convert(checkpoint.path, single, converter=gguf_converter.script, python=gguf_converter.python)
    (file,) = rewritten(single, tmp_path / "base.gguf", MIXES[mix], ggml=ggml)
    plain = reference_logprobs(model, PROMPTS, NEW_TOKENS)
    with steered(model, layout, edits):
        hooked = reference_logprobs(model, PROMPTS, NEW_TOKENS)
    base = Base(checkpoint, layout, plan, edits, file, model, plain, hooked)
    edited = export(base, file, tmp_path / "out")
    before, after = stored(file), stored(edited)
    rows = tensors_in(edited.parent)
    assert {n for n in before if before[n] != after[n]} == {row["name"] for row in rows}
    assert all(after[name][0] == before[name][0] for name in before)
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
