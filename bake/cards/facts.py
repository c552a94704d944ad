"""``Facts``: everything that a card may say, read from the folder of one artifact."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bake.artifact.names import walk
from bake.artifact.record import (
    RECORD,
    VERIFICATION,
    read_json,
    read_record,
    record_text,
    unverified,
)
from bake.artifact.schema import Record
from bake.cards import licences, stored
from bake.checkpoints.hub_names import is_repository
from bake.errors import InputError, UsageError
from bake.recipe import CardSpec, card_of

ADAPTER = "adapter_config.json"
_RECIPE = f"{RECORD}: recipe"


@dataclass(frozen=True, eq=False)
class Facts:
    """What one artifact's files say.

    Attributes:
        folder: the artifact.
        record: its ``bake.json``.
        recipe: the recipe in it, parsed; empty where the record holds none.
        spec: what the recipe's ``[card]`` adds.
        verification: its ``verify.json``, or None where there is none of this plan.
        reason: why it does not count as verified, or None when it does.
        adapter: ``adapter_config.json``; empty for other kinds.
        names: its files.
    """

    folder: Path
    record: Record
    recipe: Mapping[str, Any]
    spec: CardSpec
    verification: Mapping[str, Any] | None
    reason: str | None
    adapter: Mapping[str, Any]
    names: tuple[str, ...]

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """The record as JSON values."""
        found: dict[str, Any] = json.loads(record_text(self.record))
        return found

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan, as the record has it."""
        return stored.mapping(self.content, "plan", RECORD)

    @property
    def base(self) -> Mapping[str, Any]:
        """The base, as the record has it."""
        return stored.mapping(self.content, "base", RECORD)

    @property
    def base_card(self) -> Mapping[str, Any]:
        """What the base's own card states."""
        return stored.mapping(self.base, "card", RECORD)

    @property
    def base_repo(self) -> str | None:
        """The base's id on the Hub, or None for a folder."""
        repo = self.record.base.repo
        return repo if self.record.base.on_hub and is_repository(repo) else None

    @property
    def title(self) -> str:
        """What the recipe calls it, or what was done."""
        found = stored.mapping(self.content, "recipe", RECORD)
        merged = stored.text(self.merged, "name", RECORD)
        return stored.text(found, "title", _RECIPE) or (
            f"A model with the adapter {merged}" if merged else "An edited model"
        )

    @property
    def merged(self) -> Mapping[str, Any]:
        """The adapter that a merge merged, as the record has it; empty for other kinds."""
        if self.record.kind != "merge":
            return {}
        return stored.mapping(self.content, "adapter", RECORD)

    @property
    def base_licence(self) -> licences.Stated:
        """The licence that the base's card stated when it was exported."""
        return licences.stated(self.base_card)

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
    record = read_record(folder)
    text = "" if record.recipe is None else record.recipe.text
    try:
        spec = card_of(text, where=_RECIPE)
        values = tomllib.loads(text)
    except UsageError as error:
        raise InputError(error.what, where=error.where, fix=error.fix) from error
    found, problems = walk(folder)
    if problems:
        raise InputError(str(problems[0]), where=str(folder))
    return Facts(
        folder=folder,
        record=record,
        recipe=values,
        spec=spec,
        verification=_verification(folder, record),
        reason=unverified(folder, record),
        adapter=read_json(folder, ADAPTER) if record.kind == "lora" and ADAPTER in found else {},
        names=tuple(found),
    )


def _verification(folder: Path, record: Record) -> Mapping[str, Any] | None:
    """Return the verification; one of another plan says nothing of this artifact."""
    if not (folder / VERIFICATION).is_file():
        return None
    content = read_json(folder, VERIFICATION)
    return content if content.get("plan_digest") == record.plan.digest else None
