"""bake's worker asks llama.cpp's library in one pass; its server answers prefix by prefix."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from exporting import written
from install import GgufConverter
from reference import largest_difference
from subject import (
    BROKEN,
    EFFECT,
    STREAM,
    Spec,
    Subject,
    answered_by_server,
    direction,
    request,
    subject_at,
)
from tiny_checkpoints import converted, plain_llama

from bake.affine import translation
from bake.process import RuntimeFailed
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP

pytestmark = pytest.mark.runtimes

SAME = 1e-5  # nats: the same kernels in float32, and the server's softmax in float32
OFFSET: list[Spec] = [("offset", translation(3 * direction()), "resid_post.1")]
# The carrier, its edit, its file, and the server's option.
ADAPTERS = {
    "model": None,
    "lora": ("gguf-lora", STREAM, "lora.gguf", "--lora"),
    "control vector": ("control-vector", OFFSET, "control-vector.gguf", "--control-vector"),
}


@dataclass(frozen=True, eq=False)
class Served:
    subject: Subject
    file: Path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, gguf_converter: GgufConverter) -> Served:
    folder = tmp_path_factory.mktemp("base")
    subject = subject_at(plain_llama(), folder / "model")
    return Served(subject, converted(subject.model, subject.checkpoint.path, gguf_converter))


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_pass_gives_what_the_server_gives_for_every_prefix(
    name: str, base: Served, llamacpp_python: Path, tmp_path: Path
) -> None:
    words, adapter = ["-m", str(base.file)], None
    if ADAPTERS[name] is not None:
        kind, specs, file, option = ADAPTERS[name]
        plan = base.subject.plan(specs, targets=("llama.cpp",))
        adapter = written(kind, plan, base.subject.checkpoint, tmp_path / "out").path / file
        words += [option, str(adapter)]
    asked = request(base.file, adapter)
    served = answered_by_server(asked, words, llamacpp_python, tmp_path)
    answered = ask(LLAMA_CPP, asked, llamacpp_python)
    pairs = list(zip(answered.prompt_logprobs, served.prompt_logprobs, strict=True))
    assert max(float(np.abs(a - b).max()) for a, b in pairs) <= SAME
    assert answered.greedy == served.greedy
    # The effect: the positions of a prompt, and the model with and without its adapter, differ.
    assert max(float(np.abs(a[1:] - b[:-1]).max()) for a, b in pairs if len(a) > 1) > BROKEN
    if adapter is not None:
        assert largest_difference(base.subject.plain, answered) > EFFECT
        both = ask(LLAMA_CPP, replace(asked, unadapted=2), llamacpp_python)
        for table, plain in zip(both.unadapted, base.subject.plain.prompt_logprobs, strict=False):
            assert float(np.abs(table - plain).max()) <= SAME


def test_a_file_that_llamacpp_does_not_load_is_said(
    base: Served, llamacpp_python: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(base.file.read_bytes()[:-4096])
    with pytest.raises(RuntimeFailed, match=r"llama\.cpp does not load"):
        ask(LLAMA_CPP, request(cut), llamacpp_python)
    wrong = replace(request(base.file), vocab_size=request(base.file).vocab_size + 1)
    with pytest.raises(RuntimeFailed, match="the file's vocabulary is not one of"):
        ask(LLAMA_CPP, wrong, llamacpp_python)
