"""What a table says of runtimes is read as strictly as the rest of it."""

import re
from importlib import resources

import pytest

from bake.errors import FamilyError
from bake.families import Family, parse_family

WHERE = "own.toml"
TEXT = (resources.files("bake.families") / "llama.toml").read_text(encoding="utf-8")
OLLAMA = re.search(r"(?ms)^\[runtime\.ollama\].*?(?=^\[)", TEXT)
RUN = re.search(r"(?ms)^\[run\].*?(?=^\[)", TEXT)
assert OLLAMA is not None and RUN is not None
SECTION = """[runtime.ollama]
source = "Ollama convert/convert_llama.go"
biases = ["self_attn.v_proj"]
extra_bias = "refused"
untied_head = true
"""


def with_section(section: str, run: str = "") -> Family:
    """Return the Llama table with another section of Ollama, and another [run]."""
    assert OLLAMA is not None and RUN is not None
    return parse_family(TEXT.replace(OLLAMA[0], section).replace(RUN[0], run), WHERE)


def refusal(section: str, run: str = "") -> FamilyError:
    with pytest.raises(FamilyError) as caught:
        with_section(section, run)
    assert caught.value.exit_code == 4
    return caught.value


def test_what_may_be_left_out() -> None:
    family = with_section(SECTION)
    found = family.runtimes["ollama"]
    assert found.checkpoint and found.untied_head
    assert (found.misplaced, dict(found.defaults)) == ((), {})
    assert (found.lora, found.control_vector) == (None, None)
    # Nobody has run anything of a table that does not say so.
    assert set(family.run.values()) == {()}
    assert family.run["vllm"] == ()


def test_a_runtime_that_loads_no_checkpoint_has_nothing_to_say_of_one() -> None:
    found = with_section('[runtime.ollama]\nsource = "x"\ncheckpoint = false\n').runtimes["ollama"]
    assert not found.checkpoint and found.biases == () and not found.untied_head
    error = refusal('[runtime.ollama]\nsource = "x"\ncheckpoint = false\nbiases = []\n')
    assert error.what == "unknown key 'biases'"


@pytest.mark.parametrize(
    ("old", "new", "what", "fix"),
    [
        ("runtime.ollama", "runtime.olama", "there is no runtime 'olama'", "'ollama'?"),
        ("runtime.ollama", "runtime.transformers", "there is no runtime 'transformers'", "vllm, "),
        ("runtime.ollama", "runtime.tgi", "there is no runtime 'tgi'", "known are vllm, "),
        ("biases", "bias", "the key 'biases' is missing", None),
        ('extra_bias = "refused"\n', "", "the key 'extra_bias' is missing", None),
        ("untied_head = true\n", "", "the key 'untied_head' is missing", None),
        # Where a head of its own is lost, the table has to say how.
        ("untied_head = true", "untied_head = false", "the key 'extra_head' is missing", None),
        (
            "untied_head = true",
            'untied_head = false\nextra_head = "lost"',
            "extra_head = 'lost' is not one of dropped, refused",
            None,
        ),
        (
            "untied_head = true",
            'untied_head = true\nextra_head = "dropped"',
            "unknown key 'extra_head'",
            "'extra_bias'?",
        ),
        (
            "untied_head = true",
            'untied_head = true\nmisplaced = ["q_proj"]',
            "misplaced names 'q_proj', which is no linear layer of the table",
            None,
        ),
        (
            "untied_head = true",
            "untied_head = true\nmisplaced = [1]",
            "misplaced = [1] is no list of texts",
            None,
        ),
        (
            "untied_head = true",
            "untied_head = true\ndefaults = 10000",
            "defaults = 10000 is no table",
            None,
        ),
        (
            "untied_head = true",
            'untied_head = true\nlora = ["layers"]',
            "lora = ['layers'] is no list of linear, expert, embed, positions, head",
            None,
        ),
        (
            "untied_head = true",
            'untied_head = true\ncheckpoint = "no"',
            "checkpoint = 'no' is no truth value",
            None,
        ),
    ],
)
def test_sections_that_are_refused(old: str, new: str, what: str, fix: str | None) -> None:
    assert old in SECTION
    error = refusal(SECTION.replace(old, new))
    assert error.what == what
    assert str(error.where).startswith(f"{WHERE} [runtime.")
    assert fix is None or fix in str(error.fix)


@pytest.mark.parametrize(
    ("run", "what", "fix"),
    [
        ('vllm = ["lora", "adapter"]', "is no list of checkpoint, lora, gguf-lora", None),
        ('vllm = "lora"', "vllm = 'lora' is no list of checkpoint", None),
        ('vlm = ["lora"]', "unknown key 'vlm'", "'vllm'?"),
    ],
)
def test_what_was_run_is_a_carrier_in_a_runtime(run: str, what: str, fix: str | None) -> None:
    assert with_section(SECTION, '[run]\nvllm = ["lora"]\n').run["vllm"] == ("lora",)
    error = refusal(SECTION, f"[run]\n{run}\n")
    assert what in error.what
    assert error.where == f"{WHERE} [run]"
    assert fix is None or fix in str(error.fix)
