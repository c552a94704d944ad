"""The rules that a base model's licence sets for what is made from it.

A reading of the licences' texts (Llama 3 to 4: clause 1.b; Gemma Terms: 3.1 and 3.2; Apache-2.0:
clause 4), not legal advice. A licence that is not known here is refused unless the user says that
its terms are met.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bake.artifact.names import CARD, Problem


@dataclass(frozen=True, slots=True)
class Licence:
    """What one licence demands of a derived model.

    Attributes:
        id: as the Hub spells it.
        rank: 0 for the public domain up to 4 for terms of a model's own: a derived model may not
            have a lower one than its base.
        notice: what NOTICE has to say, or None.
        shown: words that the card has to show, or None.
        prefix: what the repository's name has to begin with, a space standing for ``.``, ``_`` or
            ``-`` too; or None.
        copy: whether a copy of the licence has to travel.
        remark: what it says beyond what can be checked, or None.
    """

    id: str
    rank: int
    notice: str | None = None
    shown: str | None = None
    prefix: str | None = None
    copy: bool = False
    remark: str | None = None


def _llama(version: str, *, shown: str = "Built with Llama", prefix: str = "Llama") -> Licence:
    family = "Meta Llama" if version == "3" else "Llama"
    return Licence(
        id=f"llama{version}",
        rank=4,
        notice=f"{family} {version} is licensed under the {family} {version} Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
        shown=shown,
        prefix=prefix,
        copy=True,
    )


_GEMMA = Licence(
    id="gemma",
    rank=4,
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms",
    copy=True,
    remark="Gemma's Prohibited Use Policy forbids to circumvent safety filters: "
    "think of it when the edit concerns refusals",
)
_KNOWN = (
    *(Licence(name, 0) for name in ("cc0-1.0", "unlicense", "wtfpl", "0bsd")),
    *(Licence(name, 1) for name in ("mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib")),
    *(Licence(name, 1) for name in ("apache-2.0", "bsl-1.0", "cc-by-4.0", "cc-by-3.0")),
    *(Licence(name, 2) for name in ("mpl-2.0", "lgpl-2.1", "lgpl-3.0", "cc-by-sa-4.0")),
    *(Licence(name, 3) for name in ("gpl-2.0", "gpl-3.0", "agpl-3.0")),
    *(Licence(name, 4) for name in ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "openrail++")),
    *(Licence(name, 4) for name in ("creativeml-openrail-m", "bigscience-bloom-rail-1.0")),
    *(Licence(name, 4) for name in ("bigscience-openrail-m", "bigcode-openrail-m")),
    *(Licence(name, 4) for name in ("cc-by-nc-3.0", "cc-by-nc-2.0", "cc-by-nc-nd-4.0")),
    Licence(
        "llama2",
        4,
        notice="Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
        copy=True,
    ),
    _llama("3", shown="Built with Meta Llama 3", prefix="Llama 3"),
    *(_llama(version) for version in ("3.1", "3.2", "3.3", "4")),
    _GEMMA,
)
LICENCES: Mapping[str, Licence] = {licence.id: licence for licence in _KNOWN}


@dataclass(frozen=True, slots=True)
class Stated:
    """The licence that a card states: its id, and the name of one that the Hub has no id for."""

    id: str | None
    name: str | None = None

    @property
    def known(self) -> Licence | None:
        """What it demands, or None where bake does not know that."""
        return LICENCES.get(self.id or "")

    def __str__(self) -> str:
        if self.id is None:
            return "no licence"
        return self.id if self.name is None else f"{self.id} ({self.name})"


def stated(metadata: Mapping[str, object]) -> Stated:
    """Return the licence in a card's metadata."""
    found = metadata.get("license")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, str) or not found or found == "unknown":
        return Stated(None)
    name = metadata.get("license_name")
    other = found == "other" and isinstance(name, str)
    return Stated(found.lower(), str(name).lower() if other else None)


def check_licence(
    *,
    base: Stated,
    ours: Stated,
    repo: str,
    names: list[str],
    notice: str,
    card: str | None,
) -> list[Problem]:
    """Return which rules of the base's licence an artifact breaks.

    Args:
        base: the licence that the base states.
        ours: the licence that the artifact's card states.
        repo: ``owner/name`` that it is to be published as.
        names: the artifact's files.
        notice: the text of NOTICE, empty where there is none.
        card: the text of the card, or None without one.
    """
    otherwise = "or --allow licence once you know that its terms are met"
    return [
        Problem(where, what, f"{fix}, {otherwise}")
        for where, what, fix in _broken(base, ours, repo, names, notice, card)
    ]


def _inherits(base: Stated, ours: Stated) -> bool:
    """Tell whether a licence is the base's own, or a known and stricter one."""
    if ours == base:
        return True
    theirs, mine = base.known, ours.known
    if theirs is None or mine is None:
        return False
    # A licence with a notice of its own is that of one publisher's models and of no others.
    return theirs.rank < 4 and mine.rank >= theirs.rank and mine.notice is None


def _broken(
    base: Stated, ours: Stated, repo: str, names: list[str], notice: str, card: str | None
) -> Iterator[tuple[str, str, str]]:
    """Yield where a rule is broken, what is wrong, and how to keep it."""
    if base.id is None:
        yield "licence", "the base states no licence", "ask its authors"
        return
    if ours.id is None and card is not None:
        yield CARD, f"states no licence; the base has {base}", "inherit it"
    elif ours.id is not None and not _inherits(base, ours):
        yield CARD, f"states {ours} where the base has {base}", "inherit it"
    found = Licence("other", 4, copy=True) if base.id == "other" else base.known
    if found is None:
        yield "licence", f"{base} is not known to bake", "read it"
        return
    if found.copy and not any(n.upper().startswith(("LICENSE", "LICENCE")) for n in names):
        yield "LICENSE", f"{base} wants a copy of the licence to travel", "add it"
    if found.notice is not None and _plain(found.notice) not in _plain(notice):
        yield "NOTICE", f'has to say: "{found.notice}"', "add it"
    if found.shown is not None and card is not None and found.shown not in card:
        yield CARD, f'has to show "{found.shown}"', "add it"
    spelled = re.escape(found.prefix or "").replace(r"\ ", "[ ._-]")
    if re.match(spelled, repo.rpartition("/")[2]) is None:
        begins = f"has a name that begins with {found.prefix!r}"
        yield repo, f"a model made from one under {base} {begins}", "choose another name"


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("©", "(c)")).strip().rstrip(".").casefold()
