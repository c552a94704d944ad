"""Sixty plausible mistakes: each is one clear error with the right fix and the right exit code."""

# ruff: noqa: E501 (a mistake a line)

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import data_of, run

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
RECIPE = """\
[base]
model = "model"
[directions.mood]
file = "mood.npy"
[[edits]]
kind = "ablate"
direction = "mood"
at = "resid"
"""
MOST_LINES = 12


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a vector, a recipe, a bake, and what people put beside them."""
    room = tmp_path_factory.mktemp("room")
    shutil.copytree(QUICKSTART / "model", room / "model")
    rng = np.random.default_rng(0)
    np.save(room / "mood.npy", rng.standard_normal(128))
    np.save(room / "zero.npy", np.zeros(128))
    np.save(room / "nan.npy", np.full(128, np.nan))
    np.save(room / "narrow.npy", np.ones(64))
    np.save(room / "wide.npy", np.ones(4096))
    np.save(room / "whole.npy", np.arange(128))
    (room / "vector.pkl").write_bytes(pickle.dumps(np.ones(128)))
    (room / "vector.txt").write_text("1 2 3", encoding="utf-8")
    (room / "empty.pt").write_bytes(b"")
    (room / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    (room / "happy.txt").write_text("One day\nA boy\n", encoding="utf-8")
    (room / "none.txt").write_text("", encoding="utf-8")
    data_of("export", room / "recipe.toml", "--out", room / "out")
    data_of(
        "export",
        room / "recipe.toml",
        "--to",
        "gguf-lora",
        "--set",
        'edits.0.at="attn_out.*"',
        "--out",
        room / "gguf-lora",
    )
    shutil.copytree(room / "model", room / "other")
    config = room / "other" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "rms_norm_eps": 2e-6}), encoding="utf-8")
    return room


RECIPES = {
    # what is changed in the recipe: exit code, what is said, the fix
    "a vector of heads in the stream": (("mood.npy", "narrow.npy"), 4, "width 64 but", "use a direction that was fitted on this model"),
    "a vector of another model": (("mood.npy", "wide.npy"), 4, "width 4096 but", "no site of this model has width 4096"),
    "a vector of zeros": (("mood.npy", "zero.npy"), 4, "the vector of the direction is zero", "fit it again"),
    "a vector that is not finite": (("mood.npy", "nan.npy"), 4, "not finite", "fit it again"),
    "whole numbers": (("mood.npy", "whole.npy"), 4, "<i8 values", "save it as float16, float32 or float64"),
    "a pickle": (("mood.npy", "vector.pkl"), 4, "a bare Python pickle", "numpy.save or safetensors"),
    "a text file": (("mood.npy", "vector.txt"), 4, "extension '.txt'", ".npy, .pt or .safetensors"),
    "an empty file": (("mood.npy", "empty.pt"), 4, "empty.pt", ""),
    "a vector misspelt": (("mood.npy", "mod.npy"), 4, "no such file", "did you mean {}/mood.npy?"),
    "a model misspelt": (('"model"', '"./modle"'), 4, "does not exist", "did you mean {}/model?"),
    "a file for a model": (('"model"', '"./mood.npy"'), 4, "is a file; a checkpoint is a folder", ""),
    "a table for a list": (("[[edits]]", "[edits]"), 2, "is no list", "write [[edits]]"),
    "a list for a table": (("[base]", "[[base]]"), 2, "is no table", "write [base]"),
    "a text for a list, allow": (("", '[export]\nallow = "approximate"'), 2, "is no list", 'write allow = ["approximate"]'),
    "a text for a list, to": (("", '[export]\nto = "lora"'), 2, "is no list", 'write to = ["lora"]'),
    "a number in quotes": (("", 'strength = "0.5"'), 2, "is no number", "write strength = 0.5, without quotes"),
    "YAML": ((RECIPE, "base:\n  model: model\n"), 2, "is YAML", "[base]"),
    "YAML with a comment": ((RECIPE, "# mine\n---\nmodels:\n"), 2, "is YAML", "[[edits]]"),
    "an open quote": (('"model"', '"model'), 2, "is not valid TOML", ""),
    "a table misspelt": (("[directions.mood]", "[direction.mood]"), 2, "unknown key 'direction'", "did you mean 'directions'?"),
    "a key misspelt": (("", "strenght = 1.0"), 2, "unknown key 'strenght'", "did you mean 'strength'?"),
    "a kind misspelt": (('"ablate"', '"ablat"'), 2, "unknown kind 'ablat'", "did you mean 'ablate'?"),
    "a direction misspelt": (('direction = "mood"', 'direction = "mod"'), 2, "there is no direction 'mod'", "did you mean 'mood'?"),
    "a site misspelt": (('"resid"', '"resid_psot.2"'), 2, "unknown site", "did you mean 'resid_post'?"),
    "a layer too many": (('"resid"', '"resid_post.6"'), 2, "the model has 6 blocks", "blocks count from 0 to 5"),
    "a number for a site": (('"resid"', "2"), 2, "at = 2 is no text", ""),
    "no site": (('at = "resid"', ""), 2, "at", ""),
    "no base": (('[base]\nmodel = "model"', ""), 2, "the key 'base' is missing", "add it"),
    "no model": (('model = "model"', ""), 2, "the key 'model' is missing", "add it"),
    "no edit": ((RECIPE[RECIPE.index("[[edits]]"):], ""), 2, "edits", "add"),
    "another kind's key": (("", "alpha = 1.0"), 2, "'alpha' is no key of kind = 'ablate'", "ablate takes strength"),
    "one site of a stream": (('"resid"', '"resid_post.2"'), 3, "cannot ablate 'mood' at resid_post.2", 'at = "resid"'),
    "half an ablation": (("", "strength = 0.5"), 3, "cannot ablate", ""),
    "no such carrier": (("", '[export]\nto = ["ggml"]'), 2, "to holds 'ggml'", "gguf"),
    "no such allowance": (("", '[export]\nallow = ["aproximate"]'), 2, "allow holds", "did you mean 'approximate'?"),
    "no such runtime": (("", '[export]\ntarget = ["vlm"]'), 2, "target holds 'vlm'", "did you mean 'vllm'?"),
    "a runtime of other files": (("", '[export]\nto = ["lora"]\ntarget = ["llama.cpp"]'), 2, "reads no lora", "leave llama.cpp out"),
    "nothing to fit an approximation on": (('"resid"', '"resid_post.2"\n[export]\nallow = ["approximate"]'), 2, "there are no texts to fit it on", "[calibrate]"),
}  # fmt: skip

COMMANDS = {
    # the arguments: exit code, what is said, the fix
    "no such command": (("exprot",), 2, "there is no command 'exprot'", "did you mean 'export'?"),
    "no recipe": (("plan",), 2, "Missing argument", "plan --help"),
    "no such option": (("plan", "recipe.toml", "--modle", "x"), 2, "No such option '--modle'", "did you mean '--model'?"),
    "no --out": (("export", "recipe.toml"), 2, "Missing option '--out'", "export --help"),
    "a recipe misspelt": (("plan", "recpie.toml"), 4, "cannot be read", "did you mean recipe.toml?"),
    "a vector for a recipe": (("plan", "mood.npy"), 4, "is no UTF-8 text", "bake init MODEL DIRECTION"),
    "a model for a recipe": (("plan", "model"), 4, "it is a checkpoint", "bake init"),
    "a setting without a value": (("plan", "recipe.toml", "--set", "title"), 2, "is no KEY=VALUE", "edits.0.strength=0.8"),
    "a setting of no edit": (("plan", "recipe.toml", "--set", "edits.1.strength=1"), 2, "no entry 1", "counted from 0"),
    "--base for a recipe": (("plan", "recipe.toml", "--base", "model"), 2, "--base is for artifacts", "--model"),
    "an output that is there": (("export", "recipe.toml", "--out", "out"), 2, "exists and is not empty", "--force"),
    "a GGUF of nothing": (("export", "recipe.toml", "--out", "o", "--to", "gguf"), 2, "gguf", "--gguf"),
    "a model to verify": (("verify", "model"), 4, "it is a checkpoint", "bake export"),
    "an artifact misspelt": (("verify", "nothing"), 4, "no such folder", "name what `bake export` wrote"),
    "an artifact nearly right": (("card", "outt"), 4, "is no folder", "did you mean out?"),
    "no such server": (("verify", "out", "--runtime", "vlm"), 2, "'vlm' is not one of", "verify --help"),
    "an adapter that PEFT does not read": (("verify", "gguf-lora"), 2, "a gguf-lora is verified in a runtime", "--runtime: llama.cpp"),
    "prompts misspelt": (("verify", "out", "--prompts", "hapy.txt"), 4, "cannot be read", "did you mean happy.txt?"),
    "prompts of nothing": (("verify", "out", "--prompts", "none.txt"), 4, "holds no prompts", "write one a line"),
    "another base": (("verify", "out", "--base", "other"), 4, "is not the base", ""),
    "another base to compare": (("diff", "other", "out"), 1, "is not the base that out was made from", "bake diff out"),
    "one model to compare": (("diff", "model"), 2, "does not say what it was made from", "bake diff BASE OUT"),
    "three models to compare": (("diff", "model", "out", "out"), 2, "3 models are named", "BASE OUT"),
    "a plot of no form": (("diff", "out", "--plot", "a.jpg"), 2, "a.jpg", ".png or .svg"),
    "a vector of no shape": (("directions", "mood.npy", "--shape", "wide"), 2, "there is no shape 'wide'", "vector"),
    "a reader of nobody": (("directions", "mood.npy", "--reader", "numpy"), 2, "there is no reader 'numpy'", "npy"),
    "a folder of something else": (("directions", "model"), 4, "a folder without the files of a known system", "reader"),
    "a family of nothing": (("families", "modle"), 4, "neither a folder here nor a Hub id", "did you mean model?"),
    "a table of nothing": (("families", "model", "--family", "own.toml"), 4, "cannot be read", ""),
    "a repository without an owner": (("push", "out", "mood"), 2, "'mood' is no repository", "owner/name"),
    "a push of nothing": (("push", "nothing", "me/mood"), 4, "is no folder", "name what `bake export` wrote"),
    "a push before it is verified": (("push", "out", "me/mood"), 4, "verif", ""),
    "a revert of a model": (("revert", "model", "--out", "x"), 4, "", "bake export"),
    "a merge of nothing": (("merge", "adapter", "model", "--out", "x"), 4, "neither a folder here nor a Hub id", "owner/name"),
    "classes that are one": (("fit", "model", "--positive", "happy.txt", "--negative", "happy.txt", "--concept", "mood", "--out", "m.safetensors"), 2, "the same prompts", "--positive names"),
    "a fit of no file": (("fit", "model", "--positive", "happy.txt", "--negative", "sda.txt", "--concept", "mood", "--out", "m.safetensors"), 4, "cannot be read", "a file of prompts"),
    "a fit to another form": (("fit", "model", "--positive", "happy.txt", "--negative", "none.txt", "--concept", "mood", "--out", "m.pt"), 2, "--out names m.pt", ".safetensors"),
    "a concept of two words": (("fit", "model", "--positive", "happy.txt", "--negative", "none.txt", "--concept", "my mood", "--out", "m.safetensors"), 2, "is no word", "letters"),
    "a recipe that is there": (("init", "model", "mood.npy"), 2, "recipe.toml exists already", "--force"),
    "a trial without a prompt": (("try", "recipe.toml"), 2, "there is no prompt", "bake try RECIPE"),
    "both loud and quiet": (("plan", "recipe.toml", "-q", "-v"), 2, "exclude each other", ""),
}  # fmt: skip


def check(args: tuple[object, ...], code: int, said: str, fix: str, place: Path) -> None:
    result = run(*args, columns=200)
    told = re.sub(r"\s+", " ", result.stderr)
    assert result.exit_code == code, told
    assert result.stdout == "", "an error does not come after something else"
    assert told.startswith("error: ") and said in told, told
    assert fix.format(place) in told, told
    assert len(result.stderr.splitlines()) <= MOST_LINES, result.stderr
    assert "Traceback" not in told


@pytest.mark.parametrize("name", RECIPES)
def test_a_mistake_in_a_recipe(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (old, new), code, said, fix = RECIPES[name]
    assert old in RECIPE
    monkeypatch.chdir(room)
    text = RECIPE.replace(old, new) if old else f"{RECIPE}{new}\n"
    path = room / "mistake.toml"
    path.write_text(text, encoding="utf-8")
    check(("plan", path), code, said, fix, room)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_on_the_command_line(
    room: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    args, code, said, fix = COMMANDS[name]
    monkeypatch.chdir(room)
    before = sorted(path.name for path in room.iterdir())
    check(args, code, said, fix, room)
    assert sorted(path.name for path in room.iterdir()) == before


def test_there_are_sixty_and_what_they_are_made_of_works(room: Path) -> None:
    assert len(RECIPES) + len(COMMANDS) >= 60
    assert run("plan", room / "recipe.toml").exit_code == 0


def test_what_is_not_near_is_not_guessed(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bake.nearby import nearby

    monkeypatch.chdir(room)
    assert nearby(Path("happy.tx"), "no") == "did you mean happy.txt?"
    assert nearby(Path("modle/config.json"), "no") == "did you mean model?"
    assert nearby(Path("something else"), "no") == "no"
