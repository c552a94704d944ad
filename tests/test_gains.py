"""Multipliers of branches and of the embedding: a table of the user's own for Granite."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from harness import RELATIVE, Base, bake, edit, measure, plan_of, vector
from transformers import AutoModelForCausalLM, GraniteConfig

from bake import edits as make
from bake.checkpoints import open_checkpoint
from bake.families import parse_family, resolve
from bake.plan import Exactness

LLAMA = Path(__file__).parents[1] / "bake" / "families" / "llama.toml"


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """x + 0.22 · f(x) in every branch, 12 · E at the embedding (modeling_granite.py)."""
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=56,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.3,
        logits_scaling=2.0,
        max_position_embeddings=64,
        initializer_range=0.5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **tiny.EAGER).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    path = tmp_path_factory.mktemp("granite")
    tiny.write_checkpoint(model, path)
    text = LLAMA.read_text(encoding="utf-8").partition("[gguf]")[0]
    text = text.replace("LlamaForCausalLM", "GraniteForCausalLM")
    text = text.replace('"is_llama_config"', '"attention_multiplier", "logits_scaling"')
    text = text.replace(
        'module = "self_attn"', 'module = "self_attn"\ngain = "residual_multiplier"'
    )
    text = text.replace('module = "mlp"', 'module = "mlp"\ngain = "residual_multiplier"')
    text = text.replace(
        'module = "model.embed_tokens"',
        'module = "model.embed_tokens"\nmultiplier = "embedding_multiplier"\n'
        'multiplied_by = "model"',
    )
    checkpoint = open_checkpoint(path)
    shapes, dtypes = tiny.header_of(path)
    layout = resolve(parse_family(text, "granite.toml"), checkpoint.config, shapes, dtypes)
    assert {branch.gain for branch in layout.branches} == {0.22}
    assert layout.embed_multiplier == 12.0
    return Base(path, checkpoint, tiny.load(path), layout)


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("ablate", "resid"),
        ("affine", "resid"),
        ("affine", ["resid_pre.*", "attn_out.*", "mlp_out.*"]),
        ("offset", "resid_pre.0"),
        ("offset", "embed"),
        ("ablate", ["embed", "resid_pre.0"]),
        ("offset", "resid_mid.1"),
        ("offset", "resid_post.1"),
        ("offset", "mlp_out.1"),
    ],
)
def test_multipliers_are_divided_out(
    kind: str, at: str | list[str], granite: Base, tmp_path: Path
) -> None:
    direction, mean = vector(24), vector(24, 1)
    map_ = {
        "ablate": make.ablate(direction),
        "affine": make.affine(direction, mean=mean, alpha=0.7),
        "offset": make.offset(direction),
    }[kind]
    edits = [edit(granite, kind, map_, at)]
    plan = plan_of(granite, edits)
    assert plan.exactness is Exactness.EXACT
    measured = measure(granite, edits, bake(granite, plan, tmp_path / "out"))
    assert measured.effect > 1e-3
    assert measured.error <= RELATIVE * measured.effect
    if kind != "offset" or at == "mlp_out.1":
        return
    # The control: the same plan with the multipliers forgotten.
    branches = tuple(replace(branch, gain=1.0) for branch in granite.layout.branches)
    plain = replace(granite.layout, branches=branches, embed_multiplier=1.0)
    broken = plan_of(replace(granite, layout=plain), edits)
    wrong = measure(granite, edits, bake(granite, broken, tmp_path / "broken"))
    assert wrong.error > 1e-2 * measured.effect
