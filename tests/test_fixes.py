"""The fix that an error offers is true: its words are a recipe's, and the plan takes it."""

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harness import base_at, edit, matrix, orthogonal, plan_of, vector

import bake
from bake import edits as make
from bake.affine import AffineMap
from bake.directions import READERS, Shape
from bake.errors import UsageError
from bake.plan import Exactness
from bake.recipe import ALLOWANCES
from bake.recipe.schema import recipe_schema
from bake.sites import parse_site

ROOT = Path(bake.__file__).parent
KEY = re.compile(r"(?<![\w.])([a-z_]+) = (\"[^\"{]*\"|\[[^\]{]*\]|true|false|-?\d[\d.]*)")
"""A key of a recipe with a value, as a fix spells it; what is formatted in is no value."""


def told() -> Iterator[tuple[str, str]]:
    """Yield every text that a fix or a remedy is made of, with its place in the code."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values: list[ast.expr] = []
            if isinstance(node, ast.keyword) and node.arg == "fix":
                values = [node.value]
            elif isinstance(node, ast.Assign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {getattr(target, "id", "").lower() for target in targets}
                if names & {"remedy", "remedies", "ways", "fix", "relocate", "modules"}:
                    values = [node.value]
            for value in values:
                yield f"{path.relative_to(ROOT)}:{value.lineno}", _text(value)


def _text(value: ast.AST) -> str:
    """Return the constant parts of an expression, with {} for what is formatted in."""
    if isinstance(value, ast.FormattedValue):
        return "{}"
    if isinstance(value, ast.Constant):
        return value.value if isinstance(value.value, str) else ""
    joint = "" if isinstance(value, ast.JoinedStr) else " "
    return joint.join(_text(part) for part in ast.iter_child_nodes(value))


def test_every_key_that_a_fix_names_is_one_of_a_recipe() -> None:
    tables = recipe_schema()["$defs"].values()
    keys = {key for table in tables for key in table.get("properties", ())}
    seen = []
    for place, text in told():
        for key, value in KEY.findall(text):
            # Of a family's table, of config.json or of Python: not of a recipe.
            if place.startswith(("families/", "checkpoints/", "merge/", "verify/", "publish/")):
                continue
            assert key in keys, f"{place}: {key} = {value}"
            found = tomllib.loads(f"x = {value}")["x"]
            words = found if isinstance(found, list) else [found]
            known = {"allow": ALLOWANCES, "shape": tuple(Shape), "reader": tuple(READERS)}
            for word in words if key in known else ():
                assert word in known[key], f"{place}: {key} = {value}"
            for word in words if key == "at" else ():
                if word != "resid" and not re.search(r"[*-]", word):
                    parse_site(word)
            seen.append(key)
    assert {"at", "allow", "shape", "method", "repeat"} <= set(seen)
    assert len(seen) > 25


def test_a_fix_of_another_key_would_be_found() -> None:
    assert KEY.findall('set shpae = "layers" or layers = 3') == [
        ("shpae", '"layers"'),
        ("layers", "3"),
    ]
    with pytest.raises(UsageError):
        parse_site("resid_pots.3")


# --- what the plan says is followed ------------------------------------------------------------


def _maps(width: int) -> dict[str, AffineMap]:
    return {
        "ablate": make.ablate(vector(width)),
        "affine": make.affine(vector(width), alpha=0.5),
        "half": make.ablate(vector(width), strength=0.5),
        "offset": make.offset(vector(width)),
        "rotate": make.rotate(orthogonal(width)),
        "linear": make.linear(matrix(width), shift=vector(width, 2)),
        "scale": make.scale(1 + 0.1 * vector(width).abs(), shift=vector(width, 3)),
    }


FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "olmo2", "mixtral")
KINDS = ("ablate", "affine", "half", "offset", "rotate", "linear", "scale")
SITES = ("resid_post.1", "ln1_post_out.1", "ln2_post_out.1", "mlp_out.1")
ACCEPTS = {"nulling": Exactness.NULLING, "relocate": Exactness.RELOCATED}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_remedy_of_the_plan_is_one(
    tiny_checkpoint: Callable[..., Path], family: str, kind: str
) -> None:
    base = base_at(tiny_checkpoint(family, tied=False))
    map_ = _maps(base.layout.hidden)[kind]
    for site in SITES:
        if parse_site(site).kind not in {known.kind for known in base.layout.sites}:
            continue
        for finding in plan_of(base, [edit(base, "linear", map_, site)]).findings:
            if finding.exactness is not Exactness.IMPOSSIBLE:
                continue
            said = finding.remedy or ""
            for key, value in KEY.findall(said):
                words = json.loads(value)
                if key == "at":
                    other = plan_of(base, [edit(base, "linear", _left(map_, said), words)])
                    assert other.exactness is Exactness.EXACT, (site, said)
                elif key == "allow" and words != ["approximate"]:
                    other = plan_of(base, [edit(base, "linear", map_, site)], allow=words)
                    assert other.exactness is not Exactness.IMPOSSIBLE, (site, said)
            named = re.search(r"edit (\w+\.\d+)", said)
            if named:
                other = plan_of(base, [edit(base, "linear", _left(map_, said), named[1])])
                assert other.exactness is Exactness.EXACT, (site, said)
            elif "leave the constant out" in said and "at =" not in said:
                other = plan_of(base, [edit(base, "linear", map_.without_bias(), site)])
                assert other.exactness is Exactness.EXACT, (site, said)


def _left(map_: AffineMap, said: str) -> AffineMap:
    return map_.without_bias() if "leave the constant out" in said else map_


def test_a_single_site_is_told_every_way(tiny_checkpoint: Callable[..., Path]) -> None:
    base = base_at(tiny_checkpoint("llama"))
    affine = edit(
        base, "affine", make.affine(vector(base.layout.hidden), alpha=1.0), "resid_post.1"
    )
    (finding,) = plan_of(base, [affine]).findings
    for way in (
        'at = "resid"',
        'at = ["attn_out.*"',
        '["widen"]',
        '["relocate"]',
        '["approximate"]',
    ):
        assert way in str(finding.remedy)
    # The control: what folds is told nothing.
    (folded,) = plan_of(
        base, [edit(base, "ablate", make.ablate(torch.ones(base.layout.hidden)), "resid")]
    ).findings
    assert folded.remedy is None
