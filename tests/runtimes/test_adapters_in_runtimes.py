"""Adapters and control vectors in the runtimes that they are for: they equal hooks.

vLLM serves the PEFT folder (`--enable-lora`), llama.cpp the GGUF adapter (`--lora`) and the control
vector (`--control-vector`), each beside an unedited base that its own tools made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from install import GgufConverter
from reference import Reference, first_disagreement, largest_difference, reference_logprobs
from test_gguf_in_runtimes import (
    NEW_TOKENS,
    PROMPTS,
    TOLERANCE,
    ablation,
    direction,
    queries,
    tiny_gemma2,
    tiny_mixtral,
)
from tiny_checkpoints import SHAPE, VOCAB, randomised, write
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bake.affine import AffineMap, translation
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.edits import Edit, EditKind
from bake.families import Layout
from bake.outputs.control_vector import export_control_vector
from bake.outputs.gguf_lora import export_gguf_lora
from bake.outputs.lora import export_lora
from bake.plan import Plan, compile_plan
from bake.sites import expand
from bake.steer import steered
from bake.verify.compare import layout_of
from bake.verify.runtimes import llamacpp, vllm
from bake.verify.runtimes.base import RuntimeFailed, RuntimeRequest, RuntimeResult
from bake.verify.runtimes.converter import convert

pytestmark = pytest.mark.runtimes

EFFECT = 0.05  # nats: what an edit moves at least, hundreds of tolerances
NO_BIAS = {**SHAPE, "attention_bias": False}
Spec = tuple[str, AffineMap, str | list[str]]


def tiny_llama(*, tied: bool = False) -> PreTrainedModel:
    config = LlamaConfig(**{**NO_BIAS, "tie_word_embeddings": tied})
    return randomised(LlamaForCausalLM(config), 21)


def tiny_qwen3() -> PreTrainedModel:
    return randomised(Qwen3ForCausalLM(Qwen3Config(**NO_BIAS)), 22)


STREAM: list[Spec] = [("affine", ablation(0.8), "resid")]
MODULES: list[Spec] = [("ablate", ablation(), ["attn_out.*", "mlp_out.*"])]
OFFSETS: list[Spec] = [
    ("offset", translation(0.5 * direction(1)), "resid_post.1-2"),
    ("offset", translation(-0.4 * direction(2)), "resid_pre.2"),
]


@dataclass(frozen=True, eq=False)
class Base:
    """A tiny model on disk and in memory."""

    checkpoint: Checkpoint
    layout: Layout
    model: PreTrainedModel
    plain: Reference

    def plan(self, specs: Sequence[Spec], targets: Sequence[str] = ("transformers",)) -> Plan:
        """Return the plan of some edits."""
        layout = self.layout
        edits = tuple(
            Edit(EditKind(kind), "c", expand(at, layers=layout.layers, stream=layout.stream), map_)
            for kind, map_, at in specs
        )
        return compile_plan(
            edits,
            layout,
            gain=lambda name: self.checkpoint.read(name).to(torch.float64),
            config=self.checkpoint.config,
            targets=targets,
        )

    def hooked(self, plan: Plan) -> Reference:
        """Return what the model computes under the edits as hooks."""
        with steered(self.model, self.layout, plan.edits):
            return reference_logprobs(self.model, PROMPTS, NEW_TOKENS)


def base_of(model: PreTrainedModel, folder: Path) -> Base:
    checkpoint = open_checkpoint(write(model, folder))
    plain = reference_logprobs(model, PROMPTS, NEW_TOKENS)
    return Base(checkpoint, layout_of(checkpoint), model, plain)


def request(model: Path, adapter: Path | None = None) -> RuntimeRequest:
    return RuntimeRequest(model, PROMPTS, NEW_TOKENS, VOCAB, "float32", adapter)


def check(base: Base, hooked: Reference, result: RuntimeResult) -> None:
    """The runtime computes what the hooks compute, and that is not what the base computes."""
    assert largest_difference(hooked, result) <= TOLERANCE
    assert first_disagreement(hooked, result, TOLERANCE) is None
    assert largest_difference(base.plain, result) > EFFECT
    assert first_disagreement(base.plain, result, TOLERANCE) is not None


# --- llama.cpp -----------------------------------------------------------------------------------

# In each case a part of the adapter that the converter stores in another order, or in a stack.
LLAMACPP: dict[str, tuple[Callable[[], PreTrainedModel], list[Spec]]] = {
    "Llama": (tiny_llama, [*STREAM, ("linear", queries(), "q.1"), ("linear", queries(), "z.2")]),
    "Qwen3": (tiny_qwen3, [*STREAM, ("ablate", ablation(seed=3), "ln2_out.1")]),
    "Gemma 2": (tiny_gemma2, MODULES),
    "Mixtral": (tiny_mixtral, [*STREAM, ("linear", queries(), "q.2")]),
}


@dataclass(frozen=True, eq=False)
class Served:
    """A base with its GGUF in float32."""

    base: Base
    file: Path
    edits: list[Spec]


@pytest.fixture(scope="module", params=LLAMACPP)
def served(
    request: pytest.FixtureRequest,
    gguf_converter: GgufConverter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    make, edits = LLAMACPP[request.param]
    folder = tmp_path_factory.mktemp("base")
    base = base_of(make(), folder / "model")
    return Served(base, converted(base, folder, gguf_converter), edits)


def converted(base: Base, folder: Path, converter: GgufConverter) -> Path:
    file = folder / "base.gguf"
    convert(base.checkpoint.path, file, converter=converter.script, python=converter.python)
    return file


def test_gguf_adapter_in_llamacpp(served: Served, llamacpp_python: Path, tmp_path: Path) -> None:
    base, plan = served.base, served.base.plan(served.edits)
    adapter = export_gguf_lora(plan, base.checkpoint, tmp_path / "out", record={}).path
    result = llamacpp.run(request(served.file, adapter / "lora.gguf"), llamacpp_python)
    check(base, base.hooked(plan), result)


def test_control_vector_in_llamacpp(served: Served, llamacpp_python: Path, tmp_path: Path) -> None:
    """Also where no checkpoint can hold the offset: Qwen3, Gemma 2 and Mixtral have no slot."""
    base, plan = served.base, served.base.plan(OFFSETS)
    vector = export_control_vector(plan, tmp_path / "out", record={}).path
    result = llamacpp.run(request(served.file, vector / "control-vector.gguf"), llamacpp_python)
    check(base, base.hooked(plan), result)
    # The control: the same vectors one block later are another model.
    later = [(kind, map_, "resid_post.2") for kind, map_, _ in OFFSETS]
    assert largest_difference(base.hooked(base.plan(later)), result) > EFFECT


def test_llamacpp_aborts_on_an_embedding_adapter_of_a_tied_model(
    llamacpp_python: Path, gguf_converter: GgufConverter, tmp_path: Path
) -> None:
    """Why bake refuses it: the adapter is good for the untied model, and kills the tied one."""
    untied = base_of(tiny_llama(), tmp_path / "untied")
    plan = untied.plan(STREAM)
    adapter = export_gguf_lora(plan, untied.checkpoint, tmp_path / "out", record={}).path
    tied = base_of(tiny_llama(tied=True), tmp_path / "tied")
    file = converted(tied, tmp_path, gguf_converter)
    with pytest.raises(RuntimeFailed, match="signal SIGABRT"):
        llamacpp.run(request(file, adapter / "lora.gguf"), llamacpp_python)


# --- vLLM ----------------------------------------------------------------------------------------

VLLM: dict[str, tuple[Callable[[], PreTrainedModel], list[Spec]]] = {
    "Llama": (tiny_llama, [*STREAM, ("linear", queries(), "q.1")]),
    "Llama, a tied head": (lambda: tiny_llama(tied=True), STREAM),
    "Gemma 2": (tiny_gemma2, MODULES),
}


@pytest.mark.parametrize("case", VLLM)
def test_adapter_in_vllm(case: str, vllm_python: Path, tmp_path: Path) -> None:
    make, edits = VLLM[case]
    base = base_of(make(), tmp_path / "model")
    plan = base.plan(edits, targets=("transformers", "vllm"))
    adapter = export_lora(plan, base.checkpoint, tmp_path / "out", record={}).path
    result = vllm.run(request(base.checkpoint.path, adapter), vllm_python)
    check(base, base.hooked(plan), result)


def test_vllm_refuses_an_embedding_adapter_of_gemma(vllm_python: Path, tmp_path: Path) -> None:
    """Why the plan refuses it for the target vllm; PEFT takes it."""
    base = base_of(tiny_gemma2(), tmp_path / "model")
    plan = base.plan([("offset", translation(direction()), "embed")])
    adapter = export_lora(plan, base.checkpoint, tmp_path / "out", record={}).path
    with pytest.raises(RuntimeFailed, match="expected target modules in"):
        vllm.run(request(base.checkpoint.path, adapter), vllm_python)
