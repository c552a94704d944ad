"""Family tables are closed: what a table, a config or a checkpoint says too much is refused."""

import re
import runpy
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import tiny

from bake.errors import CheckpointError, FamilyError, UsageError
from bake.families import (
    Family,
    Layout,
    family_named,
    find_family,
    load_families,
    load_refused,
    parse_family,
    read_family,
    resolve,
    runtime_of,
)
from bake.sites import Site, SiteKind, parse_site

WHERE = "own.toml"
Checkpoint = Callable[..., Path]
FAMILIES = {family.name: family for family in load_families()}
every_table = pytest.mark.parametrize("name", sorted(FAMILIES))
every_family = pytest.mark.parametrize("name", sorted(tiny.FAMILIES))


def text_of(name: str) -> str:
    return (resources.files("bake.families") / f"{name}.toml").read_text(encoding="utf-8")


def changed(old: str, new: str, name: str = "llama") -> str:
    """Return a shipped table with one piece of its text replaced, wherever it stands."""
    text = text_of(name)
    assert old in text, old
    return text.replace(old, new)


def without_gguf(text: str) -> str:
    """Return the table without its last sections, which name every module once more."""
    return re.sub(r"(?ms)^\[gguf.*", "", text)


def refusal(text: str) -> FamilyError:
    with pytest.raises(FamilyError) as caught:
        parse_family(text, WHERE)
    assert caught.value.exit_code == 4
    return caught.value


# The shipped tables


def test_every_table_has_a_tiny_model_and_every_tiny_model_a_table() -> None:
    assert sorted(FAMILIES) == sorted(tiny.CONFIGS)


@every_table
def test_a_table_is_named_as_its_file_and_says_where_it_was_read(name: str) -> None:
    family = family_named(name)
    assert family == FAMILIES[name]
    assert re.match(r"transformers models/\w+/modeling_\w+\.py: \w+", family.source)
    assert family.title
    assert family.architectures
    assert all(runtime.source for runtime in family.runtimes.values())


@every_table
def test_the_config_class_agrees_with_the_defaults(name: str) -> None:
    """A key that config.json leaves unsaid has the value that transformers would give it."""
    from transformers import AutoConfig

    family = FAMILIES[name]
    config = AutoConfig.for_model(tiny.CONFIGS[name]["model_type"])
    keys = family
    assert keys.defaults or keys.flags
    for key, value in {**keys.defaults, **keys.flags}.items():
        if hasattr(config, key):
            assert getattr(config, key) == value, key
        elif key == "rope_theta":  # transformers 5 keeps it below, by kind of attention in Gemma 3
            rope = config.rope_parameters
            assert rope.get("full_attention", rope)[key] == value
        elif key == "full_attention_interval":  # which the class turns into a list
            assert config.layer_types.index("full_attention") == value - 1
        else:
            assert key == "pretraining_tp" or value is False, key


@every_family
def test_a_table_resolves_its_tiny_model(name: str, tiny_checkpoint: Checkpoint) -> None:
    path = tiny_checkpoint(name)
    shapes, _ = tiny.header_of(path)
    assert find_family(tiny.config_of(path)) == FAMILIES[name]
    layout = tiny.layout_of(path)
    assert layout.family == FAMILIES[name]
    assert layout.layers == 3
    assert set(layout.untouched) <= {n for n in shapes if n.endswith("_norm.weight")}
    assert layout.tied == (name in tiny.TIED)


@every_family
def test_a_layout_names_real_modules_and_tensors(name: str, tiny_checkpoint: Checkpoint) -> None:
    path = tiny_checkpoint(name)
    layout, model = tiny.layout_of(path), tiny.load(path)
    linears = [x for b in layout.branches for x in (*b.reads, *b.writes)]
    norms = [n for b in layout.branches for n in (b.norm_in, b.norm_out) if n is not None]
    lives = [x.live for x in linears if x.live is not None] + [n.live for n in norms]
    lives += [b.live for b in layout.branches] + [layout.embed_live, layout.final_norm.live]
    for live in lives:
        model.get_submodule(live)
    assert layout.unembed.live is not None
    assert model.get_submodule(layout.unembed.live) is model.get_output_embeddings()
    for linear in linears:
        assert layout.shapes[linear.weight] == linear.shape
        assert linear.bias.size == linear.shape[linear.output_axis]
        assert (linear.bias.state == "present") == (linear.bias.name in layout.shapes)


@every_family
def test_the_parts_of_a_fused_layer_share_its_rows(name: str, tiny_checkpoint: Checkpoint) -> None:
    layout = tiny.layout_of(tiny_checkpoint(name))
    for branch in layout.branches:
        for linear in branch.reads:
            rows = [row for part in linear.parts for row in part.rows]
            if rows:
                assert sorted(rows) == list(range(linear.shape[linear.output_axis]))
            for part in linear.parts:
                assert len(part.rows) == layout.width(part.site)


def test_rows_of_fused_layers_by_hand(tiny_checkpoint: Checkpoint) -> None:
    """GPT-NeoX lays query, key and value out head by head, GPT-2 and Phi-3 one after another."""
    (neox,) = tiny.layout_of(tiny_checkpoint("gpt_neox")).branches[0].reads
    heads = {str(part.site): [part.rows[0], part.rows[8], part.rows[31]] for part in neox.parts}
    assert heads == {"q.0": [0, 24, 79], "k.0": [8, 32, 87], "v.0": [16, 40, 95]}
    (gpt2,) = tiny.layout_of(tiny_checkpoint("gpt2")).branches[0].reads
    assert [part.rows for part in gpt2.parts] == [range(24), range(24, 48), range(48, 72)]
    (phi3,) = tiny.layout_of(tiny_checkpoint("phi3")).branches[0].reads
    assert [part.rows for part in phi3.parts] == [range(32), range(32, 48), range(48, 64)]


def test_a_name_that_no_table_has() -> None:
    with pytest.raises(FamilyError, match="there is no family table named 'lama'"):
        family_named("lama")


# A table that is not one


@pytest.mark.parametrize(
    ("old", "new", "what", "where", "fix"),
    [
        (
            'title = "Llama',
            'titel = "Llama',
            "the key 'title' is missing",
            WHERE,
            "'title' by 'titel'?",
        ),
        ("[norm]", "tittle = 1\n[norm]", "unknown key 'tittle'", "[block]", None),
        (
            'name = "llama"',
            'name = "llama"\nsources = ""',
            "unknown key 'sources'",
            WHERE,
            "'source'?",
        ),
        ("[norm]", "[norm]\nkinds = 1", "unknown key 'kinds'", f"{WHERE} [norm]", "mean 'kind'?"),
        (
            "[embed]",
            "[embed]\nzebra = 1",
            "unknown key 'zebra'",
            f"{WHERE} [embed]",
            "known are module",
        ),
        ("[unembed]", "[unembed]\nbiass = ''", "unknown key 'biass'", "[unembed]", "mean 'bias'?"),
        ("[dims]", "[dims]\nhead = 'x'", "unknown key 'head'", f"{WHERE} [dims]", "mean 'heads'?"),
        (
            'module = "mlp"',
            'module = "mlp"\nnorm = ""',
            "unknown key 'norm'",
            "[[branch]] mlp",
            "norm_in",
        ),
        (
            'sites = ["z"]',
            'site = ["z"]',
            "unknown key 'site'",
            "self_attn.o_proj",
            "mean 'sites'?",
        ),
        (
            'extra_bias = "refused"',
            'extra_bias = "refused"\nsauce = ""',
            "unknown key 'sauce'",
            "[runtime.llama.cpp]",
            "'source'?",
        ),
        ('hidden = "hidden_size"\n', "", "the key 'hidden' is missing", f"{WHERE} [dims]", None),
        (
            'layers = "num_hidden_layers"\n',
            "",
            "the key 'layers' is missing",
            f"{WHERE} [dims]",
            None,
        ),
        (
            'path = "model.layers.{layer}"',
            "",
            "the key 'path' is missing",
            f"{WHERE} [block]",
            None,
        ),
        ('kind = "rms"', "", "the key 'kind' is missing", f"{WHERE} [norm]", None),
        ('name = "mlp"\n', "", "the key 'name' is missing", "[[branch]]", None),
        ("untied_head = true", "", "the key 'untied_head' is missing", "[runtime.vllm]", None),
        ('name = "llama"', "name = 3", "name = 3 is no text", WHERE, None),
        (
            'architectures = ["LlamaForCausalLM"]',
            'architectures = "LlamaForCausalLM"',
            "is no list",
            WHERE,
            None,
        ),
        (
            'architectures = ["LlamaForCausalLM"]',
            "architectures = [1]",
            "architectures = [1] is no list of texts",
            WHERE,
            None,
        ),
        (
            "untied_head = true",
            "untied_head = 1",
            "untied_head = 1 is no truth value",
            "[runtime.vllm]",
            None,
        ),
        (
            "[norm]",
            "[norm]\ngain_offset = true",
            "gain_offset = True is no whole number",
            f"{WHERE} [norm]",
            None,
        ),
        ("[norm]", '[norm]\nbias = "no"', "bias = 'no' is no truth value", f"{WHERE} [norm]", None),
        (
            "[embed]",
            "[embed]\nmultiplier = [2]",
            "multiplier = [2] is neither a number nor a config key",
            f"{WHERE} [embed]",
            None,
        ),
        (
            "[embed]",
            "[embed]\nmultiplier = true",
            "multiplier = True is neither a number",
            f"{WHERE} [embed]",
            None,
        ),
        (
            'kind = "rms"',
            'kind = "batch"',
            "kind = 'batch' is not one of rms, layer",
            f"{WHERE} [norm]",
            None,
        ),
        (
            'name = "mlp"',
            'name = "ffn"',
            "name = 'ffn' is not one of attn, mlp",
            "[[branch]] ffn",
            None,
        ),
        (
            'from = "resid_mid"',
            'from = "embed"',
            "from = 'embed' is not one of resid_pre, resid_mid",
            "[[branch]] mlp",
            None,
        ),
        (
            'to = "resid_post"',
            'to = "resid_pre"',
            "to = 'resid_pre' is not one of resid_mid, resid_post",
            "[[branch]] mlp",
            None,
        ),
        (
            'sites = ["z"]',
            'sites = ["zed"]',
            "sites names 'zed', which is no site",
            "self_attn.o_proj",
            "the sites are embed, resid_pre",
        ),
        (
            'sites = ["z"]',
            'sites = ["z"], layout = "conv"',
            "layout = 'conv' is not one of linear, conv1d",
            "self_attn.o_proj",
            None,
        ),
        (
            'sites = ["z"]',
            'sites = ["z"], fuse = "rows"',
            "fuse = 'rows' is not one of concat, heads",
            "self_attn.o_proj",
            None,
        ),
        (
            'sites = ["z"]',
            'sites = ["z"], live = 3',
            "live = 3 is no text",
            "self_attn.o_proj",
            None,
        ),
        (
            'bias = "mlp_bias"',
            'bias = "mlp_biases"',
            "bias = 'mlp_biases' is neither always, never nor a key of [flags]",
            WHERE,
            None,
        ),
        (
            "[unembed]",
            "[unembed]\nbias = 'head_bias'",
            "bias = 'head_bias' is neither always, never",
            WHERE,
            None,
        ),
        (
            'extra_bias = "dropped"',
            'extra_bias = "ignored"',
            "extra_bias = 'ignored' is not one of dropped, refused",
            "[runtime.vllm]",
            None,
        ),
        (
            '"mlp.down_proj",\n',
            '"mlp.down",\n',
            "biases names 'mlp.down', which is no linear layer of the table",
            "[runtime.vllm]",
            None,
        ),
        (
            "mlp_bias = false",
            'mlp_bias = "no"',
            "mlp_bias = 'no' is no boolean",
            f"{WHERE} [flags]",
            None,
        ),
        (
            "pretraining_tp = [1]",
            "pretraining_tp = 1",
            "pretraining_tp = 1 is no list of allowed values",
            f"{WHERE} [must]",
            None,
        ),
        ("[norm]", "[norm", "the family table is not valid TOML", WHERE, None),
        (
            "[norm]",
            f"x = {'9' * 5000}\n[norm]",
            "is not valid TOML: Exceeds the limit",
            WHERE,
            None,
        ),
        (
            "[norm]",
            f"x = {'[' * 5000}\n[norm]",
            "the family table nests too deeply to be parsed",
            WHERE,
            None,
        ),
        ("reads = [", 'reads = ["mlp.up",', "a table is meant, not 'mlp.up'", "[[branch]]", None),
        ('module = "mlp"', "module = []", "module names no module", "[[branch]] mlp", None),
        (
            'sites = ["mlp_act"], bias',
            'sites = ["mlp_act"], stacked = true, bias',
            "mlp.down_proj is stacked, and has sites, which one layer has",
            "[[branch]]",
            None,
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_tables_that_are_refused(
    old: str, new: str, what: str, where: str, fix: str | None
) -> None:
    parse_family(text_of("llama"), WHERE)
    error = refusal(changed(old, new))
    assert what in error.what
    assert where in str(error.where)
    assert fix is None or fix in str(error.fix)


@pytest.mark.parametrize("section", ["block", "norm", "embed", "unembed", "dims", "runtime"])
def test_a_section_that_is_missing_or_no_section(section: str) -> None:
    other = f"[{section}" if section != "runtime" else "[runtime.vllm"
    text = changed(f"{other}]", other.replace(section, f"defaults.{section}") + "]")
    if section != "runtime":  # the other runtime keeps the section alive
        assert refusal(text).what == f"the key {section!r} is missing"
    text = f"{section} = 3\n" + re.sub(rf"\[{section}(\..*)?\]", "[defaults.other\\1]", text)
    assert refusal(text).what == f"{section} = 3 is no table"


def test_a_users_own_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(changed('name = "llama"', 'name = "mine"'), encoding="utf-8")
    assert read_family(path).name == "mine"
    with pytest.raises(FamilyError, match="the family table cannot be read") as caught:
        read_family(tmp_path / "other.toml")
    assert caught.value.where == str(tmp_path / "other.toml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FamilyError, match="the family table is no UTF-8 text"):
        read_family(path)


# Which table


def find(config: Mapping[str, Any]) -> Family:
    return find_family(config)


def test_a_condition_tells_tables_of_one_class_apart() -> None:
    neox = {"architectures": ["GPTNeoXForCausalLM"]}
    assert find(neox).name == "gpt_neox"  # the class's default is parallel
    assert find({**neox, "use_parallel_residual": True}).name == "gpt_neox"
    assert find({**neox, "use_parallel_residual": False}).name == "gpt_neox_sequential"
    with pytest.raises(FamilyError, match="no table fits this GPTNeoXForCausalLM") as caught:
        find({**neox, "use_parallel_residual": "both"})
    assert "gpt_neox needs use_parallel_residual in [True]" in caught.value.what
    assert "gpt_neox_sequential needs use_parallel_residual in [False]" in caught.value.what


def test_an_architecture_without_a_table() -> None:
    with pytest.raises(FamilyError, match="bake has no family table for ZebraForCausalLM") as error:
        find({"architectures": ["ZebraForCausalLM"]})
    assert error.value.where == "config.json"
    assert "cannot know every tensor" in str(error.value.why)
    assert "--family FILE" in str(error.value.fix)


def test_the_table_that_a_new_one_is_begun_from() -> None:
    """By what config.json says, and where that does not tell, by the name of the class."""

    def fix(name: str, **config: Any) -> str:
        with pytest.raises(FamilyError) as caught:
            find({"architectures": [name], **config})
        return str(caught.value.fix)

    mixture = {"n_routed_experts": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "v_head_dim": 8}
    assert "nearest is 'deepseek_v" in fix("DeepseekV5ForCausalLM", **mixture)
    assert "nearest is 'granite'" in fix("ZebraForCausalLM", residual_multiplier=0.2)
    assert "nearest is 'olmo" in fix("Olmo4ForCausalLM")
    assert "knows 33% of the keys" in fix("ZebraForCausalLM", zebra=1, stripes=2)


def test_a_class_that_no_table_can_describe() -> None:
    import transformers

    known = {name for family in FAMILIES.values() for name in family.classes}
    for refused in load_refused():
        assert re.match(r"transformers models/\w+/modeling_\w+\.py: \w+", refused.source)
        for name in refused.architectures:
            assert hasattr(transformers, name) and name not in known
            with pytest.raises(FamilyError) as caught:
                find({"architectures": [name]})
            assert caught.value.what == f"bake does not edit a {name}"
            assert refused.reason in str(caught.value.why)


@pytest.mark.parametrize(
    "names", [None, [], "LlamaForCausalLM", ["LlamaForCausalLM", "Other"], [3], {}]
)
def test_architectures_that_name_no_single_class(names: Any) -> None:
    config = {} if names is None else {"architectures": names}
    with pytest.raises(FamilyError, match=re.escape(f"architectures = {names!r} names no single")):
        find(config)


def test_two_tables_for_one_model() -> None:
    one = parse_family(text_of("llama"), WHERE)
    other = parse_family(changed('name = "llama"', 'name = "mine"'), WHERE)
    with pytest.raises(FamilyError, match="several tables fit LlamaForCausalLM: llama, mine"):
        find_family({"architectures": ["LlamaForCausalLM"]}, (one, other))


def test_the_page_of_families_is_that_of_the_tables() -> None:
    root = Path(__file__).parent.parent / "docs"
    made = runpy.run_path(str(root / "make_families_page.py"))["page"]()
    assert (root / "family-list.md").read_text("utf-8") == made, "run docs/make_families_page.py"
    assert "| `cohere` |" in made and made.count("\n| `") > 50
    (row,) = (line for line in made.splitlines() if line.startswith("| `cohere` |"))
    assert "`ln2_out`" not in row  # one norm for both branches


# A checkpoint that the table does not describe


class Model:
    """Config and headers of a tiny checkpoint, to be changed and resolved."""

    def __init__(self, path: Path, name: str) -> None:
        self.family = FAMILIES[name]
        self.config = tiny.config_of(path)
        self.shapes, self.dtypes = tiny.header_of(path)

    def add(self, name: str, *shape: int) -> "Model":
        self.shapes[name] = shape
        self.dtypes[name] = "F64"
        return self

    def rename(self, change: Callable[[str], str]) -> "Model":
        self.shapes = {change(name): shape for name, shape in self.shapes.items()}
        self.dtypes = dict.fromkeys(self.shapes, "F64")
        return self

    def resolve(self) -> Layout:
        return resolve(self.family, self.config, self.shapes, self.dtypes)

    def refusal(self, kind: type[FamilyError] | type[CheckpointError] = FamilyError) -> Any:
        with pytest.raises(kind) as caught:
            self.resolve()
        assert caught.value.exit_code == 4
        return caught.value


@pytest.fixture
def model(tiny_checkpoint: Checkpoint) -> Callable[..., Model]:
    """Return a function that opens a tiny checkpoint; it takes what ``tiny.make_model`` takes."""
    return lambda name, **options: Model(tiny_checkpoint(name, **options), name)


Open = Callable[..., Model]


@every_family
def test_an_unclaimed_tensor(name: str, model: Open) -> None:
    for extra in ("model.extra.weight", "lm_head.bias"):
        error = model(name).add(extra, 3).refusal()
        assert error.what == f"the checkpoint's tensor {extra} is not in the table {name!r}"
        assert "--family FILE" in error.fix


@every_family
def test_a_missing_tensor(name: str, model: Open) -> None:
    """Whichever it is, so that no writer can be forgotten."""
    whole = model(name)
    claimed = set(whole.shapes) - set(whole.resolve().untouched)
    for tensor in claimed:
        cut = model(name)
        del cut.shapes[tensor]
        error = cut.refusal(CheckpointError)
        missing = tensor.removeprefix("transformer.") if "wte" in tensor else tensor
        assert f"{missing} is missing from the checkpoint" in error.what
        assert f"the table {name!r} expects it" in error.why


def free_axis(tensor: str) -> tuple[int, bool]:
    """Return the axis of a tensor whose size no site and no dimension of the table names."""
    if ".w2." in tensor:
        return 1, True  # what an expert computes inside is no site
    return 0, ".block_sparse_moe." in tensor or ".wpe." in tensor


@every_family
def test_a_tensor_of_another_shape(name: str, model: Open) -> None:
    whole = model(name)
    untouched = whole.resolve().untouched
    for tensor, shape in whole.shapes.items():
        if tensor in untouched:
            continue
        wrongs = {axis: (*shape[:axis], n + 1, *shape[axis + 1 :]) for axis, n in enumerate(shape)}
        wrongs = {**wrongs, len(shape): (*shape, 1)}
        for wrong in (wrongs[axis] for axis in wrongs if (axis, True) != free_axis(tensor)):
            changed_ = model(name)
            changed_.shapes[tensor] = wrong
            error = changed_.refusal(CheckpointError)
            assert f"{tensor} has the shape {list(wrong)} where [" in error.what
            assert error.why == "config.json and the tensors disagree"


@every_family
def test_a_transposed_weight_is_another_shape(name: str, model: Open) -> None:
    whole = model(name)
    layout = whole.resolve()
    for branch in layout.branches:
        for linear in (*branch.reads, *branch.writes):
            out, inner = linear.shape
            if out == inner or not (linear.parts or linear.input_site):
                continue
            turned = model(name)
            turned.shapes[linear.weight] = (inner, out)
            assert f"{linear.weight} has the shape" in turned.refusal(CheckpointError).what


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "U8"])
def test_a_tensor_of_codes(dtype: str, model: Open) -> None:
    for tensor in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        coded = model("llama")
        coded.dtypes[tensor] = dtype
        error = coded.refusal()
        assert error.what.endswith(f"{tensor} as {dtype}")
        assert "these are codes" in error.why
        assert "F64, F32, BF16, F16" in error.fix


def test_a_double_claim(model: Open) -> None:
    twice = model("llama")
    twice.family = parse_family(without_gguf(changed("mlp.gate_proj", "mlp.up_proj")), WHERE)
    assert twice.refusal().what == "the tensor model.layers.0.mlp.up_proj.weight is claimed twice"


def test_a_norm_of_two_branches_is_claimed_once(model: Open) -> None:
    text = changed(
        'norm_in = "post_attention_layernorm"', 'norm_in = "input_layernorm"', "gpt_neox"
    )
    shared = model("gpt_neox")
    shared.family = parse_family(without_gguf(text), WHERE)
    for name in list(shared.shapes):
        if "post_attention_layernorm" in name:
            del shared.shapes[name]
    layout = shared.resolve()
    assert layout.branches[0].norm_in is layout.branches[1].norm_in


def test_a_layer_too_many_and_one_too_few(model: Open) -> None:
    more, fewer = model("llama"), model("llama")
    more.config["num_hidden_layers"] = 4
    assert "model.layers.3." in more.refusal(CheckpointError).what
    fewer.config["num_hidden_layers"] = 2
    assert re.search(r"tensor model\.layers\.2\.\S+ is not in the table", fewer.refusal().what)


def test_a_bias_without_its_flag(model: Open) -> None:
    """transformers would not load it: it has to be refused, not carried along."""
    silent = model("llama", mlp_bias=False).add("model.layers.0.mlp.down_proj.bias", 24)
    assert "model.layers.0.mlp.down_proj.bias is not in the table" in silent.refusal().what
    lacking = model("llama", mlp_bias=False)
    lacking.config["mlp_bias"] = True
    error = lacking.refusal(CheckpointError)
    assert "the bias model.layers.0.mlp.gate_proj.bias is missing" in error.what


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_a_flag_opens_and_closes_slots(flag: str, model: Open) -> None:
    closed = model("llama", **{flag: False}).resolve()
    slots = [x.bias for b in closed.branches for x in (*b.reads, *b.writes)]
    assert {(slot.flag, slot.state) for slot in slots} == {
        ("attention_bias", "closed" if flag == "attention_bias" else "present"),
        ("mlp_bias", "closed" if flag == "mlp_bias" else "present"),
    }
    assert closed.flags[flag] is False


# A config that the table does not describe


@pytest.mark.parametrize(
    ("name", "key", "value", "allowed"),
    [("llama", "pretraining_tp", 2, "1"), ("gpt2", "add_cross_attention", True, "False")],
)
def test_a_key_that_changes_the_arithmetic(
    name: str, key: str, value: Any, allowed: str, model: Open
) -> None:
    other = model(name)
    other.config[key] = value
    error = other.refusal()
    assert error.what == f"{key} = {value!r}, but the table {name!r} is written for {allowed}"
    assert error.why == "the key changes the arithmetic of the forward pass"
    unsaid = model(name)
    unsaid.config.pop(key, None)
    unsaid.resolve()


def test_a_quantised_checkpoint(model: Open) -> None:
    codes = model("llama")
    codes.config["quantization_config"] = {"quant_method": "fp8"}
    error = codes.refusal()
    assert error.what == "the checkpoint is quantised"
    assert error.where == "config.json quantization_config"
    codes.config["quantization_config"] = None
    codes.resolve()


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("num_hidden_layers", None, "the key 'num_hidden_layers' is missing"),
        ("num_hidden_layers", "3", "num_hidden_layers = '3' is no positive integer"),
        ("hidden_size", 0, "hidden_size = 0 is no positive integer"),
        ("num_attention_heads", 4.0, "num_attention_heads = 4.0 is no positive integer"),
        ("vocab_size", -1, "vocab_size = -1 is no positive integer"),
        ("attention_bias", "false", "attention_bias = 'false' is no boolean"),
        ("mlp_bias", None, "mlp_bias = None is no boolean"),
        ("tie_word_embeddings", "no", "tie_word_embeddings = 'no' is no boolean"),
    ],
)
def test_values_of_config_that_are_refused(key: str, value: Any, what: str, model: Open) -> None:
    odd = model("llama")
    odd.config[key] = value
    error = odd.refusal()
    assert error.what == what
    assert error.where == "config.json"


def test_a_boolean_is_no_size(model: Open) -> None:
    odd = model("llama")
    odd.config["num_hidden_layers"] = True
    assert odd.refusal().what == "num_hidden_layers = True is no positive integer"


def test_unsaid_keys_have_the_defaults_of_the_class(model: Open) -> None:
    plain = model("llama")
    for key in ("tie_word_embeddings", "pretraining_tp"):
        plain.config.pop(key, None)
    assert plain.resolve().tied is False
    gemma = model("gemma")
    del gemma.config["tie_word_embeddings"]
    assert gemma.resolve().tied is True
    widths = model("gpt2", n_inner=None)
    assert widths.config["n_inner"] is None
    assert widths.resolve().dims["inner"] == 4 * 24


def test_a_table_without_a_default_needs_the_key_said(model: Open) -> None:
    bare = model("llama")
    bare.family = parse_family(changed("tie_word_embeddings = false\n", ""), WHERE)
    bare.resolve()
    del bare.config["tie_word_embeddings"]
    assert bare.refusal().what == "the key 'tie_word_embeddings' is missing"


def test_a_mixture_needs_its_number_of_experts(model: Open) -> None:
    mixture = model("mixtral")
    assert mixture.resolve().dims["experts"] == 3
    mixture.family = parse_family(
        changed("num_local_experts = 8\n", "", "mixtral"), WHERE
    )  # fmt: skip
    del mixture.config["num_local_experts"]
    assert mixture.refusal().what == "the key 'num_local_experts' is missing"


def test_a_size_that_versions_of_a_class_call_otherwise(model: Open) -> None:
    mixture = model("qwen3_moe")
    names = ("num_experts", "num_local_experts")
    assert [mixture.config.pop(name, None) for name in names] != [None, None]
    for name in names:
        mixture.config = {**mixture.config, name: 3}
        assert mixture.resolve().dims["experts"] == 3
    mixture.config["num_experts"] = 4
    assert mixture.refusal().what.startswith("num_experts = 4, num_local_experts = 3: one size")
    mixture.config |= {"num_experts": None, "num_local_experts": None}
    assert mixture.refusal().what == "the key 'num_experts' or 'num_local_experts' is missing"


def test_a_size_that_the_class_fixes(model: Open) -> None:
    """Falcon 7B has one key and one value for all heads, whatever its configuration says."""
    shared = model("falcon")
    shared.config["num_kv_heads"] = 4
    layout = shared.resolve()
    assert layout.dims["kv_heads"] == 1
    (fused,) = layout.branches[0].reads
    assert [len(part.rows) for part in fused.parts] == [32, 8, 8]


# Heads, prefixes, buffers


@every_family
def test_a_tied_head_with_a_tensor_of_its_own(name: str, model: Open) -> None:
    both = model(name, tied=True)
    head = f"{both.family.unembed.module}.weight"
    assert head not in both.shapes
    assert both.resolve().unembed.weight == head
    shape = both.shapes[f"{both.family.embed.module}.weight"]
    layout = both.add(head, *shape).resolve()
    assert (
        layout.tied
        and layout.head_is_stored
        and not model(name, tied=True).resolve().head_is_stored
    )
    wider = both.add(head, shape[0], shape[1] + 1).refusal(CheckpointError)
    assert f"the output head {head} has the shape" in wider.what


def test_gpt2_without_its_prefix(model: Open) -> None:
    plain = model("gpt2").resolve()
    stripped = model("gpt2").rename(lambda name: name.removeprefix("transformer."))
    assert not any(name.startswith("transformer.") for name in stripped.shapes)
    layout = stripped.resolve()
    assert layout.embed == "wte.weight"
    assert layout.positions == ("wpe.weight",)
    assert layout.branches[0].reads[0].weight == "h.0.attn.c_attn.weight"
    assert layout.branches[0].reads[0].bias.name == "h.0.attn.c_attn.bias"
    # Modules of the loaded model keep their prefix.
    assert [b.live for b in layout.branches] == [b.live for b in plain.branches]
    assert layout.branches[0].reads[0].live == "transformer.h.0.attn.c_attn"
    half = model("gpt2").rename(lambda name: name.replace("transformer.wte", "wte"))
    assert (
        "h.0" in half.refusal(CheckpointError).what or "wpe" in half.refusal(CheckpointError).what
    )


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_buffers_of_old_checkpoints_travel_untouched(prefix: str, model: Open) -> None:
    old = model("gpt2").rename(lambda name: name.replace("transformer.", prefix))
    for layer in range(3):
        old.add(f"{prefix}h.{layer}.attn.bias", 1, 1, 64, 64)
        old.add(f"{prefix}h.{layer}.attn.masked_bias")
    layout = old.resolve()
    assert len(layout.untouched) == 6
    assert f"{prefix}h.2.attn.masked_bias" in layout.untouched
    other = old.add(f"{prefix}h.0.attn.other_bias", 1)
    assert f"tensor {prefix}h.0.attn.other_bias is not in the table" in other.refusal().what


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt_neox", "gpt_neox.layers.1.attention.bias"),
        ("gpt_neox_sequential", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"),
    ],
)
def test_other_buffers(name: str, buffer: str, model: Open) -> None:
    assert model(name).add(buffer, 4).resolve().untouched == (buffer,)
    for other in (
        buffer.replace(".layers.", ".layers.x.layers."),
        f"{buffer}.weight",
        f"x.{buffer}",
    ):
        assert f"tensor {other} is not in the table" in model(name).add(other, 4).refusal().what


@pytest.mark.parametrize(
    ("untouched", "left", "refused"),
    [
        ("vision.**", "vision.blocks.0.norm.weight", "visions.blocks.0.norm.weight"),
        ("mtp.*.weight", "mtp.norm.weight", "mtp.layers.norm.weight"),
        ("model.layers.{layer}.extra", "model.layers.17.extra", "model.layers.x.extra"),
    ],
)
def test_tensors_outside_the_blocks_that_a_table_leaves(
    untouched: str, left: str, refused: str, model: Open
) -> None:
    towered = model("llama")
    top = f'untouched = ["{untouched}"]\n[must]'
    towered.family = parse_family(changed("[must]", top), WHERE)
    assert towered.add(left, 4).resolve().untouched == (left,)
    assert f"tensor {refused} is not in the table" in towered.add(refused, 4).refusal().what


# Sites of a layout


def test_the_stream_has_a_point_before_the_blocks_and_after_every_write(model: Open) -> None:
    sequential = [str(site) for site in model("llama").resolve().stream]
    assert sequential == ["resid_pre.0"] + [
        f"resid_{kind}.{layer}" for layer in range(3) for kind in ("mid", "post")
    ]
    parallel = model("gpt_neox").resolve()
    assert [str(site) for site in parallel.stream] == [
        "resid_pre.0", "resid_post.0", "resid_post.1", "resid_post.2"
    ]  # fmt: skip
    assert [[str(site) for site in point] for point in parallel.points][1] == [
        "resid_post.0", "resid_pre.1"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "site", "width"),
    [
        ("llama", "resid_post.1", 24), ("llama", "q.1", 32), ("llama", "q.1.h3", 8),
        ("llama", "k.1", 16), ("llama", "v.1.h1", 8), ("llama", "z.0", 32), ("llama", "embed", 24),
        ("llama", "mlp_act.0", 40), ("llama", "mlp_gate.0", 40), ("llama", "ln_final_out", 24),
        ("gpt2", "k.0", 24), ("gpt2", "mlp_up.2", 40), ("gpt_neox", "v.0.h3", 8),
        ("gemma2", "ln1_post_out.1", 24), ("mixtral", "mlp_out.0", 24),
    ],
)  # fmt: skip
def test_widths(name: str, site: str, width: int, model: Open) -> None:
    assert model(name).resolve().width(parse_site(site)) == width


@pytest.mark.parametrize(
    ("name", "site", "what"),
    [
        ("llama", "resid_post.3", "llama has no site resid_post.3"),
        ("llama", "ln1_post_out.0", "llama has no site ln1_post_out.0"),
        ("gpt2", "mlp_gate.0", "gpt2 has no site mlp_gate.0"),
        ("gpt_neox", "resid_mid.0", "gpt_neox has no site resid_mid.0"),
        ("olmo2", "ln1_out.0", "olmo2 has no site ln1_out.0"),
        ("mixtral", "mlp_act.0", "mixtral has no site mlp_act.0"),
        ("llama", "q.0.h4", "q.0.h4 names head 4, but there are 4"),
        ("llama", "k.0.h2", "k.0.h2 names head 2, but there are 2"),
    ],
)
def test_sites_that_a_model_does_not_have(name: str, site: str, what: str, model: Open) -> None:
    layout = model(name).resolve()
    with pytest.raises(UsageError) as caught:
        layout.width(parse_site(site))
    assert caught.value.what == what
    if "head" not in what:
        assert "its 3 blocks have embed, resid_pre" in str(caught.value.why)


@every_family
def test_sites_are_in_the_order_of_the_forward_pass(name: str, model: Open) -> None:
    layout = model(name).resolve()
    assert list(layout.sites) == sorted(layout.sites, key=lambda site: site.order)
    assert layout.sites[0] == Site(SiteKind.EMBED)
    assert layout.sites[-1] == Site(SiteKind.LN_FINAL_OUT)
    assert len(set(layout.sites)) == len(layout.sites)
    assert all(layout.width(site) > 0 for site in layout.sites)


def test_what_a_table_says_of_runtimes(model: Open) -> None:
    layout = model("qwen3").resolve()
    vllm = runtime_of(layout, "vllm")
    assert vllm is not None
    assert "self_attn.o_proj" not in vllm.biases
    assert vllm.extra_bias == "dropped"
    assert runtime_of(layout, "another") is None
