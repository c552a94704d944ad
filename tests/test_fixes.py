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
from test_nonlinear import built

import bake
from bake import edits as make
from bake.affine import AffineMap
from bake.directions import READERS, Shape
from bake.errors import BakeError, UsageError
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


# --- what a recipe is told is followed ---------------------------------------------------------

MLP, BOTH = 'at = "mlp_out.1"', 'at = ["attn_out.0-1", "mlp_out.0-1"]'
ABLATE = 'kind = "ablate"\ndirection = "v"\n'
OFFSET = 'kind = "offset"\ndirection = "v"\n'
GATE = f'kind = "gate"\nmap = "ablate"\ndirection = "v"\n{MLP}\n'
TURN = f'kind = "rotate"\n{MLP}\n'
KERNEL = "peak = 1, max = 1, min = 0.5, width = 2"
TOLD: dict[str, tuple[str, str, str]] = {
    "a kind misspelt": (f'kind = "ablat"\ndirection = "v"\n{MLP}', "'ablate'", ABLATE + MLP),
    "a key of other kinds": (
        f"{OFFSET}{MLP}\nstrength = 0.5",
        "offset takes coefficient",
        f"{OFFSET}{MLP}\ncoefficient = 0.5",
    ),
    "nothing inside": (
        f'kind = "norm-preserving"\ndirection = "v"\n{MLP}',
        "write one of ablate",
        f'kind = "norm-preserving"\nmap = "ablate"\ndirection = "v"\n{MLP}',
    ),
    "no condition": (
        GATE,
        'gate = { direction = "NAME", above = 0.5 }',
        f'{GATE}gate = {{ direction = "cond", above = 0.5 }}',
    ),
    "a condition on two sides": (
        f'{GATE}gate = {{ direction = "cond", above = 0.5, below = 0.6 }}',
        "above or below, and not both",
        f'{GATE}gate = {{ direction = "cond", below = 0.6 }}',
    ),
    "a condition on no direction": (
        f'{GATE}gate = {{ direction = "con", above = 0.5 }}',
        "'cond'",
        f'{GATE}gate = {{ direction = "cond", above = 0.5 }}',
    ),
    "no limit": (
        f'kind = "clamp"\ndirection = "v"\n{MLP}',
        "give low, high or both",
        f'kind = "clamp"\ndirection = "v"\nhigh = 1.0\n{MLP}',
    ),
    "two directions of an offset": (
        f'kind = "offset"\ndirection = ["v", "cond"]\n{MLP}',
        "one [[edits]] for each",
        f'{OFFSET}{MLP}\n[[edits]]\nkind = "offset"\ndirection = "cond"\n{MLP}',
    ),
    "no site of several": (
        'kind = "ablate"\ndirection = ["v", "cond"]',
        'at = "resid"',
        'kind = "ablate"\ndirection = ["v", "cond"]\nat = "resid"',
    ),
    "no site": (OFFSET, 'at = "resid_post.1"', f'{OFFSET}at = "resid_post.1"'),
    "added again and again": (
        f'{OFFSET}at = "resid"',
        'at = "resid_post.1", or say repeat = true',
        f'{OFFSET}at = "resid"\nrepeat = true',
    ),
    "another width": (
        f'{ABLATE}at = "mlp_act.1"',
        "name a site of that width: ",
        f'{ABLATE}at = "attn_out.1"',
    ),
    "a kind that the file is not for": (
        f'kind = "erase"\ndirection = "v"\n{MLP}',
        "what it holds is for ablate, affine, offset, clamp",
        f'kind = "affine"\ndirection = "v"\n{MLP}',
    ),
    "a threshold left out": (
        f'kind = "erase"\ndirection = "jump"\n{MLP}',
        "write kind = 'clamp'",
        f'kind = "clamp"\nlow = 0.0\nhigh = 0.0\ndirection = "jump"\n{MLP}',
    ),
    "a mean left out": (
        f'kind = "linear"\ndirection = "sae"\n{MLP}',
        "write kind = 'erase' or 'clamp'",
        f'kind = "erase"\ndirection = "sae"\n{MLP}',
    ),
    "no mean": (
        f'kind = "affine"\ndirection = "v"\nmean = true\n{MLP}',
        "name the direction that is the mean",
        f'kind = "affine"\ndirection = "v"\nmean = "cond"\n{MLP}',
    ),
    "a plane of one": (
        f'{TURN}direction = "v"\ndegrees = 30',
        'direction = ["first", "second"], or reflect = true',
        f'{TURN}direction = ["v", "cond"]\ndegrees = 30',
    ),
    "a plane and no angle": (
        f'{TURN}direction = "plane"',
        "degrees = 30 to turn by, or angle = 180",
        f'{TURN}direction = "plane"\nangle = 180',
    ),
    "a mirror of two": (
        f'{TURN}direction = ["v", "cond"]\nreflect = true',
        "name one direction",
        f'{TURN}direction = "v"\nreflect = true',
    ),
    "an angle twice": (
        f'{TURN}direction = "plane"\ndegrees = 30\nangle = 90',
        "degrees turns by an angle",
        f'{TURN}direction = "plane"\ndegrees = 30',
    ),
    "too few numbers": (
        f"{ABLATE}{BOTH}\nstrength = [0.5]",
        "one number for each of these blocks",
        f"{ABLATE}{BOTH}\nstrength = [0.5, 0.6]",
    ),
    "a kernel elsewhere": (
        f"{ABLATE}{MLP}\nstrength = {{ {KERNEL.replace('peak = 1', 'peak = 9')} }}",
        "move the peak or widen it",
        f"{ABLATE}{MLP}\nstrength = {{ {KERNEL} }}",
    ),
    "half a kernel": (
        f"{ABLATE}{MLP}\nstrength = {{ peak = 1, max = 1 }}",
        "give peak, max, min and width",
        f"{ABLATE}{MLP}\nstrength = {{ {KERNEL} }}",
    ),
    "heretic's word": (
        f"{ABLATE}{MLP}\nstrength = {{ {KERNEL.replace('width', 'min_weight_distance')} }}",
        "min_weight_distance is 'width' here",
        f"{ABLATE}{MLP}\nstrength = {{ {KERNEL} }}",
    ),
    "blocks downwards": (
        f'{ABLATE}{BOTH}\nstrength = {{ "1-0" = 0.5 }}',
        'write "0-1"',
        f'{ABLATE}{BOTH}\nstrength = {{ "0-1" = 0.5 }}',
    ),
    "a block without a number": (
        f"{ABLATE}{BOTH}\nstrength = {{ 0 = 0.5 }}",
        "name it too, with 0 where",
        f"{ABLATE}{BOTH}\nstrength = {{ 0 = 0.5, 1 = 0 }}",
    ),
    "a number without a block": (
        f"{ABLATE}{MLP}\nstrength = {{ 1 = 0.5, 2 = 0.5 }}",
        "leave it out, or add it to `at`",
        f"{ABLATE}{MLP}\nstrength = {{ 1 = 0.5 }}",
    ),
    "a site in no block": (
        f'{ABLATE}at = "embed"\nstrength = {{ 0 = 0.5 }}',
        "strength = { embed = 1.0, … }",
        f'{ABLATE}at = "embed"\nstrength = {{ embed = 1.0 }}',
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_fix_of_the_recipe_is_one(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], name: str
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    broken, fix, mended = TOLD[name]
    with pytest.raises(BakeError) as caught:
        built(base, tmp_path, broken)
    assert fix in str(caught.value.fix)
    assert built(base, tmp_path, mended)
