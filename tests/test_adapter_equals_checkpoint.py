"""In float32 an adapter and a checkpoint of one plan are the same function, to 1e-5 of a logit.

The gain of each model's last norm is scaled so that its largest logit is 1. What is left is the
rounding of a float32 model: the two carriers add the same product in another order, and a few such
roundings of 6e-8 add up from layer to layer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import logits_of, peft_model
from exporting import written
from harness import Base, bake, base_at, edit, plan_of, vector
from peft.tuners.lora import LoraLayer

from bake import edits as make
from bake.affine import AffineMap
from bake.edits import Edit, WeightUpdate
from bake.plan import Exactness
from bake.plan.carriers import carrier_findings
from bake.sites import Site, SiteKind

LARGEST = 1e-5
# With a bias in every linear layer, which no flag closes.
BIASED = [f for f in tiny.FAMILIES if "o" in tiny.BIASES[f] and not tiny.unbiased(f)]


def subspace(n: int) -> AffineMap:
    return make.ablate(torch.stack([vector(n, 3), vector(n, 4)]), strength=0.5)


def few_channels(n: int) -> AffineMap:
    factor = torch.ones(n, dtype=torch.float64)
    factor[1], factor[5] = -2.0, 0.25
    return make.scale(factor)


def eraser(n: int) -> AffineMap:
    """Return an oblique projector of norm 2 with a mean.

    Its norm multiplies every rounding, in the hooks' model as in both carriers: with one of norm
    100 two float32 evaluations of one function are some 1e-4 apart.
    """
    unit = vector(n, 5) / vector(n, 5).norm()
    across = vector(n, 6) - (vector(n, 6) @ unit) * unit
    left = unit + 3**0.5 * across / across.norm()
    return make.erase(left.unsqueeze(1), unit.unsqueeze(0), mean=0.2 * vector(n, 7))


SITES = ("attn_out", "mlp_out", "z", "mlp_act", "q", "k", "v", "mlp_gate", "mlp_up")
Form = tuple[str, Callable[[int], AffineMap | WeightUpdate], str]
FORMS: dict[str, Form] = {
    "ablation of the stream": ("ablate", lambda n: make.ablate(vector(n)), "resid"),
    "subspace of the stream": (
        "ablate",
        lambda n: make.ablate(torch.stack([vector(n, 3), vector(n, 4)])),
        "resid",
    ),
    "affine edit of the stream": (
        "affine",
        lambda n: make.affine(vector(n), mean=vector(n, 1), alpha=0.7),
        "resid",
    ),
    "eraser of the stream": ("erase", eraser, "resid"),
    "offset": ("offset", lambda n: make.offset(0.5 * vector(n)), "embed"),
    "ablation": ("ablate", lambda n: make.ablate(vector(n)), "embed"),
    **{
        f"{kind} at {site}": (kind, build, site)
        for site in SITES
        for kind, build in (("ablate", subspace), ("scale", few_channels))
    },
    **{
        f"ablate at {site}": ("ablate", lambda n: make.ablate(vector(n)), site)
        for site in ("ln1_out", "ln2_out", "ln_final_out")
    },
    "update": ("update", lambda n: make.update(vector(n, 1), vector(n, 2)), "square"),
}


def held(family: str, site: str) -> bool:
    """Whether both carriers hold a linear edit there, written by hand.

    A layer's bias passes through a map of its output, and an adapter holds no bias; the stream of
    a model with post-norms cannot be edited at all.
    """
    if site == "resid":
        return family not in (*BIASED, *tiny.POST_NORM)
    if site in ("q", "k", "v"):
        return family not in (*BIASED, "qwen2")
    return family not in BIASED or site not in ("attn_out", "mlp_out", "mlp_gate", "mlp_up")


def forms_of(family: str) -> dict[str, Form]:
    """Return the forms of a family: at each module one of the two kinds, in turn.

    So every kind meets every module and every family, and every module every family. All three
    together are held to the hooks in float64, in test_families.py and test_lora.py.
    """
    turn = tiny.FAMILIES.index(family)
    other = {
        f"{('ablate', 'scale')[(turn + place) % 2]} at {site}" for place, site in enumerate(SITES)
    }
    return {name: form for name, form in FORMS.items() if name not in other}


def exists(base: Base, site: str) -> bool:
    """Whether the architecture has such a place."""
    return site in ("resid", "square") or any(s.kind == site for s in base.layout.sites)


def edits_of(base: Base, form: Form) -> list[Edit]:
    """Return the edit, at block 1 where the place is one of a block."""
    kind, build, site = form
    hidden = base.layout.hidden
    if site == "resid":
        return [edit(base, kind, build(hidden), "resid")]
    if site == "square":  # o_proj's update: from its input to the stream
        inner = base.layout.width(Site(SiteKind.Z, 1))
        update = make.update(0.5 * vector(hidden, 1), 0.5 * vector(inner, 2))
        return [edit(base, kind, update, "attn_out.1")]
    place = Site(SiteKind(site), None if site in ("embed", "ln_final_out") else 1)
    return [edit(base, kind, build(base.layout.width(place)), str(place))]


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A float32 model whose largest logit is 1."""
    family = request.param
    model = tiny.make_model(family, dtype=torch.float32, **tiny.unbiased(family))
    path = tmp_path_factory.mktemp(family)
    tiny.write_checkpoint(model, path / "raw")
    norm = model.get_submodule(tiny.layout_of(path / "raw").final_norm.live)
    offset = tiny.GAIN_OFFSET.get(family, 0.0)
    with torch.no_grad():
        size = float(logits_of(model).abs().max())
        norm.weight.copy_((norm.weight + offset) / size - offset)
        if getattr(norm, "bias", None) is not None:
            norm.bias.div_(size)
    tiny.write_checkpoint(model, path / "base")
    return base_at(path / "base")


def difference(one: Any, other: Any) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("base", tiny.FAMILIES, indirect=True)
def test_adapter_equals_checkpoint_in_float32(base: Base, tmp_path: Path) -> None:
    family = base.layout.family.name
    plain = logits_of(tiny.load(base.path, torch.float32))
    assert float(plain.abs().max()) == pytest.approx(1, abs=0.01)  # Gemma 2 caps them
    worst, found = 0.0, 0
    for name, form in forms_of(family).items():
        if not exists(base, form[2]):
            continue
        plan = plan_of(base, edits_of(base, form))
        exact = all(
            finding.exactness is Exactness.EXACT
            for carrier in ("checkpoint", "lora")
            for finding in carrier_findings(plan, carrier)
        )
        assert exact == held(family, form[2]), name
        if not exact:
            continue
        folder = tmp_path / name.replace(" ", "_")
        adapter = written("lora", plan, base.checkpoint, folder / "lora").path
        baked = logits_of(tiny.load(bake(base, plan, folder / "baked"), torch.float32))
        model = peft_model(base.path, adapter, torch.float32)
        adapted = logits_of(model)
        assert difference(plain, baked) > 1e-3, name
        assert difference(adapted, baked) <= LARGEST, name
        worst, found = max(worst, difference(adapted, baked)), found + 1
        # The control: half the change is another function.
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling = {name: 0.5 * scale for name, scale in layer.scaling.items()}
        assert difference(logits_of(model), baked) > 1e-4, name
    print(f"{family}: {found} edits, largest difference {worst:.1e}")
    assert found >= 8
