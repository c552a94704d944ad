"""Every steering system's files, read and baked, against the system's own hook; and their table."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import RELATIVE, Base, bake, base_at, logits, plain_logits, plan_of
from systems import INPUT, SYSTEMS, Made, Map, Sizes, System
from torch import Tensor

from bake.edits import EditKind
from bake.errors import DirectionError
from bake.plan import Exactness
from bake.recipe import build_edits, first_recipe, load_recipe, parse_recipe, read_artifacts
from bake.recipe.maps import left_out
from bake.sites import parse_site
from bake.steer import steered as reference

TABLE = Path(__file__).parent.parent / "docs" / "sources.md"


def recipe_text(folder: Path, made: Made) -> str:
    """Return the recipe that names an artifact."""

    def inline(value: Any) -> str:
        if isinstance(value, Mapping):
            inner = (f"{json.dumps(key)} = {inline(item)}" for key, item in value.items())
            return f"{{ {', '.join(inner)} }}"
        return json.dumps(value)

    def rows(values: Mapping[str, Any]) -> str:
        return "".join(f"{key} = {inline(value)}\n" for key, value in values.items())

    return (
        '[base]\nmodel = "base"\n[directions.v]\n'
        + rows({"file": str(folder / made.file), **made.options})
        + "".join(f"[directions.{name}]\n{rows(table)}" for name, table in made.more.items())
        + "[[edits]]\n"
        + rows({"direction": "v", **made.edit})
    )


@contextmanager
def hooked(model: torch.nn.Module, hooks: Mapping[str, Map]) -> Iterator[None]:
    """Steer as the systems do: a function on the output or the input of live modules."""
    handles = []
    for path, act in hooks.items():
        module = model.get_submodule(path.removesuffix(INPUT))
        if path.endswith(INPUT):

            def before(_: Any, args: Any, act: Map = act) -> Any:
                return act(args[0]), *args[1:]

            handles.append(module.register_forward_pre_hook(before))
        else:

            def after(_: Any, __: Any, out: Any, act: Map = act) -> Any:
                return (act(out[0]), *out[1:]) if isinstance(out, tuple) else act(out)

            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def steered(base: Base, made: Made, *, shift: int = 0) -> Tensor:
    """Return the logits under the system's own edit, ``shift`` layers off where it is not zero."""

    def moved(path: str) -> str:
        return re.sub(
            r"layers\.(\d+)",
            lambda m: f"layers.{(int(m[1]) + shift) % base.layout.layers}",
            path,
        )

    if made.update is None:
        with hooked(base.model, {moved(path): act for path, act in made.hooks.items()}):
            return logits(base.model, base)
    path, change = made.update
    weight = base.model.get_parameter(moved(path))
    with torch.no_grad():
        before = weight.clone()
        weight += change
        result = logits(base.model, base)
        weight.copy_(before)
    return result


def baked(base: Base, folder: Path, text: str) -> Tensor:
    """Return the logits of the model that a recipe is baked into."""
    (folder / "r.toml").write_text(text, encoding="utf-8")
    recipe = load_recipe(folder / "r.toml")
    edits = build_edits(recipe, base.layout, read_artifacts(recipe))
    path = bake(base, plan_of(base, edits), folder / "out")
    return logits(tiny.load(path), base)


def hooked_by_bake(base: Base, folder: Path, text: str) -> Tensor:
    """Return the logits under bake's hooks of edits that the plan refuses."""
    (folder / "r.toml").write_text(text, encoding="utf-8")
    recipe = load_recipe(folder / "r.toml")
    edits = build_edits(recipe, base.layout, read_artifacts(recipe))
    assert plan_of(base, edits).exactness is Exactness.IMPOSSIBLE
    with reference(base.model, base.layout, edits):
        return logits(base.model, base)


def sizes_of(base: Base) -> Sizes:
    config = base.checkpoint.config
    heads = config["num_attention_heads"]
    attention = base.layout.width(parse_site("z.0"))
    inner = config["intermediate_size"]
    return Sizes(base.layout.hidden, inner, base.layout.layers, attention, heads)


@dataclass(frozen=True)
class Distance:
    """Of the baked model from the system's own hook, as a share of the effect."""

    right: float
    wrong: float
    """From the same hook one layer off, or with one left out."""


def distance(base: Base, folder: Path, system: System) -> Distance:
    made = system.make(folder, sizes_of(base))
    text = recipe_text(folder, made)
    found = (hooked_by_bake if system.hooked else baked)(base, folder, text)
    wanted = steered(base, made)
    effect = float((wanted - plain_logits(base)).abs().max())
    assert effect > 1e-3
    # Where a system hooks every layer alike, or none, another layer's hook is no other one.
    alike = len(made.hooks) >= 2 * base.layout.layers or "model.norm" in made.hooks
    less = replace(made, hooks=dict(list(made.hooks.items())[:-1]))
    wrong = steered(base, less) if alike else steered(base, made, shift=1)
    return Distance(
        float((found - wanted).abs().max()) / effect, float((found - wrong).abs().max()) / effect
    )


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, RELATIVE), (torch.float32, 1e-5)])
def test_a_system_is_baked_as_it_steers(
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    system: System,
    dtype: torch.dtype,
    most: float,
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=dtype))
    found = distance(base, tmp_path, system)
    assert found.right <= most
    assert found.wrong > 1e-3


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_the_recipe_to_begin_with_is_one(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], system: System
) -> None:
    """What ``bake directions`` prints is read, and leads to edits of the model."""
    base = base_at(tiny_checkpoint("llama"))
    made = system.make(tmp_path, sizes_of(base))
    (tmp_path / "r.toml").write_text(recipe_text(tmp_path, made), encoding="utf-8")
    found = read_artifacts(load_recipe(tmp_path / "r.toml"))
    options = {key: value for key, value in made.options.items() if key != "layer"}
    text = first_recipe(found["v"], str(tmp_path / made.file), options)
    again = parse_recipe(text.encode(), tmp_path / "first.toml")
    assert build_edits(again, base.layout, read_artifacts(again))
    # The other kinds that it offers take all of what the file holds.
    offered = re.search(r'kind = "[a-z-]+" +# or (.+)', text)
    held = [item.tensors for item in found["v"].items]
    for kind in offered[1].split(", ") if offered else ():
        assert not any(left_out(EditKind(kind), tensors) for tensors in held)


Measured = Callable[[System], tuple[float, float, float]]
"""Returns how far a system's own hook is in float64 and in float32, and the control's, as shares of
the effect."""
HEAD = (
    "| system | file | site | formula | positions | folds | float64 | float32 | control |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def words(system: System) -> str:
    """Return what a row of the table says of a system before what is measured."""
    s = system
    return f"| {s.name} | {s.file} | {s.site} | {s.formula} | {s.positions} | {s.folds} | "


def shares(measured: Iterable[float]) -> str:
    """Return the last cells of a row: what was measured, as shares of the effect."""
    return " | ".join(f"{share:.0e}" for share in measured) + " |\n"


def filled(text: str, mark: str, table: str) -> str:
    """Return a page with a table between the two comments of a name."""
    first, last = f"<!-- {mark} -->\n", f"<!-- /{mark} -->\n"
    before, rest = text.split(first)
    return before + first + table + last + rest.split(last)[1]


def page(text: str, measured: Measured) -> str:
    """Return docs/sources.md with the table of the systems in its place."""
    rows = (words(system) + shares(measured(system)) for system in SYSTEMS)
    return filled(text, "systems", HEAD + "".join(rows))


def told(text: str, start: str) -> tuple[float, float, float]:
    """Return what docs/sources.md says was measured, in the row that starts so."""
    (row,) = (line for line in text.splitlines() if line.startswith(start))
    float64, float32, other = row.removeprefix(start).rstrip(" |").split(" | ")
    return float(float64), float(float32), float(other)


def documented(text: str) -> Measured:
    """Return what docs/sources.md says was measured of the systems."""
    return lambda system: told(text, words(system))


def test_the_table_is_that_of_the_documentation() -> None:
    """Its words are the systems', and what it says was measured keeps the bounds."""
    text = TABLE.read_text(encoding="utf-8")
    said = documented(text)
    assert page(text, said) == text, "run python docs/make_sources_table.py"
    for system in SYSTEMS:
        float64, float32, other = said(system)
        assert float64 <= RELATIVE and float32 <= 1e-5
        assert other > 1e-3, system.name
    with pytest.raises(ValueError, match="not enough values"):  # the control: another table
        page(text.replace("| CAA |", "| CCA |"), documented(text.replace("| CAA |", "| CCA |")))


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_a_module_that_is_another_site_here_is_told_every_layer(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], layers: tuple[int, ...]
) -> None:
    """Gemma 2 calls the norm behind attention as Llama calls the one before the MLP."""
    base = base_at(tiny_checkpoint("gemma2"))
    (tmp_path / "act").mkdir()
    for layer in layers:
        name = f"model.layers.{layer}.post_attention_layernorm.statedict"
        torch.save({"auroc": torch.rand(base.layout.hidden)}, tmp_path / "act" / name)
    at = json.dumps([f"ln2_out.{n}" for n in layers])
    right = json.dumps(
        [f"ln1_post_out.{n}" for n in layers] if len(layers) > 1 else "ln1_post_out.1"
    )
    made = Made("act", {"kind": "scale"}, {})
    # The site that the reader took it for is refused whether it is the file's or the recipe's word.
    for line in ("", f"at = {at}\n"):
        (tmp_path / "r.toml").write_text(recipe_text(tmp_path, made) + line, encoding="utf-8")
        recipe = load_recipe(tmp_path / "r.toml")
        with pytest.raises(DirectionError) as error:
            build_edits(recipe, base.layout, read_artifacts(recipe))
        assert f"at = {right}" in str(error.value.fix)
    (tmp_path / "r.toml").write_text(recipe_text(tmp_path, made) + f"at = {right}\n")
    recipe = load_recipe(tmp_path / "r.toml")
    built = build_edits(recipe, base.layout, read_artifacts(recipe))
    sites = [str(site) for edit in built for site in edit.sites]
    assert sites == [f"ln1_post_out.{n}" for n in layers]


@pytest.mark.parametrize("index", [None, 0.4])
def test_rows_of_another_model_are_refused(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], index: float | None
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    for rows, right in ((base.layout.layers, False), (base.layout.layers + 1, True)):
        torch.save(torch.rand(rows, base.layout.hidden), tmp_path / "refusal_directions.pt")
        options = {} if index is None else {"index": index}
        made = Made("refusal_directions.pt", {"kind": "ablate", "at": "mlp_out.0"}, {}, options)
        (tmp_path / "r.toml").write_text(recipe_text(tmp_path, made))
        recipe = load_recipe(tmp_path / "r.toml")
        found = read_artifacts(recipe)
        if right:
            assert build_edits(recipe, base.layout, found)
            continue
        with pytest.raises(DirectionError, match="has rows for"):
            build_edits(recipe, base.layout, found)
