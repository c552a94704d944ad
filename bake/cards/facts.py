"""``Facts``: everything that a card may say, read from the folder of one artifact."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from bake.artifact.carrier import KINDS, Carrier
from bake.artifact.names import walk
from bake.artifact.record import RECORD, read_json, read_record
from bake.artifact.schema import BaseCard, Record
from bake.artifact.verification import Report, read_report, typed, ungated, unverified
from bake.cards import licences
from bake.checkpoints.hub_names import is_repository
from bake.errors import InputError, UsageError
from bake.nearby import nearby
from bake.recipe import CardTable, Recipe, parse_recipe

ADAPTER = "adapter_config.json"


class Adapter(msgspec.Struct, frozen=True):
    """What a card says of the configuration of a LoRA."""

    r: int
    lora_alpha: int | float


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What one artifact's files say.

    Attributes:
        folder: the artifact.
        record: its ``bake.json``.
        recipe: the recipe in it; None where the record holds none.
        report: its ``verify.json``, or None where there is none of this plan.
        reason: why it does not count as verified, or None when it does.
        ungated: why its recipe's gate on side effects does not count as held, or None.
        adapter: rank and alpha of a LoRA, or of the one that was merged.
        names: its files.
    """

    folder: Path
    record: Record
    recipe: Recipe | None
    report: Report | None
    reason: str | None
    ungated: str | None
    adapter: Adapter | None
    names: tuple[str, ...]

    @property
    def carrier(self) -> Carrier:
        """The facts of the artifact's kind."""
        return KINDS[self.record.kind]

    @property
    def spec(self) -> CardTable:
        """What the recipe's ``[card]`` adds."""
        return CardTable() if self.recipe is None else self.recipe.card

    @property
    def base_repo(self) -> str | None:
        """The base's id on the Hub, or None for a folder."""
        base = self.record.base
        return base.repo if base.on_hub and is_repository(base.repo) else None

    @property
    def commit(self) -> str | None:
        """The base's commit on the Hub, or None where the record names none."""
        return self.record.base.revision if self.base_repo and self.record.base.pinned else None

    @property
    def compared(self) -> bool:
        """Whether these files were run in transformers, in the storage type, beside the hooks."""
        found = self.report
        return found is not None and self.carrier.checkpoint and found.stored in found.metrics

    @property
    def converted(self) -> bool:
        """Whether llama.cpp's converter made it from a baked checkpoint."""
        gguf = self.record.gguf
        return gguf is not None and bool(gguf.converter and gguf.outtype)

    @property
    def title(self) -> str:
        """What the recipe calls it, or what was done."""
        recipe, merged = self.record.recipe, self.record.adapter
        if recipe is not None and recipe.title:
            return recipe.title
        return f"A model with the adapter {merged.name}" if merged else "An edited model"

    @property
    def base_card(self) -> BaseCard:
        """What the base's card stated when it was exported: nothing where it had none."""
        return self.record.base.card or BaseCard()

    @property
    def base_licence(self) -> licences.Stated:
        """The licence that it stated."""
        return licences.stated(self.base_card.to_json())

    @property
    def licence(self) -> licences.Stated:
        """The licence of the artifact: what the recipe says, or the base's."""
        if self.spec.licence is None:
            return self.base_licence
        return licences.Stated(self.spec.licence, self.spec.licence_name)


def read_facts(folder: Path) -> Facts:
    """Read an artifact.

    Raises:
        InputError: the folder is no artifact, or one of its records is malformed.
    """
    if not folder.is_dir():
        fix = nearby(folder, "name what `bake export` wrote")
        raise InputError("is no folder", where=str(folder), fix=fix)
    record = read_record(folder)
    found, problems = walk(folder)
    if problems:
        raise InputError(str(problems[0]), where=str(folder))
    return Facts(
        folder=folder,
        record=record,
        recipe=_recipe(folder, record),
        report=read_report(folder, record),
        reason=unverified(folder, record),
        ungated=ungated(folder, record),
        adapter=_adapter(folder, record, found),
        names=tuple(found),
    )


def _recipe(folder: Path, record: Record) -> Recipe | None:
    asked = record.recipe
    if asked is None or not asked.text:
        return None
    try:
        return parse_recipe(asked.text.encode(), folder / RECORD, asked.settings)
    except UsageError as error:
        raise InputError(error.what, where=error.where, fix=error.fix) from error


def _adapter(folder: Path, record: Record, names: list[str]) -> Adapter | None:
    if record.adapter is not None:
        config = record.adapter.config
    elif KINDS[record.kind].library == "peft" and ADAPTER in names:
        config = read_json(folder, ADAPTER)
    else:
        return None
    if config.get("r") is None or config.get("lora_alpha") is None:
        return None
    return typed(config, Adapter, ADAPTER)
