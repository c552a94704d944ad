"""Write docs/relocation.md's table of families anew: ``python docs/make_relocation_table.py``."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # these tables, whatever bake is installed

from bake.families import Family, load_families  # noqa: E402

PAGE = HERE / "relocation.md"
FIRST, LAST = "<!-- families -->\n", "<!-- /families -->\n"
HEAD = "| family | `relocate` | `widen` | a constant behind a block |\n|---|---|---|---|\n"


def in_place(family: Family) -> str:
    """Return whether an edit at one site is relocated in the stream's own dimensions."""
    if any(branch.norm_out for branch in family.branches):
        return "no: norms behind the writers"
    if family.norm.kind == "layer":
        return "where the edit does not see the stream's mean"
    return "yes"


def wider(family: Family) -> str:
    """Return how the family is widened."""
    if family.widen is None:
        return "no: its table does not say how"
    how = ["computed behind a block" if family.widen.gate else ""]
    how += ["read in another frame" if any(b.norm_out for b in family.branches) else ""]
    how += ["the mean kept aside" if family.norm.kind == "layer" else ""]
    how += ["heads added" if family.widen.heads else ""]
    how += ["norms of the same epsilon" if family.widen.same_eps else ""]
    how += ["embedding multiplied" if isinstance(family.embed.multiplier, str) else ""]
    said = "; ".join(word for word in how if word)
    return f"yes ({said})" if said else "yes"


def constant(family: Family) -> str:
    """Return what a constant behind a block goes into."""
    last = [branch for branch in family.branches if branch.target == "resid_post"][-1]
    rows = last.writes
    if last.norm_out is None and len(rows) == 1 and "{expert}" not in rows[0].module:
        if rows[0].bias != "never":
            return "a bias, exactly"
    own = "" if family.widen is None else "a dimension (`widen`)"
    if family.widen is not None and family.widen.gate:
        own = "neurons (`widen`)"
    if family.recasts:
        return "a bias, exactly (`recast`)" + (f", or {own}" if own else "")
    return own or "no"


def table() -> str:
    """Return the rows of all shipped tables."""
    rows = (f"| {f.title} | {in_place(f)} | {wider(f)} | {constant(f)} |" for f in load_families())
    return HEAD + "".join(f"{row}\n" for row in rows)


def page(text: str) -> str:
    """Return the page with the table in its place."""
    before, rest = text.split(FIRST)
    return before + FIRST + table() + LAST + rest.split(LAST)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
