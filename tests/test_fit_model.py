"""``bake fit`` on tiny models: where it looks, at which tokens, and the command."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import data_of, error_of, run
from harness import base_at, edit, vector
from torch import Tensor
from words import TEMPLATE, WORDS, write_tokenizer

from bake import edits as make
from bake.checkpoints import open_checkpoint
from bake.cli.fit import command
from bake.errors import UsageError
from bake.fit import METHODS
from bake.fit.collect import collect
from bake.fit.split import Part
from bake.fit.texts import Position, Texts, read_texts
from bake.jobs import FitRequest, FittedDirections, fit_directions, open_model, propose
from bake.progress import Tally
from bake.sites import Site, SiteKind, expand
from bake.steer import steered, watched
from bake.verify.models import load
from bake.verify.precision import double_precision
from bake.verify.tokenizer import load_tokenizer

CLOSE = 1e-10
"""Relative, in float64; of float32 one batch against another."""
SINGLE = 1e-5


def near(found: Tensor, wanted: Tensor, relative: float = CLOSE) -> bool:
    return float((found - wanted).abs().max()) <= relative * float(wanted.abs().max())


# Where it looks is where an edit acts


def seen(base: Any, sites: Sequence[Site], edits: Sequence[Any] = ()) -> dict[Site, Tensor]:
    """Return the activations of the standard tokens, under edits."""
    found: dict[Site, Tensor] = {}
    with torch.no_grad(), double_precision(), steered(base.model, base.layout, edits):
        with watched(base.model, base.layout, sites, lambda site, x: found.update({site: x})):
            base.model(tiny.tokens(), use_cache=False)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "phi3"])
def test_a_site_is_seen_as_an_edit_there_is_given_it(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    base = base_at(tiny_checkpoint(family))
    asked = [site for site in base.layout.sites if site.layer in (None, 1)]
    heads = [Site(kind, 1, 1) for kind in (SiteKind.Q, SiteKind.Z)]
    sites = []
    for site in (*asked, *heads):
        try:
            seen(base, [site])
            sites.append(site)
        except UsageError:  # a site that no module carries, which no edit is hooked at either
            map_ = make.ablate(vector(base.layout.width(site)))
            with pytest.raises(UsageError, match="no module"):
                seen(base, (), [edit(base, "ablate", map_, str(site))])
    assert len(sites) > 8
    before = seen(base, sites)
    assert before.keys() == set(sites)
    for seed, site in enumerate(sites):
        width = base.layout.width(site)
        map_ = make.affine(vector(width, seed), mean=vector(width, seed + 99), alpha=0.5)
        after = seen(base, [site], [edit(base, "affine", map_, str(site))])[site]
        assert near(after, map_(before[site])), site
        assert not near(after, before[site], 1e-3), site
    # What is seen moves nothing.
    with torch.no_grad(), double_precision():
        plain = base.model(tiny.tokens(), use_cache=False).logits
        with watched(base.model, base.layout, sites, lambda site, x: None):
            assert torch.equal(base.model(tiny.tokens(), use_cache=False).logits, plain)


def texts_of(prompts: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]]) -> Texts:
    return Texts(Path("x"), tuple(map(tuple, prompts)), tuple(spans), "plain text")


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_activations_are_those_of_each_prompt_by_itself(
    streamed: bool, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Prompts of many lengths in one batch, in their order, at the tokens that are asked for."""
    path = tiny_checkpoint("llama", dtype=torch.float32)
    live = load(open_checkpoint(path), torch.float32, streamed=streamed)
    assert live.layout is not None
    lengths = (9, 3, 12, 3, 7)
    prompts = [tiny.tokens(batch=1, length=n, seed=i)[0].tolist() for i, n in enumerate(lengths)]
    spans = [(8, 9), (1, 3), (4, 12), (2, 3), (1, 7)]
    sites = expand(
        ["resid_pre.*", "ln1_out.1"], layers=live.layout.layers, stream=live.layout.stream
    )
    found = collect(live, texts_of(prompts, spans), sites, Tally(5, None))
    plain = tiny.load(path, torch.float32)
    for i, (prompt, (start, stop)) in enumerate(zip(prompts, spans, strict=True)):
        with torch.no_grad():
            states = plain(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for site in sites[:-1]:
            state = states[site.layer or 0][0]
            row = found[site][i]
            assert near(row, state[start:stop].mean(0), SINGLE), (i, site)
            assert not near(row, state[start - 1 : stop - 1].mean(0), 1e-2)
        norm = plain.model.layers[1].input_layernorm
        with torch.no_grad():
            assert near(found[sites[-1]][i], norm(states[1][0])[start:stop].mean(0), SINGLE)


@pytest.mark.parametrize(("name", "at"), [("opt", "mlp_act.1"), ("llama4", "mlp_out.1")])
def test_a_module_that_takes_all_tokens_in_one_row(
    name: str, at: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """OPT's MLP and Llama 4's mixture see [batch · length, d]; a mean is over one prompt's."""
    live = load(open_checkpoint(tiny_checkpoint(name)), torch.float64)
    assert live.layout is not None
    prompts = [tiny.tokens(batch=1, length=n, seed=n)[0].tolist() for n in (7, 7, 4)]
    spans = [(2, 7), (6, 7), (0, 3)]
    (site,) = expand([at], layers=live.layout.layers, stream=live.layout.stream)
    found = collect(live, texts_of(prompts, spans), [site], Tally(3, None))[site]
    assert found.shape == (3, live.layout.width(site))
    for i, (prompt, span) in enumerate(zip(prompts, spans, strict=True)):
        alone = collect(live, texts_of([prompt], [span]), [site], Tally(1, None))[site][0]
        assert near(found[i], alone, SINGLE)
        other = collect(live, texts_of([prompt], [(0, span[1] - 1)]), [site], Tally(1, None))[site]
        assert not near(found[i], other[0], 1e-2)


# At which tokens


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that reads prompts through a tokenizer with a template, or without."""

    def read(lines: Sequence[Any], position: str, template: str | None = TEMPLATE) -> Any:
        tokenizer = write_tokenizer(tmp_path / "tokenizer", template)
        chats = not isinstance(lines[0], str)
        path = tmp_path / ("x.jsonl" if chats else "x.txt")
        path.write_text("\n".join(json.dumps(x) if chats else x for x in lines))
        return read_texts(path, tokenizer, Position(position)), tokenizer

    return read


def chat(*said: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(said)
    return {"messages": [{"role": r, "content": s} for r, s in zip(roles, said, strict=False)]}


def test_positions_are_tokens_of_the_template(prompts: Callable[..., Any]) -> None:
    def words(lines: Sequence[Any], position: str, **options: Any) -> list[str]:
        found, tokenizer = prompts(lines, position, **options)
        return [
            " ".join(tokenizer.convert_ids_to_tokens(list(tokens[start:stop])))
            for tokens, (start, stop) in zip(found.tokens, found.spans, strict=True)
        ]

    assert words(["the cat runs", "a dog"], "last") == ["<|assistant|>"] * 2
    assert words(["the cat runs"], "last", template=None) == ["runs"]
    assert words(["the cat runs"], "mean", template=None) == ["the cat runs"]  # but <s>
    (said,) = words([chat("the cat", "a dog sleeps")], "answer")
    assert said == "a dog sleeps <|end|>"
    (whole,) = words([chat("the cat", "a dog sleeps")], "mean")
    assert whole.startswith("be kind <|end|> <|user|> the cat") and whole.endswith(said)


@pytest.mark.parametrize(
    ("lines", "position", "template", "what"),
    [
        (["the cat"], "answer", TEMPLATE, "the prompt ends in no answer"),
        ([chat("the cat")], "answer", TEMPLATE, "the prompt ends in no answer"),
        ([chat("the", "cat")], "answer", None, "no chat template for messages"),
        (
            [chat("the", "cat")],
            "answer",
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "writes the question otherwise when an answer follows",
        ),
        (["a dog", "the cat", "a dog"], "last", TEMPLATE, "prompt 3 is prompt 1 once more"),
        ([{"text": "dog"}, {"text": ""}], "mean", TEMPLATE, "prompt 2 has no token but the first"),
    ],
)
def test_prompts_are_refused(
    lines: Sequence[Any],
    position: str,
    template: str | None,
    what: str,
    prompts: Callable[..., Any],
) -> None:
    with pytest.raises(Exception, match=what):
        prompts(lines, position, template)


# The command


class Folder:
    """A tiny model with a tokenizer, and prompts that speak of the sun or of the sea."""

    def __init__(self, path: Path, model: Path) -> None:
        self.path, self.model = path, model
        write_tokenizer(model)
        for name, word in (("sun", "sun"), ("sea", "sea")):
            others = [w for w in WORDS if w not in ("sun", "sea")]
            lines = [f"{others[i]} {word} {others[(7 * i + 3) % len(others)]}" for i in range(34)]
            (path / f"{name}.txt").write_text("\n".join(lines))
        self.out = path / "c.safetensors"

    def command(
        self, *options: object, positive: str = "sun.txt", negative: str = "sea.txt"
    ) -> Any:
        files = ("--positive", self.path / positive, "--negative", self.path / negative)
        return ("fit", self.model, *files, "--concept", "sun", "--out", self.out, *options)

    def written(self) -> dict[str, bytes]:
        inputs = ("sun.txt", "sea.txt")
        files = (path for path in self.path.iterdir() if path.is_file())
        return {path.name: path.read_bytes() for path in files if path.name not in inputs}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit")
    tiny.write_checkpoint(tiny.make_model("llama", dtype=torch.float32), path)
    return path


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Iterator[Folder]:
    yield Folder(tmp_path, model)


def test_a_fit_is_a_file_and_a_recipe_that_every_command_takes(folder: Folder) -> None:
    found = data_of(*folder.command("--plot", folder.path / "c.svg"))
    assert found["separates"] and found["exactness"] == "exact"
    assert set(folder.written()) == {"c.safetensors", "c.toml", "c.svg"}
    assert found["left_out"] == ["resid_pre.0"]  # a template's own token
    assert len(found["sites"]) == 6 and found["auroc"]["low"] > 0.5
    read = data_of("directions", folder.out)
    assert (read["format"], read["concept"], read["rows"][0]["site"]) == (
        "bake", "sun", found["best"],
    )  # fmt: skip
    recipe = folder.path / "c.toml"
    assert recipe.read_text() == found["recipe"]
    planned = data_of("plan", recipe)
    assert planned["plan"]["exactness"] == "exact"
    data_of("export", recipe, "--out", folder.path / "out")
    assert "34 prompts as chat template" in read["metadata"]["positive"]
    said = run(*folder.command("--force")).stdout
    assert f"{found['best']} tells the classes apart" in said and "plan" in said


@pytest.mark.parametrize("method", ["mean-difference", "ace", "leace"])
def test_the_hooks_of_the_recipe_move_the_class(method: str, folder: Folder) -> None:
    """On the live model, at the site that was chosen, the prompts that were fitted."""
    paths = folder.path / "sun.txt", folder.path / "sea.txt"
    asked = FitRequest(positive=paths[0], negative=paths[1], concept="sun", method=method)
    found = fit_directions(open_model(folder.model), asked)
    edits = propose(found, folder.out).request.plan.reference
    live, site, part = load(open_checkpoint(folder.model), torch.float32), *_chosen(found)
    tokenizer = load_tokenizer(folder.model)

    def rows(edits: Sequence[Any]) -> tuple[Tensor, Tensor]:
        both = []
        for path, seen in zip(paths, (part.positive, part.negative), strict=True):
            with live.under(edits):
                texts = read_texts(path, tokenizer, Position.LAST)
                both.append(collect(live, texts, [site], Tally(1, None))[site][list(seen)].double())
        return both[0], both[1]

    (positive, negative), hooked = rows(()), rows(edits)
    gap = positive.mean(0) - negative.mean(0)
    if method == "mean-difference":
        assert near(hooked[1].mean(0), positive.mean(0), SINGLE)
        assert not near(negative.mean(0), positive.mean(0), 1e-2)
    elif method == "ace":
        wanted = negative.mean(0) @ gap
        assert near(torch.cat(hooked) @ gap, wanted.expand(len(torch.cat(hooked))), 1e-4)
        assert not near(positive @ gap, wanted.expand(len(positive)), 1e-2)
    else:
        left = (hooked[0].mean(0) - hooked[1].mean(0)).norm()
        assert float(left) <= 1e-4 * float(gap.norm())


def _chosen(found: FittedDirections) -> tuple[Site, Part]:
    return found.sweep.best.site, found.sweep.split.fit


def test_the_same_prompts_are_the_same_bytes(folder: Folder) -> None:
    options = ("--at", "attn_out.*", "--position", "mean", "--every-site", "--force")
    found = data_of(*folder.command(*options))
    once = folder.written()
    assert data_of("plan", folder.path / "c.toml")["plan"]["exactness"] == "exact"
    assert data_of(*folder.command(*options)) == found and folder.written() == once
    for other in (("--seed", "1"), ("--position", "last"), ("--method", "ace")):
        data_of(*folder.command(*options, *other))
        assert folder.written()["c.safetensors"] != once["c.safetensors"]


def test_the_example_of_the_page_runs(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "fit.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"## In Python\n\n```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(folder.path)
    code = code.replace("path/to/model", str(folder.model)).replace(".jsonl", ".txt")
    exec(code.replace("happy", "sun").replace("sad", "sea"))
    assert data_of("directions", "mood.safetensors")["concept"] == "mood"


def test_help_and_page_name_every_method() -> None:
    """The help is a text, since a list of functions would load torch."""
    (option,) = (one for one in command.params if one.name == "method")
    assert option.help.replace(" or ", ", ").rstrip(".").split(", ") == list(METHODS)
    page = (Path(__file__).parents[1] / "docs" / "fit.md").read_text(encoding="utf-8")
    assert re.findall(
        r"^\| `([a-z-]+)`(?: \(default\))? \|", page.partition("## Methods")[2], re.M
    ) == list(METHODS)


MISTAKES: dict[str, tuple[dict[str, str], tuple[object, ...], int, str]] = {
    "an empty file": ({"sun.txt": ""}, (), 4, "holds no prompts"),
    "a file of blanks": ({"sea.txt": "\n \n"}, (), 4, "holds no prompts"),
    "no file": ({}, ("--positive", "nowhere.txt"), 4, "cannot be read"),
    "one prompt": ({"sun.txt": "the sun"}, (), 4, "the positive class has 1 example"),
    "nine prompts": (
        {"sea.txt": "\n".join(f"sea {word}" for word in WORDS[:9])}, (), 4, "has 9 examples",
    ),
    "no chat": ({"sun.jsonl": '{"messages": []}'}, ("--positive", "sun.jsonl"), 4, "no list of"),
    "no JSON": ({"sun.jsonl": "sun"}, ("--positive", "sun.jsonl"), 4, "no JSON"),
    "an unknown method": ({}, ("--method", "lece"), 2, "did you mean 'leace'?"),
    "another": ({}, ("--method", "mean-diference"), 2, "did you mean 'mean-difference'?"),
    "an unknown position": ({}, ("--position", "lst"), 2, "did you mean 'last'?"),
    "an unknown site": ({}, ("--at", "resid_pst.1"), 2, "did you mean 'resid_post'?"),
    "a layer too far": ({}, ("--at", "resid_post.3"), 2, "the model has 3 blocks"),
    "a site that it lacks": ({}, ("--at", "ln1_post_out.1"), 2, "llama has no site"),
    "no word": ({}, ("--concept", "the sun"), 2, "is no word"),
    "another suffix": ({}, ("--out", "c.pt"), 2, "name a .safetensors file"),
    "no folder": ({}, ("--out", "nowhere/c.safetensors"), 2, "there is no folder"),
    "no picture": ({}, ("--plot", "c.pdf"), 2, "name a .png or .svg file"),
    "mixed": ({"x.npy": ""}, ("--negative", "x.npy"), 2, "one class is prompts"),
    "what is read": ({}, ("--negative", "c.safetensors"), 2, "to be read and to be written"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(
    case: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, options, code, words = MISTAKES[case]
    monkeypatch.chdir(folder.path)
    monkeypatch.setattr("bake.verify.models.load", lambda *_, **__: pytest.fail("it ran the model"))
    for name, text in files.items():
        (folder.path / name).write_text(text)
    before = folder.written()
    assert words in error_of(data_of(*folder.command(*options), code=code))
    assert folder.written() == before


def test_classes_that_are_one_are_refused(folder: Folder) -> None:
    same = data_of(*folder.command(negative="sun.txt"), code=2)
    assert "both classes hold the same prompts" in error_of(same)
    lines = (folder.path / "sun.txt").read_text().splitlines()
    (folder.path / "shuffled.txt").write_text("\n".join(reversed(lines)))
    same = data_of(*folder.command(negative="shuffled.txt"), code=2)
    assert "both classes hold the same prompts" in error_of(same)
    sea = (folder.path / "sea.txt").read_text()
    (folder.path / "both.txt").write_text(f"{sea}\n{lines[4]}")
    part = data_of(*folder.command(negative="both.txt"), code=4)
    assert "1 prompts are in both classes, first prompt 5 of sun.txt" in error_of(part)
    (folder.path / "plain.jsonl").write_text(
        "\n".join(json.dumps({"text": line}) for line in sea.splitlines())
    )
    form = data_of(*folder.command(negative="plain.jsonl"), code=4)
    assert "one class is chat template and the other plain text" in error_of(form)


def test_what_is_there_stays(folder: Folder) -> None:
    for name in ("c.safetensors", "c.toml"):
        (folder.path / name).write_text("mine")
        found = error_of(data_of(*folder.command(), code=2))
        assert f"{name} exist" in found and "--force" in found
        assert (folder.path / name).read_text() == "mine"
        (folder.path / name).unlink()


def test_words_that_mean_nothing_are_not_proposed(folder: Folder) -> None:
    """The classes differ in the order of their lines alone: the first half against the second."""
    lines = (folder.path / "sun.txt").read_text().splitlines()
    shuffled = sorted(lines, key=lambda line: hash(tuple(map(ord, line))) % 1009)
    for name, part in (("a", shuffled[:17]), ("b", shuffled[17:])):
        (folder.path / f"{name}.txt").write_text("\n".join(part))
    before = folder.written()
    found = data_of(*folder.command(positive="a.txt", negative="b.txt"), code=1)
    assert "nothing tells the classes apart better than chance" in error_of(found)
    assert not found["separates"] and found["written"] == []
    assert folder.written() == before
    said = run(*folder.command(positive="a.txt", negative="b.txt"))
    assert said.exit_code == 1 and "nothing was written" in said.stderr


def test_a_model_without_a_tokenizer_is_told_what_else_there_is(
    folder: Folder, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    tiny.write_checkpoint(tiny.make_model("llama", dtype=torch.float32), bare)
    arguments = list(folder.command())
    arguments[1] = bare
    found = error_of(data_of(*arguments, code=4))
    assert "no tokenizer" in found and "save activations yourself" in found


@pytest.mark.parametrize("missing", ["leace", "orthogonal"])
def test_a_method_whose_package_is_missing_says_so_at_once(
    missing: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bake.fit.methods.find_spec", lambda name: None)
    monkeypatch.setattr("bake.verify.models.load", lambda *_, **__: pytest.fail("it ran the model"))
    found = error_of(data_of(*folder.command("--method", missing), code=2))
    assert "concept-erasure" in found and "bake-directions[fit]" in found


def test_where_the_model_runs(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with room takes it by itself; what is said counts; large models are streamed."""
    asked: list[tuple[bool, str | None]] = []

    class Asked(Exception):
        """It is known, and need not be done."""

    def load_(checkpoint: Any, dtype: torch.dtype, **options: Any) -> Any:
        asked.append((options["streamed"], options["device_map"]))
        raise Asked

    monkeypatch.setattr("bake.verify.models.load", load_)
    for gpu, large, options, wanted in (
        (False, False, (), (False, None)),
        (True, True, (), (False, "cuda")),
        (True, False, ("--device", "cpu"), (False, "cpu")),
        (False, True, (), (True, None)),
        (False, True, ("--no-stream",), (False, None)),
        (True, False, ("--stream",), (True, None)),
    ):
        monkeypatch.setattr("bake.verify.memory.fits_gpu", lambda *_, gpu=gpu: gpu)
        monkeypatch.setattr("bake.verify.memory.too_large", lambda _, large=large: large)
        with pytest.raises(Asked):
            run(*folder.command(*options))
        assert asked.pop() == wanted
