"""What ``bake plan`` prints of runtimes and carriers, on a terminal and as JSON."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from commands import run, write_recipe

from bake.artifact import CARRIERS
from bake.families import RUNTIMES

Plan = Callable[..., Result]


@pytest.fixture
def plan(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Plan:
    """Return a function that plans one edit of a tiny model for some carriers."""

    def planned(
        family: str, kind: str, at: str, to: list[str], *args: str, **options: Any
    ) -> Result:
        model, more = tiny_checkpoint(family, **options), f"[export]\nto = {json.dumps(to)}\n"
        recipe = write_recipe(tmp_path, model, kind=kind, at=at, more=more)
        return run("plan", recipe, *args, "-v", columns=200)

    return planned


def section(text: str, title: str) -> str:
    found = re.search(rf"(?ms)^{title}.*?(?=^\w[^\n]*\n[^\n]*\n─|^Notes|^plan )", text)
    assert found is not None, text
    return found[0]


def test_one_carrier_has_the_reasons_beside_its_verdicts(plan: Plan) -> None:
    result = plan("qwen3", "offset", "attn_out.1", ["checkpoint"], attention_bias=False)
    assert result.exit_code == 0
    shown = section(result.stdout, "Runtimes: checkpoint")
    rows = [line.split()[0] for line in shown.splitlines()[3:] if line]
    assert rows == list(RUNTIMES)
    assert re.search(r"vllm +refused +no +it silently drops model\.layers\.1\.self_attn", shown)
    assert re.search(r"sglang +not tested +no +read, not run \(SGLang srt/models/qwen3\.py", shown)


def test_several_carriers_make_a_matrix_with_its_reasons_below(plan: Plan) -> None:
    to = ["checkpoint", "lora", "gguf"]
    result = plan("gemma2", "ablate", "mlp_out.1", to, "--target", "vLLM", attention_bias=False)
    assert result.exit_code == 0
    shown = section(result.stdout, "Runtimes: checkpoint, lora, gguf")
    assert re.search(r"runtime +target +checkpoint +lora +gguf\n", shown)
    assert re.search(r"transformers +no +exact +exact +not tested\n", shown)
    assert re.search(r"vllm +yes +exact +exact +–\n", shown)
    assert re.search(r"llama\.cpp +no +exact +– +exact\n", shown)
    assert re.search(r"mlx-lm +no +not tested +– +–\n", shown)
    assert shown.rstrip().endswith(" - –: the runtime reads other files than these")
    assert "refused" not in shown
    # A reason is said once, with every place that it is for.
    assert "\n - checkpoint in sglang; lora in sglang: not tested: read, not run (SGLang" in shown
    assert re.search(r"gguf in ollama: not tested: read, not run \(it starts llama\.cpp;", shown)
    carriers = section(result.stdout, "Carriers")
    assert re.search(
        r"lora +exact +exact: transformers, peft, vllm; not tested: sglang\n", carriers
    )
    assert re.search(r"control-vector +impossible +a control vector adds a constant", carriers)


def test_a_runtime_that_reads_other_files_is_not_said_to_refuse_these(plan: Plan) -> None:
    shown = plan("llama", "ablate", "ln2_out.1", ["gguf"]).stdout
    assert re.search(r"\nmlx-lm +– +no +reads other files: it writes GGUF files and reads n", shown)
    assert re.search(r"\nsglang +not tested +no +it has a reader of GGUF files, which was", shown)
    result = plan("llama", "ablate", "ln2_out.1", ["gguf", "lora"], "--target", "vllm")
    assert result.exit_code == 0
    assert re.search(r"\nvllm +yes +– +exact\n", result.stdout)
    result = plan("llama", "ablate", "ln2_out.1", ["gguf"], "--target", "vllm")
    assert result.exit_code == 2
    assert "vllm is a target, and reads no gguf" in result.output


def test_why_a_carrier_cannot_hold_the_edit_is_said_once(plan: Plan) -> None:
    to = ["checkpoint", "lora", "gguf-lora", "control-vector", "gguf"]
    for chosen in (["checkpoint"], to):
        result = plan(
            "llama", "offset", "resid_post.1", chosen, attention_bias=False, mlp_bias=False
        )
        text = " ".join(result.stdout.split())
        because = "an adapter holds no bias that runtimes take"
        assert text.count(because) == 1
        assert re.search(r"\ngguf-lora +impossible +as lora\n", result.stdout)
    assert re.search(r"vllm +no +\w+ +refused +– +– +–\n", result.stdout)
    assert "gguf-lora in llama.cpp, ollama: refused: cannot hold the edit: see Carriers" in text


def test_json_has_every_carrier_and_runtime(plan: Plan) -> None:
    result = plan("llama", "ablate", "ln2_out.1", ["lora"], "--json", "--target", "sglang")
    content = json.loads(result.stdout)
    assert list(content["carriers"]) == list(CARRIERS)
    for found in content["carriers"].values():
        assert [entry["runtime"] for entry in found["runtimes"]] == list(RUNTIMES)
        assert all(entry["reason"] for entry in found["runtimes"])
        assert {entry["runtime"] for entry in found["runtimes"] if entry["wanted"]} == {"sglang"}
    assert content["carriers"]["checkpoint"]["runtimes"] == content["plan"]["runtimes"]
    # The tiny Llama has biases in its MLP, which SGLang drops: the adapter's base is another model.
    assert result.exit_code == 3
    assert "silently drops" in content["error"]["why"]


def test_a_plan_says_what_an_adapter_of_a_tied_head_goes_over(plan: Plan) -> None:
    options = {"attention_bias": False, "mlp_bias": False}
    note = "gguf-lora goes over a copy of the base's GGUF (--gguf) in which the tied head is a"
    tied = plan("llama", "ablate", "resid", ["gguf-lora"], tied=True, **options)
    assert note in " ".join(tied.stdout.split())
    for other in (
        plan("llama", "ablate", "resid", ["gguf-lora"], tied=False, **options),
        plan("llama", "ablate", "mlp_out.1", ["gguf-lora"], tied=True, **options),
    ):
        assert other.exit_code == 0 and "gguf-lora goes" not in other.stdout
