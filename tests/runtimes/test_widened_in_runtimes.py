"""Widened models in the real runtimes: what transformers computes with the same files.

What relocation itself loses is not the runtimes' matter: the reference is transformers on the
widened checkpoint, to 1e-4 nats. The control is a copy whose norms let nothing of the new
dimensions through, which a runtime that read only the old ones would agree with.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from exporting import convert_baked, written
from install import GgufConverter
from reference import Reference, largest_difference, reference_logprobs
from safetensors.torch import load_file, save_file
from subject import BROKEN, EFFECT, NEW_TOKENS, PROMPTS, TOLERANCE, direction, request, subject_at
from tiny_checkpoints import HIDDEN, converter_for, tiny_llama, tiny_mistral, tiny_qwen2
from transformers import PreTrainedModel

from bake import edits
from bake.errors import InexactPlan
from bake.process import RuntimeFailed
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.vllm import VLLM

pytestmark = pytest.mark.runtimes

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_llama(3),
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
}
HEADS_OF_THE_WIDTH = {"qwen2"}
"""Both take the size of heads from the width of the stream there, whatever config.json says."""


class Widened:
    """A widened checkpoint, what transformers makes of it, and a broken copy."""

    def __init__(self, family: str, folder: Path) -> None:
        self.base = subject_at(FAMILIES[family](), folder / "model")
        specs = [("ablate", edits.ablate(direction(1)), "resid_post.1")]
        plan = self.base.plan(specs, allow=["widen"])
        assert plan.layout.hidden > HIDDEN and plan.widened
        self.family = family
        self.statuses = {verdict.runtime: verdict.status for verdict in plan.runtimes}
        record = {"base": {"model": str(self.base.checkpoint.path)}}
        self.out = folder / "wide"
        allow = frozenset({"widen"})
        written("checkpoint", plan, self.base.checkpoint, self.out, record=record, allow=allow)
        self.reference = self.computed(self.out)
        assert largest_difference(self.base.plain, self.reference) > EFFECT

    @staticmethod
    def computed(folder: Path) -> Reference:
        return reference_logprobs(tiny.load(folder, torch.float32), PROMPTS, NEW_TOKENS)

    def broken(self, out: Path) -> Path:
        """Return a copy in which what went to the new dimensions is not read."""
        (out / "bake").mkdir(parents=True)
        for path in self.out.rglob("*"):
            if path.is_file() and path.suffix != ".safetensors":
                (out / path.relative_to(self.out)).write_bytes(path.read_bytes())
        for path in self.out.glob("*.safetensors"):
            tensors = load_file(path)
            for name, tensor in tensors.items():
                if name.endswith("layernorm.weight"):
                    tensor[HIDDEN:] = 0
            save_file(tensors, out / path.name, metadata={"format": "pt"})
        return out


@pytest.fixture(scope="module", params=FAMILIES)
def widened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Widened:
    return Widened(request.param, tmp_path_factory.mktemp("widened"))


def test_vllm(widened: Widened, vllm_python: Path, tmp_path: Path) -> None:
    if widened.family in HEADS_OF_THE_WIDTH:
        assert widened.statuses["vllm"] == "refused"
        with pytest.raises(RuntimeFailed):
            ask(VLLM, request(widened.out), vllm_python)
        return
    assert widened.statuses["vllm"] == "approximate"
    found = ask(VLLM, request(widened.out), vllm_python)
    assert largest_difference(widened.reference, found) <= TOLERANCE
    broken = widened.computed(widened.broken(tmp_path / "broken"))
    assert largest_difference(broken, found) > BROKEN


def test_llamacpp_by_its_own_converter(
    widened: Widened, gguf_converter: GgufConverter, llamacpp_python: Path, tmp_path: Path
) -> None:
    scripts = converter_for(widened.base.model, gguf_converter, tmp_path / "converter")
    options = {"outtype": "f32", "python": gguf_converter.python}
    if widened.family in HEADS_OF_THE_WIDTH:
        assert widened.statuses["llama.cpp"] == "refused"
        with pytest.raises(InexactPlan, match="would not serve"):
            convert_baked(widened.out, tmp_path / "gguf", scripts, **options)
        return
    assert widened.statuses["llama.cpp"] == "approximate"
    made = convert_baked(widened.out, tmp_path / "gguf", scripts, **options)
    file = next(made.path.glob("*.gguf"))
    found = ask(LLAMA_CPP, request(file), llamacpp_python)
    assert largest_difference(widened.reference, found) <= TOLERANCE
    broken = widened.computed(widened.broken(tmp_path / "broken"))
    assert largest_difference(broken, found) > BROKEN
