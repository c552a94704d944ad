"""What a table says of blocks that differ, of other names and of wrappers: headers only."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from bake.edits import Edit, EditKind, offset
from bake.errors import CheckpointError, FamilyError, UsageError
from bake.families import find_family, parse_family, resolve
from bake.families.layout import Layout
from bake.plan import compile_plan
from bake.sites import Site, SiteKind, expand, parse_site

Checkpoints = Callable[..., Path]


class Header:
    """The configuration and the header of a tiny checkpoint, to be changed and resolved."""

    def __init__(self, path: Path) -> None:
        self.config = tiny.config_of(path)
        self.shapes, self.dtypes = tiny.header_of(path)

    def add(self, name: str, *shape: int) -> None:
        self.shapes[name], self.dtypes[name] = shape, "F64"

    def rename(self, old: str, new: str) -> None:
        for found in (self.shapes, self.dtypes):
            for name in [name for name in found if name.startswith(old)]:
                found[new + name[len(old) :]] = found.pop(name)  # type: ignore[assignment]

    def layout(self) -> Layout:
        return resolve(find_family(self.config), self.config, self.shapes, self.dtypes)


@pytest.fixture
def header(tiny_checkpoint: Checkpoints) -> Callable[[str], Header]:
    return lambda name: Header(tiny_checkpoint(name))


def kinds(layout: Layout) -> list[str]:
    """Return the module of each block's first branch."""
    first = {branch.layer: branch for branch in reversed(layout.branches)}
    return [first[layer].live.rpartition(".")[2] for layer in range(layout.layers)]


# Which block has what


@pytest.mark.parametrize(
    ("name", "said", "other", "is_like"),
    [
        # Qwen3-Next on the Hub has an interval where save_pretrained writes a list.
        ("qwen3_next", "layer_types", {"full_attention_interval": 2}, True),
        ("qwen3_next", "layer_types", {"full_attention_interval": 3}, False),
        ("qwen3_next", "layer_types", {}, False),  # every fourth block, of three
        # Nemotron-H on the Hub has letters.
        ("nemotron_h", "layers_block_type", {"hybrid_override_pattern": "M-*E"}, True),
        ("nemotron_h", "layers_block_type", {"hybrid_override_pattern": "MM*E"}, False),
        ("glm4_moe_lite", "mlp_layer_types", {"first_k_dense_replace": 1}, True),
    ],
)
def test_two_ways_to_say_which_block_is_which(
    name: str, said: str, other: dict[str, Any], is_like: bool, header: Callable[[str], Header]
) -> None:
    one, another = header(name), header(name)
    del another.config[said]
    another.config |= other
    if is_like:
        assert another.layout().branches == one.layout().branches
        return
    with pytest.raises(CheckpointError, match="is missing from the checkpoint"):
        another.layout()


def test_a_branch_has_sizes_of_its_own(header: Callable[[str], Header]) -> None:
    layout = header("qwen3_next").layout()
    assert kinds(layout) == ["linear_attn", "self_attn", "linear_attn"]
    widths = {site: layout.width(parse_site(site)) for site in ("z.0", "z.1", "z.0.h3", "z.1.h3")}
    assert widths == {"z.0": 24, "z.1": 32, "z.0.h3": 6, "z.1.h3": 8}
    with pytest.raises(UsageError, match=r"has no site q\.0"):
        layout.width(parse_site("q.0"))
    (fused,) = (
        x
        for b in layout.branches
        for x in b.reads
        if x.weight.endswith("1.self_attn.q_proj.weight")
    )
    assert fused.shape[0] == 64  # queries and their gate, head by head
    assert list(fused.parts[0].rows) == [row for h in range(4) for row in range(16 * h, 16 * h + 8)]
    assert not fused.is_one_site()


def test_a_star_is_for_the_blocks_that_have_the_site(header: Callable[[str], Header]) -> None:
    layout = header("nemotron_h").layout()
    assert [len(p) for p in layout.points] == [1, 2, 2, 2, 1]  # one branch a block

    def star(pattern: str) -> list[int | None]:
        found = expand(pattern, layers=4, stream=layout.stream, having=layout.sites)
        return [site.layer for site in found]

    assert star("attn_out.*") == [0, 2] and star("mlp_out.*") == [1, 3] and star("q.*") == [2]
    assert star("resid_post.*") == [0, 1, 2, 3] and star("resid_mid.*") == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="has no site resid_mid"):
        layout.width(Site(SiteKind.RESID_MID, 0))


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("layer_types", ["full_attention"], "is no list with a word for block 1"),
        ("layer_types", ["mamba"] * 3, "gives block 0 the branches mlp"),
        ("mlp_only_layers", [0, "1"], "is no list of whole numbers"),
        ("decoder_sparse_step", None, "'decoder_sparse_step' is missing"),
        ("decoder_sparse_step", 0, "is no interval"),
        ("decoder_sparse_step", 1.0, "is no whole number"),
    ],
)
def test_a_config_that_says_nothing_of_a_block(
    key: str, value: Any, what: str, header: Callable[[str], Header]
) -> None:
    odd = header("qwen3_next")
    odd.config[key] = value
    with pytest.raises(FamilyError) as caught:
        odd.layout()
    assert what in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("only", "what"),
    [
        ("{ below = 1, from = 1 }", "only has from and below"),
        ("{ rest = 1 }", "only has no condition"),
        ("{ not = [{ }] }", "only has no condition"),
        ('{ each = ["layer_types"], until = 3 }', "unknown key 'until'"),
    ],
)
def test_a_condition_says_one_thing(only: str, what: str) -> None:
    text = (resources.files("bake.families") / "smollm3.toml").read_text("utf-8")
    text = text.replace('name = "mlp"\n', f'name = "mlp"\nonly = [{only}]\n')
    with pytest.raises(FamilyError) as caught:
        parse_family(text, "own.toml")
    assert what in caught.value.what


def test_two_branches_of_one_name(header: Callable[[str], Header]) -> None:
    text = (resources.files("bake.families") / "qwen3_next.toml").read_text("utf-8")
    both = text.replace('{ every = "decoder_sparse_step", rest = -1 }]', "{ from = 0 }]", 1)
    found = header("qwen3_next")
    found.config["mlp_only_layers"], found.config["decoder_sparse_step"] = [], 2
    with pytest.raises(FamilyError, match="gives block 0 the branches attn, mlp, mlp"):
        resolve(parse_family(both, "own"), found.config, found.shapes, found.dtypes)


def test_layers_for_further_tokens_travel_as_they_are(header: Callable[[str], Header]) -> None:
    """DeepSeek's lie behind the last block; a tensor of a block is not among them."""
    found = header("deepseek_v3")
    found.add("model.layers.3.eh_proj.weight", 4, 4)
    assert "model.layers.3.eh_proj.weight" in found.layout().untouched
    found.add("model.layers.2.eh_proj.weight", 4, 4)
    with pytest.raises(FamilyError, match=r"model\.layers\.2\.eh_proj\.weight is not in the table"):
        found.layout()


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("apertus", {"post_norm": True}, "post_norm = True"),
        ("cohere2", {"use_parallel_block": False}, "use_parallel_block = False"),
        ("cwm", {"attention_bias": True}, "attention_bias = True"),
        ("falcon", {"multi_query": False}, "no table fits this FalconForCausalLM"),
        ("falcon", {"new_decoder_architecture": True}, "no table fits this FalconForCausalLM"),
        ("hunyuan_v1_moe", {"use_mixed_mlp_moe": False}, "use_mixed_mlp_moe = False"),
        ("mpt", {"no_bias": False}, "no_bias = False"),
        ("nemotron_h", {"moe_latent_size": 8}, "moe_latent_size = 8"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
    ],
)
def test_another_block_is_refused_by_its_key(
    name: str, values: dict[str, Any], what: str, header: Callable[[str], Header]
) -> None:
    """Values with which the class, or the models of that name, compute another block."""
    found = header(name)
    assert found.layout()
    found.config |= values
    with pytest.raises(FamilyError) as caught:
        found.layout()
    assert what in caught.value.what and caught.value.exit_code == 4


# Wrappers


def test_a_wrapper_is_found_by_its_text_model(header: Callable[[str], Header]) -> None:
    for name, table in (
        ("mistral in Mistral 3", "mistral"),
        ("ministral3 in Mistral 3", "ministral3"),
    ):
        found = header(name)
        family = find_family(found.config)
        assert (family.name, family.architectures) == (table, ("Mistral3ForConditionalGeneration",))
        assert not family.runtimes and family.gguf is None and not family.recasts
        found.config["text_config"]["model_type"] = "qwen2"
        with pytest.raises(FamilyError, match="its text model is none of ministral3, mistral"):
            find_family(found.config)


@pytest.mark.parametrize("where", ["top", "text"])
def test_a_key_of_a_wrapper_that_nobody_knows(where: str, header: Callable[[str], Header]) -> None:
    found = header("gemma3 in its wrapper")
    (found.config if where == "top" else found.config["text_config"])["residual_multiplier"] = 0.2
    with pytest.raises(FamilyError, match=r"does not know residual_multiplier = 0\.2"):
        found.layout()
    assumed = resolve(
        find_family(found.config), found.config, found.shapes, found.dtypes, ["residual_multiplier"]
    )
    assert assumed.assumed == ("residual_multiplier",)
    found.config.pop("residual_multiplier", None)
    found.config["text_config"] = {"model_type": "gemma3_text", "quantization_config": {}}
    for _ in range(2):
        with pytest.raises(FamilyError, match="is quantised"):
            found.layout()
        found.config["quantization_config"] = None  # of the whole, which says nothing of the part


def test_the_names_that_a_wrapper_s_checkpoint_has(header: Callable[[str], Header]) -> None:
    """What transformers writes and what its modules are called: both are on the Hub."""
    old, new = header("gemma3 in its wrapper"), header("gemma3 in its wrapper")
    new.rename("language_model.model.", "model.language_model.")
    new.rename("vision_tower.", "model.vision_tower.")
    new.rename("multi_modal_projector.", "model.multi_modal_projector.")
    one, other = old.layout(), new.layout()
    assert one.embed == "language_model.model.embed_tokens.weight"
    assert other.embed == "model.language_model.embed_tokens.weight"
    assert [b.live for b in one.branches] == [b.live for b in other.branches]
    assert one.unembed.live == "lm_head" and one.block_live.startswith("model.language_model.")
    new.add("model.layers.0.extra", 4)
    with pytest.raises(FamilyError, match="is not in the table"):
        new.layout()


def test_what_changes_of_a_text_model_is_written_below_its_key(
    header: Callable[[str], Header],
) -> None:
    found = header("gemma3 in its wrapper")
    found.config["text_config"]["attention_bias"] = False
    for name in [n for n in found.shapes if n.endswith("_proj.bias") and "self_attn" in n]:
        if name.startswith("language_model."):
            del found.shapes[name], found.dtypes[name]
    layout = found.layout()
    edits = [
        Edit(EditKind("offset"), "c", (parse_site("attn_out.1"),), offset(torch.ones(24))),
        Edit(EditKind("offset"), "c", (parse_site("embed"),), offset(torch.ones(24))),
    ]
    plan = compile_plan(edits, layout, gain=pytest.fail, config=found.config)
    changes = {change.key: change for change in plan.config}
    assert changes.keys() == {"text_config", "tie_word_embeddings"}
    was, new = changes["text_config"].old, changes["text_config"].new
    assert was == found.config["text_config"]
    assert new == {**was, "attention_bias": True, "tie_word_embeddings": False}
    assert changes["tie_word_embeddings"].new is False and plan.unties


def test_a_factor_of_the_model_is_not_rounded_as_its_embedding_is(
    header: Callable[[str], Header],
) -> None:
    """Gemma's module multiplies by a tensor of its dtype, Granite's model by a number."""
    found = header("granite")
    found.dtypes = dict.fromkeys(found.dtypes, "BF16")
    found.config["embedding_multiplier"] = 0.1
    edits = [Edit(EditKind("offset"), "c", (parse_site("embed"),), offset(torch.ones(24)))]
    (update, _) = compile_plan(edits, found.layout(), gain=pytest.fail, config=found.config).tensors
    written = update.outputs[0].map.bias
    assert torch.equal(written, torch.ones(24, dtype=torch.float64) / 0.1)
    rounded = float(torch.tensor(0.1, dtype=torch.bfloat16))
    assert not torch.allclose(written, torch.ones(24, dtype=torch.float64) / rounded, rtol=1e-4)
