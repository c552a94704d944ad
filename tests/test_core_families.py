"""Each core table, once: every kind of edit at every kind of site against hooks, and its controls.

One test a table, with one model built and one pass a variant: there are many tables, and what they
share is tested over the served ones. What must be exact is said in ``core.py``, from the classes.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import peft_warnings
from core import CORE, WRAPPED, Core
from exporting import written
from harness import RELATIVE, Base, base_at, edit, logits, matrix, plain_logits, plan_of, vector
from torch import Tensor
from transformers import PreTrainedModel

from bake import edits as make
from bake.edits import Edit
from bake.errors import CheckpointError, FamilyError
from bake.families import Branch, parse_family, resolve
from bake.families.select import Only
from bake.plan import Exactness, Plan
from bake.sites import STREAM_KINDS, Site, SiteKind

NOTICED = 1e-4
"""Of an edit's effect, what a control has to miss by: five orders above what is allowed."""
MODULES = (SiteKind.ATTN_OUT, SiteKind.MLP_OUT, SiteKind.EXTRA_OUT)
POST_NORMS = (
    *(SiteKind.LN1_POST_OUT, SiteKind.LN2_POST_OUT, SiteKind.LN3_POST_OUT),
    SiteKind.LN_FINAL_OUT,
)
Checkpoints = Callable[..., Path]


def test_every_core_table_is_here() -> None:
    assert sorted(CORE) == sorted(name for name, of in tiny.TABLES.items() if of.tier == "core")


@pytest.mark.parametrize("name", sorted(CORE))
def test_a_core_table(name: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base, of = base_at(tiny_checkpoint(name)), CORE[name]
    everything_is_drawn(base, of)
    stream = at_every_site(base, of, tmp_path)
    parts = Baked(base, at_the_parts(base), tmp_path / "parts")
    if stream is not None:
        a_wrong_axis(stream)
        a_tied_head(stream)
    an_offset_in_the_middle(base, of, tmp_path)
    a_row_forgotten(parts)
    a_gain_forgotten(parts)
    an_adapter(base, tmp_path)


@pytest.mark.parametrize("name", sorted(WRAPPED))
def test_a_model_in_a_wrapper(name: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base, of = base_at(tiny_checkpoint(name)), WRAPPED[name]
    assert base.layout.family.within is not None
    stream = at_every_site(base, of, tmp_path)
    parts = Baked(base, at_the_parts(base), tmp_path / "parts")
    if stream is not None:
        a_tied_head(stream)
    an_offset_in_the_middle(base, of, tmp_path)
    a_row_forgotten(parts)
    the_towers_are_as_they_were(parts)


# Values that change what the class builds, other than those of ``core.py``: several at once, since
# each has tensors of its own.
OTHERWISE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bamba", {"attn_layer_indices": None, "mamba_conv_bias": False, "mamba_proj_bias": False}),
    ("cohere", {"use_qk_norm": False, "logit_scale": 0.5, "tied": False}),
    ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 2, "n_shared_experts": 2}),
    ("falcon", {"alibi": True, "bias": False, "num_kv_heads": 2}),
    ("glm_moe_dsa", {"indexer_types": ["full", "shared", "shared"], "tied": True}),
    ("glm4_moe", {"use_qk_norm": False, "first_k_dense_replace": 0, "attention_bias": False}),
    ("jamba", {"num_experts": 1}),
    ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 0, "expert_layer_period": 3}),
    ("mamba2", {"norm_before_gate": True, "n_groups": 2, "use_conv_bias": False}),
    ("nemotron_h", {"layers_block_type": ["moe", "attention", "mlp", "mamba"], "use_bias": False}),
    ("opt", {"enable_bias": False, "tied": False}),
    ("qwen2_moe", {"qkv_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [1]}),
    ("stablelm", {"qk_layernorm": False, "use_qkv_bias": False, "tied": True}),
)


@pytest.mark.parametrize(("name", "values"), OTHERWISE, ids=lambda x: x if type(x) is str else "")
def test_a_table_with_other_values(
    name: str, values: dict[str, Any], tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(name, **values))
    hidden = base.layout.hidden
    map_ = make.affine(vector(hidden, 5), mean=vector(hidden, 6), alpha=0.7)
    edits = [*at_the_parts(base), edit(base, "affine", map_, "resid")]
    a_gain_forgotten(Baked(base, edits, tmp_path / "out"))


def test_several_streams_are_not_hooked_as_one(tiny_checkpoint: Checkpoints) -> None:
    """AltUp's blocks take all copies of the stream at once; within a block there is one."""
    base = base_at(tiny_checkpoint("gemma3n"))
    ablation = make.ablate(vector(base.layout.hidden))
    logits(base.model, base, [edit(base, "ablate", ablation, "mlp_out.1")])
    with pytest.raises(FamilyError, match="not of one stream"):
        logits(base.model, base, [edit(base, "ablate", ablation, "resid_post.1")])


def the_towers_are_as_they_were(baked: "Baked") -> None:
    was, now = tiny.tensors_of(baked.base.path), tiny.tensors_of(baked.out)
    towers = [name for name in baked.base.layout.untouched if "vis" in name]
    assert towers and all(torch.equal(was[name], now[name]) for name in towers)
    assert any("towers" in note for note in baked.plan.notes)


def test_a_row_that_the_class_does_not_load_is_refused(tmp_path: Path) -> None:
    """Youtu's sets the padding token's row to zero, tied or not; without such a token none."""
    for pad in (0, 3, None):
        path = tmp_path / str(pad)
        tiny.write_checkpoint(tiny.make_model("youtu", pad_token_id=pad), path)
        stored = tiny.tensors_of(path)["model.embed_tokens.weight"]
        loaded = tiny.load(path).get_output_embeddings().weight.detach()
        assert torch.equal(loaded, stored) is (pad is None)
        if pad is None:
            continue
        assert float(loaded[pad].abs().max()) == 0 < float(stored[pad].abs().min())
        with pytest.raises(FamilyError, match="sets that row of its embedding to zero") as caught:
            tiny.layout_of(path)
        # What the error says to do is what helps.
        config = {**tiny.config_of(path), "pad_token_id": None}
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert "set pad_token_id to null" in str(caught.value.fix)
        assert torch.equal(tiny.load(path).get_output_embeddings().weight, stored)
        assert tiny.layout_of(path).tied


class Baked:
    """A plan that is exact, as it was written, and the hooked logits that it has to give."""

    def __init__(self, base: Base, edits: list[Edit], out: Path) -> None:
        self.base, self.edits, self.out = base, edits, out
        self.plan = plan_of(base, edits)
        assert self.plan.exactness is Exactness.EXACT, self.plan.findings
        record = {"base": {"model": str(base.path)}}
        written("checkpoint", self.plan, base.checkpoint, out, record=record)
        self.hooked = logits(base.model, base, edits)
        self.effect = float((self.hooked - plain_logits(base)).abs().max())
        self.model = tiny.load(out)
        assert self.effect > 1e-2
        assert self.error(self.model) <= RELATIVE * self.effect

    def error(self, model: PreTrainedModel) -> float:
        """Return how far a model is from the hooked one."""
        return float((logits(model, self.base) - self.hooked).abs().max())

    def fails_with(self, changed: Mapping[str, Tensor], what: str) -> None:
        """See that the comparison notices other values in some tensors."""
        assert self.error(tiny.load(self.out, changed=changed)) > NOTICED * self.effect, what


def everything_is_drawn(base: Base, of: Core) -> None:
    """See that no gain is 1, no bias 0 and no flag closed, and that the class loads what is there.

    Some classes set the embedding's row of ``pad_token_id`` to zero when they load a file.
    """
    assert base.layout.tied is of.tied
    assert all(linear.bias.state != "closed" for linear in base.layout.linears)
    for name, tensor in tiny.tensors_of(base.path).items():
        if name == base.layout.embed:
            assert torch.equal(base.model.get_input_embeddings().weight, tensor)
        elif name == base.layout.unembed.weight:
            assert torch.equal(base.model.get_output_embeddings().weight, tensor)
        if tensor.dim() == 1:
            assert tensor.abs().min() > 0 and (tensor - 1 + of.gain_offset).abs().min() > 0, name


def at_every_site(base: Base, of: Core, out: Path) -> Baked | None:
    """Ablation, LEACE and an affine edit at all sites of the stream; the last one is returned."""
    width = base.layout.hidden
    left, right = vector(width, 5), vector(width, 6)
    eraser = make.erase(
        (left / (left @ right)).unsqueeze(1), right.unsqueeze(0), mean=vector(width)
    )
    forms = {
        "ablate": make.ablate(vector(width)),
        "erase": eraser,
        "affine": make.affine(vector(width), mean=vector(width, 1), alpha=0.7),
    }
    baked = None
    for kind, map_ in forms.items():
        edits = [edit(base, kind, map_, "resid")]
        if of.closed:
            refused(plan_of(base, edits), base.layout.family.stream.closed)
        elif of.post_norm:
            refused(plan_of(base, edits), "a projection does not pass through a norm with a gain")
        else:
            baked = Baked(base, edits, out / kind)
    return baked


def an_offset_in_the_middle(base: Base, of: Core, out: Path) -> None:
    """An offset behind block 1, in a bias of its last writer or refused for want of one."""
    edits = [edit(base, "offset", make.offset(vector(base.layout.hidden)), "resid_post.1")]
    if not of.slot:
        reason = base.layout.family.stream.closed or "has no bias slot there"
        refused(plan_of(base, edits), reason)
        return
    baked = Baked(base, edits, out / "offset")
    (update,) = baked.plan.biases
    stored, was = tiny.tensors_of(out / "offset")[update.name], tiny.tensors_of(base.path)
    baked.fails_with({update.name: was[update.name]}, "the constant is left out")
    gains = {b.gain for b in base.layout.branches}
    if gains != {1.0}:
        (gain,) = gains
        scaled = was[update.name] + gain * (stored - was[update.name])
        baked.fails_with({update.name: scaled}, "the gain of the branch is forgotten")


def refused(plan: Plan, reason: str) -> None:
    assert plan.exactness is Exactness.IMPOSSIBLE
    found = [f for f in plan.findings if f.exactness is Exactness.IMPOSSIBLE]
    assert all(f.remedy for f in found)
    assert any(reason in f.reason for f in found), found


def at_the_parts(base: Base) -> list[Edit]:
    """Linear edits at every input and output of the parts, each of its own strength."""
    edits = []
    for seed, site in enumerate(base.layout.sites):
        width = base.layout.width(site)
        if site.kind in MODULES:
            map_, kind = make.ablate(vector(width, seed), strength=0.3 + 0.1 * (seed % 5)), "ablate"
        elif site.kind in POST_NORMS:
            map_, kind = make.scale(1 + 0.3 * vector(width, seed)), "scale"
        elif site.kind is SiteKind.EMBED or site.kind in STREAM_KINDS:
            continue
        else:
            map_, kind = make.linear(matrix(width, seed)), "linear"
        edits.append(edit(base, kind, map_, str(site)))
    return edits


def is_a_switch(one: Only) -> bool:
    """Whether a condition is one of the whole model, of which every model has one side."""
    own = one.given or one.true or one.above or one.stored
    return bool(own) or any(map(is_a_switch, one.never))


def rows_of(base: Base) -> Iterator[tuple[str, list[str]]]:
    """Yield every row of the table with its tensors, those of all blocks and experts together."""
    found: dict[str, list[str]] = {}
    for linear in base.layout.linears:
        found.setdefault(linear.module, []).append(linear.weight)
    # The pattern of layers is complete; of DeepSeek's two ways to queries a model has one.
    branches = [b for b in base.layout.family.branches if not any(map(is_a_switch, b.only))]
    rows = [row for branch in branches for row in (*branch.reads, *branch.writes)]
    assert {r.module for r in rows if not any(map(is_a_switch, r.only))} <= found.keys()
    yield from found.items()


def modules_of(branch: Branch) -> set[str]:
    return {linear.module for linear in (*branch.reads, *branch.writes)}


def a_row_forgotten(baked: Baked) -> None:
    """A writer, a reader, a router or a shared gate that is left as it was."""
    was = tiny.tensors_of(baked.base.path)
    now = tiny.tensors_of(baked.out)
    for module, names in rows_of(baked.base):
        if all(torch.equal(now[name], was[name]) for name in names):
            # Without a norm before the readers there is no site that a router or an expert reads.
            branches = baked.base.layout.branches
            (norm_in,) = {b.norm_in is None for b in branches if module in modules_of(b)}
            assert norm_in, f"no edit changes {module}"
            continue
        baked.fails_with({name: was[name] for name in names}, f"{module} is forgotten")


def a_gain_forgotten(baked: Baked) -> None:
    """The final norm's gain, or where it has none the head, which takes its scale, as it was."""
    layout = baked.base.layout
    name = layout.final_norm.weight or layout.unembed.weight
    baked.fails_with({name: tiny.tensors_of(baked.base.path)[name]}, "a gain is forgotten")


def a_wrong_axis(baked: Baked) -> None:
    """A square writer folded on its input, and a writer that is not square declared as turned."""
    base = baked.base
    writer = base.layout.branches[0].writes[0]
    if writer.shape[0] == writer.shape[1]:
        weight = tiny.tensors_of(base.path)[writer.weight]
        (site,) = (e.map for e in baked.edits)
        turned = site.linear(weight)  # on the rows' channels
        baked.fails_with({writer.weight: turned}, "the axis is wrong")
        return
    text = (resources.files("bake.families") / f"{base.layout.family.name}.toml").read_text("utf-8")
    row = re.compile(rf'(writes = \[\{{ module = "{re.escape(writer.module)}"[^}}]*?)( \}})')
    other = parse_family(row.sub(r'\1, layout = "conv1d"\2', text), "turned")
    with pytest.raises(CheckpointError, match="has the shape"):
        resolve(other, base.checkpoint.config, *tiny.header_of(base.path))


def a_tied_head(baked: Baked) -> None:
    """A head that was tied is a tensor of its own, and as the embedding it would be wrong."""
    if baked.base.layout.tied:
        assert baked.plan.unties
        embed = tiny.tensors_of(baked.out)[baked.base.layout.embed]
        baked.fails_with({baked.base.layout.unembed.weight: embed}, "the head is left tied")


def an_adapter(base: Base, out: Path) -> None:
    """The same edit as an adapter, which PEFT's code in transformers loads: readers only."""
    places = (Site(SiteKind.LN1_OUT, 1), Site(SiteKind.LN_FINAL_OUT))
    place = next(site for site in places if site in base.layout.sites)
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.width(place))), str(place))]
    adapter = written("lora", plan_of(base, edits), base.checkpoint, out / "adapter").path
    hooked = logits(base.model, base, edits)
    effect = float((hooked - plain_logits(base)).abs().max())
    with peft_warnings():
        model = copy.deepcopy(base.model)
        model.load_adapter(str(adapter))
        served = logits(model, base)
    assert effect > 1e-2
    assert float((served - hooked).abs().max()) <= RELATIVE * effect
