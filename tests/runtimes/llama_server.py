"""What `llama-server ARGUMENTS` does, with a question to answer.

    python -I llama_server.py WORKER question.json OUT ARGUMENTS

The package xllamacpp brings llama.cpp's server and its command line's parser, but not the program.
Here the parser reads the arguments as they are, the server is started with what it understood,
and WORKER, bake's own `_llamacpp_worker.py`, asks it. OUT gets the answer.
"""

import ctypes
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np


def main(worker_path: Path, question_path: Path, out: Path, arguments: list[str]) -> None:
    """Start the server and write `OUT/logprobs.npz` and `OUT/result.json`."""
    import xllamacpp

    spec = importlib.util.spec_from_file_location("worker", worker_path)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    question = json.loads(question_path.read_text(encoding="utf-8"))
    params = xllamacpp.CommonParams()
    parse(xllamacpp, worker, params, ["llama-server", *arguments])
    client = worker.Client(xllamacpp.Server(params), params.api_keys[0])
    rows = [client.prompt_logprobs(p, question["vocab_size"]) for p in question["prompts"]]
    greedy = [client.greedy(p, question["max_new_tokens"]) for p in question["prompts"]]
    np.savez(out / "logprobs.npz", **{f"prompt_{i}": row for i, row in enumerate(rows)})
    result = {"version": xllamacpp.__version__, "greedy": greedy, "environment": {}}
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def parse(xllamacpp, worker, params, words: list[str]) -> None:
    """Let llama.cpp's parser fill the C++ structure that the parameters object wraps."""
    address = id(params) + object.__basicsize__
    params.n_predict, before = 0x5EED, params.n_predict
    assert ctypes.c_int32.from_address(address).value == 0x5EED  # the structure's first field
    params.n_predict = before
    function = ctypes.CDLL(xllamacpp.xllamacpp.__file__)[worker.PARSE]
    function.restype = ctypes.c_bool
    strings = ctypes.POINTER(ctypes.c_char_p)
    kinds = (ctypes.c_int, strings, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    function.argtypes = kinds
    line = (ctypes.c_char_p * (len(words) + 1))(*[word.encode() for word in words], None)
    if not function(len(words), line, address, worker.SERVER, None):
        raise SystemExit(f"llama.cpp does not understand {words}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
