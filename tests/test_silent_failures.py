"""Where runtimes compute another model and say nothing: each trap is real, and bake stays out.

One row per trap. The trap is what the runtime does, written down by hand on the tiny models, with
the damage that it does as a share of the edit's effect. The guard is what bake does about it: a
refusal that names the reason, or files in which the trap has nothing to catch. The traps that vLLM
and llama.cpp set are run in the programs themselves in ``tests/runtimes/``.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
from adapters import NO_BIAS, config_of, factors_of, peft_logits, rewritten
from exporting import written
from harness import RELATIVE, Base, bake, base_at, edit, logits, plan_of, vector
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bake import edits as make
from bake.edits import Edit
from bake.errors import InexactPlan, UsageError
from bake.families.gguf import rotary_rows
from bake.plan import Exactness, Plan
from bake.plan.carriers import carrier_findings, carrier_runtimes, refuse

UNINITIALISED = 7e37  # what vLLM was seen to leave in a bias without a tensor
DAMAGE = 1e-2  # of the effect: what a trap does at least


@dataclass(frozen=True)
class TrapBases:
    """Tiny checkpoints, and a folder to write to."""

    checkpoint: Callable[..., Path]
    folder: Path

    def base(self, family: str, **options: Any) -> Base:
        return base_at(self.checkpoint(family, **options))

    def base_with(
        self, family: str, config: Callable[[dict[str, Any]], None], **options: Any
    ) -> Base:
        """Return a base whose config.json is changed on disk."""
        source, path = self.checkpoint(family, **options), self.folder / "base"
        path.mkdir()
        for file in source.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        content = tiny.config_of(path)
        config(content)
        (path / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        return base_at(path)


def offset(base: Base, at: str) -> list[Edit]:
    return [edit(base, "offset", make.offset(vector(base.layout.hidden)), at)]


def ablation(base: Base, at: str | Sequence[str] = "resid") -> list[Edit]:
    return [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), at)]


def damage(base: Base, edits: Sequence[Edit], served: Tensor) -> float:
    """Return the largest difference from the hooked model, as a share of the edits' effect."""
    hooked = logits(base.model, base, edits)
    effect = float((hooked - logits(base.model, base)).abs().max())
    assert effect > 0.1
    return float((served - hooked).abs().max()) / effect


def served(
    base: Base, edits: Sequence[Edit], out: Path, change: Callable[[str, Tensor], None], **plan: Any
) -> float:
    """Return the damage of a runtime that changes parameters while it loads a checkpoint."""
    made = plan_of(base, edits, **plan)
    allow = frozenset(plan.get("allow", ()))
    model = tiny.load(bake(base, made, out, allow=allow))
    assert damage(base, edits, logits(model, base)) <= RELATIVE  # the files themselves are right
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    return damage(base, edits, logits(model, base))


def zeroed(pattern: str) -> Callable[[str, Tensor], None]:
    def change(name: str, parameter: Tensor) -> None:
        if re.search(pattern, name):
            parameter.zero_()

    return change


def judged(plan: Plan, carrier: str, runtime: str) -> tuple[str, str]:
    found = next(v for v in carrier_runtimes(plan, carrier) if v.runtime == runtime)
    return found.status, found.reason


def refused(
    base: Base, edits: Sequence[Edit], runtime: str, said: str, out: Path, **options: Any
) -> None:
    """The plan says why, and no checkpoint is written for that target; for others it is."""
    plan = plan_of(base, edits, **options)
    status, reason = judged(plan, "checkpoint", runtime)
    assert status == "refused"
    assert re.search(said, reason), reason
    allow = frozenset(options.get("allow", ()))
    wanted = plan_of(base, edits, targets=[runtime], **options)
    with pytest.raises(InexactPlan, match=f"the target {re.escape(runtime)} would not") as error:
        bake(base, wanted, out / "refused", allow=allow)
    assert error.value.why == reason
    assert not (out / "refused").exists()
    assert bake(base, plan, out / "written", allow=allow).exists()


# --- biases that a runtime has no slot for -------------------------------------------------------


def bias_dropped(bases: TrapBases) -> float:
    base = bases.base("qwen3", attention_bias=False)
    return served(base, offset(base, "attn_out.1"), bases.folder / "out", zeroed(r"o_proj\.bias"))


def bias_dropped_guard(bases: TrapBases) -> None:
    base = bases.base("qwen3", attention_bias=False)
    edits = offset(base, "attn_out.1")
    refused(
        base,
        edits,
        "vllm",
        r"silently drops model\.layers\.1\.self_attn\.o_proj\.bias",
        bases.folder,
    )
    # Also where it is the base's own bias, which no edit touches, and beside an adapter.
    own = bases.base("qwen3")
    plan = plan_of(own, ablation(own, "mlp_out.1"), targets=["vllm"])
    for carrier in ("checkpoint", "lora"):
        assert "silently drops" in judged(plan, carrier, "vllm")[1]
        with pytest.raises(InexactPlan, match="target vllm would not serve"):
            refuse(plan, carrier)


def mlp_bias_dropped(bases: TrapBases) -> float:
    base = bases.base("llama", mlp_bias=False)
    return served(
        base, offset(base, "resid_post.1"), bases.folder / "out", zeroed(r"mlp\..*\.bias")
    )


def mlp_bias_dropped_guard(bases: TrapBases) -> None:
    base = bases.base("llama", mlp_bias=False)
    said = r"silently drops model\.layers\.1\.mlp\.down_proj\.bias"
    refused(base, offset(base, "resid_post.1"), "sglang", said, bases.folder)
    # The attention's half of the flags is applied.
    plan = plan_of(base, offset(base, "resid_mid.1"), targets=["sglang"])
    assert judged(plan, "checkpoint", "sglang")[0] == "not tested"


# --- slots that a flag opens and no tensor fills -------------------------------------------------


def slot_uninitialised(bases: TrapBases) -> float:
    base = bases.base("llama", mlp_bias=False)

    def leave(name: str, parameter: Tensor) -> None:
        if "mlp" in name and name.endswith(".bias") and not bool(parameter.any()):
            parameter.fill_(UNINITIALISED)  # as without the zeros that bake writes

    found = served(base, offset(base, "resid_post.1"), bases.folder / "out", leave)
    return math.inf if math.isnan(found) else found


OPENED: list[tuple[str, dict[str, bool], str, list[str]]] = [
    ("llama", {"mlp_bias": False}, "resid_post.1", []),
    ("llama", NO_BIAS, "resid_mid.1", []),
    ("llama", NO_BIAS, "q.1", []),
    ("qwen3", {"attention_bias": False}, "ln1_out.1", []),
    ("gemma", {"attention_bias": False}, "attn_out.0", []),
    ("gpt_neox", {"attention_bias": False}, "z.2", []),
    ("qwen2", {}, "resid_post.1", ["recast"]),
    ("mistral", {}, "resid_mid.1", ["recast"]),
]


def slot_uninitialised_guard(bases: TrapBases) -> None:
    for number, (family, options, at, allow) in enumerate(OPENED):
        base = bases.base(family, **options)
        width = base.layout.width(plan_site(base, at))
        edits = [edit(base, "offset", make.offset(vector(width)), at)]
        plan = plan_of(base, edits, allow=allow)
        assert any(bias.create for bias in plan.biases)
        out = bake(base, plan, bases.folder / str(number), allow=frozenset(allow))
        # The class itself says which biases it has now; tiny.load asserts that none is missing.
        model, stored = tiny.load(out), tiny.tensors_of(out)
        biases = {name for name in dict(model.named_parameters()) if name.endswith(".bias")}
        written = {name.replace("embed_out", "lm_head") for name in stored if ".bias" in name}
        assert biases == {name for name in written if name.endswith(".bias")}
        untouched = [b.name for b in plan.biases if b.is_zero()]
        assert untouched and not any(bool(stored[name].any()) for name in untouched)


def plan_site(base: Base, at: str) -> Any:
    from bake.sites import parse_site

    assert parse_site(at) in base.layout.sites or "resid" in at
    return parse_site(at)


# --- adapters ------------------------------------------------------------------------------------


def multiplies(a: Sequence[int], b: Sequence[int]) -> bool:
    """``ggml_can_mul_mat`` of two matrices as numpy shapes them: the last axes are summed over."""
    return a[-1] == b[-1]


def tied_embedding_adapter(bases: TrapBases) -> float:
    """llama.cpp takes the head of a tied model for the embedding, and its factors with it."""
    base = bases.base("llama", **NO_BIAS)
    plan, hidden = plan_of(base, ablation(base)), base.layout.hidden
    out = written("gguf-lora", plan, base.checkpoint, bases.folder / "out").path
    shapes = {t.name: t.data.shape for t in gguf.GGUFReader(out / "lora.gguf").tensors}
    factors = shapes["token_embd.weight.lora_a"]
    assert multiplies(shapes["blk.0.attn_output.weight.lora_a"], (9, 4 * 8))
    # The head would multiply the factor by the stream: GGML_ASSERT ends the process.
    return 0.0 if multiplies(factors, (9, hidden)) else math.inf


def tied_embedding_adapter_guard(bases: TrapBases) -> None:
    base = bases.base("llama", tied=True, **NO_BIAS)
    plan = plan_of(base, ablation(base))
    with pytest.raises(UsageError, match="a tensor of its own") as error:
        written("gguf-lora", plan, base.checkpoint, bases.folder / "out")
    assert "aborts" in str(error.value.why)
    assert not (bases.folder / "out").exists()
    # Adapters of other layers are fine there.
    layers = plan_of(base, ablation(base, "attn_out.1"))
    assert written("gguf-lora", layers, base.checkpoint, bases.folder / "layers").files


def patterns_ignored(bases: TrapBases) -> float:
    """llama.cpp's converter and SGLang read ``lora_alpha`` and no pattern of alphas."""
    base = bases.base("llama", **NO_BIAS)
    edits = ablation(base)
    good = written("lora", plan_of(base, edits), base.checkpoint, bases.folder / "out").path
    tensors = factors_of(good)
    for name in tensors:
        if "down_proj" in name and "lora_B" in name:
            tensors[name] = tensors[name] / 4
    rank = config_of(good)["r"]
    patterned = rewritten(
        good, bases.folder / "pattern", tensors, alpha_pattern={"down_proj": 4 * rank}
    )
    assert damage(base, edits, peft_logits(base, patterned)) <= RELATIVE  # PEFT reads them
    return damage(base, edits, peft_logits(base, rewritten(good, bases.folder / "blind", tensors)))


def patterns_ignored_guard(bases: TrapBases) -> None:
    """One rank for all modules, alpha equal to it, and alpha 0 in GGUF: scale 1 at any rank."""
    base = bases.base("llama", **NO_BIAS)
    n = base.layout.hidden
    edits = [*ablation(base), edit(base, "linear", two_directions(n), "attn_out.1")]
    plan = plan_of(base, edits)
    out = written("lora", plan, base.checkpoint, bases.folder / "lora").path
    config = config_of(out)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert (config["use_rslora"], config["lora_bias"], config["bias"]) == (False, False, "none")
    assert config["r"] == config["lora_alpha"] > 1
    ranks = {
        tensor.shape[0] if "_A" in name else tensor.shape[1]
        for name, tensor in factors_of(out).items()
    }
    assert ranks == {config["r"]}
    file = written("gguf-lora", plan, base.checkpoint, bases.folder / "gguf").path
    reader = gguf.GGUFReader(file / "lora.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 0.0


def two_directions(width: int) -> Any:
    return make.ablate(torch.stack([vector(width, 3), vector(width, 4)]))


def scaled_embedding(bases: TrapBases) -> float:
    """vLLM's general backend adds an adapter's rows behind the embedding's multiplier √d."""
    base = bases.base("gemma", attention_bias=False)
    edits = offset(base, "embed")
    good = written("lora", plan_of(base, edits), base.checkpoint, bases.folder / "out").path
    assert damage(base, edits, peft_logits(base, good)) <= RELATIVE
    tensors = factors_of(good)
    name = next(name for name in tensors if "lora_embedding_B" in name)
    tensors[name] = tensors[name] / base.layout.embed_multiplier
    return damage(base, edits, peft_logits(base, rewritten(good, bases.folder / "bad", tensors)))


def scaled_embedding_guard(bases: TrapBases) -> None:
    for family in ("gemma", "gemma2", "gemma3"):
        base = bases.base(family, attention_bias=False)
        plan = plan_of(base, offset(base, "embed"), targets=["vllm"])
        status, reason = judged(plan, "lora", "vllm")
        assert status == "refused"
        assert "leaves the embedding's multiplier off" in reason
        with pytest.raises(InexactPlan, match="target vllm would not serve this lora"):
            written("lora", plan, base.checkpoint, bases.folder / family)
        assert not (bases.folder / family).exists()
        assert judged(plan, "lora", "peft")[0] == "exact"


# --- norms behind the writers --------------------------------------------------------------------


def left_in_the_stream(model: PreTrainedModel, base: Base) -> float:
    """Return the largest component along the direction behind block 0."""
    states: list[Tensor] = []
    block = model.get_submodule(base.layout.block_live.replace("{layer}", "0"))
    handle = block.register_forward_hook(
        lambda _, __, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    logits(model, base)
    handle.remove()
    unit = vector(base.layout.hidden) / vector(base.layout.hidden).norm()
    return float((states[0] @ unit).abs().max())


def naive_ablation(bases: TrapBases) -> float:
    """W ← (1 − u uᵀ) W in every writer: the post-norm's gain turns the rest back towards u."""
    shares = []
    for family in tiny.POST_NORM:
        base = bases.base(family, attention_bias=False)
        model = tiny.load(base.path)
        unit = vector(base.layout.hidden) / vector(base.layout.hidden).norm()
        embedding = model.get_input_embeddings().weight
        with torch.no_grad():
            embedding.sub_(torch.outer(embedding @ unit, unit))
            for branch in base.layout.branches:
                weight = model.get_parameter(f"{branch.writes[0].live}.weight")
                weight.sub_(torch.outer(unit, unit @ weight))
        shares.append(left_in_the_stream(model, base) / left_in_the_stream(base.model, base))
    return min(shares)


def naive_ablation_guard(bases: TrapBases) -> None:
    for family in tiny.POST_NORM:
        base = bases.base(family, attention_bias=False, tied=False)
        edits = ablation(base)
        assert plan_of(base, edits).exactness is Exactness.IMPOSSIBLE
        with pytest.raises(InexactPlan, match="impossible"):
            bake(base, plan_of(base, edits), bases.folder / "none")
        plan = plan_of(base, edits, allow=["nulling"])
        assert plan.exactness is Exactness.NULLING
        assert judged(plan, "checkpoint", "transformers")[0] == "approximate"
        out = bake(base, plan, bases.folder / family, allow=frozenset(["nulling"]))
        left = left_in_the_stream(tiny.load(out), base)
        assert left <= RELATIVE * left_in_the_stream(base.model, base)


# --- config.json ---------------------------------------------------------------------------------

THETA = 500000.0


def with_theta(config: dict[str, Any]) -> None:
    """As checkpoints on the Hub have it: at the top level."""
    config["rope_theta"] = THETA
    del config["rope_parameters"]


def nested_theta(config: dict[str, Any]) -> None:
    """As transformers 5 saves it."""
    config["rope_parameters"]["rope_theta"] = THETA


def config_rewritten(bases: TrapBases) -> float:
    """A round trip through ``save_pretrained``; MLX-LM then takes its default."""
    base = bases.base_with("llama", with_theta)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float64)
    model.save_pretrained(bases.folder / "saved")
    config = tiny.config_of(bases.folder / "saved")
    assert config["rope_parameters"]["rope_theta"] == THETA
    taken = config.get("rope_theta", 10000.0)
    return abs(taken - THETA) / THETA


def config_rewritten_guard(bases: TrapBases) -> None:
    base = bases.base_with("llama", with_theta, tied=True, **NO_BIAS)
    before = (base.path / "config.json").read_text(encoding="utf-8")
    out = bake(
        base, plan_of(base, ablation(base), targets=["mlx-lm", "ollama"]), bases.folder / "out"
    )
    after = (out / "config.json").read_text(encoding="utf-8")
    tied, untied = '"tie_word_embeddings": true', '"tie_word_embeddings": false'
    assert tied in before
    assert after == before.replace(tied, untied)  # byte for byte otherwise
    # Only a base whose config.json was saved so is refused to the runtimes that do not look there.
    for runtime in ("mlx-lm", "ollama"):
        said = "silently takes 10000 for rope_theta, which is 500000"
        nested = TrapBases(bases.checkpoint, bases.folder / runtime)
        nested.folder.mkdir()
        plain = nested.base_with("llama", nested_theta, **NO_BIAS)
        refused(plain, ablation(plain), runtime, said, nested.folder)


def recast_config_guard(bases: TrapBases) -> None:
    """Both spellings of rope_theta stay, and the head's tie is said: the classes differ in it."""

    def both(config: dict[str, Any]) -> None:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"] = THETA
        del config["tie_word_embeddings"]

    base = bases.base_with("qwen2", both)
    plan = plan_of(base, offset(base, "resid_post.1"), allow=["recast"], targets=["mlx-lm"])
    out = bake(base, plan, bases.folder / "out", allow=frozenset(["recast"]))
    config = tiny.config_of(out)
    assert config["model_type"] == "llama"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    assert config["tie_word_embeddings"] is False


def head_taken_for_tied(bases: TrapBases) -> float:
    """MLX-LM's Llama is tied where config.json does not say; transformers' is not."""
    base = bases.base("llama", tied=False, **NO_BIAS)
    plan = plan_of(base, ablation(base))
    model = tiny.load(bake(base, plan, bases.folder / "out"))
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    return damage(base, ablation(base), logits(model, base))


def head_taken_for_tied_guard(bases: TrapBases) -> None:
    base = bases.base_with("llama", lambda config: config.pop("tie_word_embeddings"), **NO_BIAS)
    said = "silently takes true for tie_word_embeddings, which is false"
    refused(base, ablation(base), "mlx-lm", said, bases.folder)
    said_so = bases.base("llama", **NO_BIAS)
    assert judged(plan_of(said_so, ablation(said_so)), "checkpoint", "mlx-lm")[0] == "not tested"


# --- converters ----------------------------------------------------------------------------------


def head_skipped(bases: TrapBases) -> float:
    """llama.cpp's converter leaves the head of a Gemma out, and its loader takes the embedding."""
    base = bases.base("gemma2", attention_bias=False)
    edits = offset(base, "embed")
    model = tiny.load(bake(base, plan_of(base, edits), bases.folder / "out"))
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    return damage(base, edits, logits(model, base))


def head_skipped_guard(bases: TrapBases) -> None:
    for family in ("gemma", "gemma2"):
        base = bases.base(family, attention_bias=False)
        folder = bases.folder / family
        refused(base, offset(base, "embed"), "llama.cpp", "silently drops an output head", folder)
        for runtime in ("sglang", "ollama", "mlx-lm"):
            plan = plan_of(base, offset(base, "embed"))
            assert judged(plan, "checkpoint", runtime)[0] == "refused"
        # The GGUF of the base is edited where it is: the same head is missing there.
        (finding,) = carrier_findings(plan, "gguf")
        assert finding.exactness is Exactness.IMPOSSIBLE


def bias_out_of_order(bases: TrapBases) -> float:
    """Ollama's importer turns the rows of a Llama's q and k weights, and not of their biases."""
    base = bases.base("qwen2")
    rows = {
        "q_proj": rotary_rows(4 * 8, 8),
        "k_proj": rotary_rows(2 * 8, 8),
    }

    def turn(name: str, parameter: Tensor) -> None:
        for layer, order in rows.items():
            if name.endswith(f"{layer}.bias"):
                # Row i of the file is row order[i] of the checkpoint, and meets bias i.
                parameter[torch.tensor(order)] = parameter.clone()

    edits = offset(base, "resid_post.1")
    return served(base, edits, bases.folder / "out", turn, allow=["recast"])


def bias_out_of_order_guard(bases: TrapBases) -> None:
    base = bases.base("qwen2")
    said = r"silently loads model\.layers\.0\.self_attn\.q_proj\.bias in the wrong order"
    refused(base, offset(base, "resid_post.1"), "ollama", said, bases.folder, allow=["recast"])
    # Zeros have no order: a Llama without biases of its own is fine.
    plain = bases.base("llama", **NO_BIAS)
    plan = plan_of(plain, offset(plain, "resid_mid.1"), targets=["ollama"])
    assert judged(plan, "checkpoint", "ollama")[0] == "not tested"
    assert bake(plain, plan, bases.folder / "plain").exists()


@dataclass(frozen=True)
class Trap:
    """A way to be served another model without a word."""

    springs: Callable[[TrapBases], float] | None
    """Fall into it, and return the damage as a share of the edit's effect."""
    guard: Callable[[TrapBases], None]


TRAPS: Mapping[str, Trap] = {
    "vLLM drops a bias that its class has no slot for": Trap(bias_dropped, bias_dropped_guard),
    "SGLang drops the biases of a Llama's MLP": Trap(mlp_bias_dropped, mlp_bias_dropped_guard),
    "vLLM leaves a bias slot without a tensor uninitialised": Trap(
        slot_uninitialised, slot_uninitialised_guard
    ),
    "llama.cpp aborts on an adapter of a tied embedding": Trap(
        tied_embedding_adapter, tied_embedding_adapter_guard
    ),
    "llama.cpp's converter and SGLang ignore patterns of ranks and alphas": Trap(
        patterns_ignored, patterns_ignored_guard
    ),
    "vLLM leaves the embedding's multiplier off an adapter": Trap(
        scaled_embedding, scaled_embedding_guard
    ),
    "a norm behind the writers brings an ablated direction back": Trap(
        naive_ablation, naive_ablation_guard
    ),
    "save_pretrained moves rope_theta to where MLX-LM and Ollama do not look": Trap(
        config_rewritten, config_rewritten_guard
    ),
    "a recast config that leaves the other class's defaults unsaid": Trap(
        None, recast_config_guard
    ),
    "MLX-LM ties a Llama's head unless config.json says otherwise": Trap(
        head_taken_for_tied, head_taken_for_tied_guard
    ),
    "llama.cpp's converter skips the head of a Gemma": Trap(head_skipped, head_skipped_guard),
    "Ollama's importer puts the biases of q and k out of order": Trap(
        bias_out_of_order, bias_out_of_order_guard
    ),
}


@pytest.fixture
def bases(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> TrapBases:
    return TrapBases(tiny_checkpoint, tmp_path)


@pytest.mark.parametrize("trap", [name for name, trap in TRAPS.items() if trap.springs])
def test_the_trap_is_real(trap: str, bases: TrapBases) -> None:
    springs = TRAPS[trap].springs
    assert springs is not None
    assert springs(bases) > DAMAGE


@pytest.mark.parametrize("trap", TRAPS)
def test_bake_stays_out_of_it(trap: str, bases: TrapBases) -> None:
    TRAPS[trap].guard(bases)
