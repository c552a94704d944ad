"""The command line: what it prints, what it writes, and with which exit code it ends."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from commands import RecipeFolder, run, write_recipe
from rich.text import Text
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, make_model, write_checkpoint

from bake import __version__, errors
from bake.cli import COMMANDS, main
from bake.cli.render import pieces, results, screen, tensors
from bake.errors import BakeError
from bake.sites import parse_site
from bake.verify.report import Headline, Report
from bake.verify.rows import Row

FAMILIES = Path(__file__).parent.parent / "bake" / "families"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what a developer's terminal says of itself."""
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


Folders = Callable[..., RecipeFolder]


@pytest.fixture
def folder_of(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Folders:
    def make(family: str = "llama", **options: Any) -> RecipeFolder:
        base = tiny_checkpoint(family, **options)
        return RecipeFolder(tmp_path, write_recipe(tmp_path, base, family=family), base)

    return make


# --- help and start-up -------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], *[[name] for name in COMMANDS]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from bake.cli import main\n"
        f"main({[*arguments, '--help']!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'huggingface_hub', 'safetensors'}\n"
        "sys.exit(repr(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_help_names_every_command_in_one_line() -> None:
    result = CliRunner().invoke(main, ["--help"], terminal_width=80)
    listed = result.stdout[result.stdout.index("Commands:") :]
    assert re.findall(r"^  ([a-z]+) ", listed, re.MULTILINE) == list(COMMANDS)
    assert "..." not in listed
    assert CliRunner().invoke(main, ["--version"]).stdout == f"bake, version {__version__}\n"


def test_an_unknown_command_names_the_nearest() -> None:
    result = CliRunner().invoke(main, ["pla"])
    assert result.exit_code == 2
    assert "there is no command 'pla'" in result.stderr
    assert "did you mean 'plan'?" in result.stderr


def test_a_terminal_is_told_at_once_what_is_begun(folder_of: Folders) -> None:
    """Before torch is imported; the line gives way to what follows, and a pipe has none."""
    made = folder_of()
    master, slave = os.openpty()
    command = [sys.executable, "-m", "bake", "plan", str(made.recipe)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, cwd=root) as program:
        os.close(slave)
        first = os.read(master, 1 << 16)
        shown = program.communicate()[0]
        rest = os.read(master, 1 << 16)
    os.close(master)
    assert first == "bake plan …\r".encode() and b"exact" in shown
    assert rest == b"\x1b[2K\r"
    assert run("plan", made.recipe).stderr == ""


# --- plan --------------------------------------------------------------------------------------


def test_plan_says_what_changes_and_that_it_is_exact(folder_of: Folders) -> None:
    made = folder_of()
    before = made.listing()
    result = run("plan", made.recipe, "-v")
    assert result.exit_code == 0
    assert result.stderr == ""
    for fact in (
        "recipe  Mood (",
        "family  llama: Llama",
        "3 blocks, width 24",
        "ablate mood at resid (all 7 sites)",
        "Changes: 13 tensors edited",
        "model.layers.0-2.self_attn.o_proj.weight  3  24×32",
        "transformers  exact       yes",
        "peft          –           no",
        "vllm          exact       no",
        "mlx-lm        not tested  no",
        "plan    exact",
    ):
        assert fact in result.stdout
    assert f"({made.recipe})model{made.base}family" in tight(result.stdout)
    assert made.listing() == before


def test_a_verbose_plan_lists_every_tensor_that_the_json_has(folder_of: Folders) -> None:
    made = folder_of()
    data = json.loads(run("plan", made.recipe, "--json").stdout)
    names = [update["name"] for key in ("tensors", "biases") for update in data["plan"][key]]
    assert len(names) == 13
    table = run("plan", made.recipe, "-vv").stdout
    for name in names:
        assert f"\n{name} " in table
    assert data["plan"]["exactness"] == "exact"
    assert data["plan"]["digest"] in table
    assert data["recipe"]["text"] == made.recipe.read_text(encoding="utf-8")
    assert data["base"]["model"] == str(made.base)
    assert list(data["directions"]) == ["mood"]


def test_a_plan_that_is_impossible_exits_with_three(folder_of: Folders) -> None:
    made = folder_of()
    made.rewrite('"resid"', '"resid_post.1"')
    assert run("plan", made.recipe).stdout == ""  # the error says it all
    result = run("plan", made.recipe, "-v")
    assert result.exit_code == 3
    assert "impossible  ablate mood at resid_post.1" in result.stdout
    assert "error: cannot ablate 'mood' at resid_post.1: impossible" in result.stderr
    data = json.loads(run("plan", made.recipe, "--json").stdout)
    assert data["plan"]["exactness"] == "impossible"
    assert data["error"]["type"] == "InexactPlan"
    assert data["error"]["exit_code"] == 3


def test_what_is_allowed_exits_with_zero(folder_of: Folders) -> None:
    made = folder_of("gemma2")
    assert run("plan", made.recipe).exit_code == 3
    result = run("plan", made.recipe, "--allow", "nulling", "-v")
    assert result.exit_code == 0
    assert "nulling    ablate mood" in result.stdout
    assert "plan    nulling" in result.stdout
    made.recipe.write_text(made.recipe.read_text() + '[export]\nallow = ["nulling"]\n')
    assert run("plan", made.recipe).exit_code == 0


def test_a_wanted_runtime_that_refuses_exits_with_three(folder_of: Folders) -> None:
    made = folder_of("gemma2")
    made.rewrite('"resid"', '"embed"')
    assert run("plan", made.recipe).exit_code == 0
    result = run("plan", made.recipe, "--target", "vllm", "-v")
    assert result.exit_code == 3
    assert re.search(r"\nvllm +refused +yes +it refuses an output head", result.stdout)
    assert "the target vllm would not serve this checkpoint as it is meant" in result.stderr


def test_a_recast_shows_the_family_of_the_base(folder_of: Folders) -> None:
    made = folder_of("qwen2")
    made.rewrite('"ablate"', '"offset"')
    made.rewrite('"resid"', '["attn_out.*", "mlp_out.*"]')
    refused = run("plan", made.recipe, "-v")
    assert refused.exit_code == 3
    # one row for all layers
    assert flat(refused.stdout).count("model.layers.0-2.mlp.down_proj is built without bias") == 1
    result = run("plan", made.recipe, "--allow", "recast", "-v")
    assert result.exit_code == 0
    assert "family  qwen2: Qwen2" in result.stdout
    assert '["Qwen2ForCausalLM"]' in result.stdout and '["LlamaForCausalLM"]' in result.stdout
    assert re.search(r"model\.layers\.0-2\.mlp\.up_proj\.bias +3 +40 .* new, zeros", result.stdout)


def test_another_model_may_be_named(
    folder_of: Folders, tiny_checkpoint: Callable[..., Path]
) -> None:
    made = folder_of()
    other = tiny_checkpoint("qwen3")
    result = run("plan", made.recipe, "--model", other, "-v")
    assert result.exit_code == 0
    assert f"model{other}family" in tight(result.stdout)
    assert "family  qwen3" in result.stdout


def test_a_table_of_the_users_own(folder_of: Folders) -> None:
    made = folder_of()
    text = (FAMILIES / "llama.toml").read_text(encoding="utf-8")
    own = made.folder / "own.toml"
    own.write_text(text.replace('title = "Llama,', 'title = "My own,'), encoding="utf-8")
    assert "family  llama: My own," in run("plan", made.recipe, "--family", own, "-v").stdout
    own.write_text(text.replace("LlamaForCausalLM", "OtherForCausalLM"), encoding="utf-8")
    result = run("plan", made.recipe, "--family", own)
    assert result.exit_code == 4
    assert "is for OtherForCausalLM, " in flat(result.stderr)
    assert "and the model is a LlamaForCausalLM" in flat(result.stderr)
    own.write_text(text.replace("[embed]", "[embde]"), encoding="utf-8")
    assert "the key 'embed' is missing" in run("plan", made.recipe, "--family", own).stderr


def flat(text: str) -> str:
    """Undo the wrapping of a message."""
    return re.sub(r"\s+", " ", text)


def tight(text: str) -> str:
    """Return a text without its spaces, which also undoes the breaks in a long path."""
    return re.sub(r"\s+", "", text)


# --- how it looks ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_tables_fit_their_width_and_cut_nothing_off(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch, width: int, family: str
) -> None:
    made = folder_of(family)
    made.rewrite('"ablate"', '"affine"')
    wide = run("plan", made.recipe, "-vv").stdout
    monkeypatch.setenv("COLUMNS", str(width))
    text = run("plan", made.recipe, "-vv").stdout
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text and "..." not in text
    assert all(line == line.rstrip() for line in text.splitlines())

    def letters(shown: str) -> list[str]:
        return sorted(re.sub(r"[\s─]", "", shown))

    assert letters(text) == letters(wide)


def test_a_pipe_gets_no_colours_and_a_terminal_does(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = folder_of()
    assert "\x1b[" not in run("plan", made.recipe).stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1;32mexact" in run("plan", made.recipe).stdout


def test_brackets_in_a_message_are_no_markup(folder_of: Folders) -> None:
    made = folder_of()
    made.rewrite('at = "resid"', 'at = "resid"\nbold = 1')
    assert "recipe.toml[[edits]]1" in tight(run("plan", made.recipe).stderr)


def test_quiet_prints_nothing_but_errors(folder_of: Folders) -> None:
    made = folder_of()
    result = run("plan", made.recipe, "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    made.rewrite('"resid"', '"resid_post.1"')
    result = run("plan", made.recipe, "-q")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "cannot ablate 'mood'" in result.stderr
    assert run("plan", made.recipe, "-q", "-v").exit_code == 2


def test_control_characters_of_others_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A title of somebody else's artifact moves no cursor and turns no line around."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = "a\x1b[2J\x1b]0;b\x07\x9b31m\u202ec\td\ne"
    console = screen.console()
    with console.capture() as captured:
        console.print(pieces.facts([("title", text)]), Text(text), text, pieces.word("exact"))
    said = captured.get()
    assert "a[2J]0;b31mc" in said
    assert set(re.findall(r"\x1b\[?", said)) == {"\x1b["}, "the colours of bake itself stay"
    assert not set("\x07\x9b\u202e") & set(said) and "\x1b[2J" not in said


def test_numbers_in_few_words() -> None:
    assert pieces.size(576) == "576 B" and pieces.size(1_200_000_000) == "1.2 GB"
    sites = [parse_site(text) for text in ("z.0.h1", "z.1.h1", "embed", "resid_post.3")]
    assert pieces.site_list(sites) == "z.0-1.h1, embed, resid_post.3"


def test_texts_are_merged_only_where_that_says_no_more() -> None:
    grid = [f"layers.{layer}.experts.{expert}.w1" for layer in (0, 1) for expert in (0, 1, 2)]
    assert tensors.merged(grid) == "layers.0-1.experts.0-2.w1"
    assert tensors.merged(grid[:-1]) is None
    assert tensors.merged(["mlp.3 after mid.3", "mlp.4 after mid.4"]) == "mlp.3-4 after mid.3-4"
    assert tensors.merged(["error 1.25 at 0", "error 1.50 at 1"]) is None
    assert tensors.merged(["the same", "the same"]) == "the same"


# --- export ------------------------------------------------------------------------------------


def test_export_writes_the_checkpoint_that_the_plan_names(folder_of: Folders) -> None:
    made = folder_of()
    out = made.folder / "out"
    result = run("export", made.recipe, "--out", out, "-vv")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert f"written{out}carriercheckpointsize" in tight(result.stdout)
    record = json.loads((out / "bake.json").read_text(encoding="utf-8"))
    assert record["plan"]["digest"] in result.stdout
    assert record["recipe"]["text"] == made.recipe.read_text(encoding="utf-8")
    assert (out / record["base"]["path"]).resolve() == made.base.resolve()
    assert record["directions"]["mood"]["digest"].startswith("sha256:")
    base, baked = (load_file(path / "model.safetensors") for path in (made.base, out))
    changed = {name for name in base if not torch.equal(base[name], baked[name])}
    assert changed == {
        update["name"] for key in ("tensors", "biases") for update in record["plan"][key]
    }
    vector = torch.from_numpy(np.load(made.folder / "mood.npy"))
    leak = vector @ baked["model.layers.1.mlp.down_proj.weight"]
    assert float(leak.abs().max()) < 1e-12
    assert float((vector @ base["model.layers.1.mlp.down_proj.weight"]).abs().max()) > 0.1
    edited = sum(base[name].nbytes for name in changed)
    assert f"edited   {edited:,} bytes of tensors" in result.stdout


def test_a_dry_run_writes_nothing(folder_of: Folders) -> None:
    made = folder_of()
    before = made.listing()
    result = run("export", made.recipe, "--out", made.folder / "out", "--dry-run")
    assert result.exit_code == 0
    assert "dry run:" in result.stdout
    data = run("export", made.recipe, "--out", made.folder / "out", "--dry-run", "--json")
    assert json.loads(data.stdout)["dry_run"] is True
    assert made.listing() == before
    made.rewrite('"resid"', '"resid_post.1"')
    result = run("export", made.recipe, "--out", made.folder / "out", "--dry-run")
    assert result.exit_code == 3


def test_export_as_json_prints_one_object(folder_of: Folders) -> None:
    made = folder_of()
    result = run("export", made.recipe, "--out", made.folder / "out", "--json")
    data = json.loads(result.stdout)
    assert result.stderr == ""
    assert (data["kind"], data["path"]) == ("checkpoint", str(made.folder / "out"))
    assert set(data["files"]) >= {"bake.json", "config.json", "model.safetensors"}
    quiet = run("export", made.recipe, "--out", made.folder / "quiet", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    assert (made.folder / "quiet" / "model.safetensors").is_file()


def test_nothing_existing_is_overwritten_without_force(folder_of: Folders) -> None:
    made = folder_of()
    out = made.folder / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    before = made.listing()
    result = run("export", made.recipe, "--out", out)
    assert result.exit_code == 2
    assert f"{out}existsandisnotempty" in tight(result.stderr)
    assert "use --force" in result.stderr
    assert made.listing() == before
    assert (out / "config.json").read_text() == "mine"
    # Nor with it, unless bake wrote what is there.
    result = run("export", made.recipe, "--out", out, "--force")
    assert result.exit_code == 2 and "wasnotwrittenbybake" in tight(result.stderr)
    assert made.listing() == before
    (out / "bake.json").write_text("{}")
    assert run("export", made.recipe, "--out", out, "--force").exit_code == 0
    assert (out / "bake.json").is_file()
    (made.folder / "file").write_text("mine")
    result = run("export", made.recipe, "--out", made.folder / "file", "--force")
    assert result.exit_code == 2
    assert (made.folder / "file").read_text() == "mine"


def test_progress_is_told_in_bytes_on_a_terminal_only(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = folder_of()
    assert run("export", made.recipe, "--out", made.folder / "pipe").stderr == ""
    total = (made.folder / "pipe" / "model.safetensors").stat().st_size
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    shown = Text.from_ansi(
        run("export", made.recipe, "--out", made.folder / "terminal").stderr
    ).plain
    assert "writing terminal" in shown
    assert f"{total / 1000:.1f}/{total / 1000:.1f} kB" in shown
    quiet = run("export", made.recipe, "--out", made.folder / "quiet", "-q")
    assert quiet.stderr == ""


def test_a_refused_plan_writes_nothing(folder_of: Folders) -> None:
    made = folder_of()
    made.rewrite('"resid"', '"resid_post.1"')
    before = made.listing()
    result = run("export", made.recipe, "--out", made.folder / "deep" / "out", "-v")
    assert result.exit_code == 3
    assert "impossible  ablate mood at resid_post.1" in result.stdout
    assert "error: cannot ablate 'mood' at resid_post.1" in result.stderr
    data = json.loads(run("export", made.recipe, "--out", made.folder / "out", "--json").stdout)
    assert data["error"]["exit_code"] == 3
    assert data["plan"]["findings"][0]["exactness"] == "impossible"
    assert made.listing() == before


def test_an_interrupted_export_says_what_it_kept(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    made = folder_of()
    sharded = made.folder / "sharded"
    write_checkpoint(make_model("llama"), sharded, max_shard_size="60KB")
    made.rewrite(str(made.base), str(sharded))
    out = made.folder / "out"
    real = screen.progress

    @contextmanager
    def interrupting(label: str, *, visible: bool = True, unit: str | None = None) -> Any:
        def move(done: int, total: int) -> None:
            if done > limit * total:
                raise KeyboardInterrupt

        yield move

    monkeypatch.setattr(screen, "progress", interrupting)
    limit = -1.0  # when 0 bytes are said, before a worker begins
    result = run("export", made.recipe, "--out", out, "-q")
    assert result.exit_code == 130
    assert result.stderr == "\ninterrupted: nothing was written\n"
    assert not out.exists()
    limit = 0.9
    result = run("export", made.recipe, "--out", out, "-q")
    assert result.exit_code == 130
    assert f"interrupted: {out} was not written" in result.stderr
    assert str(made.folder / ".out.bake-partial") in result.stderr
    assert not out.exists()
    monkeypatch.undo()
    assert screen.progress is real
    assert run("export", made.recipe, "--out", out, "-q").exit_code == 0
    assert not (made.folder / ".out.bake-partial").exists()
    whole = made.folder / "whole"
    assert run("export", made.recipe, "--out", whole, "-q").exit_code == 0
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (whole / path.name).read_bytes()


# --- verify ------------------------------------------------------------------------------------


def test_verify_passes_what_export_wrote_and_fails_what_was_changed_since(
    folder_of: Folders,
) -> None:
    made = folder_of()
    out = made.folder / "out"
    assert run("export", made.recipe, "--out", out, "-q").exit_code == 0
    result = run("verify", out)
    assert result.exit_code == 0
    assert "verification  passed" in result.stdout
    assert "base and hooked model" in result.stderr
    assert "lost" in result.stdout and "to float" in result.stdout
    weights = load_file(out / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    result = run("verify", out, "--no-plots")
    assert result.exit_code == 1
    assert "verification  failed" in result.stdout
    assert "FAIL" in run("verify", out, "--no-plots", "-v").stdout
    assert "was changed after the export (changed: model.safetensors)" in flat(result.stderr)
    data = json.loads(run("verify", out, "--no-plots", "--json").stdout)
    assert data["passed"] is False
    assert data["error"]["exit_code"] == 1


def test_verify_needs_an_artifact_and_its_base(
    folder_of: Folders, tiny_checkpoint: Callable[..., Path]
) -> None:
    made = folder_of()
    result = run("verify", made.base)
    assert result.exit_code == 4
    assert "this is no artifact of bake" in flat(result.stderr)
    out = made.folder / "out"
    assert run("export", made.recipe, "--out", out, "-q").exit_code == 0
    result = run("verify", out, "--base", tiny_checkpoint("qwen3"))
    assert result.exit_code == 4
    assert "is not the base that the artifact was made from" in flat(result.stderr)
    (made.folder / "prompts.txt").write_text("Once upon a time\n")
    result = run("verify", out, "--prompts", made.folder / "prompts.txt")
    assert result.exit_code == 4
    assert "there is no tokenizer that transformers loads" in flat(result.stderr)
    result = run("verify", out, "--prompts", made.folder / "absent.txt")
    assert "the prompts cannot be read" in flat(result.stderr)
    (made.folder / "prompts.txt").write_text("\n\n")
    result = run("verify", out, "--prompts", made.folder / "prompts.txt")
    assert "the file holds no prompt" in flat(result.stderr)


def test_prompts_reach_the_comparison_as_the_file_they_are_in(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading and tokenising them is the library's: its tests have every kind of file."""
    from bake.jobs import verifying
    from bake.verify import compare

    made = folder_of()
    seen: dict[str, Any] = {}
    report = Report("out", "base", "sha256:0", "exact", "F64", (Row("a", 0.0, 1.0, True),), {})
    monkeypatch.setattr(verifying, "planned_of", lambda source, asked: None)
    monkeypatch.setattr(
        compare, "compare", lambda asked, _: seen.update(prompts=asked.prompts) or report
    )
    texts = made.folder / "prompts.txt"
    run("verify", made.export(), "--prompts", texts)
    assert seen["prompts"] == texts


def test_a_report_shows_every_number() -> None:
    rows = (
        Row("effect", 1.5, 1e-13, True, "must be larger", "effect"),
        Row("difference", 2e-3, 1e-6, False, "", "plan"),
        Row("number", 0.25, None, None),
    )
    headline = Headline(1.25, 0.03, 0.01, "bfloat16")
    report = Report(
        "out", "base", "sha256:0", "exact", "BF16", rows, {"torch": "2"}, headline=headline
    )
    target = screen.console()
    with target.capture() as captured:
        target.print(*results.report(report), sep="\n")
    text = captured.get()
    assert re.search(r"effect +1\.5 +1\.00e-13 +pass +must be larger", text)
    assert re.search(r"difference +0\.002 +1\.00e-06 +FAIL", text)
    # A number that nothing is demanded of has no verdict.
    assert re.search(r"number +0\.25 +– ", text)
    assert "verification  failed" in text
    assert "effect 1.25 nats a token, lost 3 % to bfloat16 (floor 1 %)" in text
    assert re.search(r"Is the plan right on this model\? +failed", text)


# --- directions and families -------------------------------------------------------------------


def test_directions_says_what_an_artifact_holds(tmp_path: Path) -> None:
    np.save(tmp_path / "stack.npy", np.array([[3.0, 4.0], [4.0, -3.0]]))
    run = CliRunner().invoke
    result = run(main, ["directions", str(tmp_path / "stack.npy"), "--shape", "layers"])
    assert result.exit_code == 0
    assert re.search(r"\n +0 +vector +2 +float64 +5\n", result.stdout)
    assert re.search(r"\n +1 +vector +2 +float64 +5 +\+0\.000\n", result.stdout)
    arguments = ["directions", str(tmp_path / "stack.npy"), "--shape", "subspace"]
    assert "5, 5" in run(main, arguments).stdout
    data = json.loads(run(main, [*arguments, "--json"]).stdout)
    assert (data["width"], data["format"]) == (2, "npy")
    assert data["rows"][0]["singular_values"] == pytest.approx([5, 5])
    result = run(main, ["directions", str(tmp_path / "stack.npy")])
    assert result.exit_code == 4
    assert 'set shape = "subspace" or shape = "layers"' in flat(result.stderr)
    assert run(main, ["directions", str(tmp_path / "absent.pt")]).exit_code == 4
    assert run(main, ["directions", "hf://owner/name"]).exit_code == 2


def test_families_lists_the_tables() -> None:
    result = CliRunner().invoke(main, ["families"])
    for family in CONFIGS:
        assert f"\n{family} " in result.stdout
    listed = json.loads(CliRunner().invoke(main, ["families", "--json"]).stdout)["families"]
    assert {table["family"] for table in listed} == set(CONFIGS)


def test_families_checks_a_model_against_its_table(folder_of: Folders) -> None:
    made = folder_of("gemma2")
    result = run("families", made.base)
    assert result.exit_code == 0
    assert "47 claimed, 0 left as they are" in result.stdout
    assert "ln2_post_out.0-2" in result.stdout
    assert re.search(
        r"self_attn\.o_proj +present +attention_bias +transformers, vllm, sglang\n", result.stdout
    )
    assert re.search(r"mlp\.down_proj +never\n", result.stdout)
    data = json.loads(run("families", made.base, "--json").stdout)
    assert (data["family"], data["tied"], data["untouched"]) == ("gemma2", True, [])
    # A table that does not know one of the model's tensors does not fit.
    own = made.folder / "own.toml"
    text = (FAMILIES / "gemma2.toml").read_text(encoding="utf-8")
    row = '    { module = "mlp.up_proj", sites = ["mlp_up"], bias = "never" },\n'
    assert row in text
    own.write_text(text.replace(row, "").partition("[gguf]")[0], encoding="utf-8")
    result = run("families", made.base, "--family", own)
    assert result.exit_code == 4
    assert "mlp.up_proj.weight is not in the table" in flat(result.stderr)


# --- bad input ---------------------------------------------------------------------------------


def spoil_config(base: Path, **changes: Any) -> Path:
    """Return a copy of a checkpoint with another config."""
    import shutil

    copy = base.parent / f"{base.name}-spoiled"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    ("spoil", "code", "fragments"),
    [
        (
            lambda b: b.rewrite("direction =", "directon ="),
            2,
            ["the key 'direction' is missing", "[[edits]] 1", "did you mean 'direction' by"],
        ),
        (lambda b: b.rewrite("[base]", "[base"), 2, ["the recipe is not valid TOML"]),
        (lambda b: b.recipe.unlink(), 4, ["the recipe cannot be read: No such file"]),
        (lambda b: b.rewrite('"resid"', '"resid_pots.1"'), 2, ["did you mean 'resid_post'?"]),
        (
            lambda b: b.rewrite('"resid"', '"attn_out.3"'),
            2,
            ["names layer 3, but the model has 3 blocks", "count from 0 to 2"],
        ),
        (
            lambda b: b.rewrite('"resid"', '"z.0"'),
            4,
            ["direction 'mood' has width 24 but z.0 has width 32", "name a site of that width"],
        ),
        (
            lambda b: np.save(b.folder / "mood.npy", np.full(24, np.nan)),
            4,
            ["mood.npy", "24 values that are not finite"],
        ),
        (lambda b: np.save(b.folder / "mood.npy", np.zeros(24)), 4, ["is zero", "fit it again"]),
        (
            lambda b: (b.folder / "mood.npy").write_bytes(b"\x93NUMPY"),
            4,
            ["mood.npy"],
        ),
        (lambda b: (b.folder / "mood.npy").unlink(), 4, ["mood.npy", "no such file or folder"]),
        (
            lambda b: b.rewrite(str(b.base), str(b.folder / "absent")),
            4,
            ["does not exist; a checkpoint is a folder"],
        ),
        (
            lambda b: b.rewrite(
                str(b.base), str(spoil_config(b.base, architectures=["FooForCausalLM"]))
            ),
            4,
            ["bake has no family table for FooForCausalLM", "bring one with --family FILE"],
        ),
        (
            lambda b: b.rewrite(str(b.base), str(spoil_config(b.base, quantization_config={}))),
            4,
            ["the weights are quantised by 'None'", "name the unquantised base instead"],
        ),
        (
            lambda b: b.rewrite("[[edits]]", '[export]\nallow = ["recasts"]\n[[edits]]'),
            2,
            ["allow holds 'recasts'", "did you mean 'recast'?"],
        ),
    ],
)
@pytest.mark.parametrize("command", ["plan", "export"])
def test_bad_input_says_what_and_leaves_nothing(
    folder_of: Folders,
    command: str,
    spoil: Callable[[RecipeFolder], object],
    code: int,
    fragments: list[str],
) -> None:
    made = folder_of()
    spoil(made)
    before = made.listing()
    arguments = [command, made.recipe]
    if command == "export":
        arguments += ["--out", made.folder / "out"]
    result = run(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    for fragment in fragments:
        assert tight(fragment) in tight(result.stderr)
        assert fragment in told(run(*arguments, "--json"))
    error = json.loads(run(*arguments, "--json").stdout)["error"]
    assert error["exit_code"] == code
    assert error["what"]
    assert made.listing() == before


def told(result: Result) -> str:
    """Return an error as one line: where, what, why and fix."""
    error = json.loads(result.stdout)["error"]
    assert result.stderr == ""
    return f"{error['what']} {error['where']} {error['why']} {error['fix']}"


def test_a_wrong_option_is_json_too(folder_of: Folders) -> None:
    made = folder_of()
    result = run("plan", made.recipe, "--jsonn")
    assert result.exit_code == 2
    assert "error: No such option '--jsonn'" in result.stderr and "--json" in result.stderr
    result = run("plan", made.recipe, "--json", "--no-such")
    assert result.exit_code == 2
    assert result.stderr == ""
    assert "No such option '--no-such'" in json.loads(result.stdout)["error"]["what"]
    assert run("export", made.recipe).exit_code == 2  # without --out


def subclasses(kind: type[BakeError]) -> list[type[BakeError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in subclasses(child))]


@pytest.mark.parametrize("kind", subclasses(BakeError))
def test_every_error_leaves_by_its_exit_code(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch, kind: type[BakeError]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("what", where="where [x]", why="why", fix="fix")

    made = folder_of()
    monkeypatch.setattr("bake.plan.compile.compile_plan", fail)
    result = run("plan", made.recipe)
    assert result.exit_code == kind.exit_code
    assert result.stderr == "error: what\nwhere: where [x]\n  why: why\n  fix: fix\n"
    data = json.loads(run("plan", made.recipe, "--json").stdout)
    assert data == {
        "error": {
            "type": kind.__name__,
            "what": "what",
            "where": "where [x]",
            "why": "why",
            "fix": "fix",
            "exit_code": kind.exit_code,
        }
    }


def test_what_the_machine_refuses_is_no_traceback_and_a_defect_is_one(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    made = folder_of()

    def fail_with(error: Exception) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("bake.outputs.write.prepare", fail)

    fail_with(OSError(errno.ENOSPC, "No space left on device", "/disk/file"))
    result = run("export", made.recipe, "--out", made.folder / "out", "-q")
    assert result.exit_code == errors.InputError.exit_code
    assert "the machine refuses: No space left on device" in result.stderr
    assert "/disk/file" in result.stderr
    fail_with(ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        run("export", made.recipe, "--out", made.folder / "out", "-q")
    fail_with(FileNotFoundError(errno.ENOENT, "No such file", "x"))
    with pytest.raises(FileNotFoundError):
        run("export", made.recipe, "--out", made.folder / "out", "-q")


def test_the_command_runs_as_a_process(folder_of: Folders) -> None:
    made = folder_of()
    code = "from bake.cli import main; main()"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(made.recipe), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["plan"]["exactness"] == "exact"


def test_a_verdict_has_its_colour() -> None:
    assert pieces.word("exact") == Text("exact", style="green")
    assert pieces.word("impossible").style == "red"
