"""Fit directions from two classes of prompts, or of saved activations."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import UsageError
from bake.jobs.model import Model
from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.directions import Directions
    from bake.fit.split import Split
    from bake.fit.sweep import Activations, Sweep
    from bake.sites import Site

DEFAULT_METHOD, DEFAULT_POSITION, DEFAULT_DTYPE = "mean-difference", "last", "float32"
DTYPES = ("float32", "bfloat16", "float16", "float64")

_OF_PROMPTS: Mapping[str, tuple[str, str | None]] = {
    "position": ("--position", DEFAULT_POSITION),
    "dtype": ("--dtype", DEFAULT_DTYPE),
    "device_map": ("--device", None),
    "streamed": ("--stream", None),
}
"""What says how a model is run: the option, and what it is by itself."""
_TOGETHER = (
    "each site was fitted on the model without the edits of the others, so that together they move "
    "the classes by more than each alone"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """What is fitted, on what and how."""

    positive: Path
    """Examples that have the concept: prompts, or saved activations (.npy, .safetensors)."""
    negative: Path
    """Examples of the reference, likewise."""
    concept: str
    """What to call it: a word."""
    method: str = DEFAULT_METHOD
    """A name of ``bake.fit.METHODS``."""
    at: tuple[str, ...] = ("resid",)
    """Patterns of sites, as a recipe spells them."""
    position: str = DEFAULT_POSITION
    """A word of ``bake.fit.texts.Position``."""
    held_out: float = 0.4
    """Share of each class that is not fitted: half of it chooses the site, half judges it."""
    seed: int = 0
    every_site: bool = False
    """Whether the file holds what was fitted at every site, and not at the best alone."""
    dtype: str = DEFAULT_DTYPE
    """What the model is run in, one of ``DTYPES``."""
    streamed: bool | None = None
    """Whether one block is in memory at a time; None where the model is too large for more."""
    device_map: str | None = None
    """As transformers takes it; None for a GPU with room, or the processor."""

    @property
    def saved(self) -> bool:
        """Whether the examples are activations.

        Raises:
            UsageError: those of one class are, and of the other not.
        """
        from bake.fit.saved import SUFFIXES

        kinds = {path.suffix in SUFFIXES for path in (self.positive, self.negative)}
        if len(kinds) > 1:
            raise UsageError(
                "one class is prompts and the other activations",
                where=f"{self.positive} and {self.negative}",
                fix="give both in one form",
            )
        return kinds.pop()


@dataclass(frozen=True, slots=True, eq=False)
class FittedDirections:
    """What was fitted, and what it is worth."""

    asked: FitRequest
    model: Model
    sweep: "Sweep"
    directions: "Directions"
    """As the file holds them."""
    kept_bytes: int
    """Of activations in memory."""


def fit_directions(
    model: Model,
    asked: FitRequest,
    bars: Bars = no_bars,
    remark: Callable[[str], None] = lambda _: None,
) -> FittedDirections:
    """Fit a method at every site that is asked for, and choose the best by held-out examples.

    Nothing is written. The model is loaded and run once over the prompts; of saved activations its
    headers alone are read.

    Args:
        model: what the directions are for.
        asked: what is fitted.
        bars: where progress is shown.
        remark: told what is worth knowing while it runs.

    Raises:
        UsageError: an unknown method, position or site; classes that are one; a package missing.
        InputError: a file cannot be read or holds too little.
        VerificationFailed: every example has the same activation at all sites.
    """
    from bake.fit import METHODS, sweep
    from bake.recipe.aliases import aliases, sites_at

    _check(asked)
    method = METHODS[asked.method]
    method.check()
    sites = sites_at(asked.at, model.layout, aliases(model.layout))
    for site in sites:
        model.layout.width(site)  # raises where the model has no such site
    (positive, negative), parts, facts = (_saved if asked.saved else _run)(
        model, asked, sites, bars, remark
    )
    with bars("fitting", unit="sites") as move:
        found = sweep(method, positive, negative, parts, progress=move)
    kept = sum(t.nbytes for rows in (positive, negative) for t in rows.values())
    directions = _directions(model, asked, found, facts)
    return FittedDirections(asked, model, found, directions, kept)


def _check(asked: FitRequest) -> None:
    """Refuse words that are none, and what has no meaning for saved activations."""
    from bake.fit import METHODS
    from bake.fit.texts import Position
    from bake.section import nearest

    for name, known in (("method", METHODS), ("position", Position), ("dtype", DTYPES)):
        word = getattr(asked, name)
        if word not in tuple(known):
            raise UsageError(f"there is no {name} {word!r}", fix=nearest(word, known))
    if re.fullmatch(r"[A-Za-z0-9_-]+", asked.concept) is None:
        raise UsageError(
            f"the concept {asked.concept!r} is no word",
            why="a recipe names the direction so",
            fix="write it with letters, digits, - and _",
        )
    odd = [word for name, (word, usual) in _OF_PROMPTS.items() if getattr(asked, name) != usual]
    if asked.saved and odd:
        raise UsageError(
            f"{odd[0]} is for prompts, and these are activations",
            why="no model is run",
            fix="leave it out",
        )


_Examples = tuple[tuple["Activations", "Activations"], "Split", Mapping[str, str]]
"""Both classes, who of them does what, and what the file of directions says of them."""


def _split(asked: FitRequest, positive: int, negative: int) -> "Split":
    """Return who is fitted, chooses and judges.

    Raises:
        UsageError: the method takes pairs, and the classes are none.
        InputError: a class is too small.
    """
    from bake.fit import METHODS
    from bake.fit.split import split

    if METHODS[asked.method].paired and positive != negative:
        raise UsageError(
            f"{asked.method} takes pairs, and the classes have {positive} and {negative} examples",
            why="example i of one belongs to example i of the other",
            fix="give as many of each, or choose another --method",
        )
    return split(positive, negative, held_out=asked.held_out, seed=asked.seed)


def _saved(model: Model, asked: FitRequest, sites: "tuple[Site, ...]", *_: Any) -> _Examples:
    """Return saved activations."""
    import torch

    from bake.checkpoints.hashes import sha256_of
    from bake.fit.saved import read_saved

    paths = {"positive": asked.positive, "negative": asked.negative}
    positive, negative = (read_saved(path, sites, model.layout) for path in paths.values())
    if all(torch.equal(positive[site], negative[site]) for site in sites):
        raise UsageError(
            "both classes hold the same activations",
            where=f"{asked.positive} and {asked.negative}",
            fix="--positive names those that have the concept, --negative the others",
        )
    facts = {
        name: f"{path.name}, saved activations, sha256:{sha256_of(path)}"
        for name, path in paths.items()
    }
    parts = _split(asked, *(len(rows[sites[0]]) for rows in (positive, negative)))
    return (positive, negative), parts, facts


def _run(
    model: Model,
    asked: FitRequest,
    sites: "tuple[Site, ...]",
    bars: Bars,
    remark: Callable[[str], None],
) -> _Examples:
    """Return the activations of prompts, which a run of the model gives."""
    import torch
    import transformers

    from bake.fit.collect import collect
    from bake.fit.saved import check_finite
    from bake.fit.texts import Position, check_apart, read_texts
    from bake.progress import Tally
    from bake.verify.models import load
    from bake.verify.tokenizer import load_tokenizer

    checkpoint = model.complete()
    tokenizer = load_tokenizer(
        checkpoint.path, otherwise="save activations yourself, as .npy or .safetensors"
    )
    texts = [
        read_texts(path, tokenizer, Position(asked.position))
        for path in (asked.positive, asked.negative)
    ]
    check_apart(*texts)
    parts = _split(asked, *(len(one.tokens) for one in texts))  # before the model is loaded
    dtype = getattr(torch, asked.dtype)
    streamed, place = _placed(model, asked, remark)
    live = load(checkpoint, dtype, family=model.family, streamed=streamed, device_map=place)
    count = sum(len(one.tokens) for one in texts)
    with bars("running the model", unit="prompts") as move:
        tally = Tally(count, move)
        classes = tuple(collect(live, one, sites, tally) for one in texts)
    for one, rows in zip(texts, classes, strict=True):
        for site, values in rows.items():
            check_finite(values, f"{one.path}, {site} in {asked.dtype}")
    facts = {
        "positive": texts[0].provenance,
        "negative": texts[1].provenance,
        "position": asked.position,
        "dtype": asked.dtype,
        "transformers": transformers.__version__,
    }
    return (classes[0], classes[1]), parts, facts


def _placed(
    model: Model, asked: FitRequest, remark: Callable[[str], None]
) -> tuple[bool, str | None]:
    """Return whether the model is streamed, and its device map.

    Where nobody says it, a GPU that has room takes it whole, and else the processor's memory.
    """
    from bake.verify.memory import fits_gpu, too_large
    from bake.verify.runs import BATCH_TOKENS

    if asked.streamed or asked.device_map is not None:
        return bool(asked.streamed), asked.device_map
    # There are no logits: a block's activations of one batch are the largest beside the model.
    if fits_gpu(model.checkpoint, BATCH_TOKENS * 8 * model.layout.hidden):
        return False, "cuda"
    if asked.streamed is None and too_large(model.checkpoint):
        remark("one block in memory at a time: the model is large; --no-stream loads it whole")
        return True, None
    return False, None


def _directions(
    model: Model, asked: FitRequest, found: "Sweep", facts: Mapping[str, str]
) -> "Directions":
    """Return what was fitted with where it came from, the same bytes every time."""
    import torch

    from bake import __version__
    from bake.directions import SAYS, Directions
    from bake.fit import METHODS
    from bake.fit.sweep import told

    method, checkpoint = METHODS[asked.method], model.checkpoint
    fits = found.fits if asked.every_site else (found.best,)
    # Of a folder the name alone, since a file of directions travels; the digest says which it is.
    name = checkpoint.path.name if checkpoint.revision is None else checkpoint.repo
    metadata = {
        "method": f"{asked.method}: {method.title}",
        "model": name,
        "model_digest": checkpoint.digest(),
        **facts,
        "examples": f"{found.split.fit} fitted, {found.split.choose} chose the site, "
        f"{found.split.judge} judged it",
        "seed": str(asked.seed),
        "best": str(found.best.site),
        "auroc": f"{told(found.judged)} at {found.best.site}",
        "bake": __version__,
        "torch": torch.__version__,
    }
    if checkpoint.revision is not None:
        metadata["model_revision"] = checkpoint.revision
    if method.package is not None:
        from importlib.metadata import version

        package = method.package.replace("_", "-")
        metadata[package] = version(package)
    says = [method.says, _TOGETHER if asked.every_site and len(fits) > 1 else None]
    if any(says):
        metadata[SAYS] = "; ".join(filter(None, says))
    items = tuple(fit.direction for fit in fits)
    return Directions(asked.concept, "bake", "", "", items, metadata)
