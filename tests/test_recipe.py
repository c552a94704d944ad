"""A recipe is read strictly, and becomes the edits that it states."""

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from tiny import layout_of

from bake import edits
from bake.affine import AffineMap
from bake.artifact import CARRIERS
from bake.checkpoints.gguf.storage import PARTS, storage_words
from bake.directions import Direction, Directions, Role, Shape, read_directions
from bake.edits import Edit, EditKind, WeightUpdate
from bake.errors import BakeError, DirectionError, HubError, InputError, UsageError
from bake.families import READS, RUNTIMES, Layout
from bake.recipe import (
    ALLOWANCES,
    Recipe,
    aliases,
    build_edits,
    disagreement,
    fetch_artifact,
    first_recipe,
    load_recipe,
    override,
    read_artifacts,
    remarks,
)
from bake.recipe.edits import KINDS_OF_KEY
from bake.recipe.schema import recipe_schema
from bake.sites import Site, SiteKind, parse_site

HIDDEN, ATTENTION, GROUPED, INNER, LAYERS = 24, 32, 16, 40, 3  # of tests/tiny.py

HEAD = """
title = "A test"
[base]
model = "base"
[directions.mood]
file = "mood.npy"
[directions.other]
file = "other.npy"
"""


@pytest.fixture
def layout(tiny_checkpoint: Callable[..., Path]) -> Layout:
    return layout_of(tiny_checkpoint("llama"))


def recipe_of(folder: Path, edits_text: str, head: str = HEAD) -> Recipe:
    (folder / "base").mkdir(exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text(head + edits_text, encoding="utf-8")
    return load_recipe(path)


def artifact(*items: Direction, concept: str = "mood") -> Directions:
    return Directions(concept, "pt", f"{concept}.pt", "sha256:0", items, {})


def vector(
    width: int = HIDDEN, seed: int = 1, layer: int | None = None, site: str | None = None
) -> Direction:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(width, generator=generator, dtype=torch.float32)
    return Direction({Role.VECTOR: values}, layer, site)


def random(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(left: AffineMap | WeightUpdate, right: AffineMap | WeightUpdate) -> bool:
    """Whether two maps are the same matrix and constant, compared on the identity."""
    if isinstance(left, WeightUpdate) or isinstance(right, WeightUpdate):
        assert isinstance(left, WeightUpdate) and isinstance(right, WeightUpdate)
        return torch.equal(left.left, right.left) and torch.equal(left.right, right.right)
    return torch.equal(left.matrix(), right.matrix()) and torch.equal(left.bias, right.bias)


def message(error: pytest.ExceptionInfo[BakeError]) -> str:
    return str(error.value)


# --- reading the text --------------------------------------------------------------------------


def test_a_recipe_is_read_with_its_text_and_digest(tmp_path: Path) -> None:
    text = '[[edits]]\nkind = "ablate"\ndirection = "mood"\nat = "resid"  # everywhere\n'
    recipe = recipe_of(tmp_path, text)
    assert recipe.title == "A test"
    assert recipe.text == HEAD + text
    assert recipe.base.source == tmp_path / "base"
    assert recipe.base.revision is None
    assert recipe.directions["mood"].path == tmp_path / "mood.npy"
    (edit,) = recipe.edits
    assert (edit.kind, edit.directions, edit.at) == (EditKind.ABLATE, ("mood",), ("resid",))
    assert (edit.strength, edit.alpha, edit.mean, edit.coefficient) == (1.0, 0.0, None, 1.0)
    assert (recipe.export.to, recipe.export.allow) == (("checkpoint",), ())
    assert recipe.export.target == ("transformers",)
    digest = recipe.digest
    assert digest.startswith("sha256:") and len(digest) == 71
    assert recipe_of(tmp_path, text + "# a comment\n").digest != digest


def test_a_hub_model_keeps_its_id_and_revision(tmp_path: Path) -> None:
    edit = '[[edits]]\nkind = "ablate"\ndirection = "mood"\nat = "resid"\n'
    directions = '[directions.mood]\nfile = "hf://owner/name/v/mood.pt@main"\n'

    def base(text: str) -> Any:
        return recipe_of(tmp_path, edit, head=f"[base]\n{text}\n{directions}").base

    assert (base('model = "owner/name"').source, base('model = "owner/name"').revision) == (
        "owner/name",
        None,
    )
    assert base('model = "owner/name@refs/pr/1"').revision == "refs/pr/1"
    assert base('model = "owner/name"\nrevision = "abc"').revision == "abc"
    assert base('model = "./owner/name"').source == tmp_path / "owner/name"
    assert base('model = "name"').source == tmp_path / "name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert base('model = "owner/name"').source == tmp_path / "owner/name"


TITLE = 'title = "A test"'
EDIT = '[[edits]]\nkind = "ablate"\ndirection = "mood"\nat = "resid"\n'


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["the recipe has no edits", "add a table [[edits]]"]),
        ("[[edit]]\n" + EDIT[10:], ["unknown key 'edit'", "did you mean 'edits'?"]),
        (EDIT + "[exprt]\n", ["recipe.toml: unknown key 'exprt'", "did you mean 'export'?"]),
        (
            EDIT + "strenght = 0.5\n",
            ["[[edits]] 1: unknown key 'strenght'", "did you mean 'strength'?"],
        ),
        (EDIT + EDIT + "sites = 1\n", ["[[edits]] 2: unknown key 'sites'", "known are"]),
        (EDIT.replace('"ablate"', '"ablat"'), ["unknown kind 'ablat'", "did you mean 'ablate'?"]),
        (EDIT.replace('"mood"', '"mod"'), ["there is no direction 'mod'", "did you mean 'mood'?"]),
        (EDIT + "strength = nan\n", ["strength = nan is not finite"]),
        (EDIT + f"strength = {10**400}\n", ["strength = inf is not finite"]),
        (EDIT + f"strength = {'9' * 5000}\n", ["the recipe is not valid TOML: Exceeds the limit"]),
        (EDIT + "strength = true\n", ["strength = True is no number"]),
        (EDIT + 'strength = "1"\n', ["strength = '1' is no number"]),
        (EDIT.replace('"resid"', "3"), ["at = 3 is no text or list of texts"]),
        (EDIT.replace('"resid"', "[]"), ["at is an empty list"]),
        (EDIT.replace('direction = "mood"\n', ""), ["the key 'direction' is missing"]),
        (
            EDIT.replace("direction", "directions"),
            ["the key 'direction' is missing", "'direction' by 'directions'?"],
        ),
        (
            EDIT.replace("kind", "knd"),
            ["[[edits]] 1: the key 'kind' is missing", "did you mean 'kind' by 'knd'?"],
        ),
        (EDIT.replace('kind = "ablate"\n', ""), ["the key 'kind' is missing"]),
        (EDIT.replace('"mood"', '["mood", "mood"]'), ["repeats a name"]),
        (
            EDIT + "degrees = 3\n",
            ["'degrees' is no key of kind = 'ablate'", "it belongs to rotate", "takes strength"],
        ),
        (
            EDIT.replace("ablate", "offset") + "strength = 2\n",
            ["'strength' is no key of kind = 'offset'", "offset takes coefficient"],
        ),
        (
            EDIT.replace("ablate", "offset").replace('"mood"', '["mood", "other"]'),
            ["kind = 'offset' takes one direction, not 2", "one [[edits]] for each direction"],
        ),
        (
            EDIT.replace('"mood"', '["mood", "other"]').replace('at = "resid"\n', ""),
            ["the key 'at' is missing", "have no site of their own in common"],
        ),
        (
            EDIT.replace("ablate", "rotate") + "degrees = 3\nreflect = true\n",
            ["degrees and reflect exclude each other"],
        ),
        (
            EDIT.replace("ablate", "affine") + "mean = 3\n",
            ["mean = 3 is neither true, false nor the name of a direction"],
        ),
        (
            EDIT.replace("ablate", "affine") + 'mean = "calm"\n',
            ["there is no direction 'calm'", "known are mood, other"],
        ),
        (EDIT + '[export]\nto = ["ggfu"]\n', ["[export]: to holds 'ggfu'", "did you mean 'gguf'?"]),
        (EDIT + "[export]\nto = []\n", ["to is an empty list"]),
        (
            EDIT + '[export]\ntarget = ["vlm"]\n',
            ["[export]: target holds 'vlm'", "did you mean 'vllm'?"],
        ),
        (
            EDIT + '[export]\nallow = ["guessing"]\n',
            [
                "[export]: allow holds 'guessing'",
                "known are recast, relocate, widen, nulling, approximate",
            ],
        ),
        (EDIT + "[export]\nwiden = 0\n", ["widen", "adds no dimension"]),
        ("\ufeff", ["begins with a byte order mark", "save it as UTF-8 without one"]),
        ("[[edits]\n", ["recipe.toml: the recipe is not valid TOML", "line"]),
        *(
            (EDIT + f"[card]\n{said}\n", ["recipe.toml", f"{where} holds U+{letter:04X} ("])
            for said, where, letter in (
                ('licence_name = "\\u202egnp.exe"', "card.licence_name", 0x202E),
                ('datasets = ["a", "b\\u2028"]', "card.datasets", 0x2028),
                ('"\\u2066" = 1', "card: a key", 0x2066),
            )
        ),
        ("edits = [1]\n", ["[base]: unknown key 'edits'"]),
    ],
)
def test_what_a_recipe_cannot_say(tmp_path: Path, text: str, fragments: list[str]) -> None:
    head = (
        HEAD.replace('[directions.other]\nfile = "other.npy"\n', "") if "[base]" in text else HEAD
    )
    if text.startswith("\ufeff"):
        head, text = text + HEAD, EDIT
    if text.startswith("edits"):
        head = HEAD[: HEAD.index("[directions.mood]")]
    with pytest.raises(UsageError) as error:
        recipe_of(tmp_path, text, head)
    for fragment in fragments:
        assert fragment in message(error)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("head", "fragments"),
    [
        (HEAD.replace('model = "base"\n', ""), ["[base]: the key 'model' is missing"]),
        (HEAD.replace('"base"', '""'), ["[base]: model is empty"]),
        (
            HEAD.replace("[base]", "[bas]"),
            ["the key 'base' is missing", "did you mean 'base' by 'bas'?"],
        ),
        (HEAD.replace("[base]\nmodel", "base"), ["base = 'base' is no table"]),
        (
            HEAD.replace('"base"', '"base"\nrevision = "main"'),
            ["revision = 'main' is given for the folder base", "has no revisions"],
        ),
        (
            HEAD.replace('"base"', '"owner/name@a"\nrevision = "b"'),
            ["model = 'owner/name@a' names a revision, and so does revision = 'b'"],
        ),
        (
            HEAD.replace("mood.npy", "a\\u0000b"),
            ["directions.mood.file holds U+0000 (a control character)"],
        ),
        (HEAD.replace("mood.npy", ""), ["[directions.mood]: a path is empty"]),
        (HEAD.replace("mood.npy", "~nobody-of-that-name/a"), ["names no home folder"]),
        (HEAD + "layer = -1\n", ["[directions.other]: layer = -1 is negative"]),
        (HEAD + "sign = 2\n", ["[directions.other]: sign = 2 is neither 1 nor -1"]),
        (HEAD + 'shape = "layer"\n', ["shape = 'layer' is unknown", "did you mean 'layers'?"]),
        (HEAD + 'kye = "x"\n', ["[directions.other]: unknown key 'kye'", "did you mean 'key'?"]),
        (HEAD.replace('file = "mood.npy"\n', ""), ["[directions.mood]: the key 'file' is missing"]),
        (HEAD.replace(TITLE, "title = 3"), ["title = 3 is no text"]),
    ],
)
def test_what_base_and_directions_cannot_say(
    tmp_path: Path, head: str, fragments: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        recipe_of(tmp_path, EDIT, head)
    for fragment in fragments:
        assert fragment in message(error)


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the recipe cannot be read: No such file"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"title = '\xe9'")
    with pytest.raises(InputError, match="the recipe is no UTF-8 text"):
        load_recipe(tmp_path / "latin.toml")


def test_the_title_defaults_to_the_name_of_the_file(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, EDIT, HEAD.replace(TITLE, "")).title == "recipe"


@pytest.mark.parametrize(
    ("spelt", "meant"),
    [
        (["vLLM", "llama_cpp", "MLX-LM"], ("vllm", "llama.cpp", "mlx-lm")),
        (
            ["SGLang", "Ollama", "PEFT", "Transformers"],
            ("sglang", "ollama", "peft", "transformers"),
        ),
        (["llama.cpp", "llamacpp", "llama-cpp"], ("llama.cpp",)),
    ],
)
def test_runtimes_in_the_spellings_of_their_makers(
    tmp_path: Path, spelt: list[str], meant: tuple[str, ...]
) -> None:
    to = '[export]\nto = ["checkpoint", "lora"]\n'
    assert recipe_of(tmp_path, EDIT + f"{to}target = {spelt}\n").export.target == meant
    assert override(recipe_of(tmp_path, EDIT + to), target=spelt).export.target == meant


def test_a_runtime_that_is_none(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, EDIT)
    for wrong, near in (("mlx", "mlx-lm"), ("olama", "ollama"), ("transformer", "transformers")):
        with pytest.raises(UsageError, match=f"holds '{wrong}'.*\\n.*did you mean '{near}'"):
            override(recipe, target=[wrong])


def test_a_target_that_reads_nothing_of_the_output(tmp_path: Path) -> None:
    """What nobody named, as the default, need not read everything; nor every target everything."""
    vector = '[export]\nto = ["control-vector"]\n'
    assert recipe_of(tmp_path, EDIT + vector).export.target == ("transformers",)
    both = '[export]\nto = ["lora", "gguf"]\ntarget = ["peft", "ollama"]\n'
    assert recipe_of(tmp_path, EDIT + both).export.target == ("peft", "ollama")
    with pytest.raises(UsageError, match=r"vllm is a target, and reads no control-vector") as error:
        recipe_of(tmp_path, EDIT + vector + 'target = ["llama.cpp", "vllm"]\n')
    assert error.value.fix == "write checkpoint or lora as well, or leave vllm out"
    with pytest.raises(UsageError, match="--target: peft is a target, and reads no checkpoint"):
        override(recipe_of(tmp_path, EDIT), target=["peft"])
    assert override(recipe_of(tmp_path, EDIT), target=["peft"], to=["lora"]).export.to == ("lora",)
    # Another output on the command line does not make the recipe's own targets wrong.
    named = recipe_of(tmp_path, EDIT + '[export]\ntarget = ["vllm"]\n')
    assert override(named, to=["control-vector"]).export.target == ("vllm",)


def test_the_words_are_those_of_the_plan() -> None:
    assert set(RUNTIMES) == set(READS)
    assert {kind for kinds in KINDS_OF_KEY.values() for kind in kinds} == set(EditKind)


def test_who_says_how_wide_allows_it(tmp_path: Path) -> None:
    export = recipe_of(tmp_path, EDIT + '[export]\nallow = ["recast"]\nwiden = 64\n').export
    assert (export.allow, export.widen) == (("recast", "widen"), 64)
    plain = recipe_of(tmp_path, EDIT + '[export]\nallow = ["recast"]\n').export
    assert (plain.allow, plain.widen) == (("recast",), None)


def test_a_command_line_overrides_a_recipe(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, EDIT + '[export]\nallow = ["recast"]\ntarget = ["vllm"]\n')
    assert override(recipe) == recipe
    given = override(recipe, model="owner/name@x", allow=["nulling"], target=["llama.cpp"])
    assert (given.base.source, given.base.revision) == ("owner/name", "x")
    assert given.export.allow == ("recast", "nulling")
    assert given.export.target == ("llama.cpp",)
    assert given.digest == recipe.digest
    with pytest.raises(UsageError, match=r"--target: target holds 'tgi'"):
        override(recipe, target=["tgi"])


# --- artifacts ---------------------------------------------------------------------------------


def test_only_the_directions_that_are_used_are_read(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "mood.npy", np.arange(1.0, 5.0))
    found = read_artifacts(recipe_of(tmp_path, EDIT))
    assert list(found) == ["mood"]
    assert torch.equal(
        found["mood"].items[0].tensors[Role.VECTOR],
        torch.arange(1.0, 5.0, dtype=torch.float64),
    )
    np.save(tmp_path / "other.npy", np.ones(4))
    used = EDIT.replace("ablate", "affine") + 'mean = "other"\n'
    assert list(read_artifacts(recipe_of(tmp_path, used))) == ["mood", "other"]


def test_artifact_errors_name_the_file(tmp_path: Path) -> None:
    import numpy as np

    with pytest.raises(DirectionError) as error:
        read_artifacts(recipe_of(tmp_path, EDIT))
    assert str(tmp_path / "mood.npy") in message(error)
    np.save(tmp_path / "mood.npy", np.array([1.0, np.nan]))
    with pytest.raises(DirectionError, match="not finite"):
        read_artifacts(recipe_of(tmp_path, EDIT))
    np.save(tmp_path / "mood.npy", np.zeros(4))
    with pytest.raises(DirectionError, match="is zero"):
        read_artifacts(recipe_of(tmp_path, EDIT))


def test_a_sign_needs_something_that_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = Direction({Role.LEFT: random(HIDDEN, 2), Role.RIGHT: random(2, HIDDEN)})
    monkeypatch.setattr(
        "bake.recipe.artifacts.read_directions", lambda path, **_: artifact(factors)
    )
    head = HEAD.replace('"mood.npy"', '"mood.npy"\nsign = -1')
    with pytest.raises(UsageError, match="sign = -1 is given, but the artifact holds left, right"):
        read_artifacts(recipe_of(tmp_path, EDIT.replace("ablate", "erase"), head))


def test_the_options_of_a_direction_reach_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def read(path: Path, **options: Any) -> Directions:
        seen.update(path=path, **options)
        return artifact(vector())

    monkeypatch.setattr("bake.recipe.artifacts.read_directions", read)
    options = 'reader = "pt"\nkey = "v"\nshape = "subspace"'
    read_artifacts(recipe_of(tmp_path, EDIT, HEAD.replace('"mood.npy"', f'"mood.npy"\n{options}')))
    assert seen == {
        "path": tmp_path / "mood.npy",
        "reader": "pt",
        "key": "v",
        "shape": Shape.SUBSPACE,
    }


def test_a_direction_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[Any] = []

    def download(repo: str, name: str, *, revision: str | None) -> str:
        asked.append((repo, name, revision))
        return str(tmp_path / "file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch_artifact("hf://owner/name/deep/mood.pt@abc") == tmp_path / "file"
    assert fetch_artifact("hf://owner/name/mood.pt") == tmp_path / "file"
    assert asked == [("owner/name", "deep/mood.pt", "abc"), ("owner/name", "mood.pt", None)]
    with pytest.raises(UsageError, match=r"write hf://owner/name/path"):
        fetch_artifact("hf://owner/name")

    def fail(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand no cached file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(HubError) as error:
        fetch_artifact("hf://owner/name/mood.pt")
    assert "hf://owner/name/mood.pt cannot be fetched: no connection" in message(error)
    assert error.value.exit_code == 5


# --- edits -------------------------------------------------------------------------------------


def build(
    folder: Path, layout: Layout, text: str, found: Mapping[str, Directions], head: str = HEAD
) -> tuple[edits.Edit, ...]:
    return build_edits(recipe_of(folder, text, head), layout, found)


def test_one_direction_acts_as_one_map_at_every_site(tmp_path: Path, layout: Layout) -> None:
    item = vector(layer=14, site="resid_pre.14")  # of another model: only metadata
    (edit,) = build(tmp_path, layout, EDIT, {"mood": artifact(item)})
    assert edit.sites == layout.stream
    assert edit.concept == "mood"
    assert same(edit.map, edits.ablate(item.tensors[Role.VECTOR]))
    assert not same(edit.map, edits.ablate(vector(seed=2).tensors[Role.VECTOR]))


def test_an_item_per_layer_acts_at_its_layer(tmp_path: Path, layout: Layout) -> None:
    items = [vector(seed=layer, layer=layer) for layer in range(LAYERS)]
    text = EDIT.replace('"resid"', '["mlp_out.*", "resid_pre.1"]')
    built = build(tmp_path, layout, text, {"mood": artifact(*items)})
    assert [[str(site) for site in edit.sites] for edit in built] == [
        ["mlp_out.0"],
        ["mlp_out.1", "resid_pre.1"],
        ["mlp_out.2"],
    ]
    for edit, item in zip(built, items, strict=True):
        assert same(edit.map, edits.ablate(item.tensors[Role.VECTOR]))


def test_layer_pins_one_item_for_every_site(tmp_path: Path, layout: Layout) -> None:
    items = [vector(seed=layer, layer=layer) for layer in range(LAYERS)]
    head = HEAD.replace('"mood.npy"', '"mood.npy"\nlayer = 2')
    text = EDIT.replace('"resid"', '["embed", "resid_post.0"]')
    (edit,) = build(tmp_path, layout, text, {"mood": artifact(*items)}, head)
    assert same(edit.map, edits.ablate(items[2].tensors[Role.VECTOR]))
    head = head.replace("layer = 2", "layer = 9")
    with pytest.raises(DirectionError, match="there is no direction for layer 9"):
        build(tmp_path, layout, text, {"mood": artifact(*items)}, head)


def test_an_item_at_the_site_itself_comes_before_one_of_its_layer(
    tmp_path: Path, layout: Layout
) -> None:
    items = [vector(seed=1, layer=0, site="attn_out.0"), vector(seed=2, layer=0, site="mlp_out.0")]
    text = EDIT.replace('"resid"', '["mlp_out.0", "attn_out.0"]')
    first, second = build(tmp_path, layout, text, {"mood": artifact(*items)})
    assert same(first.map, edits.ablate(items[1].tensors[Role.VECTOR]))
    assert same(second.map, edits.ablate(items[0].tensors[Role.VECTOR]))
    with pytest.raises(DirectionError) as error:
        build(tmp_path, layout, EDIT.replace('"resid"', '"z.0"'), {"mood": artifact(*items)})
    assert "direction 'mood' has no item for z.0" in message(error)
    assert "there are 2 directions at layer 0" in message(error)


def test_site_pins_one_of_several_items_of_a_layer(tmp_path: Path, layout: Layout) -> None:
    """What messages say of a layer with several items works, for heads as well."""
    sites = ("attn_out.0", "mlp_out.0")
    found = {"mood": artifact(*(vector(seed=n, layer=0, site=s) for n, s in enumerate(sites)))}

    def read(pin: str) -> tuple[Edit, ...]:
        head = HEAD.replace('"mood.npy"', f'"mood.npy"\n{pin}')
        return build_edits(recipe_of(tmp_path, EDIT, head), layout, found)

    for pin in ("", "layer = 0"):
        with pytest.raises(BakeError) as error:
            read(pin)
        assert 'site = "attn_out.0"' in message(error)
    for item, site in zip(found["mood"].items, sites, strict=True):
        (edit,) = read(f'site = "{site}"')
        assert same(edit.map, edits.ablate(item.tensors[Role.VECTOR]))
        assert len(edit.sites) == 2 * LAYERS + 1
    with pytest.raises(DirectionError, match="has no item at ln1_out") as error:
        read('site = "ln1_out.0"')
    assert error.value.fix == "it holds attn_out.0, mlp_out.0"
    with pytest.raises(UsageError, match="layer and site both pick"):
        read('site = "mlp_out.0"\nlayer = 0')
    with pytest.raises(UsageError, match="mlp_ou"):
        read('site = "mlp_ou.0"')


def test_sites_that_no_item_covers(tmp_path: Path, layout: Layout) -> None:
    items = [vector(seed=layer, layer=layer) for layer in (1, 2)]
    with pytest.raises(DirectionError) as error:
        build(tmp_path, layout, EDIT, {"mood": artifact(*items)})
    assert "[[edits]] 1: direction 'mood' has no item for resid_pre.0" in message(error)
    assert "layer 1, layer 2" in message(error)
    assert "give layer = N in [directions.mood]" in message(error)
    with pytest.raises(UsageError) as usage:
        build(tmp_path, layout, EDIT.replace('"resid"', '"embed"'), {"mood": artifact(*items)})
    assert "direction 'mood' has 2 items, one per layer, and embed is in no layer" in message(usage)


def test_a_stack_with_one_layer_that_is_not_zero_stays_a_stack(
    tmp_path: Path, layout: Layout
) -> None:
    items = (vector(layer=1),)
    stack = Directions("mood", "npy", "mood.npy", "sha256:0", items, {"bake.zero_layers": "0,2"})
    with pytest.raises(DirectionError, match="the direction of layer 0 is zero"):
        build(tmp_path, layout, EDIT, {"mood": stack})
    (edit,) = build(tmp_path, layout, EDIT.replace('"resid"', '"mlp_out.1"'), {"mood": stack})
    assert edit.sites == (Site(SiteKind.MLP_OUT, 1),)


def test_an_artifact_with_sites_says_where_it_acts(tmp_path: Path, layout: Layout) -> None:
    text = EDIT.replace('at = "resid"\n', "")
    items = [
        vector(seed=1, layer=0, site="ln1_out.0"),
        vector(seed=2, layer=2, site="ln2_out.2"),
        vector(seed=3, site="ln_final_out"),
    ]
    built = build(tmp_path, layout, text, {"mood": artifact(*items)})
    assert [str(site) for edit in built for site in edit.sites] == [
        "ln1_out.0",
        "ln2_out.2",
        "ln_final_out",
    ]
    for edit, item in zip(built, items, strict=True):
        assert same(edit.map, edits.ablate(item.tensors[Role.VECTOR]))
    with pytest.raises(UsageError) as error:
        build(tmp_path, layout, text, {"mood": artifact(vector(layer=1))})
    assert "the key 'at' is missing" in message(error)
    assert "the artifact of direction 'mood' names no site" in message(error)
    with pytest.raises(UsageError, match="names layer 7, but the model has 3 blocks"):
        build(tmp_path, layout, text, {"mood": artifact(vector(layer=7, site="attn_out.7"))})


OFFSET_EDIT = EDIT.replace("ablate", "offset")


def followed(error: pytest.ExceptionInfo[BakeError]) -> str:
    """Return the line of a recipe that an error's fix names as its example."""
    match = re.search(r'at = ("[^"]+"|\[[^]]+\])', str(error.value.fix))
    assert match, error.value.fix
    return match[0]


@pytest.mark.parametrize(
    ("kind", "layers", "example"),
    [
        ("offset", [None], 'at = "resid_post.1"'),
        ("offset", [2], 'at = "resid_post.2"'),
        ("offset", [0, 2], 'at = ["resid_post.0", "resid_post.2"]'),
        ("ablate", [None], 'at = "resid"'),
        ("ablate", [0, 1, 2], 'at = ["attn_out.0-2", "mlp_out.0-2"]'),
        ("ablate", [0, 2], 'at = ["attn_out.0", "attn_out.2", "mlp_out.0", "mlp_out.2"]'),
        ("ablate", [1, 2], 'at = ["attn_out.1-2", "mlp_out.1-2"]'),
    ],
)
def test_the_sites_that_an_error_names_as_an_example_are_taken(
    tmp_path: Path, layout: Layout, kind: str, layers: list[int | None], example: str
) -> None:
    items = [vector(seed=seed, layer=layer) for seed, layer in enumerate(layers)]
    text = EDIT.replace("ablate", kind).replace('at = "resid"\n', "")
    with pytest.raises(UsageError, match="the key 'at' is missing") as error:
        build(tmp_path, layout, text, {"mood": artifact(*items)})
    assert followed(error) == example
    built = build(tmp_path, layout, f"{text}{followed(error)}\n", {"mood": artifact(*items)})
    assert len(built) == len(layers)


@pytest.mark.parametrize("at", ['"resid"', '"resid_post.*"', '["resid_pre.1", "resid_post.2"]'])
def test_one_vector_at_several_sites_of_the_stream_has_to_be_meant(
    tmp_path: Path, layout: Layout, at: str
) -> None:
    text = OFFSET_EDIT.replace('"resid"', at)
    with pytest.raises(UsageError, match=r"one vector is added at \d sites of the stream") as error:
        build(tmp_path, layout, text, {"mood": artifact(vector())})
    # Both fixes are true; and what adds one vector once, or another one a layer, needs neither.
    one = OFFSET_EDIT.replace('at = "resid"', followed(error))
    assert build(tmp_path, layout, one, {"mood": artifact(vector())})
    assert build(tmp_path, layout, text + "repeat = true\n", {"mood": artifact(vector())})
    each = [vector(seed=n, layer=n) for n in range(LAYERS)]
    several = OFFSET_EDIT.replace('"resid"', '"resid_post.*"')
    assert len(build(tmp_path, layout, several, {"mood": artifact(*each)})) == LAYERS


@pytest.mark.parametrize("rows", [LAYERS - 1, LAYERS + 1, 500])
def test_a_stack_of_other_rows_than_blocks_is_refused(
    tmp_path: Path, layout: Layout, rows: int
) -> None:
    stack = random(rows, HIDDEN)
    torch.save(stack, tmp_path / "rows.pt")
    text = EDIT.replace('"resid"', '"mlp_out.1"')
    found = read_directions(tmp_path / "rows.pt", shape="layers")
    head = HEAD.replace('"mood.npy"', '"rows.pt"\nshape = "layers"')
    with pytest.raises(DirectionError) as error:
        build(tmp_path, layout, text, {"mood": found}, head)
    assert f"has rows for {rows} blocks, and the model has {LAYERS}" in message(error)
    # The fix is true, and only named where it is: row l + 1 is then that of block l.
    assert ('"hidden_states"' in message(error)) is (rows == LAYERS + 1)
    found = read_directions(tmp_path / "rows.pt", shape="hidden_states")
    head = head.replace('"layers"', '"hidden_states"')
    if rows != LAYERS + 1:
        with pytest.raises(DirectionError, match=f"has rows for {rows - 1} blocks"):
            build(tmp_path, layout, text, {"mood": found}, head)
        return
    text = EDIT.replace('"resid"', '"mlp_out.0"')
    (edit,) = build(tmp_path, layout, text, {"mood": found}, head)
    assert same(edit.map, edits.ablate(stack[1]))
    assert not same(edit.map, edits.ablate(stack[0]))


def test_a_recipe_to_begin_with_names_every_layer_and_invents_none() -> None:
    several = artifact(*(vector(seed=n, layer=n) for n in (0, 2)))
    said = first_recipe(several, "😀.pt", {})
    at = 'at = ["attn_out.0", "attn_out.2", "mlp_out.0", "mlp_out.2"]    # what the modules write'
    assert at in said
    assert tomllib.loads(said)["directions"]["concept"]["file"] == "😀.pt"
    left, right = random(HIDDEN, 2), random(2, HIDDEN)
    factors = Direction({Role.LEFT: left, Role.RIGHT: right})
    for reader, at in (
        ("leace", 'at = "resid"    # every site of the stream'),
        ("rome", 'at = "mlp_out.0"    # an example: the file does not say where it belongs'),
    ):
        made = Directions("v", reader, "v", "sha256:0", (factors,), {})
        assert at in first_recipe(made, "v", {})
    added = Directions("v", "pyvene", "v", "sha256:0", (vector(site="mlp_out.1", layer=1),), {})
    assert 'kind = "offset"' in first_recipe(added, "v", {})
    mean = artifact(Direction({Role.MEAN: random(HIDDEN)}))
    assert first_recipe(mean, "v", {}) == "# it holds mean, of which alone there is no edit\n"


def test_a_zero_site_does_not_get_the_item_of_another(tmp_path: Path, layout: Layout) -> None:
    tensors = {"attn_out.1": torch.zeros(HIDDEN), "mlp_out.1": torch.ones(HIDDEN)}
    torch.save(tensors | {"mlp_out.2": torch.ones(HIDDEN)}, tmp_path / "v.pt")
    found = {"mood": read_directions(tmp_path / "v.pt")}
    with pytest.raises(DirectionError, match=r"'mood' is zero at attn_out\.1"):
        build(tmp_path, layout, EDIT.replace('"resid"', '"attn_out.1"'), found)
    assert build(tmp_path, layout, EDIT.replace('"resid"', '"mlp_out.1"'), found)


def test_what_an_edit_does_that_its_recipe_does_not_say(tmp_path: Path) -> None:
    """An affine edit without a mean, and positions that weights do not know, are remarked."""
    affine = recipe_of(tmp_path, EDIT.replace("ablate", "affine") + "alpha = 2\n")
    (said,) = remarks(affine, {"mood": artifact(vector())})
    assert said.startswith("affine mood: there is no mean, so that the component is set to 2 times")
    with_mean = Direction({Role.VECTOR: random(HIDDEN), Role.MEAN: random(HIDDEN)})
    assert remarks(affine, {"mood": artifact(with_mean)}) == ()
    torch.save(random(HIDDEN), tmp_path / "vec_layer_1_Llama.pt")
    found = {"mood": read_directions(tmp_path / "vec_layer_1_Llama.pt")}
    (said,) = remarks(recipe_of(tmp_path, EDIT), found)
    assert "from the end of the instruction on; the weights act at every token, always" in said
    assert remarks(recipe_of(tmp_path, EDIT), {"mood": artifact(vector())}) == ()


@pytest.mark.parametrize(
    ("at", "fragment"),
    [
        ("resid_post.3", "'resid_post.3' names layer 3, but the model has 3 blocks"),
        ("resid_pots.1", "did you mean 'resid_post'?"),
        ("hidden_states[-1]", "takes the last hidden state after the final norm"),
        ("ln1_post_out.0", "llama has no site ln1_post_out.0"),
        ("model.layers.1.mpl", "did you mean 'model.layers.1.mlp'?"),
        ("model.layers.3", "the module path 'model.layers.3' is no site"),
    ],
)
def test_sites_that_the_model_does_not_have(
    tmp_path: Path, layout: Layout, at: str, fragment: str
) -> None:
    with pytest.raises(UsageError) as error:
        build(tmp_path, layout, EDIT.replace('"resid"', f'"{at}"'), {"mood": artifact(vector())})
    assert fragment in message(error)
    assert "recipe.toml [[edits]] 1" in message(error)


def test_a_direction_of_the_wrong_width(tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(DirectionError) as error:
        build(
            tmp_path,
            layout,
            EDIT.replace('"resid"', '"resid_post.2"'),
            {"mood": artifact(vector(ATTENTION))},
        )
    assert "direction 'mood' has width 32 but resid_post.2 has width 24" in message(error)
    assert "name a site of that width: q, z" in message(error)
    assert error.value.exit_code == 4
    with pytest.raises(DirectionError, match="no site of this model has width 25"):
        build(tmp_path, layout, EDIT, {"mood": artifact(vector(25))})
    built = build(
        tmp_path, layout, EDIT.replace('"resid"', '"z.2"'), {"mood": artifact(vector(ATTENTION))}
    )
    assert built[0].sites == (Site(SiteKind.Z, 2),)


MEAN = random(HIDDEN, seed=11)
LEFT, RIGHT = random(HIDDEN, 2, seed=12), random(2, HIDDEN, seed=13)
SCALE, OFFSET = random(HIDDEN, seed=14), random(HIDDEN, seed=15)
MATRIX = random(HIDDEN, HIDDEN, seed=16)
ORTHOGONAL = torch.linalg.qr(MATRIX)[0]
SUBSPACE = random(2, HIDDEN, seed=17)
VECTOR = random(HIDDEN, seed=18)
UNIT = torch.eye(HIDDEN, dtype=torch.float64)
R = Role


@pytest.mark.parametrize(
    ("kind", "keys", "tensors", "expected"),
    [
        ("ablate", "", {R.VECTOR: VECTOR}, edits.ablate(VECTOR)),
        ("ablate", "strength = 0.5", {R.VECTOR: VECTOR}, edits.ablate(VECTOR, strength=0.5)),
        ("ablate", "", {R.SUBSPACE: SUBSPACE}, edits.ablate(SUBSPACE)),
        ("affine", "", {R.VECTOR: VECTOR}, edits.affine(VECTOR)),
        (
            "affine",
            "alpha = 2\nstrength = 0.5",
            {R.VECTOR: VECTOR, R.MEAN: MEAN},
            edits.affine(VECTOR, mean=MEAN, alpha=2.0, strength=0.5),
        ),
        (
            "affine",
            "mean = true",
            {R.VECTOR: VECTOR, R.MEAN: MEAN},
            edits.affine(VECTOR, mean=MEAN),
        ),
        ("affine", "mean = false", {R.VECTOR: VECTOR, R.MEAN: MEAN}, edits.affine(VECTOR)),
        ("erase", "", {R.LEFT: LEFT, R.RIGHT: RIGHT}, edits.erase(LEFT, RIGHT)),
        (
            "erase",
            "strength = 0.5",
            {R.LEFT: LEFT, R.RIGHT: RIGHT, R.MEAN: MEAN},
            edits.erase(LEFT, RIGHT, mean=MEAN, strength=0.5),
        ),
        ("offset", "", {R.VECTOR: VECTOR}, edits.offset(VECTOR)),
        ("offset", "coefficient = -3", {R.VECTOR: VECTOR}, edits.offset(VECTOR, coefficient=-3.0)),
        ("offset", "", {R.OFFSET: OFFSET}, edits.offset(OFFSET)),
        ("scale", "", {R.SCALE: SCALE}, edits.scale(SCALE)),
        (
            "scale",
            "strength = 0.5",
            {R.SCALE: SCALE, R.OFFSET: OFFSET},
            edits.scale(0.5 + 0.5 * SCALE, shift=0.5 * OFFSET),
        ),
        ("rotate", "", {R.MATRIX: ORTHOGONAL}, edits.rotate(ORTHOGONAL)),
        ("rotate", "reflect = true", {R.VECTOR: VECTOR}, edits.reflect(VECTOR)),
        (
            "rotate",
            "degrees = 30",
            {R.SUBSPACE: SUBSPACE},
            edits.rotate_plane(SUBSPACE, degrees=30),
        ),
        ("linear", "", {R.MATRIX: MATRIX}, edits.linear(MATRIX)),
        (
            "linear",
            "strength = 0.5",
            {R.MATRIX: MATRIX, R.BIAS: OFFSET},
            edits.linear(0.5 * UNIT + 0.5 * MATRIX, shift=0.5 * OFFSET),
        ),
    ],
)
def test_every_kind_is_the_map_that_it_names(
    tmp_path: Path,
    layout: Layout,
    kind: str,
    keys: str,
    tensors: Mapping[Role, torch.Tensor],
    expected: AffineMap,
) -> None:
    text = f'[[edits]]\nkind = "{kind}"\ndirection = "mood"\nat = "attn_out.1"\n{keys}\n'
    (edit,) = build(tmp_path, layout, text, {"mood": artifact(Direction(tensors))})
    assert edit.kind == kind
    assert same(edit.map, expected)
    assert isinstance(edit.map, AffineMap) and not edit.map.is_identity()


BLOCKS = '[[edits]]\nkind = "ablate"\ndirection = "mood"\nat = ["attn_out.*", "mlp_out.1-2"]\n'
KERNEL = "{ peak = 0.5, max = 1.0, min = 0.2, width = 1.5 }"


@pytest.mark.parametrize(
    ("strength", "attention", "mlp"),
    [
        ("0.5", (0.5, 0.5, 0.5), (0.5, 0.5)),
        ("[0.9, 0.5, 0.1]", (0.9, 0.5, 0.1), (0.5, 0.1)),
        ('{ "0-1" = 0.9, 2 = 0.4 }', (0.9, 0.9, 0.4), (0.9, 0.4)),
        # |l - 0.5| is 0.5, 0.5, 1.5: a third of the way down, and all of it.
        (KERNEL, (1 - 0.8 / 3, 1 - 0.8 / 3, 0.2), (1 - 0.8 / 3, 0.2)),
        # Beyond the width there is nothing, not the least.
        (KERNEL.replace("1.5", "0.6"), (1 - 0.4 / 0.6, 1 - 0.4 / 0.6, 0), (1 - 0.4 / 0.6, 0)),
        (f"{{ attn_out = {KERNEL}, mlp_out = [0, 0.3] }}", (1 - 0.8 / 3,) * 2 + (0.2,), (0, 0.3)),
        ('{ mlp_out = { "1-2" = 0.3 }, attn_out = 0.7 }', (0.7,) * 3, (0.3, 0.3)),
    ],
)
def test_strengths_by_block_and_by_kind_of_site(
    tmp_path: Path,
    layout: Layout,
    strength: str,
    attention: tuple[float, ...],
    mlp: tuple[float, ...],
) -> None:
    text = f"{BLOCKS}strength = {strength}\n"
    built = build(tmp_path, layout, text, {"mood": artifact(Direction({R.VECTOR: VECTOR}))})
    wanted = {
        **{Site(SiteKind.ATTN_OUT, n): value for n, value in enumerate(attention)},
        **{Site(SiteKind.MLP_OUT, n): value for n, value in enumerate(mlp, start=1)},
    }
    maps = {site: edit.map for edit in built for site in edit.sites}
    assert maps.keys() == wanted.keys() and sum(len(edit.sites) for edit in built) == len(wanted)
    for site, value in wanted.items():
        found, expected = maps[site], edits.ablate(VECTOR, strength=value)
        assert isinstance(found, AffineMap)
        torch.testing.assert_close(found.matrix(), expected.matrix(), rtol=0, atol=1e-12)
    assert disagreement(recipe_of(tmp_path, text), built, layout) is None


@pytest.mark.parametrize(
    ("strength", "fragments"),
    [
        ("{}", ["is no table of numbers"]),
        ("[]", ["lists 0 numbers, and the edit acts in 3 blocks, 0-2"]),
        ("[1, 2]", ["lists 2 numbers, and the edit acts in 3 blocks, 0-2", "in rising order"]),
        ("[1, nan, 2]", ["strength = nan is not finite"]),
        (f"[1, {10**400}, 2]", ["strength = inf is not finite"]),
        ("{ 0 = 1, 1 = inf, 2 = 0 }", ["strength = inf is not finite"]),
        ('{ "0-1" = 1 }', ["strength gives no number to block 2, where the edit acts"]),
        ('{ "0-9" = 1 }', ["gives a number to block 3-9, where the edit does not act"]),
        ('{ "0-2" = 1, 1 = 0 }', ["names block 1 twice"]),
        ('{ "2-0" = 1 }', ["counts blocks downwards", 'write "0-2"']),
        ("{ -1 = 1 }", ["unknown key '-1'"]),
        ('{ "*" = 1 }', ["unknown key '*'", "name blocks"]),
        ("{ 0 = true }", ["strength = {'0': True} is no number, and no list or table"]),
        ("{ attn_out = 1 }", ["gives no number to site mlp_out, where the edit acts"]),
        ("{ attn_out = 1, mlp_out = 1, z = 1 }", ["gives a number to site z"]),
        ("{ attn_out = 1, mlp_ot = 1 }", ["unknown key 'mlp_ot'", "did you mean 'mlp_out'?"]),
        ("{ attn_out = 1, mlp_out = [1] }", ["strength.mlp_out lists 1 numbers"]),
        ("{ attn_out = 1, mlp_out = { q = 1 } }", ["strength.mlp_out has the unknown key 'q'"]),
        ("{ peak = 1, max = 1, width = 2 }", ["the kernel of strength has no min"]),
        ("{ max_weight = 1 }", ["unknown key 'max_weight'", "heretic's max_weight is 'max' here"]),
        (KERNEL.replace("1.5", "0"), ["width = 0 is not above zero"]),
        (KERNEL.replace("0.5", "9"), ["is 0 in every block of the edit, 0-2"]),
    ],
)
def test_strengths_that_leave_a_site_without_one(
    tmp_path: Path, layout: Layout, strength: str, fragments: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        text = f"{BLOCKS}strength = {strength}\n"
        build(tmp_path, layout, text, {"mood": artifact(Direction({R.VECTOR: VECTOR}))})
    for fragment in fragments:
        assert fragment in message(error)
    assert error.value.exit_code == 2


def test_amounts_by_block_at_what_is_in_no_block(tmp_path: Path, layout: Layout) -> None:
    text = '[[edits]]\nkind = "ablate"\ndirection = "mood"\nat = ["embed", "mlp_out.0"]\n'
    named = {"mood": artifact(Direction({R.VECTOR: VECTOR}))}
    with pytest.raises(UsageError, match="goes by block, and embed is in none") as error:
        build(tmp_path, layout, f"{text}strength = {{ 0 = 0.5 }}\n", named)
    assert error.value.fix is not None and "{ embed = 1.0, … }" in error.value.fix
    mended = f"{text}strength = {{ embed = 1.0, mlp_out = {{ 0 = 0.5 }} }}\n"
    assert [str(edit.sites[0]) for edit in build(tmp_path, layout, mended, named)] == [
        "embed",
        "mlp_out.0",
    ]


def test_one_vector_is_counted_whatever_its_coefficients(tmp_path: Path, layout: Layout) -> None:
    """Two numbers make two edits, and still one vector arrives twice at the stream's end."""
    text = '[[edits]]\nkind = "offset"\ndirection = "mood"\nat = "resid_post.0-1"\n'
    text += "coefficient = [1.0, -2.0]\n"
    named = {"mood": artifact(Direction({R.VECTOR: VECTOR}))}
    with pytest.raises(UsageError, match="one vector is added at 2 sites of the stream"):
        build(tmp_path, layout, text, named)
    first, second = build(tmp_path, layout, f"{text}repeat = true\n", named)
    assert same(first.map, edits.offset(VECTOR))
    assert same(second.map, edits.offset(VECTOR, coefficient=-2.0))
    notes = remarks(recipe_of(tmp_path, f"{text}repeat = true\n"), named)
    assert notes == ("offset mood: coefficient 1, -2 by block",)


def test_an_update_is_one_of_the_weight_before_its_site(tmp_path: Path, layout: Layout) -> None:
    text = '[[edits]]\nkind = "update"\ndirection = "mood"\nat = "q.1"\nstrength = 0.5\n'
    left, right = random(ATTENTION, 1), random(1, ATTENTION)
    (edit,) = build(
        tmp_path, layout, text, {"mood": artifact(Direction({R.LEFT: left, R.RIGHT: right}))}
    )
    assert isinstance(edit.map, WeightUpdate)
    assert torch.equal(edit.map.left, 0.5 * left) and torch.equal(edit.map.right, right)


def test_a_sign_turns_the_direction_but_not_its_mean(tmp_path: Path, layout: Layout) -> None:
    head = HEAD.replace('"mood.npy"', '"mood.npy"\nsign = -1')
    text = '[[edits]]\nkind = "affine"\ndirection = "mood"\nat = "attn_out.1"\nalpha = 2\n'
    item = Direction({R.VECTOR: VECTOR, R.MEAN: MEAN})
    (edit,) = build(tmp_path, layout, text, {"mood": artifact(item)}, head)
    assert same(edit.map, edits.affine(-VECTOR, mean=MEAN, alpha=2.0))
    assert not same(edit.map, edits.affine(VECTOR, mean=MEAN, alpha=2.0))


def test_a_map_has_no_opposite(tmp_path: Path, layout: Layout) -> None:
    """The shift of a scale has a sign that would not be turned; an offset alone is."""
    head = HEAD.replace('"mood.npy"', '"mood.npy"\nsign = -1')
    text = EDIT.replace('"resid"', '"mlp_out.0"')
    tensors = {R.SCALE: SCALE, R.OFFSET: OFFSET}
    recipe = recipe_of(tmp_path, text.replace("ablate", "scale"), head)
    with pytest.raises(UsageError, match="has no meaning for kind = 'scale'"):
        build_edits(recipe, layout, {"mood": artifact(Direction(tensors))})
    recipe = recipe_of(tmp_path, text.replace("ablate", "offset"), head)
    (edit,) = build_edits(recipe, layout, {"mood": artifact(Direction({R.OFFSET: OFFSET}))})
    assert same(edit.map, edits.offset(-OFFSET))


def test_several_directions_are_one_subspace(tmp_path: Path, layout: Layout) -> None:
    text = EDIT.replace('"mood"', '["mood", "other"]')
    one, two = vector(seed=1), vector(seed=2)
    found = {"mood": artifact(one), "other": artifact(two, concept="other")}
    (edit,) = build(tmp_path, layout, text, found)
    rows = torch.stack([one.tensors[R.VECTOR], two.tensors[R.VECTOR]])
    assert edit.concept == "mood + other"
    assert same(edit.map, edits.ablate(rows.double()))
    found["other"] = artifact(vector(ATTENTION))
    with pytest.raises(DirectionError, match="'mood' has 24, 'other' has 32"):
        build(tmp_path, layout, text, found)
    found["other"] = artifact(one)
    with pytest.raises(DirectionError) as error:
        build(tmp_path, layout, text, found)
    assert "[[edits]] 1: the directions of a subspace are linearly dependent" in message(error)


def test_the_mean_may_be_a_direction_of_its_own(tmp_path: Path, layout: Layout) -> None:
    text = EDIT.replace("ablate", "affine") + 'mean = "other"\n'
    found = {
        "mood": artifact(Direction({R.VECTOR: VECTOR, R.MEAN: OFFSET})),
        "other": artifact(Direction({R.VECTOR: MEAN})),
    }
    (edit,) = build(tmp_path, layout, text, found)
    assert same(edit.map, edits.affine(VECTOR, mean=MEAN))
    assert not same(edit.map, edits.affine(VECTOR, mean=OFFSET))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('kind = "affine"\nmean = "other"', ""),
        ('kind = "clamp"\nlow = 0.5\nmean = "other"', ""),
        ('kind = "gate"\nmap = "ablate"\ngate = { direction = "other", above = 0.1 }', ""),
        ('kind = "ablate"', 'gate = { direction = "other", above = 0.1 }'),
    ],
)
def test_what_an_edit_reads_beside_its_direction_is_read_site_by_site(
    tmp_path: Path, layout: Layout, text: str, said: str
) -> None:
    """One vector everywhere, and a mean or a condition that each block has its own of."""
    own = [vector(seed=10 + layer, layer=layer) for layer in range(LAYERS)]
    found = {"mood": artifact(vector()), "other": artifact(*own)}
    head = HEAD.replace('"mood.npy"', f'"mood.npy"\n{said}')

    def read(named: Mapping[str, Directions], at: str) -> tuple[Edit, ...]:
        edit = f'[[edits]]\n{text}\ndirection = "mood"\nat = "{at}"\n'
        return build_edits(recipe_of(tmp_path, edit, head), layout, named)

    def act(edit: Edit, x: torch.Tensor) -> torch.Tensor:
        map_ = edit.map if edit.own is None or edit.own.map is None else edit.own.map
        return map_(x)  # type: ignore[operator, no-any-return]

    x = random(64, HIDDEN, seed=3)
    made = read(found, "mlp_out.*")
    assert [edit.sites for edit in made] == [(parse_site(f"mlp_out.{n}"),) for n in range(LAYERS)]
    outputs = [act(edit, x) for edit in made]
    for layer, item in enumerate(own):
        (alone,) = read(found | {"other": artifact(item)}, f"mlp_out.{layer}")
        assert torch.equal(outputs[layer], act(alone, x))
    assert not torch.equal(outputs[0], outputs[1])
    # A mean, or a condition, of a stack for another model is refused as a direction is.
    stack = Directions("other", "npy", "o", "sha256:0", tuple(own), {"bake.rows": str(LAYERS + 1)})
    with pytest.raises(DirectionError, match=f"has rows for {LAYERS + 1} blocks"):
        read(found | {"other": stack}, "mlp_out.*")


def test_means_that_are_not_there_or_disagree(tmp_path: Path, layout: Layout) -> None:
    text = EDIT.replace("ablate", "affine") + "mean = true\n"
    with pytest.raises(DirectionError, match="mean = true, but 'mood' holds no mean"):
        build(tmp_path, layout, text, {"mood": artifact(vector())})
    joint = EDIT.replace("ablate", "affine").replace('"mood"', '["mood", "other"]')
    found = {
        "mood": artifact(Direction({R.VECTOR: VECTOR, R.MEAN: MEAN})),
        "other": artifact(Direction({R.VECTOR: OFFSET, R.MEAN: SCALE})),
    }
    with pytest.raises(DirectionError, match="the means of 'mood' and 'other' differ"):
        build(tmp_path, layout, joint, found)
    found["other"] = artifact(Direction({R.VECTOR: OFFSET, R.MEAN: MEAN}))
    (edit,) = build(tmp_path, layout, joint, found)
    assert same(edit.map, edits.affine(torch.stack([VECTOR, OFFSET]), mean=MEAN))


@pytest.mark.parametrize(
    ("kind", "tensors", "fragments"),
    [
        (
            "ablate",
            {R.LEFT: LEFT, R.RIGHT: RIGHT},
            ["kind = 'ablate' needs vector or subspace", "'mood' holds left, right", "erase"],
        ),
        ("erase", {R.VECTOR: VECTOR}, ["needs left,", "holds vector", "ablate, affine, offset"]),
        ("linear", {R.SCALE: SCALE}, ["needs matrix", "is for scale"]),
        ("rotate", {R.MATRIX: MATRIX}, ["not orthogonal", 'kind = "linear"']),
        ("offset", {R.SUBSPACE: SUBSPACE}, ["needs vector or offset"]),
        # A part of a map is another map.
        (
            "offset",
            {R.SCALE: SCALE, R.OFFSET: OFFSET},
            ["would leave out the scale of direction 'mood'", "write kind = 'scale'"],
        ),
        (
            "linear",
            {R.LEFT: LEFT, R.RIGHT: RIGHT, R.MEAN: MEAN},
            ["would leave out the mean", "write kind = 'erase' or 'clamp'"],
        ),
        (
            "erase",
            {R.LEFT: LEFT, R.RIGHT: RIGHT, R.BIAS: OFFSET},
            ["would leave out the bias", "write kind = 'linear'"],
        ),
        (
            "rotate",
            {R.MATRIX: MATRIX, R.OFFSET: OFFSET},
            ["would leave out the offset", "write kind = 'linear'"],
        ),
        (
            "scale",
            {R.SCALE: SCALE, R.OFFSET: OFFSET, R.BIAS: OFFSET},
            ["holds an offset and a bias", "save their sum"],
        ),
    ],
)
def test_artifacts_that_a_kind_cannot_use(
    tmp_path: Path,
    layout: Layout,
    kind: str,
    tensors: Mapping[Role, torch.Tensor],
    fragments: list[str],
) -> None:
    with pytest.raises(DirectionError) as error:
        build(
            tmp_path,
            layout,
            EDIT.replace("ablate", kind),
            {"mood": artifact(Direction(tensors))},
        )
    for fragment in fragments:
        assert fragment in message(error)


@pytest.mark.parametrize(
    ("keys", "names", "fragment"),
    [
        ("degrees = 9", '"mood"', "turns in the plane of two vectors, not 1"),
        ("", '["mood", "other"]', "needs degrees or angle"),
        ("", '"plane"', "needs degrees or angle"),
        ("angle = 9", '"mood"', "turns in the plane of two vectors, not 1"),
        ("reflect = true", '["mood", "other"]', "reflect mirrors along one vector, not 2"),
    ],
)
def test_rotations_that_are_not_determined(
    tmp_path: Path, layout: Layout, keys: str, names: str, fragment: str
) -> None:
    text = f'[[edits]]\nkind = "rotate"\ndirection = {names}\nat = "attn_out.1"\n{keys}\n'
    found = {"mood": artifact(vector()), "other": artifact(vector(seed=2))}
    if names == '"plane"':
        text = text.replace("plane", "mood")
        found = {"mood": artifact(Direction({R.SUBSPACE: random(2, HIDDEN)}))}
    with pytest.raises(BakeError, match=fragment):
        build(tmp_path, layout, text, found)


def test_the_order_of_edits_is_the_recipes(tmp_path: Path, layout: Layout) -> None:
    text = EDIT.replace("ablate", "offset").replace("mood", "other") + "repeat = true\n" + EDIT
    found = {"mood": artifact(vector()), "other": artifact(vector(seed=2))}
    built = build(tmp_path, layout, text, found)
    assert [(edit.kind, edit.concept) for edit in built] == [
        (EditKind.OFFSET, "other"),
        (EditKind.ABLATE, "mood"),
    ]


# --- module paths ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "path", "site"),
    [
        ("llama", "model.embed_tokens", "embed"),
        ("llama", "model.layers.2", "resid_post.2"),
        ("llama", "model.layers.2:output", "resid_post.2"),
        ("llama", "model.layers.2:input", "resid_pre.2"),
        ("llama", "model.layers.2.mlp", "mlp_out.2"),
        ("llama", "model.layers.2.mlp:output", "mlp_out.2"),
        ("llama", "model.layers.2.mlp.down_proj", "mlp_out.2"),
        ("llama", "model.layers.2.mlp.down_proj:input", "mlp_act.2"),
        ("llama", "model.layers.2.mlp.gate_proj", "mlp_gate.2"),
        ("llama", "model.layers.2.self_attn", "attn_out.2"),
        ("llama", "model.layers.2.self_attn.o_proj:input", "z.2"),
        ("llama", "model.layers.2.self_attn.q_proj", "q.2"),
        ("llama", "model.layers.2.input_layernorm", "ln1_out.2"),
        ("llama", "model.layers.2.post_attention_layernorm", "ln2_out.2"),
        ("llama", "model.norm", "ln_final_out"),
        ("gemma2", "model.layers.0.post_attention_layernorm", "ln1_post_out.0"),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm", "ln2_out.0"),
        ("gpt2", "transformer.h.1.mlp.c_proj:input", "mlp_act.1"),
        ("gpt2", "transformer.h.1.attn", "attn_out.1"),
        ("mixtral", "model.layers.0.mlp", "mlp_out.0"),
    ],
)
def test_module_paths_are_sites(
    tiny_checkpoint: Callable[..., Path], family: str, path: str, site: str
) -> None:
    known = aliases(layout_of(tiny_checkpoint(family)))
    assert known[path] == parse_site(site)


def test_every_alias_is_a_site_of_its_model_and_what_is_no_site_is_no_alias(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    for family in ("llama", "gpt2", "mixtral", "gemma2", "olmo2"):
        layout = layout_of(tiny_checkpoint(family))
        for path, site in aliases(layout).items():
            assert layout.width(site) > 0, path
    gpt2 = aliases(layout_of(tiny_checkpoint("gpt2")))
    assert "transformer.h.1.attn.c_attn" not in gpt2  # q, k and v in one
    mixtral = aliases(layout_of(tiny_checkpoint("mixtral")))
    assert not any("experts" in path for path in mixtral)


def test_the_alias_of_a_live_module_is_what_that_module_computes(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """Every path is a module of the loaded model, and its activation has the site's width."""
    import tiny

    for family in ("llama", "gpt2", "gpt_neox", "gemma2", "olmo2", "mixtral", "phi3"):
        path = tiny_checkpoint(family)
        layout, model = layout_of(path), tiny.load(path)
        known = aliases(layout)
        widths: dict[str, int] = {}

        def capture(name: str, widths: dict[str, int] = widths) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                widths[f"{name}:output"] = first.shape[-1]
                inputs = [*args, *kwargs.values()]
                if inputs and isinstance(inputs[0], torch.Tensor):
                    widths[f"{name}:input"] = inputs[0].shape[-1]

            return hook

        for name in {path.partition(":")[0] for path in known}:
            model.get_submodule(name).register_forward_hook(capture(name), with_kwargs=True)
        with torch.no_grad():
            model(tiny.tokens())
        for alias, site in known.items():
            if ":" in alias:
                assert widths[alias] == layout.width(site), (family, alias)


def test_a_star_in_a_module_path_is_every_layer(tmp_path: Path, layout: Layout) -> None:
    text = EDIT.replace('"resid"', '"model.layers.*.mlp"')
    (edit,) = build(tmp_path, layout, text, {"mood": artifact(vector())})
    assert [str(site) for site in edit.sites] == ["mlp_out.0", "mlp_out.1", "mlp_out.2"]


def test_a_joint_subspace_has_one_width(tmp_path: Path, layout: Layout) -> None:
    text = EDIT.replace('"mood"', '["mood", "other"]')
    found = {"mood": artifact(vector()), "other": artifact(vector(8, seed=2))}
    with pytest.raises(DirectionError) as error:
        build(tmp_path, layout, text, found)
    assert "the widths of a joint subspace differ: 'mood' has 24, 'other' has 8" in message(error)
    build(tmp_path, layout, text, found | {"other": artifact(vector(seed=2))})


def eraser(site: str, path: str) -> Directions:
    left = torch.zeros(HIDDEN, 1, dtype=torch.float64)
    left[0] = 1
    item = Direction({Role.LEFT: left, Role.RIGHT: left.T}, parse_site(site).layer, site)
    return Directions("mood", "leace", "v.pt", "sha256:0", (item,), {f"bake.module.{site}": path})


ERASE = '[[edits]]\nkind = "erase"\ndirection = "mood"\n'


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_module_is_held_against_the_model(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], prefix: str
) -> None:
    """Llama and Gemma 2 mean different norms by post_attention_layernorm."""
    path = f"{prefix}layers.1.post_attention_layernorm"
    found = {"mood": eraser("ln2_out.1", path)}
    llama, gemma = (layout_of(tiny_checkpoint(family)) for family in ("llama", "gemma2"))
    (edit,) = build(tmp_path, llama, ERASE, found)
    assert edit.sites == (parse_site("ln2_out.1"),)
    with pytest.raises(DirectionError, match=r"and in this model is ln1_post_out\.1") as error:
        build(tmp_path, gemma, ERASE, found)
    assert f"was fitted at {path}, which was read as ln2_out.1" in message(error)
    assert error.value.fix == 'name the sites: at = "ln1_post_out.1"'
    (edit,) = build(tmp_path, gemma, ERASE + 'at = "ln1_post_out.1"\n', found)
    assert edit.sites == (parse_site("ln1_post_out.1"),)
    # A recipe that picks the item says which it is, and not where it acts.
    for pin in ("layer = 1", 'site = "ln2_out.1"'):
        head = HEAD.replace('"mood.npy"', f'"mood.npy"\n{pin}')
        with pytest.raises(DirectionError, match=r"and in this model is ln1_post_out\.1"):
            build_edits(recipe_of(tmp_path, ERASE, head), gemma, found)
        text = ERASE + 'at = "ln2_out.1"\n'
        (edit,) = build_edits(recipe_of(tmp_path, text, head), gemma, found)
        assert edit.sites == (parse_site("ln2_out.1"),)


# --- the documentation -------------------------------------------------------------------------

DOCS = Path(__file__).parent.parent / "docs"


def test_the_recipe_of_the_documentation_is_one(tmp_path: Path) -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    path = tmp_path / "recipe.toml"
    path.write_text(text.partition("```toml\n")[2].partition("```")[0], encoding="utf-8")
    load_recipe(path)
    tables = recipe_schema()["$defs"].values()
    keys = {key for table in tables for key in table.get("properties", ())}
    assert {"title", "model", "file", "kind", "degrees", "target"} <= keys
    for key in keys:
        named = (f"`{key}`", f"`[{key}]`", f"`[[{key}]]`", f"`[{key}.NAME]`")
        assert any(name in text for name in named), key
    rows = re.findall(r"^\| `([\w-]+)`[^|]*\|.*\| ([^|]*) \|$", text, re.MULTILINE)
    for kind in EditKind:
        own = {key for key, kinds in KINDS_OF_KEY.items() if kind in kinds}
        documented = {
            word for name, cell in rows if name == kind for word in re.findall(r"`(\w+)`", cell)
        }
        assert documented == own, kind
    for site in SiteKind:
        assert f"`{site}`" in text, site
    for word in (*CARRIERS, *ALLOWANCES, *RUNTIMES):
        assert f"`{word}`" in text, word


def test_the_documentation_has_every_key_of_a_family_table() -> None:
    from bake.families import table

    text = (DOCS / "families.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(table).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, table.Table)]
    none = {"within", *(kind.named for kind in kinds)}  # fields that no file says
    keys = {f.encode_name for kind in kinds for f in structs.fields(kind) if f.name not in none}
    assert {"architectures", "gain_offset", "fuse", "explicit"} <= keys
    for key in keys:
        named = (f"`{key}`", f"`[{key}]`", f"`[[{key}]]`", f"`[{key}.")
        assert any(name in text for name in named), key


def test_types_of_a_gguf(tmp_path: Path) -> None:
    """One word for all, or one for each kind of tensor; what is not named is chosen."""
    assert recipe_of(tmp_path, EDIT).export.gguf_type == "auto"
    assert recipe_of(tmp_path, EDIT).export.rounding is None
    for text, meant in (
        ('"q8_0"', dict.fromkeys(PARTS, "Q8_0")),
        ('"keep"', dict.fromkeys(PARTS, "keep")),
        ('{ embed = "F16" }', {**dict.fromkeys(PARTS, "auto"), "embed": "F16"}),
    ):
        export = recipe_of(tmp_path, EDIT + f"[export]\ngguf_type = {text}\n").export
        assert export.gguf_type == meant
    for text, told in (
        ('gguf_type = "Q9"', "there is no GGUF tensor type 'Q9'"),
        ('gguf_type = { embeds = "Q8_0" }', "did you mean 'embed'"),
        ("gguf_type = 8", "is no text or table of texts"),
        ('rounding = "up"', "rounding = 'up'"),
    ):
        with pytest.raises(UsageError) as error:
            recipe_of(tmp_path, EDIT + f"[export]\n{text}\n")
        assert told in str(error.value)


def test_types_of_a_gguf_on_the_command_line() -> None:
    assert storage_words((), "--gguf-type") is None
    assert storage_words(("Q8_0",), "--gguf-type") == "Q8_0"
    pairs = ("embed=Q8_0", "writers=keep")
    assert storage_words(pairs, "--gguf-type") == {"embed": "Q8_0", "writers": "keep"}
    with pytest.raises(UsageError, match="names a type for all and others beside it"):
        storage_words(("Q8_0", "embed=F16"), "--gguf-type")
