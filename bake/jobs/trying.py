"""Let a model answer as it is and under edits as hooks, before anything is written.

Of an artifact the answer of the baked model is heard beside the two, where its files are a whole
model that transformers loads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from bake.errors import InputError
from bake.jobs.recorded import Source, base_of
from bake.jobs.request import Overrides, open_recipe

if TYPE_CHECKING:
    from bake.checkpoints import Checkpoint
    from bake.edits import Edit
    from bake.verify.models import Live

BASE, HOOKED, BAKED = "base", "hooked", "baked"
TOKENS = 64
Turn = Mapping[str, str]
"""``role`` and ``content``, as a chat template takes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TryOptions:
    """How a trial is run."""

    tokens: int = TOKENS
    """The most that an answer has."""
    dtype: str | None = None
    """A word of ``bake.jobs.fit_directions.DTYPES``; float32 where memory allows it when None, and
    else what the model is stored in."""
    device_map: str | None = None
    """As transformers takes it; None for a GPU with room, or the processor."""


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A model in memory, its edits, and what was baked from both where something was."""

    edits: "tuple[Edit, ...]"
    tokenizer: Any
    live: "Live"
    baked: "Live | None"
    options: TryOptions

    @property
    def voices(self) -> tuple[str, ...]:
        """Who answers, in this order."""
        return (BASE, HOOKED, *(() if self.baked is None else (BAKED,)))

    @property
    def chats(self) -> bool:
        """Whether the model knows turns; one without a chat template goes on with a text."""
        return self.tokenizer.chat_template is not None

    def answer(self, voice: str, chats: Sequence[Sequence[Turn]]) -> list[str]:
        """Return the greedy answers of one voice.

        Args:
            voice: one of ``voices``.
            chats: each ends in a user's turn, of which alone a model without a template sees the
                text.

        Raises:
            InputError: the chat template does not take a chat.
        """
        from bake.verify.greedy import answers
        from bake.verify.tokenizer import encoded

        kind, live = ("messages" if self.chats else "text"), self.live
        prompts = [
            encoded(self.tokenizer, kind, chat if self.chats else chat[-1]["content"], "prompt")[0]
            for chat in chats
        ]
        if voice == BAKED:
            assert self.baked is not None
            live = self.baked
        edits = self.edits if voice == HOOKED else ()
        return answers(live, prompts, self.tokenizer, self.options.tokens, edits)


def try_recipe(
    recipe: Path,
    options: TryOptions,
    remark: Callable[[str], None] = lambda _: None,
    *,
    family: Path | None = None,
    assume_harmless: Sequence[str] = (),
    **overrides: Unpack[Overrides],
) -> Trial:
    """Return the trial of a recipe. It is not planned: what no weights hold is tried as well.

    Raises:
        BakeError: whatever is wrong with the recipe, the model or the directions.
    """
    from bake.recipe import build_edits

    loaded, directions, model = open_recipe(
        recipe, family=family, assume_harmless=assume_harmless, **overrides
    )
    edits = build_edits(loaded, model.layout, directions)
    return _trial(model.complete(), edits, options, remark, family)


def try_artifact(
    source: Source,
    options: TryOptions,
    remark: Callable[[str], None] = lambda _: None,
    *,
    base: str | None = None,
    family: Path | None = None,
    assume_harmless: Sequence[str] = (),
) -> Trial:
    """Return the trial of an artifact: its base, its edits as hooks on it, and its own weights.

    Raises:
        BakeError: whatever is wrong with the artifact or its base.
    """
    from bake.checkpoints import open_checkpoint
    from bake.verify.artifact import open_baked
    from bake.verify.inputs import open_base

    artifact = open_baked(source.folder)
    if not artifact.edits:
        raise InputError(
            f"{source.name} is a {artifact.kind} and holds no edits that could be hooked",
            fix="try what `bake export` wrote",
        )
    checkpoint = open_base(artifact, base_of(source, artifact, base))
    checkpoint = replace(checkpoint, harmless=(*checkpoint.harmless, *assume_harmless))
    stored = open_checkpoint(source.folder) if artifact.carrier.checkpoint else None
    return _trial(checkpoint, artifact.edits, options, remark, family, stored)


def _trial(
    base: "Checkpoint",
    edits: "Sequence[Edit]",
    options: TryOptions,
    remark: Callable[[str], None],
    family: Path | None,
    stored: "Checkpoint | None" = None,
) -> Trial:
    """Return a trial once its models are in memory."""
    from bake.verify.models import load
    from bake.verify.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base.path)
    dtype, place = _placed(base, family, options)
    remark(f"loading the base in {str(dtype).removeprefix('torch.')}")
    live = load(base, dtype, family=family, device_map=place)
    baked = None
    if stored is not None:
        remark("loading the baked model")
        baked = load(stored, dtype, family=family, hooked=False, device_map=place)
    return Trial(tuple(edits), tokenizer, live, baked, options)


def _placed(base: "Checkpoint", family: Path | None, options: TryOptions) -> tuple[Any, str | None]:
    """Return the type that a model is run in, and its device map."""
    import torch

    from bake.verify.memory import fits_gpu, too_large
    from bake.verify.models import layout_of
    from bake.verify.runs import DTYPES

    place = options.device_map
    roomy = fits_gpu(base, 0)
    if place is None and roomy:
        place = "cuda"
    if options.dtype is not None:
        return getattr(torch, options.dtype), place
    if roomy or not too_large(base, bytes_each=4):
        return torch.float32, place
    return DTYPES[layout_of(base, family).dtype], place
