"""Adapters of mixtures from when each expert was a module: their factors are put together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_samples import base_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake.checkpoints import open_checkpoint
from bake.errors import InputError
from bake.merge.merge import merge_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

RANK, ALPHA = 3, 5
EXPERTS = {
    "mixtral": ("block_sparse_moe.experts.{}.{}", ("w1", "w2", "w3")),
    "qwen3_moe": ("mlp.experts.{}.{}", ("gate_proj", "down_proj", "up_proj")),
}
"""What each calls its experts on disk: the first and last are one parameter where they run."""


def old_adapter(base: Path, out: Path, architecture: str, **config: Any) -> dict[str, Tensor]:
    """Write factors for every expert, and return their products, not scaled, by the weight."""
    form, names = EXPERTS[architecture]
    generator = torch.Generator().manual_seed(3)
    tensors, sums = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if not any(path.endswith(form.format(n, m)) for n in range(4) for m in names):
            continue
        rows, columns = weight.shape
        a, b = (torch.randn(*s, generator=generator) for s in ((RANK, columns), (rows, RANK)))
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
        sums[name] = b.double() @ a.double()
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    text = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(names)}
    (out / "adapter_config.json").write_text(json.dumps({**text, **config}))
    return sums


@pytest.mark.parametrize("architecture", EXPERTS)
def test_each_expert_gets_what_was_trained(
    architecture: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = base_of(architecture, False, "plain", tmp_path_factory.getbasetemp() / "bases").path
    down = EXPERTS[architecture][1][1]
    # A pattern for what is still there by its name means what it meant.
    named: list[dict[str, Any]] = [{"alpha_pattern": {down: 9}}] * (down == "down_proj")
    for number, more in enumerate(({}, *named)):
        sums = old_adapter(base, tmp_path / f"a{number}", architecture, **more)
        out = tmp_path / f"out{number}"
        merge_adapter(tmp_path / f"a{number}", open_checkpoint(base), out)
        before, after = (load_file(path / "model.safetensors") for path in (base, out))
        assert len(sums) >= 18
        for name, tensor in before.items():
            alpha = 9 if more and down in name else ALPHA
            product = sums.get(name)
            want = tensor.double() + (0 if product is None else alpha / RANK * product)
            assert torch.equal(after[name], want.float()), name


@pytest.mark.parametrize("architecture", EXPERTS)
@pytest.mark.parametrize("kind", ["rslora", "alpha", "one expert's"])
def test_another_scale_than_was_trained_is_refused(
    architecture: str, kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """PEFT makes one of two factors: of a root, or of a name that is no more, another scale."""
    base = base_of(architecture, False, "plain", tmp_path_factory.getbasetemp() / "bases").path
    first, down, _ = EXPERTS[architecture][1]
    more: dict[str, Any] = {
        "rslora": {"use_rslora": True},
        "alpha": {"alpha_pattern": {first: 9}},
        "one expert's": {"alpha_pattern": {rf"layers\.1\..*experts\.2\.{down}": 9}},
    }[kind]
    old_adapter(base, tmp_path / "a", architecture, **more)
    with pytest.raises(InputError, match="were trained with the scale") as caught:
        merge_adapter(tmp_path / "a", open_checkpoint(base), tmp_path / "no")
    assert ("use_rslora" in str(caught.value.why)) == (kind == "rslora")
    assert not (tmp_path / "no").exists()
