"""Run inside llama.cpp's own environment: `python -I _llamacpp_worker.py request.json out/`.

It imports nothing of bake, which that environment need not have. It calls llama.cpp's library (in
the package xllamacpp): a model is loaded by the function that llama.cpp's server loads it with, and
one pass over a prompt gives the logits of every position. The server gives only those of the next
token, a whole vocabulary of JSON for each prefix.
"""

import ctypes
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def main(request_path: Path, out: Path) -> None:
    """Serve the request and write `out/logprobs.npz`, then `out/result.json`."""
    import xllamacpp

    request = json.loads(request_path.read_text(encoding="utf-8"))
    model = Model(xllamacpp, parameters(xllamacpp, request))
    if model.vocab_size != request["vocab_size"]:
        raise SystemExit(f"the file's vocabulary is not one of {request['vocab_size']} tokens")
    answers = [model.answer(p, request["max_new_tokens"]) for p in request["prompts"]]
    model.close()
    arrays: dict[str, Any] = {f"prompt_{i}": table for i, (table, _) in enumerate(answers)}
    if request["unadapted"]:
        model = Model(xllamacpp, parameters(xllamacpp, {**request, "adapter_kind": None}))
        for i, prompt in enumerate(request["prompts"][: request["unadapted"]]):
            arrays[f"unadapted_{i}"], _ = model.answer(prompt, 1)
        model.close()
    np.savez(out / "logprobs.npz", **arrays)
    result = {
        "version": xllamacpp.__version__,
        "greedy": [tokens for _, tokens in answers],
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "system": xllamacpp.get_system_info(),
        },
    }
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def parameters(xllamacpp: Any, request: dict[str, Any]) -> Any:
    """Return what is loaded and how: K/V caches in the request's dtype, nothing fitted."""
    longest = max(len(prompt) for prompt in request["prompts"])
    cache = {
        "float32": xllamacpp.ggml_type.GGML_TYPE_F32,
        "float16": xllamacpp.ggml_type.GGML_TYPE_F16,
        "bfloat16": xllamacpp.ggml_type.GGML_TYPE_BF16,
    }[request["dtype"]]
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    if request["adapter_kind"] == "control vector":
        add_control_vector(xllamacpp, params, request["adapter"])
    elif request["adapter_kind"] == "factors":
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["adapter"], 1.0)]
    params.n_ctx = longest + request["max_new_tokens"]
    params.n_batch = params.n_ubatch = max(longest, 32)
    params.n_outputs_max = params.n_outputs_max_per_seq = params.n_batch
    params.n_parallel = 1
    params.cache_type_k = params.cache_type_v = cache
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = False
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads()
    return params


def threads() -> int:
    """Return how many threads compute: as many as llama.cpp's own programs are told in
    LLAMA_ARG_THREADS, or OpenMP's number, of which a list has one for each level.

    Where nobody says, these programs count the processors; the library takes −1 as it is.
    """
    own, of_all = (os.environ.get(name, "") for name in ("LLAMA_ARG_THREADS", "OMP_NUM_THREADS"))
    asked = own.strip() or of_all.partition(",")[0].strip()
    return int(asked) if asked else os.cpu_count() or 1


INIT = "_Z23common_init_from_paramsR13common_paramsb"
CONTEXT = "_ZN18common_init_result7contextEv"
CLOSE = "_ZN18common_init_resultD1Ev"
PARSE = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"
SERVER = 12  # LLAMA_EXAMPLE_SERVER, llama.cpp common/common.h
SERIOUS = (3, 4)  # GGML_LOG_LEVEL_WARN and _ERROR, llama.cpp ggml/include/ggml.h

Pointer = ctypes.c_void_p
Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)


class Batch(ctypes.Structure):
    """`llama_batch`, llama.cpp include/llama.h."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", Pointer),
        ("pos", Pointer),
        ("n_seq_id", Pointer),
        ("seq_id", Pointer),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Library:
    """The functions of llama.cpp that the package's library has and its Python does not."""

    def __init__(self, xllamacpp: Any) -> None:
        self.version = xllamacpp.__version__
        self.library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        """Return a function by the name that the linker knows it by."""
        if not hasattr(self.library, name):
            raise SystemExit(f"xllamacpp {self.version} does not hold llama.cpp's {name}")
        found = self.library[name]
        found.restype, found.argtypes = result, arguments
        return found

    def address(self, params: Any) -> int:
        """Return where the C++ structure lies that a parameters object wraps.

        It is seen from the structure's first field, before anything is written.
        """
        address = id(params) + object.__basicsize__
        before, mark = params.n_predict, 0x5EED
        params.n_predict = mark
        found = ctypes.c_int32.from_address(address).value
        params.n_predict = before
        if found != mark:
            raise SystemExit(f"xllamacpp {self.version} keeps its parameters in another place")
        return address


def add_control_vector(xllamacpp: Any, params: Any, path: str) -> None:
    """Do what `llama-server --control-vector PATH` does, by llama.cpp's own command line.

    The package has no property for it, but its library has the parser of the command line.
    """
    # The value is a row of comma-separated values; quotes keep a comma in a path from parting it.
    parse(xllamacpp, params, ["--control-vector", '"' + path.replace('"', '""') + '"'])


def parse(xllamacpp: Any, params: Any, words: Sequence[str]) -> None:
    """Let llama.cpp's parser of its server's command line fill the parameters."""
    library = Library(xllamacpp)
    strings = ctypes.POINTER(ctypes.c_char_p)
    kinds = (ctypes.c_int, strings, Pointer, ctypes.c_int, Pointer)
    function = library.function(PARSE, ctypes.c_bool, *kinds)
    encoded = [word.encode() for word in ("llama-server", *words)]
    line = (ctypes.c_char_p * (len(encoded) + 1))(*encoded, None)
    if not function(len(encoded), line, library.address(params), SERVER, None):
        raise SystemExit(f"llama.cpp does not understand {' '.join(words)}")


class Model:
    """A model with its adapter, as llama.cpp's library holds it."""

    def __init__(self, xllamacpp: Any, params: Any) -> None:
        library = Library(xllamacpp)
        set_log = library.function("llama_log_set", None, Log, Pointer)
        self.log = Log(print_warning)  # it is called as long as the model is at work
        set_log(self.log, None)
        init = library.function(INIT, None, Pointer, Pointer, ctypes.c_bool)
        context = library.function(CONTEXT, Pointer, Pointer)
        # A std::unique_ptr, which a function returns through the place that it is given.
        self.loaded = Pointer()
        init(ctypes.byref(self.loaded), library.address(params), False)
        self.context = context(self.loaded)
        if self.context is None:
            raise SystemExit(f"llama.cpp does not load {params.model.path}")
        self.free = library.function(CLOSE, None, Pointer)
        self.clear = library.function("llama_memory_clear", None, Pointer, ctypes.c_bool)
        self.cache = library.function("llama_get_memory", Pointer, Pointer)(self.context)
        self.decode = library.function("llama_decode", ctypes.c_int32, Pointer, Batch)
        row = ctypes.POINTER(ctypes.c_float)
        self.row = library.function("llama_get_logits_ith", row, Pointer, ctypes.c_int32)
        own = library.function("llama_get_model", Pointer, Pointer)(self.context)
        vocab = library.function("llama_model_get_vocab", Pointer, Pointer)(own)
        count = library.function("llama_vocab_n_tokens", ctypes.c_int32, Pointer)
        self.vocab_size: int = count(vocab)

    def close(self) -> None:
        """Let go of the model's memory."""
        self.free(self.loaded)

    def answer(
        self, prompt: Sequence[int], count: int
    ) -> tuple[npt.NDArray[np.float32], list[int]]:
        """Return the log-probabilities after every token of a prompt, and its continuation.

        The first are [tokens, vocab]: row t is log p(next token | the first t + 1 tokens). The
        second are ``count`` most likely tokens; one that ends a text does not end it.
        """
        self.clear(self.cache, True)
        rows = self.logits(prompt)
        tokens = [int(rows[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.logits(tokens[-1:])[-1].argmax()))
        table = rows.astype(np.float64)
        table -= table.max(axis=1, keepdims=True)
        table -= np.log(np.exp(table).sum(axis=1, keepdims=True))
        return table.astype(np.float32), tokens

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return [tokens, vocab]: the logits after each of the tokens that come next."""
        count = len(tokens)
        batch = Batch(n_tokens=count)  # without positions they follow what is in the cache
        batch.token = (ctypes.c_int32 * count)(*tokens)
        batch.logits = (ctypes.c_int8 * count)(*[1] * count)
        status = self.decode(self.context, batch)
        if status:
            raise SystemExit(f"llama_decode of {count} tokens failed with status {status}")
        rows = (self.row(self.context, i) for i in range(count))
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows])


def print_warning(level: int, text: bytes, _: Any) -> None:
    """Print warnings and errors; what llama.cpp says of its graphs would hide them."""
    if level in SERIOUS:
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
