"""Whether files hold a plan: bounds by hand, and every kind of file with one value changed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf_files
import pytest
import torch
from exporting import written
from harness import Base, base_at, edit, plan_of, vector
from safetensors.torch import load_file, save_file

from bake import edits as make
from bake.checkpoints.gguf.file import open_gguf
from bake.checkpoints.gguf.types import type_named
from bake.checkpoints.planned import PlannedModel, PlannedTensor
from bake.jobs.planned import planned_of
from bake.jobs.recorded import Source
from bake.verify.inputs import opened
from bake.verify.runtimes.registry import Runtimes
from bake.verify.stored.blocks import steps_of, values_of
from bake.verify.stored.check import FilesChecked, check_files
from bake.verify.stored.deviation import DIRECTION, NOISE, Deviation, deviation, float_steps
from bake.verify.stored.files import Directions, Rows
from bake.verify.verification import Verification

Checkpoints = Callable[..., Path]


@dataclass
class Given:
    """Files that hold what a test says."""

    exact: torch.Tensor
    have: torch.Tensor
    step: float
    along: Directions | None = None
    unbiased: bool = True
    tied: None = None
    planned: dict[str, PlannedTensor] = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(self.exact.shape)
        self.planned = {"w": PlannedTensor("w", "F32", shape, lambda: iter([self.exact]))}

    def reach(self, name: str) -> float:
        return 1.0

    def rows(self, name: str, start: int, stop: int) -> Rows:
        return self.have[start:stop].reshape(stop - start, -1)

    def steps(self, name: str, start: int, stop: int, exact: Rows) -> Rows:
        return torch.full_like(exact, self.step)

    def directions(self, name: str) -> Directions | None:
        return self.along


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_steps_of_floating_point_types_by_hand() -> None:
    """Between 1 and 2 a bfloat16 steps by 2⁻⁷, a float16 by 2⁻¹⁰; below a power of two by half."""
    values = torch.tensor([[1.0, 1.5, 0.99, -4.0, 0.0]], dtype=torch.float64)
    want = torch.tensor([[1, 1, 0.5, 4, 0]], dtype=torch.float64) * 2**-7
    assert torch.equal(float_steps(values, torch.bfloat16)[:, :4], want[:, :4])
    assert float(float_steps(values, torch.bfloat16)[0, 4]) == 2.0**-126 * 2**-7
    assert torch.equal(float_steps(values, torch.float16)[:, :4], want[:, :4] / 8)
    # It is the distance of the neighbours that torch knows.
    above = torch.nextafter(torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor(2.0).bfloat16())
    assert float(above) - 1.5 == 2**-7


def test_rounding_to_nearest_is_a_twelfth_of_the_squared_step() -> None:
    exact = random(64, 96)
    axis = Directions(0, torch.linalg.qr(random(64, 2, seed=1))[0].T)
    sound = deviation(Given(exact, (exact * 8).round() / 8, 1 / 8, axis), "w")
    assert sound.held and sound.outside == 0
    assert sound.noise == pytest.approx(1, rel=0.05)
    assert sound.direction == pytest.approx(1, rel=0.3)
    # Always downwards is a neighbour of every value, and twice as far in the mean square; along a
    # direction with a mean it adds up.
    mean = Directions(0, torch.ones(1, 64, dtype=torch.float64) / 8)
    down = deviation(Given(exact, (exact * 8).floor() / 8, 1 / 8, mean), "w")
    assert down.outside == 0 and down.noise == pytest.approx(2, rel=0.05)
    assert down.direction > 3 and not down.held
    # One value that is off by more than a step is one value.
    wrong = (exact * 8).round() / 8
    wrong[3, 4] += 1.5 / 8
    found = deviation(Given(exact, wrong, 1 / 8, axis), "w")
    assert found.outside == 1 and not found.held and found.score > 1
    assert not deviation(Given(exact, wrong * torch.nan, 1 / 8), "w").held


def test_what_one_matrix_of_a_stack_is_off_by_is_its_own() -> None:
    """Errors of experts neither make up for each other, nor add up where the experts are alike."""
    mean = Directions(0, torch.full((1, 48), 48**-0.5, dtype=torch.float64))

    def found(exact: torch.Tensor, have: torch.Tensor) -> Deviation:
        given = Given(exact, have.flatten(0, 1), 1 / 8, mean)
        given.planned["w"] = replace(given.planned["w"], tiles=lambda: iter(exact))
        return deviation(given, "w")

    exact = random(8, 48, 64)
    nearest = (exact * 8).round() / 8
    lost = nearest.clone()
    lost[2], lost[5] = (exact[2] * 8).floor() / 8, (exact[5] * 8).ceil() / 8
    assert found(exact, nearest).held
    one = found(exact, lost)
    assert one.outside == 0 and one.noise < NOISE and one.direction > DIRECTION
    alike = exact[:1].expand(64, -1, -1)
    assert found(alike, nearest[:1].expand(64, -1, -1)).direction < 1.5
    apart = [found(exact[:1], lost[2:3] - exact[2:3] + exact[:1]), found(exact[:1], nearest[:1])]
    assert [x.held for x in apart] == [False, True]  # as of a matrix alone


def test_blocks_of_codes_are_read_by_gguf_py() -> None:
    import gguf

    values = random(4, 64).float()
    kind = type_named("Q4_1")
    raw = torch.from_numpy(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q4_1))
    back, steps = values_of(raw, kind, "w"), steps_of(raw, kind, "w")
    # The step is the block's span over fifteen, and no value is off by more than half of it.
    blocks = values.double().reshape(4, 2, 32)
    span = (blocks.amax(2) - blocks.amin(2)) / 15
    assert torch.allclose(steps.reshape(4, 2, 32)[..., 0], span, rtol=1e-3)
    assert float(((back - values.double()).abs() / steps).max()) < 0.55


# --- every kind of file -------------------------------------------------------------------------


def checked(base: Base, out: Path, **options: object) -> FilesChecked:
    """Return what the files of an artifact come to beside its plan."""
    asked = Verification(out, base=str(base.path), **options)  # type: ignore[arg-type]
    planned = planned_of(Source(out, str(out), published=False), asked)
    with opened(asked, planned) as inputs:
        return check_files(inputs.files, planned.model.digest)


def held(found: FilesChecked) -> bool:
    return not found.strays and all(one.held for one in found.deviations)


PEFT = Runtimes(("peft",))


@pytest.fixture(autouse=True)
def _runtimes_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No runtime is started here, so that none need be installed."""
    monkeypatch.setattr(Runtimes, "find", lambda self, kind, **options: None)


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_an_adapter_holds_the_planned_weights(
    family: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family, dtype=torch.float32))
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), ["attn_out.*"])]
    plan = plan_of(base, edits)
    record = {"base": {"model": str(base.path)}}
    out = written("lora", plan, base.checkpoint, tmp_path / "out", record=record).path
    found = checked(base, out, runtimes=PEFT)
    assert held(found) and found.values > 0
    assert found.controls and all(not one.deviation.held for one in found.controls)
    # One entry of one factor, changed by a thousandth.
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name and bool(tensors[name].any()))
    row = int(tensors[name].abs().sum(1).argmax())
    tensors[name][row] *= 1.001
    save_file(tensors, file, metadata={"format": "pt"})
    assert not held(checked(base, out, runtimes=PEFT))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_a_gguf_holds_the_plan_on_its_own_weights(
    kind: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = base_at(
        tiny_checkpoint("llama", dtype=torch.float32, hidden_size=64, intermediate_size=96)
    )
    file = gguf_files.write(tmp_path / "base.gguf", base.path, kind)
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), ["attn_out.*"])]
    record = {"base": {"model": str(base.path)}}
    out = written(
        "gguf", plan_of(base, edits), base.checkpoint, tmp_path / "out", record=record,
        gguf=file, gguf_type="keep",
    ).path  # fmt: skip
    llama_cpp = Runtimes(("llama.cpp",))
    options = {"gguf": file, "runtimes": llama_cpp}
    found = checked(base, out, **options)
    assert held(found) and found.values > 0
    assert found.controls and all(not one.deviation.held for one in found.controls)
    # Without the base's file nothing is known of what it should hold.
    (tmp_path / "elsewhere").mkdir()
    file = file.rename(tmp_path / "elsewhere" / file.name)
    assert not checked(base, out, runtimes=llama_cpp).deviations
    (name,) = (path for path in out.iterdir() if path.suffix == ".gguf")
    first = next(t for t in open_gguf(name).tensors.values() if "attn_output" in t.name)
    with name.open("r+b") as stream:
        stream.seek(first.start + 40)
        byte = stream.read(1)
        stream.seek(first.start + 40)
        stream.write(bytes([byte[0] ^ 0x7F]))
    assert not held(checked(base, out, gguf=file, runtimes=llama_cpp))


def test_a_control_vector_holds_the_offsets(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    shift = make.offset(vector(base.layout.hidden))
    edits = [edit(base, "offset", shift, ["resid_post.1", "resid_pre.2"])]
    record = {"base": {"model": str(base.path)}}
    plan = plan_of(base, edits)
    out = written("control-vector", plan, base.checkpoint, tmp_path / "out", record=record).path
    options = {"runtimes": Runtimes(("llama.cpp",))}
    found = checked(base, out, **options)
    # Two names of one point add up.
    assert held(found) and [one.name for one in found.deviations] == ["direction.1"]
    assert all(not one.deviation.held for one in found.controls) and found.controls
    data = json.loads((out / "bake.json").read_text())
    assert data["kind"] == "control-vector"


def test_planned_models_are_plain_values() -> None:
    """What is handed over is names, types, shapes and tiles: nothing that could compute an edit."""

    def tiles() -> Iterator[torch.Tensor]:
        yield torch.ones(2, 3)
        yield torch.zeros(1, 3)

    tensor = PlannedTensor("w", "F32", (3, 3), tiles)
    assert torch.equal(tensor.value(), torch.tensor([[1.0] * 3, [1.0] * 3, [0.0] * 3]))
    assert [(start, stop) for start, stop, _ in tensor.spans()] == [(0, 2), (2, 3)]
    assert PlannedModel("sha256:0", {"w": tensor}, "{}").tensors["w"] is tensor
