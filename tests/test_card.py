"""The model card: what it says, that its numbers are the records', and what the Hub reads of it."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cards import (
    BASE,
    COMMIT,
    EXAMPLES,
    KINDS,
    artifact,
    example,
    on_hub,
    with_licence,
    without_card,
)
from huggingface_hub import ModelCard
from jinja2 import UndefinedError

import bake
from bake.artifact import KINDS as CARRIER_FACTS
from bake.artifact import Carrier
from bake.artifact.frontmatter import card_metadata
from bake.cards import notices, templates
from bake.cards.card import card_notes, lint_card, render_card, save_card, write_card
from bake.cards.methods import METHODS
from bake.cards.stamp import is_stamped
from bake.errors import InputError, UsageError

ROOT = Path(__file__).parents[1]


def body(text: str) -> str:
    """Return a card without its metadata."""
    return text.partition("\n---\n")[2]


def first_line(text: str) -> str:
    return next(line for line in body(text).splitlines() if line.strip())


@pytest.mark.parametrize("kind", KINDS)
def test_example_is_what_its_records_give(kind: str, tmp_path: Path) -> None:
    card = (EXAMPLES / kind / "README.md").read_text(encoding="utf-8")
    assert render_card(EXAMPLES / kind) == card, "run `bake card --force` in model_cards/examples"
    assert lint_card(card, EXAMPLES / kind) == ()

    def change(content: dict[str, Any]) -> None:
        content["runtimes"][0]["lost"] *= 1.01

    changed = artifact(tmp_path / "out", kind, verification=change)
    assert render_card(changed) != card  # the control: another record, another card


@pytest.mark.parametrize("kind", KINDS)
def test_example_holds_no_place_of_a_machine(kind: str) -> None:
    for name in ("bake.json", "verify.json", "README.md"):
        text = (EXAMPLES / kind / name).read_text(encoding="utf-8")
        assert not any(place in text for place in ('"/', "/home", "/tmp", "/root", "/work"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_that_was_demanded_is_in_the_card(kind: str) -> None:
    text = render_card(EXAMPLES / kind)
    lines = [line.replace("\\", "") for line in text.splitlines()]
    report = example(kind, "verify.json")
    demanded = [row for row in report["rows"] if row["passed"] is not None]
    assert len(demanded) >= 4
    for row in demanded:
        start = f"| {row['name']} | {row['value']:.4g} | {row['limit']:.4g} | pass |"
        assert any(line.startswith(start) for line in lines), start
    for runtime in report["runtimes"]:
        lost = runtime["lost"]
        for value, times in ((f"{lost:.4g}", 2), (f"{100 * lost:.4g} % of the edit is lost", 1)):
            assert sum(runtime["runtime"] in line and value in line for line in lines) >= times


def test_checkpoint_shows_effect_and_floor_beside_the_error() -> None:
    text = render_card(EXAMPLES / "checkpoint")
    report = example("checkpoint", "verify.json")
    cells = [report["metrics"][key]["max_dlogit"] for key in ("float64", "float32", "effect")]
    assert f"| largest difference of a logit | {' | '.join(f'{c:.4g}' for c in cells)} |" in text
    head = report["headline"]
    lost, floor = (f"{100 * head[key]:.4g} %" for key in ("lost", "floor"))
    said = f"{lost} are lost to {head['to']} (rounding alone: {floor})"
    assert f"**passed**: effect {head['effect']:.4g} nats a token, of which {said}" in text
    for answer in report["answers"]:
        assert f"| {answer['text']} | passed |" in text
    assert len(report["samples"]) == 3
    for sample in report["samples"]:
        assert f"| {sample['prompt']} | {sample['base']} | {sample['hooked']} |" in text
    score = report["effects"]["contains:happy"]["baked"]
    assert f"{score['value']:.4g} ({score['low']:.4g} to {score['high']:.4g}), n = 8" in text
    for plot in (EXAMPLES / "checkpoint" / "plots").iterdir():
        assert f"](plots/{plot.name})" in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_hubs_own_reader_takes_the_metadata(kind: str, tmp_path: Path) -> None:
    out = artifact(tmp_path / "out", kind, record=on_hub)
    text = render_card(out, repo="me/happy-storyteller")
    data = ModelCard(text).data
    relation, library = {
        "checkpoint": ("finetune", "transformers"),
        "adapter": ("adapter", "peft"),
        "gguf": ("quantized", "gguf"),
    }[kind]
    assert (data.base_model, data.base_model_relation) == (BASE, relation)
    assert (data.library_name, data.pipeline_tag) == (library, "text-generation")
    assert (data.license, data.language) == ("apache-2.0", ["en"])
    assert {"bake", "steering", "affine-concept-editing", "reproducible"} <= set(data.tags)
    assert data.model_name == "happy-storyteller"
    report = example(kind, "verify.json")
    values = {r.metric_name: r.metric_value for r in data.eval_results}
    assert len(values) == len(data.eval_results) >= len(report["runtimes"])
    for runtime in report["runtimes"]:
        name = f"share of the edit's KL that is lost in {runtime['runtime']}"
        assert values[name] == runtime["lost"]  # to the last digit
    assert lint_card(text, out) == ()


def test_a_folder_is_no_base_model(tmp_path: Path) -> None:
    metadata = card_metadata(render_card(EXAMPLES / "checkpoint"))
    assert "base_model" not in metadata and "base_model_relation" not in metadata
    assert "reproducible" not in metadata["tags"]
    on = render_card(artifact(tmp_path / "out", record=on_hub))
    assert card_metadata(on)["base_model"] == BASE


def test_headline_and_provenance(tmp_path: Path) -> None:
    text = render_card(artifact(tmp_path / "out", record=on_hub), repo="me/happy")
    record = example("checkpoint", "bake.json")
    page = f"https://huggingface.co/{BASE}/tree/{COMMIT}"
    assert f"]({page}) with *mood* set to a constant (*s* = 1, *α* = 2) at 13 sites" in text
    for digest in (
        record["plan"]["digest"],
        record["recipe"]["digest"],
        record["base"]["digest"],
        record["directions"]["mood"]["digest"],
        *(
            d
            for name, d in record["files"].items()
            if name.endswith(".safetensors") and "/" not in name
        ),
    ):
        assert digest in text
    norm = next(
        t["norm"]
        for t in record["directions"]["mood"]["tensors"]
        if t["layer"] == 2 and t["role"] == "vector"
    )
    assert f"vector: 128 in float32, norm {norm:.4g}" in text
    assert METHODS["affine"].activation in text and METHODS["affine"].weights in text
    assert "13 tensors of the base are edited, 1 tensor is new" in text
    assert "The other 43 tensors of the base were copied" in text  # 56 in all
    assert record["recipe"]["text"].partition("[card]")[0].strip() in text
    assert "bake export hf://me/happy --out again" in text
    assert f"hf download {BASE} --revision {COMMIT} --local-dir base" in text
    assert "arXiv:2411.09003](https://arxiv.org/abs/2411.09003)" in text
    assert "sha256sum -c SHA256SUMS" in text and "bake revert happy --out base" in text


def test_commands_are_tested_or_say_that_they_are_not(tmp_path: Path) -> None:
    def fewer(content: dict[str, Any]) -> None:
        content["runtimes"] = [r for r in content["runtimes"] if r["runtime"] != "vllm"]

    all_of_them = render_card(EXAMPLES / "checkpoint")
    assert "**vLLM.** Tested with vllm" in all_of_them
    assert "**Ollama, after the conversion.** Not tested." in all_of_them
    for verdict in example("checkpoint", "bake.json")["plan"]["runtimes"]:
        assert f"\n| {verdict['runtime']} | {verdict['status']} | " in all_of_them
    text = render_card(artifact(tmp_path / "out", verification=fewer))
    assert "**vLLM.** Not tested. The plan says that it serves the edit exactly." in text
    assert "**transformers.** Tested with transformers" in text


def test_adapter_is_loaded_over_the_pinned_base(tmp_path: Path) -> None:
    text = render_card(artifact(tmp_path / "out", "adapter", record=on_hub), repo="me/happy-lora")
    assert f'from_pretrained("{BASE}", revision="{COMMIT}")' in text
    assert 'PeftModel.from_pretrained(base, "me/happy-lora")' in text
    assert "--enable-lora --max-lora-rank 1 --lora-modules edited=me/happy-lora" in text
    assert "base = model.unload()" in text
    assert "adapter of rank 1 with alpha 1" in text
    # The plan unties the head of a checkpoint; an adapter leaves the base's files as they are.
    changed = text.partition("## Verification")[0]
    assert "tie_word_embeddings" not in changed and "lm\\_head" not in changed
    assert "`model.layers.0-5.mlp.down_proj.weight` | 6 |" in text
    assert "tie_word_embeddings" in render_card(EXAMPLES / "checkpoint")


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("gguf-lora", "llama-server -m base.gguf --lora ./storyteller.gguf"),
        ("control-vector", "llama-server -m base.gguf --control-vector ./storyteller.gguf"),
    ],
)
def test_adapters_of_llama_cpp(kind: str, command: str, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        on_hub(content)
        content["kind"] = kind
        del content["gguf"]

    out = artifact(tmp_path / "out", "gguf", record=change)
    text = render_card(out)
    assert command in text
    assert ("No tensor of the base is changed" in text) == (kind == "control-vector")
    assert card_metadata(text)["base_model_relation"] == "adapter"
    assert lint_card(text, out) == ()


@pytest.mark.parametrize("kind", METHODS)
def test_every_kind_of_edit_has_its_formula_and_its_papers(kind: str, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["recipe"]["text"] = ""
        for finding in content["plan"]["findings"]:
            finding["kind"] = kind

    out = artifact(tmp_path / "out", record=change)
    text = render_card(out)
    method = METHODS[kind]
    assert f"$${method.activation}$$" in text
    assert method.tag in card_metadata(text)["tags"]
    for paper in method.papers:
        assert f"https://arxiv.org/abs/{paper.arxiv}" in text
    assert ("No paper is known" in text) == (not method.papers)
    assert f"| {kind} | mood |" in text and "| not recorded |" in text  # no recipe, no strength
    assert "$" not in method.where


def test_what_is_not_recorded_is_left_out(tmp_path: Path) -> None:
    def bare(content: dict[str, Any]) -> None:
        without_card(content)
        del content["schema"]  # as the first versions wrote it
        for key in ("tensors", "dtypes", "card", "digest"):
            del content["base"][key]
        del content["directions"], content["files"]

    out = artifact(tmp_path / "out", record=bare, verification=None)
    text = render_card(out)
    assert text.count("\nNot measured.\n") == 3  # side effects, verification, behaviour
    assert "copied byte for byte" not in text and "nan" not in text.casefold()
    assert "The record names no licence." in text
    assert "license" not in card_metadata(text)
    assert lint_card(text, out) == ()
    assert len(card_notes(out)) == 3 and card_notes(EXAMPLES / "gguf")[1:] == ()


@pytest.mark.parametrize("state", ["missing", "of another plan", "failed"])
def test_unverified_is_said_in_the_first_line(state: str, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        if state == "failed":
            content["passed"] = content["rows"][2]["passed"] = False
        else:
            content["plan_digest"] = "sha256:" + "0" * 64

    out = artifact(tmp_path / "out", verification=None if state == "missing" else change)
    text = render_card(out)
    assert first_line(text).startswith("**Unverified.** Nothing shows that")
    assert ("## Verification\n\nNot measured." in text) == (state != "failed")
    if state == "failed":
        assert "**FAIL**" in text
    assert lint_card(text, out) == ()
    without = text.replace(first_line(text) + "\n\n", "", 1)
    assert "does not say in its first line" in lint_card(without, out)[0].what
    # The controls: a verification that passed, and one that is not relied on.
    assert first_line(render_card(EXAMPLES / "checkpoint")) == "# A cheerful storyteller"
    forced = render_card(EXAMPLES / "checkpoint", unverified=True)
    assert first_line(forced).startswith("**Unverified.** It was published without")


@pytest.mark.parametrize(
    ("words", "noticed"),
    [
        ({"title": "Refusal as an affine function"}, "refusal"),
        ({"concept": "harmless"}, "harmless"),
        ({"direction": "jailbreak_dir"}, "jailbreak"),
        ({"file": "RefusalDirection.npy"}, "refusal"),
        ({"note": "toxic against neutral comments"}, "toxic"),
        ({"title": "Harmony, charm and kindness"}, None),
        ({"file": "mood.safetensors"}, None),
    ],
)
def test_edits_of_refusal_and_safety_carry_a_notice(
    words: dict[str, str], noticed: str | None, tmp_path: Path
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["recipe"]["title"] = words.get("title", content["recipe"]["title"])
        mood = content["directions"].pop("mood")
        mood["concept"] = words.get("concept", "mood")
        mood["file"] = words.get("file", mood["file"])
        mood["metadata"]["description"] = words.get("note", "")
        content["directions"][words.get("direction", "mood")] = mood

    out = artifact(tmp_path / "out", record=change)
    text = render_card(out)
    assert ("This edit concerns refusals or safety" in text) == (noticed is not None)
    if noticed is None:
        return
    assert f"*{noticed}*" in text
    problems = lint_card(text.replace("concerns refusals or safety", "is harmless"), out)
    assert "lacks the notice" in problems[0].what


def test_a_recipe_asks_for_the_notice(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["recipe"]["text"] += '\nnotice = "safety"\n'

    assert "This edit concerns" in render_card(artifact(tmp_path / "out", record=change))
    assert "This edit concerns" not in render_card(EXAMPLES / "checkpoint")


def test_abliterated_is_a_tag_of_ablated_refusals_only(tmp_path: Path) -> None:
    def refusal(kind: str) -> Any:
        def change(content: dict[str, Any]) -> None:
            content["recipe"] |= {"title": "Refusal", "text": ""}
            for finding in content["plan"]["findings"]:
                finding["kind"] = kind

        return change

    ablated = render_card(artifact(tmp_path / "a", record=refusal("ablate")))
    affine = render_card(artifact(tmp_path / "b", record=refusal("affine")))
    assert "abliterated" in card_metadata(ablated)["tags"]
    assert "abliterated" not in card_metadata(affine)["tags"]


def test_llamas_words_are_shown(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out", record=with_licence(license="llama3.1"))
    (out / "LICENSE").write_text("Llama 3.1 Community License", encoding="utf-8")
    text = render_card(out, repo="me/Llama-happy")
    assert "**Built with Llama**" in text
    assert "Llama 3.1 is licensed under the Llama 3.1 Community License" in text
    assert "[LICENSE](LICENSE)" in text and card_metadata(text)["license"] == "llama3.1"
    assert lint_card(text, out) == ()
    silent = text.replace("Built with Llama", "Built")
    assert [p.what for p in lint_card(silent, out)] == ['has to show "Built with Llama"']
    free = text.replace("license: llama3.1", "license: mit")
    assert "states mit where the base has llama3.1" in lint_card(free, out)[0].what


def test_gemmas_policy_is_named(tmp_path: Path) -> None:
    text = render_card(artifact(tmp_path / "out", record=with_licence(license="gemma")))
    assert "Prohibited Use Policy" in text and "Gemma Terms of Use found at" in text


def test_another_licence_has_a_name_and_a_link(tmp_path: Path) -> None:
    stated = {"license": "other", "license_name": "acme", "license_link": "LICENSE"}
    out = artifact(tmp_path / "out", record=with_licence(**stated))
    (out / "LICENSE").write_text("terms", encoding="utf-8")
    text = render_card(out)
    found = card_metadata(text)
    assert (found["license"], found["license_name"], found["license_link"]) == (
        "other",
        "acme",
        "LICENSE",
    )
    assert lint_card(text, out) == ()


def test_write_replaces_what_bake_wrote_and_nothing_else(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out", record=on_hub)
    path = write_card(out)
    first = path.read_text(encoding="utf-8")
    assert is_stamped(first)
    assert write_card(out, repo="me/happy") == out / "README.md"
    second = path.read_text(encoding="utf-8")
    assert second != first and is_stamped(second)
    edited = second.replace("## Not for", "## Not at all for")
    path.write_text(edited, encoding="utf-8")
    with pytest.raises(UsageError, match=r"was not written by bake, or was edited since"):
        write_card(out)
    assert path.read_text(encoding="utf-8") == edited
    write_card(out, force=True)
    assert path.read_text(encoding="utf-8") == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # no temporary file is left


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out", record=on_hub)
    target = tmp_path / "elsewhere.md"
    target.write_text("mine", encoding="utf-8")
    (out / "README.md").symlink_to(target)
    with pytest.raises(UsageError):
        save_card("text", out / "README.md")
    save_card("text", out / "README.md", force=True)
    assert target.read_text(encoding="utf-8") == "mine"
    assert not (out / "README.md").is_symlink()


def test_a_card_that_would_be_wrong_is_not_written(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        on_hub(content)
        content["recipe"]["title"] = "A model of /home/somebody/models"

    out = artifact(tmp_path / "out", record=change)
    with pytest.raises(InputError, match=r"2 things are wrong|names a"):
        write_card(out)
    assert not (out / "README.md").exists()


@pytest.mark.parametrize("repo", ["storyteller", "../up/there", "a/b/c", "me/x@main", "me/$(ls)"])
def test_repo_is_an_id(repo: str) -> None:
    with pytest.raises((UsageError, InputError)):
        render_card(EXAMPLES / "checkpoint", repo=repo)


def test_no_folder_and_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        render_card(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no artifact of bake"):
        render_card(tmp_path)


def test_rendering_needs_no_transformers() -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from bake.cards.card import render_card, lint_card\n"
        f"out = Path({str(EXAMPLES / 'adapter')!r})\n"
        "assert lint_card(render_card(out), out) == ()\n"
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_wheel_ships_every_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    shipped = {}
    for source, target in included.items():
        found = ROOT / source
        for file in [found] if found.is_file() else found.rglob("*.jinja"):
            shipped[file] = Path(target) / (file.relative_to(found) if found.is_dir() else "")
    assert set(shipped) == set((ROOT / "model_cards").rglob("*.jinja"))
    for file, target in shipped.items():
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / target).write_bytes(file.read_bytes())
    monkeypatch.setattr(bake, "__file__", str(tmp_path / "bake" / "__init__.py"))
    assert templates.folder() == tmp_path / "bake" / "cards" / "templates"
    card = (EXAMPLES / "checkpoint" / "README.md").read_text(encoding="utf-8")
    assert render_card(EXAMPLES / "checkpoint") == card
    monkeypatch.setattr(bake, "__file__", str(tmp_path / "nothing" / "bake" / "__init__.py"))
    with pytest.raises(bake.errors.BakeError, match="templates of the model cards are missing"):
        templates.folder()


def test_a_gap_in_the_values_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        templates.render("checkpoint.md.jinja", {})


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["plan"].update(findings="no list"),
        lambda c: c["plan"]["findings"][0].update(kind="explode"),
        lambda c: c["plan"]["findings"][0].update(sites=["nowhere"]),
        lambda c: c["plan"]["findings"][0].update(exactness="rather"),
        lambda c: c["plan"]["tensors"][0].update(sides=7),
        lambda c: c["base"].update(card=[1]),
        lambda c: c["directions"].update(mood="text"),
        lambda c: c["directions"]["mood"]["tensors"][0].update(norm="large", layer=2),
        lambda c: c["recipe"].update(text="[card]\nnotice = 'loud'"),
        lambda c: c["recipe"].update(text="[card"),
        lambda c: c["recipe"].update(title=["a"]),
        lambda c: c.update(gguf=3, kind="gguf"),
    ],
)
def test_a_malformed_record_is_refused(change: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        render_card(artifact(tmp_path / "out", record=change))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(metrics=[]),
        lambda c: c["rows"][0].update(value="much"),
        lambda c: c["rows"][0].update(passed="yes"),
        lambda c: c["runtimes"][0].update(numbers=3),
        lambda c: c["effects"].update(score={"baked": {"value": "high"}}),
        lambda c: c.update(environment="here"),
        lambda c: c["prompts"].update(tokens=10**40),
    ],
)
def test_a_malformed_verification_is_refused(change: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        render_card(artifact(tmp_path / "out", verification=change))


def test_numbers_that_are_not_finite_are_not_measured(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["metrics"]["float32"]["mean_kl"] = None
        content["metrics"]["effect"]["max_kl"] = float("nan")

    out = artifact(tmp_path / "out", verification=change)
    text = render_card(out)
    assert "nan" not in text
    assert "mean_kl" not in json.dumps(card_metadata(text))
    assert lint_card(text, out) == ()


def test_the_words_of_the_notice_are_documented() -> None:
    text = " ".join((ROOT / "docs" / "cards.md").read_text(encoding="utf-8").split())
    assert f"*{', '.join(sorted(notices.STEMS))}*" in text
    assert f"*{', '.join(notices.WORDS)}*" in text


def test_many_layers_are_a_few_lines(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        plan = content["plan"]
        tensor, finding = plan["tensors"][1], plan["findings"][0]
        names = [f"model.layers.{n}.mlp.experts.{n * n}.w" for n in range(300)]
        plan["tensors"] = [tensor | {"name": name, "source": name} for name in names]
        plan["findings"] = [
            finding | {"sites": [f"mlp_out.{n}"], "reason": f"folded into layer {n}"}
            for n in range(300)
        ]
        content["base"]["tensors"] = 1000

    out = artifact(tmp_path / "out", record=change)
    text = render_card(out)
    assert "exact, folded into layer 0-299\n" in text and "`mlp_out.0-299`" in text
    assert text.count("mlp.experts") == 100  # no grid of numbers: each by itself
    assert "and 200 tensors more, which `bake.json` names." in text
    assert "The other 700 tensors of the base" in text
    assert lint_card(text, out) == ()


def test_the_gguf_that_was_edited_is_named_with_its_digest() -> None:
    text = render_card(EXAMPLES / "gguf")
    part = example("gguf", "bake.json")["export"]["gguf"][0]
    assert f"`{part['name']}` (sha256 `{part['sha256']}`)" in text
    assert f"--to gguf --out again --gguf {part['name']}" in text
    assert f"bake revert . --base {part['name']} --out ../base" in text


def test_a_merged_adapter_is_named(tmp_path: Path) -> None:
    adapter = {"name": "someone/lora", "revision": COMMIT[::-1], "sha256": "3" * 64}

    def change(content: dict[str, Any]) -> None:
        on_hub(content)
        del content["schema"]  # as the first versions wrote it
        content |= {"kind": "merge", "adapter": {**adapter, "config": {"r": 8, "lora_alpha": 16}}}
        content["plan"] |= {"findings": [], "runtimes": []}
        del content["recipe"], content["directions"]

    out = artifact(tmp_path / "out", record=change, verification=None)
    text = render_card(out, repo="me/merged")
    page = f"https://huggingface.co/someone/lora/tree/{COMMIT[::-1]}"
    assert (
        f"with [someone/lora at commit {COMMIT[::-1][:12]}]({page}) merged into its weights" in text
    )
    assert "of rank 8 and alpha 16:" in text and "3" * 64 in text
    assert f"bake merge someone/lora@{COMMIT[::-1]} {BASE}@{COMMIT} --out again" in text
    assert "as hooks" not in text and "steering" not in card_metadata(text)["tags"]
    assert card_metadata(text)["base_model_relation"] == "finetune"
    assert lint_card(text, out) == ()
    # A name that is no id is no link.
    (out / "bake.json").write_text(
        (out / "bake.json").read_text(encoding="utf-8").replace("someone/lora", "some/one/lora"),
        encoding="utf-8",
    )
    assert "with the adapter `some/one/lora` merged" in render_card(out)


def documented(code: str) -> bool:
    """Tell whether README or docs have a command, whatever its files and names are called there."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    line = code.strip().splitlines()[-1].replace("{download}", "").replace("{max_rank}", "#")
    line = re.sub(r"\{\w+\}|\bedited\b(?!=)|\w+\.gguf|(?:\{folder\}/)?Modelfile", "@", line)
    pattern = re.escape(line).replace("\\#", r"( --max-lora-rank \d+)?").replace("@", r"\S+")
    return re.search(pattern, text) is not None


@pytest.mark.parametrize("carrier", CARRIER_FACTS.values(), ids=lambda carrier: carrier.name)
def test_the_docs_show_the_commands_that_cards_print(carrier: Carrier) -> None:
    assert bool(carrier.loading) == bool(carrier.readers)  # what nothing reads yet is not loaded
    assert {way.runtime for way in carrier.loading} <= set(carrier.readers)
    for way in carrier.loading:
        assert way.language in ("python", "sh")
        if way.language == "sh":
            assert documented(way.code), way.code
    assert not documented("llama-server -m {weights} --no-such-option {weights}")  # the control


def test_a_template_of_several_kinds_has_words_for_each() -> None:
    """A kind that it does not know would be told the words of another: rendering stops instead."""

    def missing(kind: str) -> str:
        """Return the name that rendering stops at, with nothing but a record of a kind."""
        with pytest.raises(UndefinedError) as stopped:
            templates.render("adapter.md.jinja", {"record": SimpleNamespace(kind=kind)})
        return str(stopped.value)

    assert "words_for" in missing("some-other")
    kinds = [name for name, facts in CARRIER_FACTS.items() if facts.template == "adapter.md.jinja"]
    assert len(kinds) > 1
    for kind in kinds:  # the control: past the words of the kind, at what the record lacks
        assert "words_for" not in missing(kind)
