"""``trainable_token_indices``: single rows of an embedding, and of a head that is tied to it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_samples import TOKENS, base_of
from safetensors.torch import load_file, save_file
from test_merge_kinds import check, make

from bake.checkpoints import open_checkpoint
from bake.checkpoints.adapter import FoundAdapter
from bake.diff.adapter import adapted
from bake.diff.sources import open_model
from bake.errors import InputError
from bake.jobs.planned import judged
from bake.merge.merge import merge_adapter
from bake.verify.verification import Verification

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = sorted({*TOKENS.flatten().tolist()})
SOME = [WORDS[1], 39, WORDS[0], WORDS[5]]
Options = dict[str, Any]


def folder_of(factory: pytest.TempPathFactory) -> Path:
    return factory.getbasetemp() / "bases"


ROWS: dict[str, tuple[str, bool, str, Options]] = {
    "of the embedding": ("llama", False, "plain", {"trainable_token_indices": SOME}),
    "of both of a tied pair": ("llama", True, "plain", {"trainable_token_indices": SOME}),
    "of both, by name": (
        "llama",
        True,
        "plain",
        {"trainable_token_indices": {"embed_tokens": SOME, "lm_head": SOME}},
    ),
    "others in each of a tied pair": (
        "llama",
        True,
        "plain",
        {"trainable_token_indices": {"embed_tokens": SOME, "lm_head": SOME[:2]}},
    ),
    "of a tied head alone": (
        "llama",
        True,
        "plain",
        {"trainable_token_indices": {"lm_head": SOME}},
    ),
    "of two tables": (
        "falcon",
        False,
        "plain",
        {"trainable_token_indices": {"word_embeddings": SOME, "lm_head": SOME[2:]}},
    ),
    "in a table that is scaled": ("gemma3_text", True, "plain", {"trainable_token_indices": SOME}),
    "under the head's name": ("bloom", True, "under the head", {"trainable_token_indices": SOME}),
    "stored twice": ("gpt2", True, "both stored", {"trainable_token_indices": SOME}),
    "of positions": ("gpt2", True, "plain", {"trainable_token_indices": {"wpe": [0, 3]}}),
    "under factors of the tied head": (
        "olmo2",
        True,
        "plain",
        {"trainable_token_indices": SOME, "target_modules": ["q_proj", "lm_head"]},
    ),
    "beside a saved head": (
        "llama",
        False,
        "plain",
        {"trainable_token_indices": SOME, "modules_to_save": ["lm_head"]},
    ),
}
TARGETS = {"falcon": "dense", "bloom": "dense", "gpt2": "c_fc"}


@pytest.mark.parametrize("case", ROWS)
def test_rows(case: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    architecture, tied, layout, options = ROWS[case]
    base = base_of(architecture, tied, layout, folder_of(tmp_path_factory))
    options = {"target_modules": [TARGETS.get(architecture, "q_proj")], **options}
    out = check(base, make(base, tmp_path / "a", **options), tmp_path / "out")
    apart = {"others in each of a tied pair", "of a tied head alone"}
    apart |= {"under factors of the tied head"}
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] == (tied and case not in apart)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_beside_the_whole_table(
    tied: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """``save_embedding_layers`` stores what the rows are put into, and a tied head's once more."""
    base = base_of("llama", tied, "plain", folder_of(tmp_path_factory))
    options = {"target_modules": ["q_proj"], "trainable_token_indices": SOME}
    adapter = make(base, tmp_path / "a", save=True, **options)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    table = next(
        name for name in tensors if name.endswith("embed_tokens.token_adapter.base_layer.weight")
    )
    for name in [name for name in tensors if name.endswith("token_adapter.base_layer.weight")]:
        tensors[name] = tensors[table] * 1.5
    save_file(tensors, file)
    check(base, adapter, tmp_path / "out")
    head = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    assert (head in tensors) == tied
    if tied:  # the control: a second one that says something else
        save_file({**tensors, head: tensors[head] + 1}, file)
        with pytest.raises(InputError, match=r"would not load .*lm_head.token_adapter"):
            merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "no")


def renamed(rows: object) -> Callable[[Options], Options]:
    return lambda config: {**config, "trainable_token_indices": rows}


REFUSED: dict[str, tuple[str, Options, object, str]] = {
    "a row that is not there": ("llama", {}, [*SOME[:3], 40], r"row 40 of .*, which has 40"),
    "counted from the end": ("llama", {}, [*SOME[:3], -1], "row -1 of"),
    "one row twice": ("llama", {}, [*SOME[:3], SOME[0]], "a row of .* twice"),
    "fewer than stored": ("llama", {}, SOME[:3], r"has the shape \[4, 16\]"),
    "booleans": ("llama", {}, [True] * 4, "is no list of int or dict"),
    "not named": ("llama", {}, None, "would not load .*trainable_tokens_delta"),
    "a table that the base lacks": ("llama", {}, {"wte": SOME}, "does not take this adapter up"),
    "a tied head that is saved": (
        "llama",
        {"modules_to_save": ["lm_head"]},
        SOME,
        "for which the adapter has more",
    ),
    "a table that computes more": ("opt", {}, {"embed_positions": SOME}, "OPTLearnedPositional"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    architecture, options, rows, words = REFUSED[case]
    base = base_of(architecture, True, "plain", folder_of(tmp_path_factory))
    named = rows if isinstance(rows, dict) and "wte" not in rows else SOME
    options = {"target_modules": ["q_proj"], "trainable_token_indices": named, **options}
    adapter = make(base, tmp_path / "a", **options)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "trainable_token_indices": rows}))
    with pytest.raises(InputError, match=words):
        merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_they_are_verified_and_compared(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In memory, streamed, and by ``bake diff``, which reads the adapter as a merge does."""
    base = base_of("llama", True, "plain", folder_of(tmp_path_factory))
    options = {"target_modules": ["q_proj"], "trainable_token_indices": SOME}
    adapter = make(base, tmp_path / "a", **options)
    out = merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "out").path
    for streamed in (False, True):
        assert judged(Verification(out, streamed=streamed, generate=0)).passed
    table = "model.embed_tokens.weight"
    weights = adapted(FoundAdapter(adapter), open_model(str(base.path), tmp_path))
    found = weights.values(table, weights.rows(table, 0, 40))
    stored = load_file(out / "model.safetensors")
    assert torch.equal(found.float(), stored[table])
    moved = (found != base.model.get_input_embeddings().weight).any(1).nonzero().flatten()
    assert moved.tolist() == sorted(SOME)
    # The control: one of the rows as it was.
    before = base.model.get_input_embeddings().weight[SOME[0]].float()
    stored[table][SOME[0]] = before
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    assert not judged(Verification(out, generate=0)).passed
