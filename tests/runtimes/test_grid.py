"""Every family in every carrier, in every runtime that loads it: as under hooks, to 1e-4 nats.

The hooks are transformers' own, on the unedited base, in float32. Each case has an effect (the
hooks move log-probabilities by 0.05 nats and more, and greedy tokens) and, for each carrier and
runtime, a control: the artifact with a piece of it undone is at least 0.01 nats off.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from adapters import config_of, factors_of, peft_model, rewritten
from exporting import convert_baked, written
from install import GgufConverter
from reference import Reference, largest_difference, reference_logprobs
from safetensors.torch import load_file, save_file
from subject import (
    LINEAR,
    MODULES,
    NEW_TOKENS,
    OFFSETS,
    PROMPTS,
    STREAM,
    TOLERANCE,
    Spec,
    Subject,
    Z,
    ablation,
    direction,
    heads_map,
    request,
    served_adapters,
    subject_at,
)
from tiny_checkpoints import (
    converted,
    converter_for,
    plain_llama,
    plain_qwen3,
    tiny_gemma1,
    tiny_gemma2,
    tiny_gemma3,
    tiny_gpt2,
    tiny_gpt_neox,
    tiny_mistral,
    tiny_mixtral,
    tiny_olmo2,
    tiny_phi3,
    tiny_qwen2,
)
from transformers import PreTrainedModel

from bake.affine import translation
from bake.errors import InexactPlan
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.vllm import VLLM

pytestmark = pytest.mark.runtimes


@dataclass(frozen=True)
class GridCase:
    """A tiny model, and the edits that each carrier takes to its runtimes."""

    make: Callable[[], PreTrainedModel]
    checkpoint: list[Spec]
    adapter: list[Spec] | None
    """None where the case is the checkpoint's alone."""
    vllm_adapter: list[Spec] | None = None
    """Where vLLM takes less than PEFT and llama.cpp."""
    refused: str = ""
    """Why the plan lets no adapter go to vLLM."""
    recast: bool = False
    """Whether the checkpoint is declared as a Llama, which a base's GGUF cannot be."""


# Among the edits of each family is a part that the converter stores in another order, in a stack or
# under another name, and a constant that opens or fills a bias wherever the architecture has one.
LLAMA: list[Spec] = [
    *STREAM,
    ("offset", translation(0.5 * direction(1)), "resid_post.1"),
    ("offset", translation(2 * direction(6)), "q.1"),
]
NEOX: list[Spec] = [
    *STREAM,
    ("offset", translation(0.5 * direction(1)), "resid_post.1"),
    ("linear", heads_map(), "q.1"),
]
EMBED: list[Spec] = [("offset", translation(direction(1)), "embed")]
READERS: list[Spec] = [("ablate", ablation(seed=3), ["ln1_out.1", "ln2_out.2"])]

CASES = {
    "Llama": GridCase(plain_llama, LLAMA, [*STREAM, *LINEAR]),
    "Qwen2": GridCase(
        tiny_qwen2,
        [*STREAM, ("offset", translation(2 * direction(6)), "q.1"), *Z],
        [*STREAM, *Z],
        vllm_adapter=[*MODULES, *Z],
    ),
    "Qwen2 as Llama": GridCase(
        tiny_qwen2,
        [*STREAM, ("offset", translation(0.5 * direction(1)), "resid_post.1")],
        None,
        recast=True,
    ),
    "Qwen3": GridCase(plain_qwen3, [*STREAM, *LINEAR], [*STREAM, *LINEAR, *READERS]),
    "Mistral": GridCase(
        tiny_mistral,
        [*STREAM, *LINEAR],
        [*STREAM, *LINEAR, *READERS],
        vllm_adapter=[*MODULES, *LINEAR, *READERS],
    ),
    "Phi-3": GridCase(tiny_phi3, [*STREAM, *LINEAR], [*STREAM, *LINEAR, *READERS]),
    "OLMo 2": GridCase(tiny_olmo2, [*MODULES, *LINEAR, *EMBED], [*MODULES, *LINEAR, *EMBED]),
    "GPT-NeoX": GridCase(lambda: tiny_gpt_neox(parallel=True), NEOX, [*READERS, *Z]),
    "GPT-NeoX sequential": GridCase(lambda: tiny_gpt_neox(parallel=False), NEOX, [*READERS, *Z]),
    "Gemma": GridCase(tiny_gemma1, [*MODULES, *Z], [*MODULES, *READERS]),
    "Gemma 2": GridCase(tiny_gemma2, [*MODULES, *Z], [*MODULES, *READERS]),
    "Gemma 3": GridCase(  # its head may part from the embedding in every runtime, Gemma 2's may not
        tiny_gemma3,
        [*MODULES, *EMBED],
        [*MODULES, *Z, *READERS],
    ),
    "GPT-2": GridCase(
        tiny_gpt2,
        [*STREAM, ("offset", translation(0.5 * direction(1)), "resid_post.1")],
        [*READERS, *Z],
        refused="vllm takes no adapters for GPT2LMHeadModel",
    ),
    "Mixtral": GridCase(
        tiny_mixtral,
        [*STREAM, ("linear", heads_map(), "q.2")],
        [*STREAM, ("linear", heads_map(), "q.2")],
        refused="vllm takes no adapter of experts in MixtralForCausalLM",
    ),
}


@dataclass(frozen=True, eq=False)
class GridCell:
    """One case at work: its base, what converts it, and the folder that it lives in."""

    name: str
    case: GridCase
    base: Subject
    folder: Path
    converter: GgufConverter

    @property
    def gguf(self) -> Path:
        """The base in GGUF, in float32."""
        file = self.folder / "base.gguf"
        if not file.exists():
            converted(self.base.model, self.base.checkpoint.path, self.converter)
        return file

    def baked(self) -> Path:
        """Return the edited checkpoint."""
        out, allow = self.folder / "baked", ["recast"] if self.case.recast else []
        if not out.exists():
            plan = self.base.plan(self.case.checkpoint, allow=allow)
            record = {"base": {"model": str(self.base.checkpoint.path)}}
            allowed = frozenset(allow)
            written("checkpoint", plan, self.base.checkpoint, out, record=record, allow=allowed)
        return out


@pytest.fixture(scope="module", params=CASES)
def cell(
    request: pytest.FixtureRequest,
    gguf_converter: GgufConverter,
    tmp_path_factory: pytest.TempPathFactory,
) -> GridCell:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("cell")
    return GridCell(
        request.param, case, subject_at(case.make(), folder / "model"), folder, gguf_converter
    )


all_carriers = pytest.mark.parametrize(
    "cell", [name for name, case in CASES.items() if case.adapter], indirect=True
)


# --- the checkpoint ------------------------------------------------------------------------------


def without_one_writer(cell: GridCell, baked: Path, out: Path) -> Path:
    """Return a copy of the checkpoint in which the last writer is the base's again."""
    writer = cell.base.layout.branches[-1].writes[-1].weight
    out.mkdir()
    for path in baked.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    for path in baked.glob("*.safetensors"):
        tensors = load_file(path)
        if writer in tensors:
            before = cell.base.checkpoint.read(writer)
            assert not torch.equal(tensors[writer], before)
            tensors[writer] = before
        save_file(tensors, out / path.name, metadata={"format": "pt"})
    return out


def test_checkpoint_in_transformers(cell: GridCell, tmp_path: Path) -> None:
    def computed(folder: Path) -> Reference:
        return reference_logprobs(tiny.load(folder, torch.float32), PROMPTS, NEW_TOKENS)

    baked = cell.baked()
    cell.base.check(cell.case.checkpoint, computed(baked))
    broken = computed(without_one_writer(cell, baked, tmp_path / "broken"))
    cell.base.misses(cell.case.checkpoint, broken)


def test_checkpoint_in_vllm(cell: GridCell, vllm_python: Path, tmp_path: Path) -> None:
    baked = cell.baked()
    cell.base.check(cell.case.checkpoint, ask(VLLM, request(baked), vllm_python))
    if cell.name == "Llama":  # one engine more, for all families' sake
        broken = without_one_writer(cell, baked, tmp_path / "broken")
        cell.base.misses(cell.case.checkpoint, ask(VLLM, request(broken), vllm_python))


def test_converted_checkpoint_in_llamacpp(
    cell: GridCell, llamacpp_python: Path, tmp_path: Path
) -> None:
    """`--to gguf --llama-cpp DIR`: llama.cpp's own converter on the baked checkpoint."""

    def file_of(baked: Path, out: Path) -> Path:
        scripts = converter_for(cell.base.model, cell.converter, cell.folder / "converter")
        python = cell.converter.python
        made = convert_baked(baked, out, scripts, outtype="f32", python=python)
        return next(made.path.glob("*.gguf"))

    baked = cell.baked()
    file = file_of(baked, tmp_path / "gguf")
    cell.base.check(cell.case.checkpoint, ask(LLAMA_CPP, request(file), llamacpp_python))
    if cell.case.recast:
        assert gguf.GGUFReader(file).fields["general.architecture"].contents() == "llama"
    without = without_one_writer(cell, baked, tmp_path / "without")
    (without / "bake").mkdir()
    for path in (baked / "bake").iterdir():
        (without / "bake" / path.name).write_bytes(path.read_bytes())
    broken = ask(LLAMA_CPP, request(file_of(without, tmp_path / "broken")), llamacpp_python)
    cell.base.misses(cell.case.checkpoint, broken)


# --- GGUF from the base's GGUF -------------------------------------------------------------------


@all_carriers
def test_edited_gguf_in_llamacpp(cell: GridCell, llamacpp_python: Path, tmp_path: Path) -> None:
    """`--to gguf --gguf FILE`; the base's own file is the base, so it is what was edited."""
    base, specs = cell.base, cell.case.checkpoint
    plan = base.plan(specs, targets=("llama.cpp",))
    out = written("gguf", plan, base.checkpoint, tmp_path / "out", gguf=cell.gguf).path
    file = out / "base.gguf"
    base.check(specs, ask(LLAMA_CPP, request(file), llamacpp_python))
    unedited = ask(LLAMA_CPP, request(cell.gguf), llamacpp_python)
    assert largest_difference(base.plain, unedited) <= TOLERANCE
    base.misses(specs, unedited)
    down = re.compile(rf"blk\.{base.layout.layers - 1}\.ffn_down\w*\.weight")
    restore(file, cell.gguf, next(n for n in tensors_in(file) if down.fullmatch(n)))
    base.misses(specs, ask(LLAMA_CPP, request(file), llamacpp_python))


def tensors_in(file: Path) -> list[str]:
    return [tensor.name for tensor in gguf.GGUFReader(file).tensors]


def restore(file: Path, base: Path, name: str) -> None:
    """Write a tensor of the base's file over the edited one."""
    before = next(t for t in gguf.GGUFReader(base).tensors if t.name == name)
    after = next(t for t in gguf.GGUFReader(file, "r+").tensors if t.name == name)
    assert not np.array_equal(after.data, before.data)
    after.data[:] = before.data
    after.data.base.flush()


def test_recast_edit_of_a_base_gguf_is_refused(
    gguf_converter: GgufConverter, tmp_path: Path
) -> None:
    """Its biases have no slot in a Qwen2, and a file of a Qwen2 cannot become a Llama's."""
    base = subject_at(tiny_qwen2(), tmp_path / "model")
    file = converted(base.model, base.checkpoint.path, gguf_converter)
    plan = base.plan(CASES["Qwen2 as Llama"].checkpoint, allow=["recast"])
    with pytest.raises(InexactPlan, match=r"declares the model as llama, and base\.gguf is"):
        written("gguf", plan, base.checkpoint, tmp_path / "out", gguf=file)
    assert not (tmp_path / "out").exists()


# --- the PEFT adapter ----------------------------------------------------------------------------


def halved(adapter: Path, out: Path) -> Path:
    """Return the same factors at half their scale."""
    return rewritten(adapter, out, factors_of(adapter), lora_alpha=config_of(adapter)["r"] / 2)


@all_carriers
def test_adapter_in_peft(cell: GridCell, tmp_path: Path) -> None:
    def computed(adapter: Path) -> Reference:
        model = peft_model(base.checkpoint.path, adapter, torch.float32).eval()
        return reference_logprobs(model, PROMPTS, NEW_TOKENS)

    base, specs = cell.base, cell.case.adapter
    plan = base.plan(specs)
    adapter = written("lora", plan, base.checkpoint, tmp_path / "out").path
    base.check(specs, computed(adapter))
    base.misses(specs, computed(halved(adapter, tmp_path / "half")))


def check_adapters_in_vllm(base: Subject, specs: Sequence[Spec], python: Path, out: Path) -> None:
    """One engine: the adapter, the same one halved, and none."""
    plan = base.plan(specs, targets=("transformers", "vllm"))
    good = written("lora", plan, base.checkpoint, out / "lora").path
    half = halved(good, out / "half")
    (out / "engine").mkdir()
    adapters = {"good": good, "half": half, "none": None}
    results = served_adapters(base, adapters, python, out / "engine")
    base.check(specs, results["good"])
    base.misses(specs, results["half"])
    base.misses(specs, results["none"])


@all_carriers
def test_adapter_in_vllm(cell: GridCell, vllm_python: Path, tmp_path: Path) -> None:
    base, case = cell.base, cell.case
    if not case.refused:
        check_adapters_in_vllm(base, case.vllm_adapter or case.adapter, vllm_python, tmp_path)
        return
    plan = base.plan(case.adapter, targets=("transformers", "vllm"))
    with pytest.raises(InexactPlan, match=case.refused):
        written("lora", plan, base.checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_adapter_of_a_tied_embedding_in_vllm(vllm_python: Path, tmp_path: Path) -> None:
    """The head stays the base's, as under hooks."""
    base = subject_at(plain_llama(tied=True), tmp_path / "model")
    check_adapters_in_vllm(base, STREAM, vllm_python, tmp_path)


# --- the GGUF adapter and the control vector -----------------------------------------------------


@all_carriers
def test_gguf_adapter_in_llamacpp(cell: GridCell, llamacpp_python: Path, tmp_path: Path) -> None:
    base, specs = cell.base, cell.case.adapter
    plan = base.plan(specs, targets=("llama.cpp",))
    out = written("gguf-lora", plan, base.checkpoint, tmp_path / "out").path
    file = out / "lora.gguf"
    base.check(specs, ask(LLAMA_CPP, request(cell.gguf, file), llamacpp_python))
    # Alpha 0 stands for scale 1; another alpha is divided by the rank.
    reader = gguf.GGUFReader(file, "r+")
    rank = next(t for t in reader.tensors if t.name.endswith("attn_output.weight.lora_a")).shape[1]
    alpha = reader.fields["adapter.lora.alpha"]
    assert alpha.contents() == 0
    alpha.parts[alpha.data[0]][0] = rank / 2
    alpha.parts[alpha.data[0]].base.flush()
    base.misses(specs, ask(LLAMA_CPP, request(cell.gguf, file), llamacpp_python))


@all_carriers
def test_control_vector_in_llamacpp(cell: GridCell, llamacpp_python: Path, tmp_path: Path) -> None:
    """Also where no checkpoint can hold the offset: Qwen3, Gemma and Mixtral have no slot."""
    base = cell.base
    out = written("control-vector", base.plan(OFFSETS), base.checkpoint, tmp_path / "out").path
    file = out / "control-vector.gguf"
    base.check(OFFSETS, ask(LLAMA_CPP, request(cell.gguf, file), llamacpp_python))
    reader = gguf.GGUFReader(file, "r+")
    one = next(t for t in reader.tensors if t.name == "direction.2")
    one.data[:] = 0
    one.data.base.flush()
    base.misses(OFFSETS, ask(LLAMA_CPP, request(cell.gguf, file), llamacpp_python))
