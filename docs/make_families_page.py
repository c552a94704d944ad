"""Write docs/family-list.md anew, from the tables: ``python docs/make_families_page.py``."""

import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # these tables, whatever bake is installed

from bake.families import Family, load_families, load_refused  # noqa: E402
from bake.families.resolve import BRANCH_SITES  # noqa: E402
from bake.sites import SiteKind  # noqa: E402

PAGE = HERE / "family-list.md"
HEAD = """# The families that bake knows

Written from the tables by `docs/make_families_page.py`; what a tier is and how a table is made is
in [families.md](families.md). Every family has the sites `embed`, `resid_pre`, `resid_post`,
`attn_out` and `ln_final_out`; the column *sites* names the others. *Runtimes* are those that the
table describes, *run* the carriers that tests have run, of a wrapper (the second class of a row and
those after it) checkpoints in transformers only. Where *the stream is closed* no edit at
`resid_pre`, `resid_mid` or `resid_post` is one of stock weights: the table says why, and the parts
of a block fold.

| table | models | classes | tier | sites | runtimes | run |
|---|---|---|---|---|---|---|
"""
REFUSED = """
## Classes that no table can describe

An edit of the residual stream is no edit of stock weights there. `bake` says so by name.

| classes | why | read in |
|---|---|---|
"""


def sites(family: Family) -> str:
    """Return the sites that not every family has."""
    found = {kind for row in family.linears for kind in row.sites}
    found |= {SiteKind(branch.target) for branch in family.branches}
    norms: dict[str | None, SiteKind] = {}  # one that two branches share has the first one's site
    for branch in family.branches:
        before, behind, output = BRANCH_SITES[branch.name]
        norms = {branch.norm_in: before, branch.norm_out: behind, **norms}
        found.add(output)
    found |= {site for norm, site in norms.items() if norm is not None}
    found -= {SiteKind.RESID_POST, SiteKind.ATTN_OUT}
    listed = coded(kind for kind in SiteKind if kind in found)
    return f"{listed}; the stream is closed" if family.stream.closed else listed


def coded(words: Iterable[str]) -> str:
    """Return words as Markdown shows code."""
    return ", ".join(f"`{word}`" for word in words)


def row(family: Family) -> str:
    """Return a family's row of the table."""
    ran = "; ".join(f"{name}: {', '.join(found)}" for name, found in family.run.items() if found)
    described = ", ".join(family.runtimes) or "not tested"
    cells = (
        f"`{family.name}`",
        family.title,
        coded(family.classes),
        family.tier,
        sites(family),
        described,
        ran,
    )
    return f"| {' | '.join(cells)} |\n"


def page() -> str:
    """Return the page."""
    refused = (
        f"| {coded(one.architectures)} | {one.reason} | {one.source} |\n" for one in load_refused()
    )
    return HEAD + "".join(map(row, load_families())) + REFUSED + "".join(refused)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
