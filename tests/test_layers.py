"""Modules import downwards only, and the reference shares no code with the fold."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import bake
from bake.artifact import KINDS

ROOT = Path(bake.__file__).parent

# From the bottom up. A part imports from earlier lines and, within a line, to the left of itself.
LINES = (
    (
        "errors",
        "collection",
        "progress",
        "unseen",
        "nearby",
        "sites",
        "section",
        "positions",
        "tiles",
        "atomic",
    ),
    ("affine", "nonlinear"),
    ("edits", "fold", "rounding", "edit_store"),
    ("checkpoints", "artifact", "families", "directions", "process", "_guard", "converter"),
    ("recipe",),
    ("plan", "steer"),
    ("approximate", "outputs", "merge", "revert"),
    ("verify", "diff", "fit"),
    ("seal", "cards", "publish"),
    ("jobs",),
    ("cli",),
    ("__main__",),
)
ORDER = {part: place for place, part in enumerate(part for line in LINES for part in line)}
# What a module may import from anywhere: the version, which imports nothing.
EVERYWHERE = "bake"
# Equality of the two is the evidence: code that they shared would make it an echo.
REFERENCE, FOLD = ("steer", "verify"), ("fold", "plan", "outputs", "merge", "revert")


def modules() -> dict[str, Path]:
    """Return every module of the package, by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


@cache
def imports(name: str) -> tuple[str, ...]:
    """Return the modules of the package that a module imports, at the top or in a function."""
    return tuple(_imports(name))


def _imports(name: str) -> Iterator[str]:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "bake")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively, in line {node.lineno}"
            source = node.module or ""
            if source.split(".")[0] != "bake":
                continue
            whole = [f"{source}.{alias.name}" for alias in node.names]
            yield from (module if module in MODULES else source for module in whole)


def part(module: str) -> str:
    """Return the part of the design that a module belongs to."""
    return module.split(".")[1] if "." in module else EVERYWHERE


def test_every_module_has_a_place() -> None:
    """A module that is found here has to be put on a layer, in LINES."""
    assert [name for name in MODULES if part(name) not in (EVERYWHERE, *ORDER)] == []


def test_every_module_imports_downwards() -> None:
    assert [wrong for name in MODULES for wrong in upwards(name, imports(name))] == []
    planted = upwards("bake.plan.compile", ["bake.none", "bake.outputs.lora", "bake.plan.types"])
    assert list(planted) == [
        "bake.plan.compile imports bake.none, which does not exist",
        "bake.plan.compile imports bake.outputs.lora, which lies above it",
    ]
    assert list(upwards("bake", ["bake.errors"])) == ["the package itself imports bake.errors"]


def upwards(name: str, imported: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with the imports of a module."""
    here = part(name)
    for module in imported:
        there = part(module)
        if module not in MODULES:
            yield f"{name} imports {module}, which does not exist"
        elif there in (EVERYWHERE, here):
            continue
        elif here == EVERYWHERE:
            yield f"the package itself imports {module}"
        elif ORDER[there] >= ORDER[here]:
            yield f"{name} imports {module}, which lies above it"


def circle(files: Mapping[str, Iterable[str]]) -> list[str]:
    """Return files that import one another in a circle, or nothing."""
    try:
        TopologicalSorter(files).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_two_files_import_each_other() -> None:
    """At any remove, and inside functions and for types too: a reader needs those as well."""
    files = {name: set(imports(name)) - {name} for name in MODULES}
    assert circle(files) == []
    planted = files | {"bake.errors": {"bake.outputs.lora"}}
    assert {"bake.errors", "bake.outputs.lora"} <= set(circle(planted))


def test_the_walk_sees_imports() -> None:
    """The tests above would pass on a walk that finds nothing."""
    assert "bake.errors" in set(imports("bake.affine"))
    assert {"bake.plan.compile", "bake.plan.types"} <= set(imports("bake.plan"))
    assert "bake.edits" in set(imports("bake.recipe.build"))  # from bake import edits
    inside = {"bake.recipe", "bake.jobs.fitting"}  # imported inside functions
    assert inside <= set(imports("bake.jobs.request"))


def reached(name: str) -> dict[str, tuple[str, ...]]:
    """Return every module that a module imports, at any remove, each with the way to it."""
    ways: dict[str, tuple[str, ...]] = {name: (name,)}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        for imported in imports(current):
            # Importing a module runs the packages that it lies in.
            parents = imported.split(".")
            for depth in range(2, len(parents) + 1):
                module = ".".join(parents[:depth])
                if module not in ways:
                    ways[module] = (*ways[current], module)
                    waiting.append(module)
    return ways


def test_the_reference_never_meets_the_fold() -> None:
    assert [way for name in MODULES if part(name) in REFERENCE for way in met(name, FOLD)] == []
    assert list(met("bake.outputs.checkpoint", FOLD))  # the walk sees one where there is one


def met(name: str, parts: Iterable[str]) -> Iterator[str]:
    """Yield the ways from a module to those of some parts, at any remove."""
    ways = reached(name).items()
    yield from (" imports ".join(way) for module, way in ways if part(module) in parts)


def test_a_job_neither_prints_nor_parses() -> None:
    """At no remove: a Python user calls it where there is no terminal and no command line."""
    jobs = [name for name in MODULES if part(name) == "jobs"]
    assert jobs and [name for name in jobs if spoken(name)] == []
    assert spoken("bake.cli") >= {"click", "rich"}


def spoken(name: str) -> set[str]:
    """Return what of the packages for a terminal a module imports, at any remove."""
    return {package for module in reached(name) for package in packages(module)} & {"click", "rich"}


@cache
def packages(name: str) -> frozenset[str]:
    """Return the first part of every import of a module, whoever's it is."""
    nodes = list(ast.walk(tree(name)))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return frozenset(module.split(".")[0] for module in whole | parts)


def test_the_walk_sees_packages() -> None:
    assert {"click", "bake"} <= packages("bake.cli.output")
    assert "rich" in packages("bake.cli.render.screen")


def test_the_walk_reaches_what_is_far() -> None:
    ways = reached("bake.outputs.checkpoint")
    assert {"bake.fold", "bake.plan.stream", "bake.errors"} <= set(ways)
    assert ways["bake.plan.known"][0] == "bake.outputs.checkpoint"
    assert len(ways["bake.plan.known"]) > 3


# One screen a function, and what a carrier is said once

LONGEST, MOST = 60, 8


def too_long(source: ast.AST) -> Iterator[str]:
    """Yield the functions of more lines, or with more parameters, than a reader holds."""
    for node in ast.walk(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1  # without decorators
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            names += [a.arg for a in (given.vararg, given.kwarg) if a is not None]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if lines > LONGEST or count > MOST:
                yield f"{node.name}: {lines} lines, {count} parameters"


def test_every_function_fits_a_screen() -> None:
    assert [(name, wrong) for name in MODULES for wrong in too_long(tree(name))] == []


def test_the_walk_counts_lines_and_parameters() -> None:
    body = "\n".join("    pass" for _ in range(LONGEST - 1))
    fits = ast.parse(f"@a\n@b\ndef f(self, {', '.join('abcdefgh')}):\n{body}")
    assert list(too_long(fits)) == []
    assert list(too_long(ast.parse(f"def f():\n{body}\n    pass"))) == ["f: 61 lines, 0 parameters"]
    many = ast.parse("def f(a, b, c, d, e, /, g, *rest, h, **more): pass")
    assert list(too_long(many)) == ["f: 1 lines, 9 parameters"]


CARRIERS_KNOWN = ("bake.artifact.carrier", "bake.outputs", "bake.cli")


def told_apart(source: ast.AST) -> Iterator[str]:
    """Yield the comparisons with a carrier's name, and the tables that several of them key."""
    for node in ast.walk(source):
        if isinstance(node, ast.Compare):
            values = [*ast.walk(node.left), *(n for c in node.comparators for n in ast.walk(c))]
            least = 1
        elif isinstance(node, ast.Dict):
            values, least = [key for key in node.keys if key is not None], 2
        elif isinstance(node, ast.match_case):
            values, least = [*ast.walk(node.pattern)], 1
        else:
            continue
        named = [v for v in values if isinstance(v, ast.Constant) and v.value in KINDS]
        if len(named) >= least:
            yield ast.unparse(node)


def test_no_carrier_is_told_by_its_name() -> None:
    """What differs between carriers is a fact of ``Carrier``, or a writer of ``outputs``."""
    others = [name for name in MODULES if not name.startswith(CARRIERS_KNOWN)]
    assert [(name, found) for name in others for found in told_apart(tree(name))] == []


@pytest.mark.parametrize(
    "text",
    [
        "kind == 'lora'",
        "'checkpoint' in carriers",
        "kind not in ('gguf', 'gguf-lora')",
        "{'lora': 1, 'gguf': 2}",
        "match kind:\n    case 'merge':\n        pass",
    ],
)
def test_the_walk_sees_a_carrier_told_by_its_name(text: str) -> None:
    assert list(told_apart(ast.parse(text)))
    names = "|".join(sorted(KINDS, key=len, reverse=True))
    assert not list(told_apart(ast.parse(re.sub(names, "other", text))))


# What an import costs

HEAVY = ("torch", "transformers", "matplotlib", "gguf", "peft", "numpy", "huggingface_hub")


def loaded_by(statement: str) -> set[str]:
    """Return the heavy packages that a statement loads in a fresh interpreter."""
    code = f"import sys; {statement}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    return set(run.stdout.split())


def test_the_command_line_starts_without_heavy_packages() -> None:
    assert loaded_by("import bake.cli") == set()
    assert loaded_by("import bake.affine") >= {"torch"}  # the question has a positive answer


@pytest.mark.parametrize("arguments", [["families"], ["families", "--json"], ["directions", "-h"]])
def test_a_list_and_a_help_load_no_heavy_package(arguments: list[str]) -> None:
    """A list of tables is text: it starts in a third of a second, where torch alone takes one."""
    invoke = "from click.testing import CliRunner; from bake.cli import main; "
    invoke += f"assert CliRunner().invoke(main, {arguments}).exit_code == 0"
    assert loaded_by(invoke) == set()


def test_headers_records_and_jobs_are_read_without_tensors() -> None:
    assert loaded_by("import bake.checkpoints, bake.artifact.record, bake.jobs") == set()


def test_tensors_need_no_transformers() -> None:
    names = "bake.plan, bake.recipe, bake.steer, bake.edit_store, bake.directions"
    assert loaded_by(f"import {names}") & {"transformers", "matplotlib", "gguf", "peft"} == set()


# Public names


def exported(name: str) -> list[str] | None:
    """Return a module's ``__all__`` as it is written, or None."""
    for node in tree(name).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            value: list[str] = ast.literal_eval(node.value)
            return value
    return None


def public(name: str) -> set[str]:
    """Return the names without an underscore that a package takes from the package itself."""
    return {
        alias.asname or alias.name
        for node in tree(name).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bake")
        for alias in node.names
        if not (alias.asname or alias.name).startswith("_")
    }


def sorting(name: str) -> tuple[int, str]:
    """Return the key that ruff sorts by: constants, then classes, then the rest."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, name


PACKAGES = [name for name, path in MODULES.items() if path.name == "__init__.py"]


def test_all_is_sorted_and_names_what_exists() -> None:
    listing = {name: names for name in MODULES if (names := exported(name)) is not None}
    assert "bake.plan" in listing
    for name, names in listing.items():
        assert names == sorted(set(names), key=sorting), name
        module = importlib.import_module(name)
        assert [missing for missing in names if not hasattr(module, missing)] == [], name


@pytest.mark.parametrize("name", PACKAGES)
def test_all_of_a_package_is_complete(name: str) -> None:
    """What a package's ``__init__`` imports and does not use is there to be imported from it."""
    used = {node.id for node in ast.walk(tree(name)) if isinstance(node, ast.Name)}
    assert public(name) - used <= set(exported(name) or ())


def test_every_module_says_what_it_is() -> None:
    assert [name for name in MODULES if not ast.get_docstring(tree(name))] == []
