"""Relocated edits against hooks, in float64, with the norms' share and what is left put in by hand.

The double is derived from the definition alone: it shares nothing with the plan.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import (
    RELATIVE,
    Base,
    bake,
    base_at,
    edit,
    logits,
    matrix,
    plain_logits,
    plan_of,
    vector,
)
from msgspec import structs
from torch import Tensor

from bake import edits
from bake.affine import AffineMap
from bake.edits import Edit
from bake.errors import UsageError
from bake.jobs.planned import judged
from bake.plan import ConfigChange, Exactness, Plan
from bake.plan.carriers import carrier_findings, carrier_runtimes
from bake.plan.emit import assemble
from bake.plan.hooks import Hooks
from bake.plan.lowrank import rank_of
from bake.plan.pieces import Context
from bake.plan.relocate import carried, null_rank, stretch
from bake.plan.stream import fold_stream
from bake.plan.widen import widened
from bake.sites import HEAD_KINDS, INNER_KINDS, Site, SiteKind
from bake.verify.precision import double_precision
from bake.verify.verification import Verification

ALPHA = 2.0**-6  # in place, of what is stored in float64
FREE = 0.375
FAMILIES = ("llama", "mistral", "qwen2", "smollm3", "phi3", "mixtral", "gemma", "qwen3")
BIASED = {"llama", "smollm3"}
WIDENED = tuple(family for family in tiny.FAMILIES if tiny.TABLES[family].widen is not None)


@dataclass(eq=False)
class Double:
    """A base under one hook, whose norms see the length of another stream, by hand."""

    map: Tensor
    shift: Tensor
    point: int
    """2 l + 2 for ``resid_post.l``, 2 l + 1 for ``resid_mid.l``, 2 l for ``resid_pre.l``."""
    last: int | None = None
    """The last point where the hook acts; ``point`` when None."""
    alpha: float = ALPHA
    lost: Tensor | None = None
    """The projector onto what the hook removes; None where it removes nothing."""
    left: bool = True
    """Whether readers behind the hook see what is left, or only the norms do."""
    scaled: bool = True
    """Whether the norms see what the relocated model has."""
    kept: dict[str, Tensor] = field(default_factory=dict)

    def hook(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return what stands behind the hook; ``skip`` is the stream before the last write."""
        out = x @ self.map.T + self.shift
        if self.lost is not None:
            rest = self.alpha * ((skip - self.shift) @ self.lost.T)
            self.kept.setdefault("rest", rest)
            out = out + rest if self.left else out
        return out

    def seen(self, x: Tensor, point: int) -> Tensor:
        """Return the stream whose length a norm at a point takes."""
        if point < self.point:
            out = x @ self.map.T
            return out if self.lost is None else out + self.alpha * (x @ self.lost.T)
        return x + self.kept["rest"] if self.lost is not None and not self.left else x

    def norm(self, point: int) -> Callable[..., Tensor]:
        def measured(module: Any, args: Any, out: Tensor) -> Tensor:
            own, other = (
                t.pow(2).mean(-1, keepdim=True) + epsilon(module)
                for t in (args[0], self.seen(args[0], point))
            )
            return out * (own / other).sqrt()

        return measured

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        self.kept.clear()
        last = self.point if self.last is None else self.last
        with ExitStack() as stack:

            def put(handle: Any) -> None:
                stack.callback(handle.remove)

            for layer, block in enumerate(model.model.layers):
                norms = block.input_layernorm, block.post_attention_layernorm

                def entering(_: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
                    self.kept[f"in{layer}"] = args[0] if args else kwargs["hidden_states"]

                def middle(_: Any, args: Any, layer: int = layer) -> None:
                    self.kept[f"mid{layer}"] = args[0]

                def attention(_: Any, __: Any, out: Any, layer: int = layer) -> Any:
                    before = self.kept[f"in{layer}"]
                    return (self.hook(before + out[0], before) - before, *out[1:])

                def leaving(_: Any, __: Any, out: Any, layer: int = layer) -> Any:
                    x = out if isinstance(out, Tensor) else out[0]
                    y = self.hook(x, self.kept[f"mid{layer}"])
                    return y if isinstance(out, Tensor) else (y, *out[1:])

                put(block.register_forward_pre_hook(entering, with_kwargs=True))
                put(norms[1].register_forward_pre_hook(middle))
                if self.point <= 2 * layer + 1 <= last:
                    put(block.self_attn.register_forward_hook(attention))
                if self.point <= 2 * layer + 2 <= last:
                    put(block.register_forward_hook(leaving))
                if self.scaled:
                    for place, norm in enumerate(norms):
                        put(norm.register_forward_hook(self.norm(2 * layer + place)))
            if self.scaled:
                points = 2 * len(model.model.layers)
                put(model.model.norm.register_forward_hook(self.norm(points)))
            yield


def epsilon(norm: Any) -> float:
    found: float = getattr(norm, "variance_epsilon", None) or norm.eps
    return found


def doubled(base: Base, double: Double) -> Tensor:
    with double.on(base.model):
        return logits(base.model, base)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def relocated(base: Base, map_: AffineMap, at: str, **options: Any) -> Plan:
    plan = plan_of(base, [edit(base, "linear", map_, at)], allow=("relocate", "recast"), **options)
    assert plan.exactness is Exactness.RELOCATED, plan.findings[0]
    return plan


def eraser(width: int) -> AffineMap:
    left, right = (torch.stack([vector(width, s), vector(width, s + 1)]) for s in (3, 5))
    return edits.erase(left.T @ torch.linalg.inv(right @ left.T), right, mean=vector(width, 9))


def edit_of(name: str, width: int) -> AffineMap:
    direction, mean = vector(width), vector(width, 1)
    return {
        "ablation": lambda: edits.ablate(direction),
        "subspace": lambda: edits.ablate(torch.stack([direction, mean])),
        "affine": lambda: edits.affine(direction, mean=mean, alpha=0.5),
        "eraser": lambda: eraser(width),
        "half": lambda: edits.affine(direction, mean=mean, alpha=0.5, strength=0.5),
        "learned": lambda: edits.linear(
            torch.eye(width, dtype=torch.float64) + 0.3 * matrix(width), shift=mean
        ),
    }[name]()


SITES = {"resid_post.1": 4, "resid_mid.1": 3, "resid_pre.1": 2, "resid_post.2": 6}
SINGULAR = ("ablation", "subspace", "affine", "eraser")
CASES = [
    *((family, "ablation", "resid_post.1") for family in FAMILIES),
    *(("llama", name, "resid_post.1") for name in (*SINGULAR[1:], "half", "learned")),
    *(("llama", "affine", site) for site in SITES if site != "resid_post.1"),
    ("qwen2", "affine", "resid_post.0"),
]


@pytest.mark.parametrize(("family", "name", "site"), CASES)
def test_a_relocated_edit_is_the_hook_but_for_norms_and_what_is_left(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, name: str, site: str
) -> None:
    base = base_at(tiny_checkpoint(family))
    map_ = edit_of(name, base.layout.hidden)
    baked = logits(
        tiny.load(
            bake(
                base,
                relocated(base, map_, site),
                tmp_path / "out",
                allow=frozenset({"relocate", "recast"}),
            )
        ),
        base,
    )
    hooked = logits(base.model, base, [edit(base, "linear", map_, site)])
    effect = distance(hooked, plain_logits(base))
    full, point = map_.matrix(), SITES.get(site, 2)
    lost = torch.eye(len(full), dtype=torch.float64) - full if name in SINGULAR else None
    double = Double(full, map_.bias, point, lost=lost)
    assert distance(baked, doubled(base, double)) <= RELATIVE * effect
    # Without the norms' share, or with another share left, it is not that.
    double.scaled = False
    assert distance(baked, doubled(base, double)) > 1e-3 * effect
    other = Double(full, map_.bias, point, lost=lost, alpha=1.01 * ALPHA)
    if name in SINGULAR:
        assert distance(baked, doubled(base, other)) > 10 * RELATIVE * effect
    assert distance(baked, hooked) > 10 * RELATIVE * effect


def test_nothing_of_a_suffix_is_left_but_in_the_norms(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("mistral"))
    map_ = edits.ablate(vector(base.layout.hidden))
    sites = ("resid_post.1", "resid_mid.2", "resid_post.2")
    edit_ = edit(base, "ablate", map_, sites)
    plan = plan_of(base, [edit_], allow=("relocate",))
    assert plan.exactness is Exactness.RELOCATED
    baked = logits(
        tiny.load(bake(base, plan, tmp_path / "out", allow=frozenset({"relocate"}))), base
    )
    hooked = logits(base.model, base, [edit_])
    effect = distance(hooked, plain_logits(base))
    lost = torch.eye(base.layout.hidden, dtype=torch.float64) - map_.matrix()
    double = Double(map_.matrix(), map_.bias, 4, 6, FREE, lost, left=False)
    assert (
        distance(doubled(base, Double(map_.matrix(), map_.bias, 4, 6, scaled=False)), hooked)
        <= RELATIVE * effect
    )
    assert distance(baked, doubled(base, double)) <= RELATIVE * effect
    double.left = True
    assert distance(baked, doubled(base, double)) > 1e-3 * effect


def test_what_is_not_allowed_is_refused_with_the_way_out(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    for family, offered in (("llama", True), ("gemma2", False), ("gpt2", False)):
        base = base_at(tiny_checkpoint(family))
        found = edit(base, "ablate", edits.ablate(vector(base.layout.hidden)), "resid_post.1")
        (finding,) = plan_of(base, [found]).findings
        assert finding.exactness is Exactness.IMPOSSIBLE and finding.remedy is not None
        assert ("relocate" in finding.remedy) == offered, family
        assert "widen" in finding.remedy
        allowed = plan_of(base, [found], allow=("relocate",)).exactness
        assert (allowed is Exactness.RELOCATED) == offered, family


def test_an_edit_with_an_exact_fold_keeps_it(tiny_checkpoint: Callable[..., Path]) -> None:
    base = base_at(tiny_checkpoint("llama"))
    everywhere = edit(base, "ablate", edits.ablate(vector(base.layout.hidden)), "resid")
    plans = [plan_of(base, [everywhere], allow=allow) for allow in ((), ("relocate",))]
    assert {plan.exactness for plan in plans} == {Exactness.EXACT}
    assert plans[0].digest == plans[1].digest
    once = edit(base, "ablate", edits.ablate(vector(base.layout.hidden)), "resid_post.1")
    assert plan_of(base, [once], allow=("relocate",)).digest != plans[0].digest


def test_an_ablation_in_place_is_an_adapter_of_rank_one(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    base = base_at(tiny_checkpoint("llama", **tiny.unbiased("llama")))
    plan = relocated(base, edits.ablate(vector(base.layout.hidden)), "resid_post.1")
    ranks = {update.name: rank_of(update) for update in plan.tensors if not update.is_copy()}
    assert set(ranks.values()) == {1}
    assert all("layers.2" not in name for name in ranks)
    assert [f.exactness for f in carrier_findings(plan, "lora")] == [Exactness.RELOCATED]
    constant = relocated(base, edit_of("affine", base.layout.hidden), "resid_post.1")
    assert {f.exactness for f in carrier_findings(constant, "lora")} == {Exactness.IMPOSSIBLE}


def test_edits_that_shrink_a_component_too_far_are_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    map_ = edits.ablate(vector(base.layout.hidden))
    sites = ("resid_post.0", "resid_post.1", "resid_post.2")
    (finding,) = plan_of(base, [edit(base, "ablate", map_, sites)], allow=("relocate",)).findings
    assert finding.exactness is Exactness.IMPOSSIBLE
    assert "of its size" in finding.reason


@pytest.mark.parametrize("name", [*SINGULAR, "half", "learned"])
def test_what_stands_for_an_edit_is_invertible_and_as_near_as_it_says(name: str) -> None:
    map_, width = edit_of(name, 24), 24
    found = carried(map_, ALPHA)
    assert found is not None
    x = matrix(width, 7)
    assert distance(found.back.linear(found.forward.linear(x)), x) <= RELATIVE
    change = found.forward.linear(x) + found.constant - map_(x)
    if name in SINGULAR:
        lost = x - map_.linear(x)
        assert found.left == pytest.approx(ALPHA, rel=RELATIVE)
        assert distance(change, ALPHA * (lost - (map_.bias - map_.linear(map_.bias)))) <= RELATIVE
        assert distance(change, torch.zeros_like(change)) > 1e-3
    else:
        assert found.left == 0 and null_rank(map_, ALPHA) == 0
        assert distance(change, torch.zeros_like(change)) <= RELATIVE


@pytest.mark.parametrize("name", SINGULAR)
def test_fresh_dimensions_take_all_that_an_edit_removes(name: str) -> None:
    width, rank = 24, 2 if name in ("subspace", "eraser") else 1
    map_ = edit_of(name, width).scatter(torch.arange(width), width + 4)
    fresh = torch.eye(width + 4, dtype=torch.float64)[width:]
    assert null_rank(map_, FREE) == rank
    found = carried(map_, FREE, fresh)
    assert found is not None and found.left == 0
    x = torch.nn.functional.pad(matrix(width, 7), (0, 4))
    image = found.forward.linear(x)
    assert distance(image[:, :width], map_.linear(x)[:, :width]) <= RELATIVE
    assert float(image[:, width : width + rank].abs().max()) > 0.1
    assert not bool(image[:, width + rank :].any())
    assert distance(found.back.linear(image), x) <= RELATIVE
    assert distance(found.constant, map_.bias) == 0


@pytest.mark.parametrize(
    ("strengths", "removed", "left"),
    [
        ((1.0, 1.0, 1.0), 3, ALPHA),
        ((1.0, 0.5, 0.5), 1, ALPHA),
        ((1.005, 0.5, 0.5), 1, ALPHA - 0.005),  # turned round, and carried so
        ((0.995, 2.0, 2.0), 1, ALPHA - 0.005),
    ],
)
def test_equal_shares_of_several_directions_are_told_from_what_is_removed(
    strengths: tuple[float, ...], removed: int, left: float
) -> None:
    """Eigenvectors of equal eigenvalues are whatever rounding makes of them."""
    rows = edits.orthonormal(torch.stack([vector(24, seed) for seed in range(3)]))
    skew = rows + 0.3 * vector(24, 9) / vector(24, 9).norm()
    shares = torch.tensor(strengths, dtype=torch.float64)
    for right in (rows, torch.linalg.solve(skew @ rows.T, skew)):
        map_ = edits.linear_factors(-rows.T * shares, right)  # row i keeps 1 − share of itself
        found = carried(map_, ALPHA)
        assert found is not None and null_rank(map_, ALPHA) == removed
        assert found.left == pytest.approx(left, rel=RELATIVE)
        x = matrix(24, 7)
        assert distance(found.back.linear(found.forward.linear(x)), x) <= RELATIVE
        change = (found.forward.linear(x) - map_.linear(x)) @ right.T
        raised = torch.where((1 - shares).abs() < ALPHA, ALPHA * (1 - shares + 1e-9).sign(), 0.0)
        wanted = x @ right.T * torch.where(raised != 0, raised - (1 - shares), raised)
        assert distance(change, wanted) <= RELATIVE
        assert float(wanted.abs().max()) > 1e-3


def test_a_map_whose_null_space_has_no_complement_is_not_relocated() -> None:
    # A³ = 0 on three dimensions, and A² ≠ 0.
    basis = edits.orthonormal(torch.stack([vector(24, seed) for seed in range(3)]))
    shift = torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.float64)
    full = torch.eye(24, dtype=torch.float64) + basis.T @ (shift - torch.eye(3)) @ basis
    assert carried(edits.linear(full), ALPHA) is None


def test_stretch_is_that_of_the_whole_matrix() -> None:
    for name in (*SINGULAR, "half", "learned"):
        map_ = edit_of(name, 24)
        sizes = torch.linalg.svdvals(map_.matrix())
        low, high = stretch(map_)
        assert abs(high - float(sizes.max())) <= RELATIVE * high
        assert abs(low - float(sizes.min())) <= RELATIVE * high


# --- widened --------------------------------------------------------------------------------------


class Widened(Double):
    """The same for a widened model: nothing is left, and the norms see what went aside."""

    def _aside(self, x: Tensor) -> Tensor:
        """Return what the hook removes, in an orthonormal basis of what it can remove."""
        assert self.lost is not None
        u, sizes, _ = torch.linalg.svd(self.lost)
        return self.alpha * (x @ self.lost.T) @ u[:, sizes > 1e-6]

    def hook(self, x: Tensor, skip: Tensor) -> Tensor:
        self.kept["aside"] = self._aside(skip)
        return x @ self.map.T + self.shift

    def seen(self, x: Tensor, point: int) -> Tensor:
        # The norm takes a mean over as many values as x has: the length is what counts.
        before = point < self.point
        own, aside = (x @ self.map.T, self._aside(x)) if before else (x, self.kept["aside"])
        squares = own.pow(2).sum(-1, keepdim=True) + aside.pow(2).sum(-1, keepdim=True)
        return (squares / x.shape[-1]).sqrt().expand_as(x)


WIDE_CASES = [
    # Where a gated layer writes, it computes the edit (tests/test_quotient.py).
    *((family, "ablation", "resid_mid.1") for family in FAMILIES),
    *(("llama", name, "resid_mid.1") for name in SINGULAR[1:]),
]


@pytest.mark.parametrize(("family", "name", "site"), WIDE_CASES)
def test_nothing_of_an_edit_of_a_widened_model_is_left_but_in_the_norms(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, name: str, site: str
) -> None:
    base = base_at(tiny_checkpoint(family))
    width, allow = base.layout.hidden, frozenset({"widen", "recast"})
    map_ = edit_of(name, width)
    asked = [edit(base, "linear", map_, site)]
    plan = plan_of(base, asked, allow=allow)
    assert plan.exactness is Exactness.RELOCATED and plan.widened, plan.findings[0]
    out = bake(base, plan, tmp_path / "out", allow=allow)
    assert tiny.config_of(out)["hidden_size"] == 64 > width
    with torch.no_grad(), double_precision():
        baked = tiny.load(out)(tiny.tokens(), use_cache=False).logits
    hooked = logits(base.model, base, asked)
    effect = distance(hooked, plain_logits(base))
    full = map_.matrix()
    lost = torch.eye(width, dtype=torch.float64) - full
    double = Widened(full, map_.bias, SITES.get(site, 2), lost=lost, alpha=FREE)
    assert distance(baked, doubled(base, double)) <= RELATIVE * effect
    double.scaled = False
    assert distance(doubled(base, double), hooked) <= RELATIVE * effect
    other = Widened(full, map_.bias, SITES.get(site, 2), lost=lost, alpha=1.01 * FREE)
    assert distance(baked, doubled(base, other)) > 1e-6 * effect


@contextmanager
def without_lengths(model: Any, width: int) -> Iterator[None]:
    """Run a model whose norms divide by a constant, so that none of them sees a length."""
    blocks = model.model.layers
    norms = [n for b in blocks for n in (b.input_layernorm, b.post_attention_layernorm)]
    norms.append(model.model.norm)

    def divided(module: Any, args: Any, out: Tensor) -> Tensor:
        assert out.shape == args[0].shape
        return 0.4 * (args[0].shape[-1] / width) ** 0.5 * module.weight * args[0]

    hooks = [norm.register_forward_hook(divided) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("at", ["every block", "one direction twice"])
def test_any_number_of_sites_is_exact_but_for_lengths(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, at: str
) -> None:
    """Another direction behind every block, one after another; and the same at two sites."""
    base = base_at(tiny_checkpoint(family))
    width, allow = base.layout.hidden, frozenset({"widen"})
    asked = [
        edit(base, "ablate", edits.ablate(vector(width, layer)), f"resid_post.{layer}")
        for layer in range(3)
    ]
    if at == "one direction twice":
        asked = [edit(base, "ablate", edits.ablate(vector(width)), ("resid_mid.0", "resid_post.2"))]
    if family in BIASED:
        asked[0] = edit(base, "affine", edit_of("affine", width), str(asked[0].sites[0]))
    plan = plan_of(base, asked, allow=allow)
    assert plan.widened and plan.exactness is Exactness.RELOCATED
    wide = tiny.load(bake(base, plan, tmp_path / "out", allow=allow))
    with torch.no_grad(), double_precision(), without_lengths(wide, width):
        baked = wide(tiny.tokens(), use_cache=False).logits
    with without_lengths(base.model, width):
        hooked, plain = logits(base.model, base, asked), logits(base.model, base)
        one = logits(base.model, base, asked[:1]) if len(asked) > 1 else plain
    assert distance(baked, hooked) <= RELATIVE * distance(hooked, plain)
    assert distance(one, hooked) > 1e-3 * distance(hooked, plain)


def test_a_model_is_widened_only_where_something_would_be_left(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    width = base.layout.hidden
    for name, at, grows in (
        ("half", "resid_post.1", True),  # a gated layer computes it, without a norm's share
        ("half", "resid_mid.1", False),
        ("learned", "resid_post.1", False),
        ("ablation", "resid", False),
        ("ablation", ("resid_mid.2", "resid_post.2"), False),
        ("ablation", ("resid_post.1", "resid_mid.2", "resid_post.2"), True),
        ("ablation", "resid_post.1", True),
        ("ablation", ("resid_post.0", "resid_post.1", "resid_post.2"), True),
    ):
        plan = plan_of(base, [edit(base, "linear", edit_of(name, width), at)], allow=("widen",))
        assert plan.widened == grows, (name, at)
        assert plan.exactness is not Exactness.IMPOSSIBLE


def only_widened(base: Base, asked: Sequence[Edit] = (), neurons: int = 0) -> Plan:
    """Return a plan that widens a model for no edit's sake, and folds edits that are exact."""

    def read(name: str) -> Tensor:
        return base.checkpoint.read(name).to(torch.float64)

    config = base.checkpoint.config
    wide = widened(base.layout, config, 1, neurons=neurons)
    assert wide is not None
    hooks, gain = Hooks([wide.edit(one) for one in asked], wide.layout), wide.gain(read)
    stream = fold_stream(wide.layout, hooks, nulling=False)
    made = assemble(Context(wide.layout, hooks, stream, gain))
    assert not made.found.failures and not made.flags - set(base.layout.flags)
    made = wide.completed(made, gain, ())
    changes = wide.config(config)
    if made.untied:
        changes += (ConfigChange("tie_word_embeddings", True, False),)
    return Plan(wide.layout, (), made.tensors, made.biases, changes, (), (), (), 0)


@pytest.mark.parametrize("family", WIDENED)
def test_a_widened_model_without_an_edit_is_the_same_model(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    base = base_at(tiny_checkpoint(family))
    plan, plain = only_widened(base), plain_logits(base)

    def off(broken: Plan, folder: str) -> float:
        with torch.no_grad(), double_precision():
            model = tiny.load(bake(base, broken, tmp_path / folder))
            out = model(tiny.tokens(), use_cache=False).logits
        return distance(out, plain) / float(plain.abs().max())

    assert tiny.config_of(bake(base, plan, tmp_path / "out"))[base.layout.family.dims.hidden] > 32
    assert off(plan, "sound") <= 1e-12
    # Of what makes up for the width, all that a family has does something.
    assert base.layout.family.widen is not None
    eps = base.layout.family.widen.eps
    forgotten = {"eps": replace(plan, config=tuple(c for c in plan.config if c.key != eps))}
    for update in plan.tensors:
        if update.replacement is not None and "scales" not in forgotten:
            others = tuple(u for u in plan.tensors if u is not update)
            plainly = replace(update, replacement=update.replacement * 1.001)
            forgotten["scales"] = replace(plan, tensors=(*others, plainly))
        elif update.outputs and update.name not in forgotten:
            others = tuple(u for u in plan.tensors if u is not update)
            forgotten[update.name] = replace(plan, tensors=(*others, replace(update, outputs=())))
    named = {name.split(".")[-2] if "." in name else name: one for name, one in forgotten.items()}
    for name, broken in named.items():
        assert off(broken, name) > 1e-10, name


def inside(base: Base, layer: int) -> list[Edit]:
    """Return edits of all that is of no stream's width in a block, and updates of its writers."""
    layout, found = base.layout, list[Edit]()
    for site in sorted(layout.sites, key=lambda site: site.order):
        if site.layer == layer and site.kind in (*HEAD_KINDS, *INNER_KINDS):
            parts = {x.weight: {p.site for p in x.parts} | {x.input_site} for x in layout.linears}
            owners = [x for x in layout.linears if site in parts[x.weight]]
            width, biased = layout.width(site), all(x.bias.state == "present" for x in owners)
            shift = vector(width, 3) if biased else None
            found.append(edit(base, "scale", edits.scale(vector(width), shift=shift), str(site)))
    head = layout.width(Site(SiteKind.Z, layer, 1))
    found.append(edit(base, "ablate", edits.ablate(vector(head)), f"z.{layer}.h1"))
    for branch in layout.branches:
        if branch.layer == layer and len(branch.writes) == 1:
            outputs, inputs = branch.writes[0].shape[:: 1 - 2 * branch.writes[0].output_axis]
            change = edits.update(vector(outputs, 5), vector(inputs, 6) / inputs)
            found.append(edit(base, "update", change, str(branch.output_site)))
    return found


@pytest.mark.parametrize("family", WIDENED)
def test_edits_inside_a_block_are_the_same_in_a_widened_model(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Heads and neurons keep their places beside new ones, and are no stream without a mean."""
    base = base_at(tiny_checkpoint(family))
    asked = inside(base, 1)
    neurons = 0 if family in tiny.UNGATED else 64
    plan = only_widened(base, asked, neurons)
    assert plan.layout.dims["inner"] >= base.layout.dims["inner"] + neurons
    with torch.no_grad(), double_precision():
        baked = tiny.load(bake(base, plan, tmp_path / "out"))(tiny.tokens(), use_cache=False).logits
    hooked = logits(base.model, base, asked)
    effect = distance(hooked, plain_logits(base))
    assert distance(baked, hooked) <= RELATIVE * effect
    for index in range(len(asked)):
        fewer = logits(base.model, base, asked[:index] + asked[index + 1 :])
        assert distance(fewer, hooked) > 1e-3 * effect, asked[index].sites


def test_a_width_that_is_asked_for_is_taken_or_the_nearest_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    width, allow = base.layout.hidden, frozenset({"widen"})
    unit = math.lcm(base.layout.dims["heads"], 8)
    asked = [edit(base, "ablate", edits.ablate(vector(width)), "resid_post.1")]
    plan = plan_of(base, asked, allow=allow, widen=5 * unit - width)
    out = bake(base, plan, tmp_path / "out", allow=allow)
    assert (
        tiny.config_of(out)["hidden_size"]
        == 5 * unit
        != plan_of(base, asked, allow=allow).layout.hidden
    )
    for given in (5 * unit - width + 1, 4 * unit - width + unit // 2 + 1):
        with pytest.raises(UsageError, match="makes a model of width") as found:
            plan_of(base, asked, allow=allow, widen=given)
        assert found.value.fix == f"widen = {5 * unit - width}"
    with pytest.raises(UsageError) as found:
        plan_of(base, asked, allow=allow, widen=1)
    assert found.value.fix is not None
    offered = int(found.value.fix.removeprefix("widen = "))
    assert plan_of(base, asked, allow=allow, widen=offered).widened


def test_a_family_that_nobody_has_widened_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    found = base_at(tiny_checkpoint("gpt2"))
    table = structs.replace(found.layout.family, widen=None)
    base = replace(found, layout=replace(found.layout, family=table))
    asked = [edit(base, "ablate", edits.ablate(vector(base.layout.hidden)), "resid_post.1")]
    (finding,) = plan_of(base, asked, allow=("widen",)).findings
    assert finding.exactness is Exactness.IMPOSSIBLE
    assert finding.remedy is not None and "widen" not in finding.remedy
    (finding,) = plan_of(found, asked).findings
    assert finding.remedy is not None and "widen" in finding.remedy


def test_a_widened_plan_is_a_checkpoint_and_nothing_else(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    base = base_at(tiny_checkpoint("llama", **tiny.unbiased("llama")))
    asked = [
        edit(base, "ablate", edits.ablate(vector(base.layout.hidden)), site)
        for site in ("resid_post.1", "attn_out.0")
    ]
    assert carrier_findings(plan_of(base, asked[1:]), "lora")[0].exactness is Exactness.EXACT
    plan = plan_of(base, asked, allow=("widen",))
    for finding in carrier_findings(plan, "lora"):
        assert finding.exactness is Exactness.IMPOSSIBLE and "hidden_size" in finding.reason
    statuses = {verdict.runtime: verdict.status for verdict in plan.runtimes}
    for runtime in ("transformers", "vllm", "llama.cpp"):
        assert statuses[runtime] == "approximate", runtime
    assert statuses["sglang"] == "not tested"
    served = {verdict.runtime: verdict.status for verdict in carrier_runtimes(plan, "gguf")}
    assert served["llama.cpp"] != "exact"


def test_a_runtime_that_takes_the_size_of_heads_from_the_width_is_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    base = base_at(tiny_checkpoint("qwen2"))
    asked = [edit(base, "ablate", edits.ablate(vector(base.layout.hidden)), "resid_post.1")]
    plan = plan_of(base, asked, allow=("widen",))
    verdicts = {verdict.runtime: verdict for verdict in plan.runtimes}
    assert verdicts["vllm"].status == "refused" and "head_dim" in (verdicts["vllm"].reason or "")
    assert verdicts["llama.cpp"].status == "refused"
    assert verdicts["transformers"].status == "approximate"


def test_a_widened_checkpoint_in_shards_keeps_their_names_and_counts_its_bytes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny.make_model("llama", dtype=torch.bfloat16, seed=1)
    tiny.write_checkpoint(model, tmp_path / "base", max_shard_size="20KB")
    base = base_at(tmp_path / "base")
    asked = [edit(base, "ablate", edits.ablate(vector(base.layout.hidden)), "resid_post.1")]
    plan = plan_of(base, asked, allow=("widen",))
    out = bake(base, plan, tmp_path / "out", allow=frozenset({"widen"}))
    names = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    assert len(names) > 1 and names == {path.name for path in out.glob("*.safetensors")}
    shapes, dtypes = tiny.header_of(out)
    assert set(dtypes.values()) == {"BF16"}
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(2 * prod(shape) for shape in shapes.values())
    tiny.load(out)


def test_a_widened_artifact_is_verified(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    map_ = edits.affine(vector(base.layout.hidden), alpha=2.0)
    asked, allow = [edit(base, "affine", map_, "resid_mid.0")], frozenset({"widen"})
    out = bake(base, plan_of(base, asked, allow=allow), tmp_path / "out", allow=allow)
    report = judged(Verification(out, base=str(base.path), generate=0))
    assert report.exactness == "relocated" and report.passed, report.rows
    strict = Verification(out, base=str(base.path), generate=0, most_kl=1e-6)
    assert judged(strict).verdict == "failed"
