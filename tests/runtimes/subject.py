"""A tiny model under edits: what transformers computes under hooks, and how near a runtime is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from reference import Reference, first_disagreement, largest_difference, reference_logprobs
from tiny_checkpoints import HIDDEN, VOCAB, write
from transformers import PreTrainedModel

from bake.affine import AffineMap, LowRankMap, translation
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.edits import Edit, EditKind
from bake.families import Layout
from bake.plan import Plan, compile_plan
from bake.process import run_script
from bake.sites import expand
from bake.steer import steered
from bake.verify.models import layout_of
from bake.verify.runtimes import exchange, llamacpp, vllm
from bake.verify.runtimes.request import RuntimeRequest, RuntimeResult

TOLERANCE = 1e-4  # nats, in float32: what the project promises
EFFECT = 0.05  # nats: what an edit moves at least, hundreds of tolerances
BROKEN = 1e-2  # nats: what a broken artifact misses by at least, a hundred tolerances
NEW_TOKENS = 16
PROMPTS = ((1,), (1, 17, 200, 45, 9), tuple(range(1, 60, 5)))

Spec = tuple[str, AffineMap, str | list[str]]


def direction(seed: int = 0, width: int = HIDDEN) -> torch.Tensor:
    """Return a unit vector in float64."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(width, generator=generator, dtype=torch.float64)
    return vector / vector.norm()


def ablation(constant: float = 0.0, seed: int = 0, width: int = HIDDEN) -> AffineMap:
    """Return the map that sets a component to a constant."""
    unit = direction(seed, width)
    return LowRankMap(-unit[:, None], unit[None], constant * unit)


def heads_map() -> AffineMap:
    """Return a map of rank 2 of all heads together, 4 × 32 wide."""
    generator = torch.Generator().manual_seed(5)
    factors = torch.randn(2, 4 * 32, generator=generator, dtype=torch.float64) / 8
    return LowRankMap(factors.T.contiguous(), factors, torch.zeros(128, dtype=torch.float64))


STREAM: list[Spec] = [("affine", ablation(0.8), "resid")]
LINEAR: list[Spec] = [("linear", heads_map(), "q.1"), ("linear", heads_map(), "z.2")]
Z: list[Spec] = [("linear", heads_map(), "z.1")]
MODULES: list[Spec] = [("ablate", ablation(), ["attn_out.*", "mlp_out.*"])]
OFFSETS: list[Spec] = [
    ("offset", translation(3 * direction(1)), "resid_post.1-2"),
    ("offset", translation(-2.5 * direction(2)), "resid_pre.2"),
]


@dataclass(frozen=True, eq=False)
class Subject:
    """A tiny model on disk and in memory."""

    checkpoint: Checkpoint
    layout: Layout
    model: PreTrainedModel
    plain: Reference
    """What it computes without any edit."""
    _hooked: list[tuple[Sequence[Spec], Reference]] = field(default_factory=list)

    def edits(self, specs: Sequence[Spec]) -> tuple[Edit, ...]:
        """Return edits at the sites that patterns select."""
        layout = self.layout
        return tuple(
            Edit(EditKind(kind), "c", expand(at, layers=layout.layers, stream=layout.stream), map_)
            for kind, map_, at in specs
        )

    def plan(
        self,
        specs: Sequence[Spec],
        targets: Sequence[str] = ("transformers",),
        allow: Sequence[str] = (),
    ) -> Plan:
        """Return the plan of some edits."""
        return compile_plan(
            self.edits(specs),
            self.layout,
            gain=lambda name: self.checkpoint.read(name).to(torch.float64),
            config=self.checkpoint.config,
            targets=targets,
            allow=allow,
        )

    def hooked(self, specs: Sequence[Spec]) -> Reference:
        """Return what the model computes under the edits as hooks."""
        for known, reference in self._hooked:
            if known is specs:
                return reference
        with steered(self.model, self.layout, self.edits(specs)):
            reference = reference_logprobs(self.model, PROMPTS, NEW_TOKENS)
        self._hooked.append((specs, reference))
        return reference

    def check(self, specs: Sequence[Spec], served: RuntimeResult | Reference) -> None:
        """A runtime computes what the hooks compute, and that is not what the base computes."""
        hooked = self.hooked(specs)
        difference = largest_difference(hooked, served)
        print(f"{self.layout.family.name}: max |Δ log p| = {difference:.1e} nats")
        assert difference <= TOLERANCE
        assert first_disagreement(hooked, served, TOLERANCE) is None
        assert largest_difference(self.plain, served) > EFFECT
        assert first_disagreement(self.plain, served, TOLERANCE) is not None

    def misses(self, specs: Sequence[Spec], served: RuntimeResult | Reference) -> None:
        """The control: what a broken artifact computes is not what the hooks compute."""
        assert largest_difference(self.hooked(specs), served) > BROKEN


def subject_at(model: PreTrainedModel, folder: Path) -> Subject:
    """Write the model to a folder and return it as a subject."""
    checkpoint = open_checkpoint(write(model, folder))
    plain = reference_logprobs(model, PROMPTS, NEW_TOKENS)
    return Subject(checkpoint, layout_of(checkpoint), model, plain)


def request(model: Path, adapter: Path | None = None) -> RuntimeRequest:
    """Return the standard request for a model."""
    return RuntimeRequest(model, PROMPTS, NEW_TOKENS, VOCAB, "float32", adapter)


def served_adapters(
    base: Subject,
    adapters: dict[str, Path | None],
    python: Path,
    folder: Path,
    **engine: str,
) -> dict[str, RuntimeResult]:
    """Return what one engine of vLLM computes with each adapter, and without one (None)."""
    asked = request(base.checkpoint.path)
    ranks = [vllm.max_lora_rank(path) for path in adapters.values() if path is not None]
    question = exchange.as_json(asked) | {
        "adapter": "several",
        "adapter_rank": max(ranks),
        "engine": engine,
        "adapters": {name: path and str(path) for name, path in adapters.items()},
    }
    (folder / "request.json").write_text(json.dumps(question), encoding="utf-8")
    worker = Path(vllm.__file__).with_name("_vllm_worker.py")
    script = Path(__file__).with_name("vllm_adapters.py")
    run_script(
        "vLLM",
        python,
        ["-I", script, worker, folder / "request.json", folder],
        folder=folder,
        timeout=900.0,
        variables=vllm.VLLM.variables,
    )
    return {name: exchange.read("vLLM", asked, folder / name) for name in adapters}


def answered_by_server(
    asked: RuntimeRequest, words: Sequence[str], python: Path, folder: Path
) -> RuntimeResult:
    """Return what llama.cpp's own server answers, started with words of its command line."""
    (folder / "question.json").write_text(json.dumps(exchange.as_json(asked)), encoding="utf-8")
    (folder / "answer").mkdir()
    small = ["--ctx-size", "128", "--parallel", "1", "--no-warmup", "--fit", "off"]
    small += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
    small += ["--host", "127.0.0.1", "--port", "0", "--api-key", "none-but-this-test"]
    worker = Path(llamacpp.__file__).with_name("_llamacpp_worker.py")
    script = ["-I", Path(__file__).with_name("llama_server.py"), worker, folder / "question.json"]
    run_script(
        "llama-server",
        python,
        [*script, folder / "answer", *words, *small],
        folder=folder,
        timeout=300.0,
        variables={},
    )
    return exchange.read("llama.cpp", asked, folder / "answer")
