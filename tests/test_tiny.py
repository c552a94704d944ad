"""The tiny models have what the other tests rely on, and the guard of conftest.py guards."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moulds import Filling
from tiny import (
    BIASES,
    CONFIGS,
    FAMILIES,
    GAIN_OFFSET,
    TIED,
    config_of,
    header_of,
    layout_of,
    load,
    make_model,
    read,
    tokens,
    tolerance,
    write_checkpoint,
)
from transformers import PreTrainedModel

from bake.families import load_families

# Where the class has no head_dim, heads × head_dim is hidden.
SQUARE_HEADS = tuple(family for family in FAMILIES if "head_dim" not in CONFIGS[family])
Checkpoints = Callable[..., Path]


def test_every_family_table_has_a_tiny_model() -> None:
    assert sorted(CONFIGS) == [family.name for family in load_families()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_keeps_float64_bit_by_bit(family: str, tiny_checkpoint: Checkpoints) -> None:
    path = tiny_checkpoint(family)
    assert config_of(path)["dtype"] == "float64"
    assert set(header_of(path)[1].values()) == {"F64"}
    made, loaded = make_model(family).state_dict(), load(path).state_dict()
    assert made.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in made.items())
    other = make_model(family, seed=1).state_dict()
    assert not any(torch.equal(tensor, other[name]) for name, tensor in made.items())


# One more whose experts become stacks, and whose file fills a buffer too.
@pytest.mark.parametrize("family", [*FAMILIES, "glm4_moe"])
def test_a_copy_is_what_transformers_loads(
    family: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    first = load(tiny_checkpoint(family))
    kept = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    write_checkpoint(make_model(family, seed=1), tmp_path)
    for copied in (load(tmp_path), load(tmp_path)):
        found = read(tmp_path, torch.float64)
        one, other = copied.state_dict(), found.state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        assert dict(copied.named_buffers()).keys() == dict(found.named_buffers()).keys()
        for name, buffer in found.named_buffers():
            assert torch.equal(copied.get_buffer(name), buffer)
        assert copied.config.to_dict() == found.config.to_dict()
        assert copied.config.name_or_path == found.config.name_or_path == str(tmp_path)
        assert len(list(copied.parameters())) == len(list(found.parameters()))  # what is tied
        with torch.no_grad():
            answers = [model(tokens()).logits for model in (copied, found, first)]
        # Where a tensor lies in memory decides on some machines in which order products add up.
        apart, other_values = ((answers[0] - a).abs().max() for a in answers[1:])
        assert apart <= tolerance(found) * answers[0].abs().max() < 1e-3 * other_values
    assert all(torch.equal(tensor, kept[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_values_that_are_computed_are_read_each_time(
    family: str, factor: float, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """The control of the copies: what a class computes on loading is not put where it is not."""

    def computing(path: Path, dtype: torch.dtype) -> PreTrainedModel:
        model = read(path, dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("mlp.down_proj.weight", "experts.down_proj")):
                    parameter.mul_(factor)
        return model

    path = tiny_checkpoint(family)
    filling = Filling.seen(computing(path, torch.float64), path, computing)
    assert (filling is None) is (factor != 1.0)
    write_checkpoint(make_model(family, seed=1), tmp_path)
    for each in (path, tmp_path):
        one, other = load(each, read=computing), computing(each, torch.float64)
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_differ(family: str, tiny_checkpoint: Checkpoints) -> None:
    dims = layout_of(tiny_checkpoint(family)).dims
    query, key = (dims[name] * dims["head_dim"] for name in ("heads", "kv_heads"))
    sizes = {dims["hidden"], dims["inner"], dims["vocab"], query, key}
    assert len(sizes) == (3 if family in SQUARE_HEADS else 5)
    square = layout_of(tiny_checkpoint(family, square=True)).dims
    assert square["heads"] * square["head_dim"] == square["hidden"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gains_differ_from_one_and_biases_from_zero(
    family: str, tiny_checkpoint: Checkpoints
) -> None:
    model, layout = make_model(family), layout_of(tiny_checkpoint(family))
    gains = [p for p in model.parameters() if p.dim() == 1]
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    for parameter in gains:
        if not any(parameter is bias for bias in biases):
            gain = parameter + GAIN_OFFSET.get(family, 0.0)
            assert 0.5 <= gain.abs().min() < gain.abs().max() <= 1.5
            assert gain.min() < 0 < gain.max()
    linears = [x for b in layout.branches for x in (*b.reads, *b.writes)]
    assert all(x.bias.state != "closed" for x in linears)
    assert all(bias.abs().max() > 0.1 for bias in biases)
    assert bool(biases) == bool(BIASES[family])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_both_branches_move_the_stream(family: str, tiny_checkpoint: Checkpoints) -> None:
    model, layout = make_model(family), layout_of(tiny_checkpoint(family))
    logits = model(tokens()).logits
    assert 1 < logits.abs().max() < 10
    for branch in layout.branches:
        silent = make_model(family)
        last = branch.live if branch.norm_out is None else branch.norm_out.live

        def hook(module: torch.nn.Module, args: object, output: object) -> object:
            return (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output

        silent.get_submodule(last).register_forward_hook(hook)
        assert (silent(tokens()).logits - logits).abs().max() > 0.05 * logits.abs().max()


def test_a_tied_head_is_one_tensor(tiny_checkpoint: Checkpoints) -> None:
    for family in FAMILIES:
        model, layout = make_model(family), layout_of(tiny_checkpoint(family))
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == layout.tied == (family in TIED)
    for family, tied in (("llama", True), ("gpt2", False), ("gemma2", False)):
        path = tiny_checkpoint(family, tied=tied)
        model, layout = load(path), layout_of(path)
        assert layout.tied == tied
        assert (layout.unembed.weight in layout.shapes) != tied
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_a_checkpoint_in_shards_is_the_same_layout(tmp_path: Path) -> None:
    model = make_model("llama")
    write_checkpoint(model, tmp_path / "one")
    write_checkpoint(model, tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert layout_of(tmp_path / "many") == layout_of(tmp_path / "one")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            load(tmp_path / "many").parameters(), load(tmp_path / "one").parameters(), strict=True
        )
    )


def test_overrides_reach_the_config(tmp_path: Path) -> None:
    write_checkpoint(make_model("llama", attention_bias=False, dtype=torch.bfloat16), tmp_path)
    assert config_of(tmp_path)["attention_bias"] is False
    assert CONFIGS["llama"]["attention_bias"] is True
    layout = layout_of(tmp_path)
    assert layout.dtype == "BF16"
    assert {x.bias.state for b in layout.branches for x in b.reads} == {"closed", "present"}


def test_loading_asserts_on_a_missing_tensor(tmp_path: Path) -> None:
    write_checkpoint(make_model("llama", attention_bias=False), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace(
            '"attention_bias": false', '"attention_bias": true'
        ),
        encoding="utf-8",
    )
    with pytest.raises(AssertionError, match=r"self_attn\.o_proj\.bias"):
        load(tmp_path)


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.invalid", 443)])
def test_the_guard_fails_a_test_that_connects(address: tuple[str, int]) -> None:
    with pytest.raises(pytest.fail.Exception, match="the test reaches for the network"):
        socket.create_connection(address, timeout=0.1)
    with socket.socket() as sock, pytest.raises(pytest.fail.Exception, match=address[0]):
        sock.connect(address)


def test_the_guard_lets_loopback_through() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            client.sendall(b"x")
            accepted, _ = server.accept()
            with accepted:
                assert accepted.recv(1) == b"x"
