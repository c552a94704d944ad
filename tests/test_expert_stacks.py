"""Experts in one tensor: each one's matrix is folded where it lies, on the axis that is stated."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tiny
import torch
from exporting import written
from harness import RELATIVE, Base, base_at, edit, logits, plain_logits, plan_of, vector
from safetensors.torch import save_file
from torch import Tensor

from bake import edits as make
from bake.checkpoints.planned import PlannedTensor
from bake.edits import Edit
from bake.errors import FamilyError
from bake.plan import Exactness
from bake.verify.controls import AXIS, Control, Spoiling, groups_of

Checkpoints = Callable[..., Path]
DOWN, UP = "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"


def baked(base: Base, edits: list[Edit], out: Path) -> tuple[Callable[[Path], float], float]:
    """Write an exact plan; return what tells how far a checkpoint is from it, and its effect."""
    plan = plan_of(base, edits)
    assert plan.exactness is Exactness.EXACT, plan.findings
    written("checkpoint", plan, base.checkpoint, out, record={"base": {"model": str(base.path)}})
    hooked = logits(base.model, base, edits)
    effect = float((hooked - plain_logits(base)).abs().max())
    assert effect > 1e-2

    def error(path: Path) -> float:
        return float((logits(tiny.load(path), base) - hooked).abs().max()) / effect

    assert error(out) <= RELATIVE
    return error, effect


def other(source: Path, out: Path, changed: Mapping[str, Tensor], **config: object) -> Path:
    """Write a checkpoint with other tensors, in one file."""
    out.mkdir()
    values = {**tiny.config_of(source), **config}
    (out / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in changed.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_every_expert_changes_on_its_own_axis(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """gpt-oss's own experts are square, so that no shape says which axis is which."""
    base = base_at(tiny_checkpoint("gpt_oss", intermediate_size=24))
    width = base.layout.hidden
    affine = make.affine(vector(width), mean=vector(width, 1), alpha=0.7)
    edits = [
        edit(base, "affine", affine, "mlp_out.1"),
        edit(base, "offset", make.offset(vector(width, 5)), "ln2_out.1"),
    ]
    error, _ = baked(base, edits, tmp_path / "out")
    was, now = tiny.tensors_of(base.path), tiny.tensors_of(tmp_path / "out")
    assert was[DOWN].shape == (4, width, width)
    bias = f"{DOWN}_bias"
    spoiled = {
        "axis": {DOWN: was[DOWN] + (now[DOWN] - was[DOWN]).transpose(1, 2)},
        "last expert": {DOWN: torch.cat([now[DOWN][:-1], was[DOWN][-1:]])},
        "bias of one": {bias: torch.cat([now[bias][:-1], was[bias][-1:]])},
        "biases before": {f"{UP}_bias": was[f"{UP}_bias"]},
        "router": {"model.layers.1.mlp.router.bias": was["model.layers.1.mlp.router.bias"]},
    }
    for name, tensors in spoiled.items():
        path = other(tmp_path / "out", tmp_path / name, {**now, **tensors})
        assert error(path) > 1e-3, name


def test_each_expert_is_rounded_for_itself(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Error feedback begins anew with every expert, and keeps what each of them lost."""
    base = base_at(tiny_checkpoint("gpt_oss", dtype=torch.bfloat16, hidden_size=96))
    direction = vector(96)
    plan = plan_of(base, [edit(base, "ablate", make.ablate(direction), "resid")])
    unit = direction / direction.norm()

    def leaks(rounding: str) -> Tensor:
        out = tmp_path / rounding
        record = {"base": {"model": str(base.path)}}
        written("checkpoint", plan, base.checkpoint, out, record=record, rounding=rounding)
        return (tiny.tensors_of(out)[DOWN].double() @ unit).norm(dim=1)

    nearest, feedback = leaks("nearest"), leaks("feedback")
    assert bool((feedback < 0.1 * nearest).all()), (nearest, feedback)


def stacked(tensors: Mapping[str, Tensor], *, turned: bool = False) -> dict[str, Tensor]:
    """Return a checkpoint with the experts of every block in one tensor, as the Hub has some."""
    found, experts = {}, dict[str, dict[str, list[Tensor]]]()
    for name, tensor in tensors.items():
        path, _, rest = name.partition(".experts.")
        if not rest[:1].isdigit():
            found[name] = tensor
            continue
        _, kind, _ = rest.split(".")
        experts.setdefault(path, {}).setdefault(kind, []).append(tensor)
    for path, kinds in experts.items():
        up = torch.cat([torch.stack(kinds["gate_proj"]), torch.stack(kinds["up_proj"])], dim=1)
        down = torch.stack(kinds["down_proj"])
        found[f"{path}.experts.gate_up_proj"] = up.transpose(1, 2) if turned else up
        found[f"{path}.experts.down_proj"] = down.transpose(1, 2) if turned else down
    return found


@pytest.mark.parametrize(
    ("name", "turned", "axis"),
    [
        ("qwen3_5_moe in its wrapper", False, 0),  # Qwen/Qwen3.5-35B-A3B
        ("qwen3_moe in Qwen3-VL", True, 1),  # Qwen/Qwen3-VL-30B-A3B-Instruct
    ],
)
def test_what_the_hub_stacks(
    name: str, turned: bool, axis: int, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Files of the Hub, which save_pretrained writes otherwise, are read as their class does."""
    source = tiny_checkpoint(name)
    tensors = tiny.tensors_of(source)
    if turned:  # save_pretrained writes these in the orientation of the class
        tensors = {
            key: value.transpose(1, 2) if ".experts." in key else value
            for key, value in tensors.items()
        }
    path = other(source, tmp_path / "hub", stacked(tensors))
    base, as_saved = base_at(path), base_at(source)
    apart = plain_logits(base) - plain_logits(as_saved)
    assert float(apart.abs().max()) <= RELATIVE * float(plain_logits(as_saved).abs().max())
    (writer,) = (x for x in base.layout.branches[-1].writes if x.experts == 3)
    assert writer.output_axis == axis
    width = base.layout.hidden
    edits = [
        edit(base, "ablate", make.ablate(vector(width)), "resid"),
        edit(base, "ablate", make.ablate(vector(width, 2), strength=0.4), "mlp_out.2"),
        edit(base, "ablate", make.ablate(vector(width, 3)), "ln2_out.2"),
    ]
    error, _ = baked(base, edits, tmp_path / "out")
    was, now = tiny.tensors_of(path), tiny.tensors_of(tmp_path / "out")
    for key in (name for name in now if "layers.2" in name and ".experts." in name):
        assert was[key].shape == now[key].shape
        assert error(other(tmp_path / "out", tmp_path / key, {**now, key: was[key]})) > 1e-3


def test_a_square_stack_of_two_orientations_is_refused(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Where a class takes the axis from the shape, a shape that says nothing is no answer."""
    source = tiny_checkpoint("qwen3_moe in Qwen3-VL")
    config = tiny.config_of(source)
    text = {**config["text_config"], "moe_intermediate_size": config["text_config"]["hidden_size"]}
    tensors = dict(tiny.tensors_of(source))
    for name in tensors:
        if name.endswith("experts.down_proj"):
            tensors[name] = torch.zeros(3, 24, 24, dtype=torch.float64)
        elif name.endswith("experts.gate_up_proj"):
            tensors[name] = torch.zeros(3, 48, 24, dtype=torch.float64)
    path = other(source, tmp_path / "square", tensors, text_config=text)
    with pytest.raises(FamilyError, match=r"down_proj is square, and may be stored as \[out, in\]"):
        tiny.layout_of(path)


def test_a_verification_turns_the_change_of_a_square_stack() -> None:
    """The wrong axis is told from the right one for each matrix of a stack."""
    was, now = torch.randn(3, 4, 4).double(), torch.randn(3, 4, 4).double()
    planned = {"w": PlannedTensor("w", "F64", (3, 4, 4), lambda: iter([now]))}
    kinds = [group[0].kind for group in groups_of(planned, lambda _: True, None, "seed")]
    assert AXIS in kinds
    spoiling = Spoiling(
        planned,
        lambda _, start, stop: was.reshape(12, 4)[start:stop],
        lambda _, start, stop: now.reshape(12, 4)[start:stop],
        None,
    )
    turned = (was + (now - was).transpose(1, 2)).reshape(12, 4)
    for start, stop in ((0, 12), (4, 8), (5, 11)):
        assert torch.equal(spoiling.rows(Control(AXIS, "w"), start, stop), turned[start:stop])
