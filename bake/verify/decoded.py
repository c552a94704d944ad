"""What storage in a GGUF costs of an edit by itself, on the file's own weights.

A runtime that multiplies blocks of codes rounds activations as well, so that what it serves does
not say what the codes have lost. Here the base's file and the artifact's are decoded into
transformers' model in float64, and the base is hooked: nothing but storage lies between the two.
What the runtime adds lies between the decoded file and the file served.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float32
from torch import Tensor

from bake.checkpoints.gguf.file import Gguf
from bake.families import Layout
from bake.families.gguf import GgufPlace, gguf_places
from bake.verify.inputs import PROMPTS, Inputs
from bake.verify.loss import Divergence, divergence
from bake.verify.models import Values
from bake.verify.runner import Runner
from bake.verify.stored.blocks import FLOATS
from bake.verify.stored.files import StoredFiles
from bake.verify.stored.gguf import file_rows

LogProbs = Float32[Tensor, "tokens vocab"]


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """Runs over the whole transcript; their logits let go of, one after another.

    Attributes:
        effect: how far the decoded base lies from itself under the edits as hooks.
        lost: how far the decoded artifact lies from that.
        logprobs: of the decoded base, and of the decoded artifact, over what runtimes are asked.
    """

    effect: Divergence
    lost: Divergence
    logprobs: tuple[LogProbs, LogProbs]


def run_decoded(runner: Runner) -> Decoded | None:
    """Run the weights of an artifact that was made from a GGUF of the base; None of any other.

    The model is the planned one, in which an edited head has parameters of its own.
    """
    inputs = runner.inputs
    weights = _weights_of(inputs)
    if weights is None:
        return None
    edits, double = inputs.artifact.edits, torch.float64
    base = weights.values(edited=False)
    hooked = runner.trace("decoded base and hooks", "planned", double, edits, tensors=base).logits

    def beside(name: str, tensors: Values) -> tuple[Divergence, LogProbs]:
        logits = runner.trace(name, "planned", double, tensors=tensors).logits
        asked = logits[: runner.transcript.rows(PROMPTS)].log_softmax(-1).to(torch.float32)
        return divergence(hooked, logits, runner.transcript.speaking), asked

    effect, plain = beside("decoded base", base)
    lost, stored = beside("decoded artifact", weights.values(edited=True))
    return Decoded(effect, lost, (plain, stored))


def _weights_of(inputs: Inputs) -> "_Weights | None":
    """Return what the two files hold; None where they are not at hand, or hold what has no place.

    A tensor in codes that no table places would be taken from the checkpoint, and its rounding for
    the runtime's.
    """
    gguf, layout = inputs.planned.gguf, inputs.layout
    if gguf is None or layout is None:
        return None
    places = gguf_places(layout)
    placed = {place.name for place in places.values()}
    infos = gguf.original.tensors.items()
    if any(info.kind.name not in FLOATS for name, info in infos if name not in placed):
        return None
    shapes = {name: info.shape for name, info in inputs.base.tensors.items()}
    shapes |= {name: tensor.shape for name, tensor in inputs.planned.model.tensors.items()}
    return _Weights(gguf.original, inputs.files, layout, places, shapes)


@dataclass(frozen=True, slots=True, eq=False)
class _Weights:
    """The weights of a base's file and of an artifact's, as a checkpoint names and orders them."""

    original: Gguf
    files: StoredFiles
    layout: Layout
    places: Mapping[str, GgufPlace]
    shapes: Mapping[str, tuple[int, ...]]

    def values(self, *, edited: bool) -> Values:
        """Return what decodes every tensor that has a place in the file."""
        return {
            name: partial(self._value, place, self.shapes[name], edited)
            for name, place in self.places.items()
            if name in self.shapes
        }

    def _value(self, place: GgufPlace, shape: tuple[int, ...], edited: bool) -> Tensor:
        """Return a tensor in float64, as the checkpoint has it."""
        count = shape[-1] if place.transposed else shape[0]
        start = 0 if place.expert is None else place.expert * count
        found = self._rows(place.name, start, start + count, edited=edited) - place.addend
        if place.rows is not None:
            found = torch.empty_like(found).index_copy(0, torch.tensor(place.rows), found)
        return (found.T if place.transposed else found).reshape(shape)

    def _rows(self, name: str, start: int, stop: int, *, edited: bool) -> Tensor:
        """Return rows of a tensor of the file, counted through all experts."""
        if edited and name in self.files.planned:
            return self.files.rows(name, start, stop)
        head, table = (self.places[x].name for x in (self.layout.unembed.weight, self.layout.embed))
        if name == head and name not in self.original.tensors:
            name = table  # they are tied
        if name not in self.original.tensors:
            return torch.zeros(stop - start, 1, dtype=torch.float64)  # a bias of the edit's own
        return file_rows(self.original, name, start, stop)
