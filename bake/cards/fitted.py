"""What an approximate plan's stand-ins stand in for, and what their calibration measured."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bake.artifact.record import RECORD
from bake.cards import stored
from bake.cards.facts import Facts
from bake.cards.methods import METHODS, Method
from bake.cards.text import Markdown, code, escape, number
from bake.errors import InputError

_WHERE = f"{RECORD}: calibration"
_NAMED = re.compile(r"(\w+) '(.*)' at (.+)")


@dataclass(frozen=True, slots=True)
class Asked:
    """An edit that no fold reaches, as the recipe asks for it.

    Attributes:
        kind: a key of ``METHODS``.
        concept: the direction's name.
        places: the sites, as the calibration names them.
    """

    kind: str
    concept: str
    places: str

    @property
    def method(self) -> Method:
        """What the kind is."""
        return METHODS[self.kind]

    @property
    def words(self) -> Markdown:
        """The edit in a few words: *mood* set to a constant at ``resid_post.2``."""
        return Markdown(f"*{escape(self.concept)}* {self.method.did} at {code(self.places)}")


@dataclass(frozen=True, slots=True)
class Fitted:
    """The calibration of an approximate plan.

    Attributes:
        asked: what the stand-ins are for.
        tokens: that were fitted to.
        held_out: tokens of texts that nothing was fitted to or chosen by.
        lost: the share of the edit's own effect that is lost on those, as Markdown.
        kl: the mean KL(hooked ‖ baked) on those, in nats.
        effect: the mean KL(hooked ‖ base) on those, in nats.
        texts: where the texts are from, how many, and their digest, as Markdown.
        rows: of each stand-in: site, rank, λ, explained share, KL on the texts that chose it.
    """

    asked: tuple[Asked, ...]
    tokens: int
    held_out: int
    lost: Markdown
    kl: Markdown
    effect: Markdown
    texts: Markdown
    rows: tuple[tuple[Markdown, ...], ...]

    @property
    def words(self) -> Markdown:
        """What is stood in for, in a few words."""
        return Markdown("; ".join(found.words for found in self.asked))


def stand_ins_from(facts: Facts) -> int | None:
    """Return the number of the first finding that is a stand-in, or None where none is.

    Raises:
        InputError: the record is malformed.
    """
    found = stored.mapping(facts.content, "calibration", RECORD)
    return stored.whole(found, "kept", _WHERE) if found else None


def fitted(facts: Facts) -> Fitted | None:
    """Return what the record says of the stand-ins, or None for a plan without any.

    Raises:
        InputError: the record is malformed.
    """
    found = stored.mapping(facts.content, "calibration", RECORD)
    if not found:
        return None
    share = _demanded(found, "share")
    return Fitted(
        asked=tuple(_asked(text) for text in stored.words(found, "stands_for", _WHERE)),
        tokens=int(_demanded(found, "tokens")),
        held_out=int(_demanded(found, "held_out_tokens")),
        lost=Markdown(f"{100 * share:.2g} %"),
        kl=number(float(_demanded(found, "kl"))),
        effect=number(float(_demanded(found, "effect_kl"))),
        texts=_texts(stored.mapping(found, "prompts", _WHERE)),
        rows=tuple(_row(fit) for fit in stored.objects(found, "fits", _WHERE)),
    )


def _demanded(found: Mapping[str, Any], key: str) -> float:
    value = stored.number(found, key, _WHERE)
    if value is None:
        raise InputError(f"{key} is missing", where=_WHERE)
    return value


def _asked(text: str) -> Asked:
    match = _NAMED.fullmatch(text)
    if match is None or match[1] not in METHODS:
        raise InputError(f"stands_for names {text!r}, which is no edit", where=_WHERE)
    return Asked(match[1], match[2], match[3])


def _texts(found: Mapping[str, Any]) -> Markdown:
    """Return where the texts of the calibration are from."""
    source, digest = (stored.text(found, key, _WHERE) for key in ("source", "digest"))
    parts = [code(source)] if source else []
    for key, thing in (("prompts", "texts"), ("tokens", "tokens")):
        if (value := stored.whole(found, key, _WHERE)) is not None:
            parts.append(Markdown(f"{number(value)} {thing}"))
    if digest:
        parts.append(Markdown(f"token ids {code(digest)}"))
    return Markdown(", ".join(parts))


def _row(fit: Mapping[str, Any]) -> tuple[Markdown, ...]:
    values = [stored.number(fit, key, _WHERE) for key in ("rank", "ridge", "r2", "kl")]
    told = [Markdown("not recorded") if v is None else number(v) for v in values]
    return (code(stored.text(fit, "site", _WHERE)), *told)
