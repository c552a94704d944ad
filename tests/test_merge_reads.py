"""A layer is a matrix product, or the rows of a table, if it computes that: not by its name."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bake.merge.reads import is_plain


class ByHand(nn.Linear):
    """Falcon's way."""

    def forward(self, x: Tensor) -> Tensor:
        found = x @ self.weight.T
        return found if self.bias is None else found + self.bias


class Scaled(nn.Embedding):
    """Gemma's way, whose scale PEFT puts on its factors too."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.embed_scale = nn.Buffer(torch.tensor(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Cut(nn.Linear):
    """Plain for all but large inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-1e4, 1e4))


class Bounded(nn.Linear):
    """Gemma 4's way: the bounds are values of the checkpoint."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.bound = nn.Buffer(torch.tensor(float("inf")))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-self.bound, self.bound))


class Normed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.norm(dim=-1, keepdim=True))


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float().to(self.weight.dtype))


class Shifted(nn.Embedding):
    """OPT's way with positions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x + 2) % self.weight.shape[0])


class Scaling(nn.Embedding):
    """With a scale that PEFT does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class More(nn.Linear):
    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return super().forward(x) + state


PLAIN = (nn.Linear, ByHand, nn.Embedding, Scaled)
OWN = (Doubled, Cut, Bounded, Normed, Rounded, Shifted, Scaling, More)


@pytest.mark.parametrize("kind", [*PLAIN, *OWN])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_a_layer_computes(kind: Any, device: str) -> None:
    with torch.device(device):
        layer = kind(9, 5)
    assert is_plain(layer) == (kind in PLAIN)


def test_a_table_that_changes_its_rows_is_none() -> None:
    assert not is_plain(nn.Embedding(9, 5, max_norm=1.0))


def test_the_layer_stays_as_it_is() -> None:
    layer = ByHand(9, 5)
    before = layer.weight.clone()
    is_plain(layer)
    assert torch.equal(layer.weight, before)
