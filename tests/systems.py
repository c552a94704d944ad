"""What steering systems write, and the hooks that they steer with: one ``System`` each.

The hooks are those of the systems' own code, on live modules in float64; nothing of bake is used.
"""

import argparse
import json
import math
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Map = Callable[[Tensor], Tensor]
INPUT = ":input"


@dataclass(frozen=True)
class Sizes:
    """Of the model that is steered."""

    hidden: int
    inner: int
    layers: int
    attention: int
    """Of all heads together."""
    heads: int


@dataclass(frozen=True)
class Made:
    """An artifact, the recipe's words for it, and what the system does with it."""

    file: str
    edit: Mapping[str, Any]
    hooks: Mapping[str, Map]
    """By the path of the module, with ``:input`` for a hook of its input."""
    options: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further directions of the recipe, by name."""
    update: tuple[str, Tensor] | None = None
    """A weight's path and what the system adds to it, instead of hooks."""


@dataclass(frozen=True)
class System:
    """One row of the table in docs/sources.md."""

    name: str
    file: str
    site: str
    formula: str
    positions: str
    make: Callable[[Path, Sizes], Made]
    folds: str = "yes"

    @property
    def hooked(self) -> bool:
        """Whether bake's hooks are compared, since nothing folds without an allowance."""
        return self.folds.endswith("hooks") or self.folds == NO


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return random float32 values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def block(layer: int) -> str:
    return f"model.layers.{layer}"


def plus(vector: Tensor, coefficient: float) -> Map:
    return lambda x: x + coefficient * vector.double()


def blend(factor: Tensor, shift: Tensor) -> Map:
    return lambda z: factor * z + shift


def offset(coefficient: float = 1.5, **more: Any) -> dict[str, Any]:
    return {"kind": "offset", "coefficient": coefficient, **more}


def _caa(folder: Path, sizes: Sizes) -> Made:
    (folder / "sycophancy").mkdir()
    rows = rand(sizes.layers, sizes.hidden)
    for layer, row in enumerate(rows):
        torch.save(row, folder / "sycophancy" / f"vec_layer_{layer}_Llama-2-7b-chat-hf.pt")
    return Made("sycophancy", offset(2.0), {block(1): plus(rows[1], 2.0)}, {"layer": 1})


def _easyedit(folder: Path, sizes: Sizes) -> Made:
    (folder / "caa").mkdir()
    row = rand(sizes.hidden)
    torch.save(row, folder / "caa" / "layer_1.pt")
    return Made("caa", offset(), {block(1): plus(row, 1.5)})


def _svec(folder: Path, sizes: Sizes) -> Made:
    rows = {layer: rand(sizes.hidden, seed=layer) for layer in (1, 2)}
    text = {
        "model_type": "llama",
        "directions": {layer: row.double().tolist() for layer, row in rows.items()},
        "explained_variances": dict.fromkeys(rows, 0.5),
    }
    (folder / "v.svec").write_text(json.dumps(text))
    hooks = {block(layer) + INPUT: plus(row, 1.5) for layer, row in rows.items()}
    return Made("v.svec", offset(), hooks)


def _wisent(folder: Path, sizes: Sizes) -> Made:
    row = rand(sizes.hidden)
    text = {"steering_vectors": {"2": row.double().tolist()}, "layers": ["2"], "model": "x"}
    (folder / "v.json").write_text(json.dumps(text))
    return Made("v.json", offset(), {block(1): plus(row, 1.5)})


def stand_in(name: str, fields: tuple[str, ...]) -> type:
    """Return a class that pickles as ``name``, an object of some package with these fields."""
    module, _, word = name.rpartition(".")
    made = type(word, (), {"__module__": module, "__qualname__": word})
    made.__init__ = lambda self, *values: self.__dict__.update(zip(fields, values, strict=True))  # type: ignore[misc]
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        sys.modules.setdefault(path, types.ModuleType(path))
    setattr(sys.modules[module], word, made)
    return made


def _steering_vectors(kind: str, module: str) -> Callable[[Path, Sizes], Made]:
    def make(folder: Path, sizes: Sizes) -> Made:
        rows = {layer: rand(sizes.hidden, seed=layer) for layer in (0, 2)}
        name = "steering_vectors.steering_vector.SteeringVector"
        cls = stand_in(name, ("layer_activations", "layer_type"))
        torch.save(cls(rows, kind), folder / "sv.pt")
        hooks = {block(layer) + module: plus(row, 1.5) for layer, row in rows.items()}
        return Made("sv.pt", offset(), hooks)

    return make


def _rnngineering(folder: Path, sizes: Sizes) -> Made:
    positive, negative = ([rand(sizes.hidden, seed=n + s) for n in range(6)] for s in (0, 50))
    state = {"positives": positive, "negatives": negative, "lda": False, "mamba_style": False}
    torch.save(state, folder / "refusal_1.pt")
    row = torch.stack(positive).double().mean(0) - torch.stack(negative).double().mean(0)
    return Made("refusal_1.pt", offset(), {block(1): plus(row, 1.5)})


def _ace(folder: Path, sizes: Sizes) -> Made:
    positive, negative = (rand(20, 1, sizes.hidden, seed=s).bfloat16() for s in (1, 2))
    torch.save(positive, folder / "acts_M=x_L=1_P=+.pt")
    torch.save(negative, folder / "acts_M=x_L=1_P=-.pt")
    pair = [acts.double().squeeze(1) for acts in (positive, negative)]
    u, mean = pair[0].mean(0) - pair[1].mean(0), torch.cat(pair).mean(0)
    p = u / u.norm()

    def orth(x: Tensor) -> Tensor:
        return x - ((x - mean) @ p)[..., None] * p + 0.5 * u

    hooks = {block(n) + part: orth for n in range(sizes.layers) for part in (".self_attn", ".mlp")}
    edit = {"kind": "affine", "alpha": 0.5, "at": ["attn_out.*", "mlp_out.*"]}
    minus = {"minus": str(folder / "acts_M=x_L=1_P=-.pt")}
    return Made("acts_M=x_L=1_P=+.pt", edit, hooks, minus)


def _heretic(folder: Path, sizes: Sizes) -> Made:
    rows = torch.nn.functional.normalize(rand(sizes.layers + 1, sizes.hidden), dim=1)
    torch.save(rows, folder / "refusal_directions.pt")
    # Model.abliterate: math.modf(index + 1), lerp of two rows, made unit again.
    r = torch.nn.functional.normalize(rows[1].double().lerp(rows[2].double(), 0.4), dim=0)

    def ablate(x: Tensor) -> Tensor:
        return x - 0.8 * (x @ r)[..., None] * r

    edit = {"kind": "ablate", "strength": 0.8, "at": ["attn_out.1", "mlp_out.1"]}
    hooks = {block(1) + part: ablate for part in (".self_attn", ".mlp")}
    return Made("refusal_directions.pt", edit, hooks, {"index": 0.4})


def _heretic_kernel(folder: Path, sizes: Sizes) -> Made:
    """A row a block, and for each component a kernel over the blocks."""
    rows = torch.nn.functional.normalize(rand(sizes.layers + 1, sizes.hidden), dim=1)
    torch.save(rows, folder / "refusal_directions.pt")
    numbers = {  # max_weight, max_weight_position, min_weight, min_weight_distance
        "attn_out": (1.2, 1.6, 0.3, 1.1),
        "mlp_out": (0.7, sizes.layers - 1.0, 0.1, 2.0),
    }
    parts = {"attn_out": ".self_attn", "mlp_out": ".mlp"}
    hooks: dict[str, Map] = {}
    for kind, (most, peak, least, width) in numbers.items():
        for layer in range(sizes.layers):
            distance = abs(layer - peak)
            if distance > width:
                continue
            weight = most + (distance / width) * (least - most)
            # Unit to float32 in the file, and meant as unit: an ablation restores that.
            r = torch.nn.functional.normalize(rows[layer + 1].double(), dim=0)
            hooks[block(layer) + parts[kind]] = (
                lambda x, r=r, weight=weight: x - weight * (x @ r)[..., None] * r  # type: ignore[misc]
            )
    words = ("max", "peak", "min", "width")
    strength = {kind: dict(zip(words, found, strict=True)) for kind, found in numbers.items()}
    edit = {"kind": "ablate", "strength": strength, "at": ["attn_out.*", "mlp_out.*"]}
    return Made("refusal_directions.pt", edit, hooks)


def _act_modules(sizes: Sizes) -> dict[str, int]:
    """Return the modules that AcT edits in a Llama, with the widths of their outputs."""
    widths = {"up_proj": sizes.inner, "gate_proj": sizes.inner, "down_proj": sizes.hidden}
    return {f"{block(1)}.mlp.{name}": width for name, width in widths.items()}


def _save_act(folder: Path, states: Mapping[str, Mapping[str, Any]]) -> None:
    (folder / "act").mkdir()
    for name, state in states.items():
        torch.save(dict(state), folder / "act" / f"{name}.statedict")


def _linear_act(folder: Path, sizes: Sizes) -> Made:
    states, hooks = {}, {}
    for n, (name, width) in enumerate(_act_modules(sizes).items()):
        w, b = 1 + rand(1, width, seed=n, scale=0.3), rand(1, width, seed=n + 9, scale=0.3)
        expanded = [-torch.ones(width), torch.ones(width)]  # as _post_load leaves it
        states[name] = {"net.w1": w, "net.b1": b, "quantiles_src": expanded}
        hooks[name] = blend(0.6 * w.double() + 0.4, 0.6 * b.double())
    _save_act(folder, states)
    return Made("act", {"kind": "scale", "strength": 0.6}, hooks, {"quantiles": "q_all"})


def _transport(method: str) -> Callable[[Path, Sizes], Made]:
    def make(folder: Path, sizes: Sizes) -> Made:
        states, hooks = {}, {}
        for n, (name, width) in enumerate(_act_modules(sizes).items()):
            mu1, mu2 = (rand(width, seed=n + s, scale=0.3) for s in (0, 20))
            std1, std2 = (0.5 + rand(width, seed=n + s).abs() for s in (40, 60))
            std1[3] = 1e-6  # dead, and left alone
            state = {"mu1": mu1, "mu2": mu2, "std1": std1, "std2": std2}
            states[name] = {**state, "quantiles_src": "q_all"}
            live = std1 > 1e-4
            a = (
                std2.double() / std1.double()
                if method == "gaussian"
                else torch.ones(width).double()
            )

            shift = mu2.double() - a * mu1.double()
            factor = torch.where(live, 0.7 * a + 0.3, torch.ones(width).double())
            hooks[name] = blend(factor, torch.where(live, 0.7 * shift, 0.0))
        _save_act(folder, states)
        return Made("act", {"kind": "scale", "strength": 0.7}, hooks, {"method": method})

    return make


def _aura(folder: Path, sizes: Sizes) -> Made:
    states, hooks = {}, {}
    for n, (name, width) in enumerate(_act_modules(sizes).items()):
        auroc = torch.rand(width, generator=torch.Generator().manual_seed(n))
        states[name] = {"auroc": auroc}
        alpha = torch.where(auroc > 0.5, 1 - 2 * (auroc.double() - 0.5), 1.0)
        hooks[name] = blend(0.8 * alpha + 0.2, torch.zeros_like(alpha))
    _save_act(folder, states)
    return Made("act", {"kind": "scale", "strength": 0.8}, hooks)


def pyvene_folder(
    folder: Path, kind: str, component: str, state: Mapping[str, Tensor], layer: int = 1
) -> Path:
    """Write what ``IntervenableModel.save`` writes of one intervention."""
    start = f"layer_{layer}_comp_{component}"
    if "." in component:
        start = "comp_" + component.replace(".", "_")
    key = f"{start}_unit_pos_nunit_1#0"
    folder.mkdir()
    torch.save(dict(state), folder / f"intkey_{key}.bin")
    config = {
        "intervention_types": [f"<class 'pyreft.interventions.{kind}'>"],
        "representations": [[layer, component, "pos", 1, *[None] * 10]],
        "sorted_keys": [key],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _loreft(folder: Path, sizes: Sizes) -> Made:
    turn = torch.linalg.qr(rand(sizes.hidden, 3).double())[0].float()
    weight, bias = rand(3, sizes.hidden, seed=1, scale=0.2), rand(3, seed=2)
    state = {"weight": weight, "bias": bias, "rotate_layer": turn}
    pyvene_folder(folder / "reft", "LoreftIntervention", "mlp_output", state)
    r, w, b = turn.double(), weight.double(), bias.double()
    hooks = {block(1) + ".mlp": lambda h: h + (h @ w.T + b - h @ r) @ r.T}
    return Made("reft", {"kind": "linear"}, hooks)


def _addition(folder: Path, sizes: Sizes) -> Made:
    row = rand(sizes.hidden)
    kind, state = "AdditionIntervention", {"source_representation": row}
    pyvene_folder(folder / "pyvene", kind, "model.layers[1].output", state)
    return Made("pyvene", offset(1.0), {block(1): plus(row, 1.0)})


def _quadratic(folder: Path, sizes: Sizes) -> Made:
    from concept_erasure.quadratic import QuadraticEditor

    d = sizes.hidden
    maps = torch.eye(d).double() + 0.1 * rand(3, 3, d, d, seed=1).double()
    editor = QuadraticEditor(rand(3, d).double(), maps)
    torch.save(editor, folder / "quad.pt")

    def transport(x: Tensor) -> Tensor:
        moved: Tensor = editor.transport(x, 2, 1)
        return moved

    hooks = {block(1) + ".mlp": transport}
    edit = {"kind": "linear", "at": "mlp_out.1"}
    return Made("quad.pt", edit, hooks, {"source": 2, "target": 1})


def _style(folder: Path, sizes: Sizes) -> Made:
    rows = {layer: rand(sizes.hidden, seed=layer) for layer in (0, 1)}
    torch.save(rows, folder / "style.pt")
    keep = torch.full((sizes.hidden,), 0.8, dtype=torch.float64)
    hooks = {f"{block(n)}.mlp": blend(keep, 1.3 * row.double()) for n, row in rows.items()}
    return Made("style.pt", offset(1.3, keep=0.8, at="mlp_out.0-1"), hooks)


def _rome(folder: Path, sizes: Sizes) -> Made:
    # On a Linear the key is as long as the input, and the outer product is added transposed.
    left, right = rand(sizes.inner, scale=0.3), rand(sizes.hidden, seed=1, scale=0.3)
    np.savez(folder / "rome.npz", left_vector=left.numpy(), right_vector=right.numpy())
    change = torch.outer(left.double(), right.double()).T
    update = (f"{block(1)}.mlp.down_proj.weight", change)
    return Made("rome.npz", {"kind": "update", "at": "mlp_out.1"}, {}, update=update)


def _gemma_scope(folder: Path, sizes: Sizes) -> Made:
    decoder = rand(100, sizes.hidden)
    zeros = np.zeros(100, "f4")
    np.savez(folder / "params.npz", W_enc=decoder.T.numpy(), W_dec=decoder.numpy(), b_enc=zeros)
    edit = offset(at="resid_post.1")
    return Made("params.npz", edit, {block(1): plus(decoder[7], 1.5)}, {"feature": 7})


def sae_folder(folder: Path, decoder: Tensor, hook: str) -> Path:
    """Write what ``sae.save_model`` of SAELens writes."""
    folder.mkdir()
    tensors = {"W_dec": decoder, "W_enc": decoder.T.contiguous(), "b_dec": torch.zeros(3)}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"d_sae": len(decoder), "architecture": "standard", "metadata": {"hook_name": hook}}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def _sae_lens(folder: Path, sizes: Sizes) -> Made:
    decoder = rand(100, sizes.hidden)
    sae_folder(folder / "sae", decoder, "blocks.1.hook_resid_post")
    return Made("sae", offset(), {block(1): plus(decoder[99], 1.5)}, {"feature": 99})


def _sae_level(folder: Path, sizes: Sizes) -> Made:
    """``JumpReLUSAE.forward`` with its error term, a hook setting one feature."""
    decoder, encoder = rand(40, sizes.hidden), rand(sizes.hidden, 40, seed=1)
    path = sae_folder(folder / "sae", decoder, "blocks.1.hook_resid_post")
    rest = {"b_enc": rand(40, seed=2), "b_dec": rand(sizes.hidden, seed=3)}
    threshold = rand(40, seed=4).abs()
    tensors = {"W_dec": decoder, "W_enc": encoder, "threshold": threshold, **rest}
    save_file(tensors, path / "sae_weights.safetensors")
    config = json.loads((path / "cfg.json").read_text())
    config |= {"architecture": "jumprelu", "apply_b_dec_to_input": True}
    (path / "cfg.json").write_text(json.dumps(config))

    def act(x: Tensor) -> Tensor:
        before = (x - rest["b_dec"].double()) @ encoder.double() + rest["b_enc"].double()
        acts = before.relu() * (before > threshold.double())
        return x + (1.5 - acts[..., 9:10]) * decoder[9].double()

    edit = {"kind": "clamp", "low": 1.5, "high": 1.5}
    return Made("sae", edit, {block(1): act}, {"feature": 9, "method": "encoder"})


def _axbench(folder: Path, sizes: Sizes) -> Made:
    weight = rand(12, sizes.hidden)
    torch.save(weight, folder / "DiffMean_weight.pt")
    edit = offset(at="resid_post.1")
    return Made("DiffMean_weight.pt", edit, {block(1): plus(weight[4], 1.5)}, {"feature": 4})


def _hidden_states(folder: Path, sizes: Sizes) -> Made:
    rows = rand(sizes.layers + 1, sizes.hidden)
    torch.save(rows, folder / "rows.pt")
    edit = offset(at="resid_post.0-1")
    hooks = {block(n): plus(rows[n + 1], 1.5) for n in (0, 1)}
    return Made("rows.pt", edit, hooks, {"shape": "hidden_states"})


def _arditi(folder: Path, sizes: Sizes) -> Made:
    """``get_all_direction_ablation_hooks`` of refusal_direction; COSMIC writes its folder too."""
    (folder / "run").mkdir()
    row = rand(sizes.hidden).double()
    torch.save(row, folder / "run" / "direction.pt")
    (folder / "run" / "direction_metadata.json").write_text(json.dumps({"pos": -1, "layer": 1}))
    r = row / row.norm()

    def ablate(x: Tensor) -> Tensor:
        return x - (x @ r)[..., None] * r

    parts = (INPUT, ".self_attn", ".mlp")
    hooks = {block(n) + part: ablate for n in range(sizes.layers) for part in parts}
    return Made("run", {"kind": "ablate", "at": "resid"}, hooks)


def _cosmic(folder: Path, sizes: Sizes) -> Made:
    """``get_affine_activation_addition_input_pre_hook`` of COSMIC, whose reference is not saved."""
    made = _arditi(folder, sizes)
    row = torch.load(folder / "run" / "direction.pt")
    reference, r = rand(sizes.hidden, seed=7), row / row.norm()
    torch.save(reference, folder / "harmless_mean.pt")

    def act(x: Tensor) -> Tensor:
        return x - (x @ r)[..., None] * r + (reference.double() @ r) * r + 0.4 * row

    edit = {"kind": "affine", "alpha": 0.4, "mean": "reference", "at": "resid_pre.1"}
    more = {"reference": {"file": str(folder / "harmless_mean.pt")}}
    return Made(made.file, edit, {block(1) + INPUT: act}, more=more)


def _iti(folder: Path, sizes: Sizes) -> Made:
    """``validate_2fold.py``: each head's unit difference of means, times its σ and α."""
    count, size = sizes.heads, sizes.attention // sizes.heads
    acts = rand(30, sizes.layers, sizes.attention)
    labels = (rand(30, seed=1) > 0).numpy().astype("i8")
    np.save(folder / "tiny_tqa_head_wise.npy", acts.numpy())
    np.save(folder / "tiny_tqa_labels.npy", labels)
    chosen, hooks = ((1, 0), (1, count - 1), (2, 1)), {}
    for layer in {layer for layer, _ in chosen}:
        move = torch.zeros(sizes.attention).double()
        for head in (h for n, h in chosen if n == layer):
            part = slice(head * size, (head + 1) * size)
            own = acts[:, layer, part].double()
            theta = own[labels == 1].mean(0) - own[labels == 0].mean(0)
            theta = theta / theta.norm()
            move[part] = theta * torch.std(own @ theta)
        hooks[f"{block(layer)}.self_attn.o_proj{INPUT}"] = plus(move, 4.0)
    at = [f"z.{layer}.h{head}" for layer, head in chosen]
    edit = offset(4.0, at=at)
    return Made("tiny_tqa_head_wise.npy", edit, hooks, {"heads": count})


def _lm_steer(folder: Path, sizes: Sizes) -> Made:
    one, two = (rand(2, sizes.hidden, 3, seed=n, scale=0.5) for n in (1, 2))
    state = {"projector1": torch.nn.Parameter(one), "projector2": torch.nn.Parameter(two)}
    arguments = argparse.Namespace(epsilon=0.1, rank=3, adaptor_class="multiply", cuda=False)
    torch.save([arguments, state, 1000], folder / "detoxification.pt")
    p1, p2 = one[1].double(), two[1].double()
    hooks: dict[str, Map] = {"model.norm": lambda s: s + 0.1 * (s @ p1 * 3.0) @ p2.T}
    edit = {"kind": "linear", "strength": 3.0}
    return Made("detoxification.pt", edit, hooks, {"feature": 1})


def _angular(mode: int) -> Callable[[Path, Sizes], Made]:
    def make(folder: Path, sizes: Sizes) -> Made:
        """``AngularSteeringOperator.steer`` with its two adaptive modes."""
        pairs = {
            f"{block(n)}.{name}": (rand(sizes.hidden, seed=n), rand(sizes.hidden, seed=n + 20))
            for n in (0, 1)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        keys = ("first_direction", "second_direction")
        rows = {
            name: {key: row.numpy() for key, row in zip(keys, pair, strict=True)}
            for name, pair in pairs.items()
        }
        np.save(folder / "steering_config.npy", rows, allow_pickle=True)  # type: ignore[arg-type]
        hooks: dict[str, Map] = {}
        for name, (first, second) in pairs.items():
            b1 = first.double() / first.double().norm()
            b2 = second.double() - (second.double() @ b1) * b1
            b2 = b2 / b2.norm()
            aim = math.cos(math.radians(200)) * b1 + math.sin(math.radians(200)) * b2

            def steer(h: Tensor, b1: Tensor = b1, b2: Tensor = b2, aim: Tensor = aim) -> Tensor:
                inside = (h @ b1)[..., None] * b1 + (h @ b2)[..., None] * b2
                turned = h - inside + inside.norm(dim=-1, keepdim=True) * aim
                return turned if mode == 0 else torch.where((h @ b1 > 0)[..., None], turned, h)

            hooks[name] = steer
        edit: dict[str, Any] = {"kind": "rotate", "angle": 200.0}
        if mode == 1:
            edit = {"kind": "gate", "map": "rotate", "angle": 200.0}
            edit["gate"] = {"direction": "v", "above": 0.0}
        return Made("steering_config.npy", edit, hooks)

    return make


def _masked_act(folder: Path, sizes: Sizes) -> Made:
    states, hooks = {}, {}
    for n, (name, width) in enumerate(_act_modules(sizes).items()):
        w, b = 1 + rand(1, width, seed=n, scale=0.3), rand(1, width, seed=n + 9, scale=0.3)
        low, high = (rand(width, seed=n + s, scale=0.05).abs() for s in (50, 60))
        states[name] = {"net.w1": w, "net.b1": b, "quantiles_dict_src": {"q_0_100": [-low, high]}}

        def transport(
            z: Tensor, w: Tensor = w, b: Tensor = b, low: Tensor = low, high: Tensor = high
        ) -> Tensor:
            moved = 0.6 * (w.double() * z + b.double()) + 0.4 * z
            return torch.where((z > -low.double()) & (z < high.double()), moved, z)

        hooks[name] = transport
    _save_act(folder, states)
    edit = {"kind": "masked-scale", "strength": 0.6}
    return Made("act", edit, hooks, {"quantiles": "q_0_100"})


NO = "no: hooks and stand-ins"
ALL, LATER = "all", "from the end of the instruction on; folded: all"
SYSTEMS = (
    System("CAA", "folder of `vec_layer_<l>_<model>.pt`", "`resid_post`", "x + c v", LATER, _caa),
    System("EasyEdit 2", "folder of `layer_<l>.pt`", "`resid_post`", "x + c v", ALL, _easyedit),
    System(
        "activation-steering (CAST)",
        "`.svec`",
        "`resid_pre`",
        "x + c v",
        "all, on a condition; folded: always",
        _svec,
    ),
    System("wisent", "`.json`", "`resid_post.(l−1)`", "x + c v", ALL, _wisent),
    System(
        "steering-vectors, decoder_block",
        "pickled `SteeringVector`",
        "`resid_post`",
        "x + c v",
        ALL,
        _steering_vectors("decoder_block", ""),
    ),
    System(
        "steering-vectors, mlp",
        "pickled `SteeringVector`",
        "`mlp_out`",
        "x + c v",
        ALL,
        _steering_vectors("mlp", ".mlp"),
    ),
    System(
        "rnngineering",
        "`{behavior}_{layer}.pt`",
        "`resid_post`",
        "x + c (μ₊ − μ₋)",
        "the last; folded: all",
        _rnngineering,
    ),
    System(
        "steering-llama3 (ACE), orth",
        "`acts_…P=+.pt` and `minus`",
        "`attn_out`, `mlp_out`",
        "x − P(x − μ) + m u",
        ALL,
        _ace,
    ),
    System(
        "heretic",
        "`refusal_directions.pt` and `index`",
        "`attn_out`, `mlp_out`",
        "x − λ (r·x) r",
        ALL,
        _heretic,
    ),
    System(
        "heretic, a row and a weight a block",
        "`refusal_directions.pt`",
        "`attn_out`, `mlp_out`",
        "x − λₗ (rₗ·x) rₗ",
        ALL,
        _heretic_kernel,
    ),
    System(
        "Linear-AcT, `q_all`",
        "folder of `<module>.statedict`",
        "by module",
        "s (w ⊙ z + b) + (1 − s) z",
        ALL,
        _linear_act,
    ),
    System(
        "Mean-AcT",
        "folder of `<module>.statedict`",
        "by module",
        "z + s (μ₂ − μ₁)",
        ALL,
        _transport("mean"),
    ),
    System(
        "Gaussian-AcT",
        "folder of `<module>.statedict`",
        "by module",
        "s (σ₂/σ₁ (z − μ₁) + μ₂) + (1 − s) z",
        ALL,
        _transport("gaussian"),
    ),
    System(
        "AurA", "folder of `<module>.statedict`", "by module", "s α ⊙ z + (1 − s) z", ALL, _aura
    ),
    System(
        "LoReFT",
        "folder of pyvene",
        "`mlp_out`",
        "h + R(Wh + b − Rᵀh)",
        "first and last of the prompt; folded: all",
        _loreft,
        "at modules' outputs; a block's output is not",
    ),
    System(
        "pyvene, addition",
        "folder of pyvene",
        "by the component",
        "h + v",
        "as its call says; folded: all",
        _addition,
    ),
    System(
        "QuadraticEditor",
        "pickled object, `source`, `target`",
        "as fitted",
        "μₜ + T(x − μₛ)",
        "by label; folded: one for all",
        _quadratic,
        "at modules' outputs",
    ),
    System("style vectors", "`{layer: v}`", "`mlp_out`", "a y + b v", ALL, _style),
    System("ROME", "`.npz`", "the weight", "W + u vᵀ", ALL, _rome),
    System(
        "Gemma Scope",
        "`params.npz` and `feature`",
        "as fitted",
        "x + c W_dec[n]",
        ALL,
        _gemma_scope,
    ),
    System("SAELens", "folder and `feature`", "`hook_name`", "x + c W_dec[n]", ALL, _sae_lens),
    System(
        "SAELens, a feature set to a level",
        'folder, `feature` and `method = "encoder"`',
        "`hook_name`",
        "x + (level − f(x)) W_dec[n]",
        ALL,
        _sae_level,
        NO,
    ),
    System(
        "AxBench", "`<Method>_weight.pt` and `feature`", "`resid_post`", "x + c w[n]", ALL, _axbench
    ),
    System(
        "a stack of `hidden_states`",
        "[layers + 1, d]",
        "`resid_post`",
        "x + c v",
        ALL,
        _hidden_states,
    ),
    System(
        "refusal_direction (Arditi); COSMIC, linear",
        "folder of `direction.pt`",
        "`resid`",
        "x − (r̂·x) r̂",
        ALL,
        _arditi,
    ),
    System(
        "COSMIC, ACE",
        "folder of `direction.pt`; `mean`, a file of the reference",
        "`resid_pre.l`",
        "x − P(x − μ) + α r",
        ALL,
        _cosmic,
        "at one block [relocated or computed](relocation.md); here its hooks",
    ),
    System(
        "ITI",
        "`…_head_wise.npy`, `…_labels.npy` and `heads`",
        "`z.l.h`, as named",
        "x + α σ θ",
        "the last; folded: all",
        _iti,
    ),
    System(
        "LM-Steer",
        "`torch.save` of arguments and state",
        "`ln_final_out`",
        "s + ε v (s P₁) P₂ᵀ",
        ALL,
        _lm_steer,
    ),
    System(
        "Angular Steering",
        "`.npy` of {module: directions}",
        "by module",
        "h − P h + ‖P h‖ v",
        ALL,
        _angular(0),
        NO,
    ),
    System(
        "Angular Steering, adaptive",
        "`.npy` of {module: directions}",
        "by module",
        "the same where h·b₁ > 0",
        ALL,
        _angular(1),
        NO,
    ),
    System(
        "Linear-AcT, `q_0_100`",
        "folder of `<module>.statedict`",
        "by module",
        "as above, between two quantiles",
        ALL,
        _masked_act,
        NO,
    ),
)
