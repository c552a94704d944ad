"""What a verification holds: logits are gigabytes, and nothing may keep a second copy of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bake.verify import metrics, store
from bake.verify.metrics import compare_logits
from bake.verify.store import Store


def memory(tensors: list[Tensor]) -> int:
    """The bytes that some tensors keep, those of what they are views of included."""
    whole = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(whole.values())


def test_a_sample_of_logits_keeps_no_more_than_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_SAMPLE", 100)
    monkeypatch.setattr(metrics, "_AT_ONCE", 1000)
    kept: list[list[Tensor]] = []
    real = metrics._Spread.quantile

    def quantile(self: metrics._Spread, share: float) -> float:
        kept.append(self.sample)
        return real(self, share)

    monkeypatch.setattr(metrics._Spread, "quantile", quantile)
    x, y = torch.randn(2, 40, 500)
    found = compare_logits(x, {"other": y})["other"].metrics
    assert kept and all(memory(sample) <= 100 * 8 for sample in kept)
    apart = (x.double() - y.double()).abs().flatten()[::200]
    assert found.p99_dlogit == float(apart.sort().values[98])


@pytest.mark.parametrize("layout", ["own", "shared", "view", "turned"])
def test_a_kept_run_is_copied_only_where_a_file_cannot_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(store, "WORTH_KEEPING", 0.0)
    x = torch.randn(6, 4)
    other = {"own": torch.randn(6, 4), "shared": x, "view": x[1:3], "turned": x.T}[layout]
    tensors = {"logits": x, "stream": other}
    apart = store._apart(tensors)
    assert apart["logits"] is x
    assert (apart["stream"] is other) == (layout == "own")
    kept = Store(tmp_path / "runs", {"question": 1})
    kept.save("a run", tensors, 1.0)
    (file,) = (tmp_path / "runs").glob("*.safetensors")
    for name, value in load_file(file).items():
        assert torch.equal(value, tensors[name])
