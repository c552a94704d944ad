"""Jobs in Python: a request of edits is the request of the recipe that asks for the same."""

import re
from pathlib import Path

import pytest
from torch import Tensor

from bake.directions import Role, read_directions
from bake.edits import EditKind, ablate
from bake.errors import InexactPlan, UsageError
from bake.jobs import compile_request, export, open_model, plan_edits

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart"
MOOD = read_directions(QUICKSTART / "mood.safetensors").at_layer(2).tensors[Role.VECTOR]
RECIPE = f"""
base = {{ model = "{QUICKSTART / "model"}" }}
directions = {{ mood = {{ file = "{QUICKSTART / "mood.safetensors"}", layer = 2 }} }}
edits = [{{ kind = "ablate", direction = "mood", at = "resid" }}]
"""


@pytest.mark.parametrize(("vector", "same"), [(MOOD, True), (MOOD + 1, False)])
def test_edits_in_python_make_the_plan_of_the_recipe(
    vector: Tensor, same: bool, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    asked = compile_request(tmp_path / "recipe.toml")
    model = open_model(QUICKSTART / "model")
    made = plan_edits(model, [model.edit(EditKind.ABLATE, "mood", ablate(vector))])
    assert (made.plan.digest == asked.plan.digest) is same
    recipe = asked.provenance().recipe
    assert recipe is not None and recipe.text == RECIPE
    assert made.provenance().recipe is None


def test_the_example_of_the_recipes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"## In Python\n\n```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("path/to/model", str(QUICKSTART / "model")))
    assert (tmp_path / "out" / "bake.json").is_file()


def test_what_cannot_be_done_is_said_as_a_command_says_it(tmp_path: Path) -> None:
    model = open_model(QUICKSTART / "model")
    with pytest.raises(UsageError, match="99"):
        model.edit(EditKind.ABLATE, "mood", ablate(MOOD), at=["resid_post.99"])
    once = plan_edits(model, [model.edit(EditKind.ABLATE, "mood", ablate(MOOD), ["resid_post.1"])])
    with pytest.raises(InexactPlan):
        export(once, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "allow", "wider"),
    [
        (("lora",), ("relocate", "widen"), False),
        (("checkpoint", "lora"), ("relocate", "widen"), False),
        (("gguf-lora",), ("widen", "relocate"), False),
        (("checkpoint",), ("relocate", "widen"), True),
    ],
)
def test_a_plan_is_made_for_the_carriers_that_are_asked_for(
    to: tuple[str, ...], allow: tuple[str, ...], wider: bool
) -> None:
    model = open_model(QUICKSTART / "model")
    once = [model.edit(EditKind.ABLATE, "mood", ablate(MOOD), ["resid_post.1"])]
    asked = plan_edits(model, once, to=to, allow=allow)
    assert asked.plan.widened is wider and asked.refusal() is None
    # What the record keeps of the request makes the plan again, for each carrier alone.
    kept = asked.provenance().allow
    assert set(kept) == (set(allow) if wider else {"relocate"})
    for carrier in to:
        again = plan_edits(model, once, to=(carrier,), allow=kept)
        assert again.plan.digest == asked.plan.digest
    if not wider:
        (note,) = (note for note in asked.plan.notes if "could not hold" in note)
        assert "widen" in note and to[-1] in note


def test_what_an_adapter_cannot_hold_is_refused_where_nothing_else_is_allowed() -> None:
    model = open_model(QUICKSTART / "model")
    once = [model.edit(EditKind.ABLATE, "mood", ablate(MOOD), ["resid_post.1"])]
    asked = plan_edits(model, once, to=("lora",), allow=("widen",))
    refusal = asked.refusal()
    assert refusal is not None and "hidden_size" in str(refusal.why)
    # A stand-in is one that an adapter holds.
    fit = plan_edits(model, once, to=("lora",), allow=("widen", "approximate"))
    assert not fit.plan.widened and set(fit.provenance().allow) == {"approximate"}
