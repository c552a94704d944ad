"""One feature of a sparse autoencoder: its row of ``W_dec`` [features, d], perhaps its encoder too.

Gemma Scope has ``params.npz``; SAELens a folder with ``cfg.json`` and ``sae_weights.safetensors``,
whose ``hook_name`` says the site. Whatever the file's size, only what is the feature's is kept.

With ``method = "encoder"`` the feature is what it is in the forward pass: its activation is
a = w·x + b where that is above its threshold, and 0 elsewhere (``StandardSAE.encode`` and
``JumpReLUSAE.encode`` of SAELens; Gemma Scope's is a JumpReLU, arXiv 2408.05147), and changing a by
δ adds δ W_dec[feature] to x. As a map: left W_dec[feature], right w, the threshold, and a mean μ
with w·μ = −b.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bake.directions.arrays import hooked_site, listing, one_row
from bake.directions.direction import Direction, Role
from bake.directions.json_file import read_object
from bake.directions.npy import read_part
from bake.directions.npz import names_of, opened_archive
from bake.directions.reader import Content, Reader, Request
from bake.directions.safetensors_file import opened
from bake.errors import DirectionError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
DECODER = "W_dec"
ENCODER = "encoder"
"""The method that reads the encoder too."""
_MAX_CONFIG = 1 << 22
_ROW = "leave method out to add the feature's row"
_PLAIN = {"normalize_activations": ("none", None), "reshape_activations": ("none", None)}
"""What an encoder does to its input beforehand, and the values with which that is nothing."""


Part = Callable[[str, int, int], Tensor]
"""Reads by name, axis and number one row (axis 0) or one column (1) of a matrix, a vector [n] being
a matrix [1, n]: of W_enc [d, features] the column of a feature, of b_enc its number, of b_dec [d],
the row 0, all of it."""


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Collection[str], Part]]:
    """Yield the names of a file's arrays, and what reads a part of one."""
    if path.suffix != ".npz":
        with opened(path) as file:
            yield file.names, file.part
        return
    names = names_of(path)
    with opened_archive(path) as archive:

        def part(name: str, axis: int, n: int) -> Tensor:
            if name not in names:
                raise DirectionError(
                    f"the archive holds no {name!r}", fix=f"it holds {listing(sorted(names))}"
                )
            with archive.open(f"{name}.npy") as file:
                return read_part(file, axis, n)

        yield names, part


def _recognises(path: Path) -> bool:
    if path.is_dir():
        return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()
    return path.name == WEIGHTS or DECODER in names_of(path)


def _read(request: Request) -> Content:
    path = request.path
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    weights = path / WEIGHTS if path.is_dir() else path
    key = request.key or DECODER
    feature = request.feature
    if feature is None:
        raise DirectionError(
            "the file holds the features of a sparse autoencoder, and `feature` names none",
            fix=f"set feature = 0, for example: the row of {key} that is the direction",
        )
    if request.method not in (None, ENCODER):
        raise DirectionError(
            f"method = {request.method!r} is none of a sparse autoencoder",
            fix=f'set method = "{ENCODER}" to clamp the feature, or leave it out to add its row',
        )
    config = read_object(path / CONFIG, _MAX_CONFIG) if path.is_dir() else None
    with _opened(weights) as (names, part):
        tensors = {Role.VECTOR: part(key, 0, feature)}
        if request.method == ENCODER:
            subtracts = _subtracts(config, jumps="threshold" in names)
            tensors = _encoder(names, part, feature, tensors[Role.VECTOR], subtracts=subtracts)
    site = None if config is None else _site(config)
    files = (weights,) if config is None else (path / CONFIG, weights)
    layer = None if site is None else int(site.rpartition(".")[2])
    said = {"feature": str(feature), "key": key}
    return Content((Direction(tensors, layer, site),), said, files=files)


def _encoder(
    names: Collection[str],
    part: Part,
    feature: int,
    decoder: Float[Tensor, " d"],
    *,
    subtracts: bool,
) -> dict[Role, Tensor]:
    """Return the feature as a map; ``subtracts`` says whether ``b_dec`` is taken off x before."""

    def number(name: str) -> Tensor:
        # float64 here: a tensor with an axis keeps its type beside a number without one.
        found = one_row(part(name, 1, feature), f"{name} of feature {feature}", 1)
        return found.to(torch.float64)

    decoder = one_row(decoder, f"the row of feature {feature}").to(torch.float64)
    w = one_row(part("W_enc", 1, feature), f"W_enc of feature {feature}").to(torch.float64)
    before = torch.zeros_like(w)
    if subtracts:
        before = one_row(part("b_dec", 0, 0), "b_dec").to(torch.float64)
    if not w.shape == decoder.shape == before.shape:
        raise DirectionError(
            f"the encoder is {w.shape[0]} wide and the decoder {decoder.shape[0]}",
            why="it reads one place and writes another, as a transcoder does",
            fix="leave method out to add the feature's row where it is written",
        )
    if not w.any():
        raise DirectionError(
            f"the encoder of feature {feature} reads nothing: its row is zero", fix=_ROW
        )
    constant = number("b_enc") - w @ before
    # The ReLU stands before the threshold: below zero there is nothing left to compare.
    threshold = number("threshold").clamp(min=0) if "threshold" in names else w.new_zeros(1)
    return {
        Role.LEFT: decoder.unsqueeze(1),
        Role.RIGHT: w.unsqueeze(0),
        Role.MEAN: -constant * w / (w @ w),
        Role.THRESHOLD: threshold,
    }


def _subtracts(config: Mapping[str, Any] | None, *, jumps: bool) -> bool:
    """Return whether ``b_dec`` is subtracted from what the encoder reads.

    Args:
        config: SAELens's; an archive of Gemma Scope has none.
        jumps: whether there are thresholds.

    Raises:
        DirectionError: the encoder is none whose activation of a feature is its own affair.
    """
    if config is None:
        if not jumps:
            raise DirectionError(
                "the file does not say when a feature is active: it holds no threshold",
                why="an archive is read as Gemma Scope's, whose encoders are JumpReLUs",
                fix=_ROW,
            )
        return False
    kind = config.get("architecture")
    if kind != ("jumprelu" if jumps else "standard"):
        raise DirectionError(
            f"the encoder is of the architecture {kind!r}",
            why="that of standard and of jumprelu is read; in others a feature is active by what "
            "the others are, or by a gate of its own",
            fix=_ROW,
        )
    other = {word: value for word, one in _PLAIN.items() if (value := config.get(word)) not in one}
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation != "relu":
        other["activation_fn"] = activation
    if other:
        raise DirectionError(
            f"the encoder has {', '.join(f'{word} = {value!r}' for word, value in other.items())}",
            why="then a feature's activation is no number of w·x alone",
            fix=_ROW,
        )
    subtracts = config.get("apply_b_dec_to_input")
    if not isinstance(subtracts, bool):
        raise DirectionError(
            f"{CONFIG} does not say apply_b_dec_to_input",
            why="whether the encoder subtracts b_dec moves every activation",
            fix=f"add it to {CONFIG} as the model was trained, or {_ROW}",
        )
    return subtracts


def _site(found: Mapping[str, Any]) -> str | None:
    """Return the site that SAELens names, of the residual stream; other hooks have no one site."""
    inner = found.get("metadata")
    every = {**(inner if isinstance(inner, dict) else {}), **found}
    # A transcoder reads at hook_name and writes elsewhere, where its decoder's rows belong.
    return hooked_site(str(every.get("hook_name_out") or every.get("hook_name")))


READER = Reader(
    "a sparse autoencoder (params.npz of Gemma Scope, a folder of SAELens), with `feature`",
    _recognises,
    _read,
    frozenset({"feature", "key", "method"}),
    kinds=("offset", "clamp"),
    files=(CONFIG, WEIGHTS),
    beside=lambda name: (CONFIG,) if name == WEIGHTS else (),
)
