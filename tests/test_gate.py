"""What an edit costs elsewhere: on which text, within which limits, and what a push makes of it."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from commands import RecipeFolder, data_of, error_of, recipe_text, run, write_recipe
from words import WORDS, write_letters, write_tokenizer

from bake.artifact.record import read_record
from bake.artifact.schema import Bounds, GivenText, Limits
from bake.artifact.verification import HELD, MISSED, NOT_MEASURED, NOT_SHOWN, ungated
from bake.cards.card import render_card
from bake.errors import InputError, UsageError
from bake.publish.preflight import Terms, preflight
from bake.recipe import limits_beside, limits_differ, parse_recipe
from bake.verify import text as text_module
from bake.verify.gate import Check, bounded, gate_failure, gate_json
from bake.verify.interval import Interval, clustered, difference, mean, share
from bake.verify.perplexity import perplexity, perplexity_ratio
from bake.verify.refusals import refuses
from bake.verify.tasks import run_tasks

PASSAGES = "\n".join(
    " ".join(WORDS[(7 * line + 3 * step + step * step) % len(WORDS)] for step in range(12))
    for line in range(12)
)
REFUSED = "what is bread\nthe cat sees a tree\nwe eats bread and sleeps\nyes\n"


# --- intervals, by hand ------------------------------------------------------------------------


def test_shares_have_wilsons_interval() -> None:
    none, half = share([False] * 10), share([True, False] * 5)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(0.2775, abs=1e-4)  # Brown, Cai and DasGupta 2001, Wilson
    assert (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_perplexity_by_hand() -> None:
    """Even odds over four tokens are a perplexity of 4."""
    found = perplexity(((math.log(4), math.log(4)), (math.log(4),)))
    assert (found.value, found.low, found.high, found.count) == pytest.approx((4, 4, 4, 3))
    # Certain of the right token at one place, even odds at the other.
    found = perplexity(((0.0, math.log(4)),))
    assert found.value == pytest.approx(2.0) and found.low < found.value < found.high


def test_a_passage_is_one_observation() -> None:
    """Tokens of a passage are wrong together, so repeating each adds nothing to what is known."""
    base = tuple((0.0,) for _ in range(4))
    apart = tuple((x,) for x in (0.1, 0.2, 0.3, 0.4))
    once = perplexity_ratio(apart, base)
    assert math.log(once.value) == pytest.approx(0.25)
    spread = math.sqrt(sum((x - 0.25) ** 2 for x in (0.1, 0.2, 0.3, 0.4)) * 4 / 3) / 4
    assert math.log(once.high) - 0.25 == pytest.approx(1.959964 * spread)
    repeated = clustered([row * 50 for row in apart])
    assert repeated.high == pytest.approx(math.log(once.high))
    # Control: counted token by token the interval would be seven times narrower.
    naive = mean([x for row in apart for x in row * 50])
    assert naive.high - naive.value < (repeated.high - repeated.value) / 7


def test_two_models_that_agree_on_a_few_texts_are_not_equal() -> None:
    """Agresti and Min: ten pairs without a difference leave a sixth of a chance open."""
    same = difference([1.0] * 10, [1.0] * 10, unit=True)
    assert same.value == 0.0
    assert same.high == pytest.approx(1.959964 / 12) == pytest.approx(-same.low)
    assert difference([1.0] * 1000, [1.0] * 1000, unit=True).high < 0.002
    # Control: without the two texts more, ten pairs would prove it.
    assert difference([1.0] * 10, [1.0] * 10, unit=False).high == 0.0
    # 12 against 2 of 100 pairs differ: (12.5 − 2.5) / 102, by hand.
    first, second = [1.0] * 12 + [0.0] * 2 + [1.0] * 86, [0.0] * 12 + [1.0] * 2 + [1.0] * 86
    found = difference(first, second, unit=True)
    half = 1.959964 * math.sqrt(15 - 100 / 102) / 102
    assert (found.low, found.high) == pytest.approx((10 / 102 - half, 10 / 102 + half))


# --- verdicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "most", "least"),
    [
        (0.1, 0.2, HELD, MISSED),
        (0.1, 0.5, HELD, NOT_SHOWN),
        (0.4, 0.6, NOT_SHOWN, NOT_SHOWN),
        (0.5, 0.6, NOT_SHOWN, HELD),
        (0.6, 0.7, MISSED, HELD),
    ],
)
def test_the_unfavourable_end_decides(low: float, high: float, most: str, least: str) -> None:
    interval = Interval((low + high) / 2, low, high, 10)
    assert Check("k", "n", interval, 0.5, "at most").verdict == most
    assert Check("k", "n", interval, 0.5, "at least").verdict == least


def test_bounds_hold_the_baked_model_by_itself_and_against_its_base() -> None:
    base, baked = [1.0] * 200, [1.0] * 100 + [0.0] * 100
    values = {"base": base, "baked": baked}

    def verdicts(**bounds: float) -> list[str]:
        checks = bounded("scores s", "s", Bounds(**bounds), values, unit=True)
        assert [check.key for check in checks] == [f"scores s {name}" for name in bounds]
        return [check.verdict for check in checks]

    assert verdicts(least=0.4, most=0.6) == [HELD, HELD]
    assert verdicts(least=0.6, most=0.4) == [MISSED, MISSED]
    assert verdicts(drop=0.6, rise=0.01) == [HELD, HELD]
    assert verdicts(drop=0.4) == [MISSED] and verdicts(drop=0.5) == [NOT_SHOWN]


def test_a_failed_gate_says_the_worst_of_it() -> None:
    held = Check("a", "first", Interval(1.0, 0.9, 1.1, 9), 2.0, "at most")
    open_ = Check("b", "second", Interval(2.0, 1.9, 2.1, 9), 2.0, "at most")
    missed = Check("c", "third", Interval(3.0, 2.9, 3.1, 9), 2.0, "at most")
    assert gate_failure(gate_json([held]), "out") is None and gate_failure({}, "out") is None
    error = gate_failure(gate_json([held, open_]), "out")
    assert error is not None and error.exit_code == 1
    assert "second: 2 (1.9 to 2.1), at most 2, not shown" in str(error)
    assert "name a longer text or more prompts" in str(error)
    error = gate_failure(gate_json([held, open_, missed]), "out")
    assert error is not None and "third" in error.what and "more elsewhere" in str(error)


def test_refusals_are_told_by_their_first_words() -> None:
    for answer in ("I'm sorry, but no.", " “no”"[:0] + "\n I’M SORRY", '"I cannot help', "Sorry"):
        assert refuses(answer), answer
    for answer in ("Sure. I cannot wait!", "You could say I'm sorry", "", "Here is how"):
        assert not refuses(answer), answer
    assert refuses("Je ne peux pas", ("je ne peux",)) and not refuses("I'm sorry", ("je ne",))


# --- the recipe --------------------------------------------------------------------------------

WHOLE = """[verify]
text = "t.txt"
[verify.gate]
perplexity = 1.05
scores = {"contains:sorry" = {least = 0.9, drop = 0.1}}
refusals = {prompts = "r.txt", least = 0.95}
tasks = {arc_easy = {drop = 0.02}}
"""


def test_the_gate_of_a_recipe_travels_in_its_record(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    (tmp_path / "r.txt").write_text("three\n")
    recipe = parse_recipe((recipe_text("m") + WHOLE).encode(), tmp_path / "recipe.toml")
    limits = limits_beside(recipe.verify, recipe.path)
    assert limits is not None and limits.gate is not None
    assert limits.text == GivenText(file="t.txt", text="one\ntwo\n")
    assert limits.gate.keys == (
        "perplexity",
        "refusals",
        "scores contains:sorry least",
        "scores contains:sorry drop",
        "tasks arc_easy drop",
    )
    assert Limits.of(json.loads(json.dumps(limits.to_json()))) == limits
    assert limits_differ(recipe.verify, limits) is None
    # A record with a wider gate than its recipe is another one.
    content = limits.to_json()
    content["gate"]["perplexity"] = 2.0
    assert "other limits" in str(limits_differ(recipe.verify, Limits.of(content)))
    assert "other limits" in str(limits_differ(recipe.verify, None))


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("1.05", "0.05", "perplexity = 0.05 is below 1"),
        ("perplexity", "perplexty", "unknown key 'perplexty'"),
        ("least = 0.9,", "leest = 0.9,", "unknown key 'leest'"),
        ("drop = 0.02", "", "'arc_easy' has no limit"),
        ("drop = 0.02", "drop = 0", "drop = 0.0 is not above zero"),
        ("drop = 0.02", "drop = -1", "drop = -1.0 is not above zero"),
        ("{drop = 0.02}", "0.02", "a table is meant"),
        ("arc_easy", '""', "name of a score or a task is empty"),
        ("least = 0.95", "least = 1", "is not between 0 and 1"),
        ("least = 0.95", "least = 0.95, phrases = ['']", "a phrase is empty"),
        ('prompts = "r.txt", ', "", "'prompts' is missing"),
        ('text = "t.txt"', "", "no text is named that it is measured on"),
        (WHOLE.partition("[verify.gate]\n")[2], "", "the gate limits nothing"),
    ],
)
def test_a_gate_that_is_none(old: str, new: str, what: str, tmp_path: Path) -> None:
    text = recipe_text("m") + WHOLE.replace(old, new)
    assert text != recipe_text("m") + WHOLE
    with pytest.raises(UsageError, match=what):
        parse_recipe(text.encode(), tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "the text cannot be read"),
        (b"\xff\xfe", "is no UTF-8 text"),
        (b" \n", "holds no text"),
        (b"x" * 1_000_001, "the limit is 1,000,000"),
    ],
)
def test_a_text_that_cannot_travel(content: bytes | None, what: str, tmp_path: Path) -> None:
    recipe = parse_recipe(
        (recipe_text("m") + '[verify]\ntext = "t.txt"\n').encode(), tmp_path / "recipe.toml"
    )
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(InputError, match=what):
        limits_beside(recipe.verify, recipe.path)


# --- measured ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of real words and a chat template."""
    folder = tmp_path_factory.mktemp("worded")
    tiny.write_checkpoint(tiny.make_model("mistral", dtype=torch.float32), folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def made(base: Path, tmp_path: Path) -> Callable[[str], RecipeFolder]:
    def make(verify: str) -> RecipeFolder:
        (tmp_path / "held-out.txt").write_text(PASSAGES)
        (tmp_path / "asked.txt").write_text(REFUSED)
        recipe = write_recipe(tmp_path, base, more=verify)
        return RecipeFolder(tmp_path, recipe, base)

    return make


def gated(bounds: str) -> str:
    return f'[verify]\ntext = "held-out.txt"\n[verify.gate]\n{bounds}\n'


def verify(out: Path, *args: object, code: int = 0) -> dict[str, Any]:
    return data_of("verify", out, "--no-plots", "--generate", "4", *args, code=code)


def test_a_gate_is_held_or_the_verification_fails(
    made: Callable[[str], RecipeFolder], tmp_path: Path
) -> None:
    folder = made(gated("perplexity = 100"))
    out = folder.export()
    found = verify(out)
    text, effects = found["text"], found["effects"]["perplexity"]
    assert text == {"source": "held-out.txt", "language": None, "passages": 12, "tokens": 156}
    (check,) = found["gate"]["checks"]
    assert found["gate"]["verdict"] == HELD == check["verdict"]
    assert check["value"] == pytest.approx(effects["baked"]["value"] / effects["base"]["value"])
    assert check["low"] < check["value"] < check["high"] and check["count"] == 144
    # The files hold what the hooks do, to float32; the edit itself moves the perplexity.
    assert effects["baked"]["value"] == pytest.approx(effects["hooked"]["value"], rel=1e-4)
    assert abs(check["value"] - 1) > 1e-3
    record = read_record(out)
    assert ungated(out, record) is None
    words = (out / "verify.md").read_text()
    assert "gate on side effects: **held**" in words
    assert "perplexity on held-out.txt (12 passages, 156 tokens)" in words
    assert found["prompts"]["form"] == "chat template"
    assert "- prompts: built-in, 16 with" in words and "(chat template)" in words
    shown = run("verify", out, "--generate", "0", "--html", "-v", columns=200).stdout
    assert "(chat template)" in shown and "gate" in shown and HELD in shown
    page = (out / "verify.html").read_text()
    assert "gate on side effects</td><td><code>held" in page and "chat template" in page

    # Control: the same numbers beyond a tighter limit. An ablation of a random model is no help.
    folder.rewrite("perplexity = 100", f"perplexity = {max(1.0, check['low'] * 0.99)}")
    tight = folder.export("tight")
    failed = verify(tight, code=1)
    assert "the gate is not held: perplexity on held-out.txt" in error_of(failed)
    assert failed["gate"]["verdict"] == "failed" and failed["passed"] is True
    assert failed["gate"]["checks"][0]["value"] == pytest.approx(check["value"])
    assert "the limit on perplexity is" in str(ungated(tight, read_record(tight)))
    assert "**FAIL**" in (tight / "verify.md").read_text()


def test_a_push_refuses_what_its_gate_does_not_let_through(
    made: Callable[[str], RecipeFolder],
) -> None:
    out = made(gated("perplexity = 100")).export()

    def problems(**terms: bool) -> list[str]:
        found = preflight(out, Terms(no_card=True, **terms)).problems
        return [str(problem) for problem in found if "gate" in str(problem)]

    assert "there is no verify.json of this plan" in problems()[0]
    verify(out, "--no-gate")
    (problem,) = problems()
    assert "the limit on perplexity is not measured" in problem and "--ungated" in problem
    assert problems(unverified=True) == [problem]  # the proof is another matter
    assert problems(ungated=True) == []
    found = preflight(out, Terms(no_card=True, ungated=True))
    assert any("is not held" in note for note in found.notes) and found.ungated is not None
    assert found.unverified is None
    assert "**Ungated.**" in render_card(out)
    verify(out)
    assert problems() == [] and "ngated" not in render_card(out)
    # A verdict that somebody wrote for another limit is none for this one.
    report = json.loads((out / "verify.json").read_text())
    report["gate"]["checks"][0]["key"] = "refusals"
    (out / "verify.json").write_text(json.dumps(report))
    assert "the limit on perplexity is not measured" in problems()[0]


def test_a_card_that_hides_an_open_gate_is_refused(made: Callable[[str], RecipeFolder]) -> None:
    out = made(gated("perplexity = 100")).export()
    verify(out, "--no-gate")
    for card, wanted in (("# A model\n", 1), ("# A model\n\nIt is ungated.\n", 0)):
        (out / "README.md").write_text(card)
        found = preflight(out, Terms(ungated=True)).problems
        assert sum("ungated" in str(problem) for problem in found) == wanted


def test_refusals_are_kept_or_not(made: Callable[[str], RecipeFolder]) -> None:
    """What the base's answers begin with stands for a refusal here: a tiny model knows none."""
    gate = "refusals = {{prompts = 'asked.txt', least = {}, phrases = [{}]}}"
    every = ", ".join(f'"{word}"' for word in WORDS)
    folder = made(gated(gate.format(0.3, every)))
    (check,) = verify(folder.export())["gate"]["checks"]
    # Both answer with words, so that all are kept; four prompts show little.
    assert (check["value"], check["bound"], check["verdict"]) == (1.0, 0.3, HELD)
    assert check["low"] == pytest.approx(share([True] * check["count"]).low)
    assert check["name"].endswith("prompts of asked.txt that the base refuses")
    folder.rewrite("least = 0.3", "least = 0.95")
    out = folder.export("more")
    assert "not shown" in error_of(verify(out, code=1))
    folder.rewrite(every, '"I cannot"')
    none = folder.export("none")
    assert "the base refuses none of the 4 prompts" in error_of(verify(none, code=4))


def test_scores_are_limited_against_the_base(made: Callable[[str], RecipeFolder]) -> None:
    folder = made(gated("scores = {'contains:e' = {most = 1, rise = 0.5}}"))
    found = verify(folder.export())
    assert set(found["effects"]) == {"perplexity", "contains:e"}
    most, rise = found["gate"]["checks"]
    values = {name: found["effects"]["contains:e"][name]["value"] for name in ("base", "baked")}
    assert most["value"] == values["baked"]
    assert rise["value"] == pytest.approx(values["baked"] - values["base"])
    assert (most["verdict"], rise["verdict"]) == (HELD, HELD)
    assert "needs generated text" in error_of(
        data_of("verify", folder.out, "--no-plots", "--generate", "0", code=2)
    )


@pytest.mark.parametrize(
    ("bounds", "args", "code", "what"),
    [
        ("perplexity = 2", ("--text", "held-out.txt"), 2, "--text names another"),
        ("scores = {'contains:' = {least = 0.1}}", (), 2, "names nothing"),
        ("refusals = {prompts = 'asked.txt', least = 0.5}", ("--stream",), 2, "in memory"),
    ],
)
def test_a_gate_that_cannot_be_measured_is_refused_first(
    bounds: str,
    args: Sequence[str],
    code: int,
    what: str,
    made: Callable[[str], RecipeFolder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = made(gated(bounds))
    out = folder.export()
    monkeypatch.chdir(folder.folder)
    monkeypatch.setattr("bake.verify.compare.collect", lambda runner: pytest.fail("measured"))
    assert what in error_of(data_of("verify", out, *args, code=code))


def test_a_short_text_and_a_lora_are_refused_first(made: Callable[[str], RecipeFolder]) -> None:
    folder = made(gated("perplexity = 2"))
    folder.rewrite('at = "resid"', 'at = "attn_out.0"')
    lora = folder.export("lora", "--to", "lora")
    served = ("verify", lora, "--runtime", "peft", "--no-plots")
    assert "is measured on checkpoints" in error_of(data_of(*served, code=2))
    found = data_of(*served, "--no-gate")
    assert found["gate"]["verdict"] == NOT_MEASURED and "runtimes alone" in found["text"]["reason"]
    bare = folder.export("bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    assert "the artifact has no tokenizer" in error_of(data_of("verify", bare, code=4))
    (folder.folder / "held-out.txt").write_text("the cat\n" * 7)
    short = folder.export("short")
    assert "holds 7 passages" in error_of(data_of("verify", short, code=4))


# --- on which text -----------------------------------------------------------------------------


def test_a_perplexity_that_means_nothing_is_not_published(
    made: Callable[[str], RecipeFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made("").export()
    found = verify(out)
    assert "perplexity" not in found["effects"]
    assert found["text"]["reason"].endswith("the tokenizer cannot write it in fr")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (out / file).unlink()
    assert verify(out, code=1)["text"] == {"reason": "the artifact has no tokenizer"}


def test_a_base_is_measured_in_the_languages_that_it_knows(
    made: Callable[[str], RecipeFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made("")
    base = folder.folder / "letters"
    shutil.copytree(folder.base, base)
    (base / "chat_template.jinja").unlink()
    write_letters(base)
    folder.rewrite(str(folder.base), str(base))
    out = folder.export()
    found = verify(out)
    assert "perplexity" not in found["effects"]
    reason = "bake's own text is for bases that need 2 bits a byte of it or fewer: "
    assert found["text"]["reason"].startswith(reason)
    assert f"no perplexity: {reason}" in (out / "verify.md").read_text()
    assert f"No perplexity was measured: {reason}" in render_card(out).replace("\\", "")
    # A base that knew the languages would be measured on them, and say so.
    monkeypatch.setattr(text_module, "BITS", math.inf)
    text = verify(out)["text"]
    assert (text["source"], text["language"]) == ("built-in", "en, de, fr")
    # The card's word comes first.
    for stated, wanted in (("de", "de"), (["en", "ja"], "en"), ("multilingual", "en, de, fr")):
        record = json.loads((out / "bake.json").read_text())
        record["base"]["card"] = {"language": stated}
        (out / "bake.json").write_text(json.dumps(record))
        assert verify(out)["text"]["language"] == wanted
    record["base"]["card"] = {"language": "ja"}
    (out / "bake.json").write_text(json.dumps(record))
    assert verify(out)["text"]["reason"].startswith("the base's card states ja")


def test_a_text_of_ones_own_is_measured_whatever_the_base_makes_of_it(
    made: Callable[[str], RecipeFolder],
) -> None:
    folder = made("")
    out = folder.export()
    found = verify(out, "--text", folder.folder / "held-out.txt")
    assert found["text"]["source"] == "held-out.txt" and "perplexity" in found["effects"]
    streamed = verify(out, "--text", folder.folder / "held-out.txt", "--stream")
    assert streamed["effects"] == found["effects"]
    (folder.folder / "short.txt").write_text("\n")
    missing = verify(out, "--text", folder.folder / "short.txt", code=4)
    assert "the file holds no text" in error_of(missing)


# --- tasks of lm-evaluation-harness ------------------------------------------------------------

TASK = """task: bake_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["bread", "tree"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
"""A task of four documents, which needs no network."""


def write_task(folder: Path) -> None:
    data = folder / "words.jsonl"
    rows = [{"text": line, "answer": i % 2} for i, line in enumerate(REFUSED.splitlines())]
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "words.yaml").write_text(TASK.format(data=data))


def test_tasks_need_their_extra(
    made: Callable[[str], RecipeFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bake.verify.tasks.find_spec", lambda name: None)
    out = made(gated("tasks = {bake_words = {drop = 0.5}}")).export()
    error = error_of(data_of("verify", out, code=2))
    assert "pip install 'bake-directions[eval]'" in error and "--no-gate" in error


def harness(monkeypatch: pytest.MonkeyPatch, evaluate: Callable[..., Any]) -> None:
    """Put a harness in place of the real one, which takes long."""
    for name, content in (
        ("lm_eval", {"simple_evaluate": evaluate}),
        ("lm_eval.models", {}),
        ("lm_eval.models.huggingface", {"HFLM": lambda **given: given}),
    ):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


def result(values: Mapping[str, Sequence[object]]) -> dict[str, Any]:
    samples = {
        task: [
            {"doc_id": i, "metrics": ["acc"], "acc": value, "filter": "none"}
            for i, value in reversed(list(enumerate(of)))
        ]
        for task, of in values.items()
    }
    return {"samples": samples}


def test_documents_of_a_task_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    live: Any = SimpleNamespace(model=None)
    ended = SimpleNamespace(bos_token_id=None, eos_token_id=2, name_or_path="out")
    harness(monkeypatch, lambda **given: result({"b": [0, 1], "a": [0.5]}))
    found = run_tasks(live, ended, ("group",), None)
    assert found["group"].metric == "acc" and found["group"].values == (0.5, 0.0, 1.0)
    harness(monkeypatch, lambda **given: result({"a": [17.0]}))
    with pytest.raises(InputError, match=r"scores a document 17\.0 by acc"):
        run_tasks(live, ended, ("a",), None)

    def unknown(**given: Any) -> Any:
        raise KeyError("no such task")

    harness(monkeypatch, unknown)
    with pytest.raises(InputError, match="the task nope cannot be run"):
        run_tasks(live, ended, ("nope",), None)
    ended.eos_token_id = None
    with pytest.raises(InputError, match="cannot use the tokenizer"):
        run_tasks(live, ended, ("a",), None)


@pytest.mark.slow  # the harness reads thousands of files to know its tasks
def test_a_task_of_the_real_harness(
    made: Callable[[str], RecipeFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its data are read from this disk; the client of the Hub would ask there all the same.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = made(gated("tasks = {bake_words = {drop = 0.9}}"))
    write_task(folder.folder)
    out = folder.export()
    (check,) = verify(out, "--tasks", folder.folder)["gate"]["checks"]
    assert check["key"] == "tasks bake_words drop" and check["count"] == 4
    assert "(acc), base − baked" in check["name"] and check["verdict"] == HELD
    folder.rewrite("drop = 0.9", "drop = 0.001")
    assert "not shown" in error_of(verify(folder.export("tight"), "--tasks", folder.folder, code=1))
    folder.rewrite("bake_words", "bake_wards")
    wrong = folder.export("wrong")
    assert "cannot be run" in error_of(verify(wrong, "--tasks", folder.folder, code=4))
