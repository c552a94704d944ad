"""Run inside llama.cpp's own environment: `python -I _llamacpp_worker.py request.json out/`.

It imports nothing of bake, which that environment need not have. It starts llama.cpp's own server
in this process (package xllamacpp) and asks it over the loopback interface, since the native
`/completion` answer carries token ids and the package's Python call does not.
"""

import ctypes
import json
import os
import platform
import secrets
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Below this the server's float32 probability is subnormal, and its logarithm has lost digits.
SMALLEST_LOGPROB = -87.0


def main(request_path: Path, out: Path) -> None:
    """Serve the request and write `out/logprobs.npz`, then `out/result.json`."""
    import xllamacpp

    request = json.loads(request_path.read_text(encoding="utf-8"))
    key = secrets.token_hex()
    server = Client(start(xllamacpp, request, key), key)
    rows = [server.prompt_logprobs(p, request["vocab_size"]) for p in request["prompts"]]
    greedy = [server.greedy(p, request["max_new_tokens"]) for p in request["prompts"]]
    arrays: dict[str, Any] = {f"prompt_{i}": row for i, row in enumerate(rows)}
    if request["unadapted"]:
        del server  # it stops, and its memory is free for the next one
        server = Client(start(xllamacpp, {**request, "adapter_kind": None}, key), key)
        for i, prompt in enumerate(request["prompts"][: request["unadapted"]]):
            arrays[f"unadapted_{i}"] = server.prompt_logprobs(prompt, request["vocab_size"])
    np.savez(out / "logprobs.npz", **arrays)
    result = {
        "version": xllamacpp.__version__,
        "greedy": greedy,
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "system": xllamacpp.get_system_info(),
        },
    }
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def start(xllamacpp: Any, request: dict[str, Any], key: str) -> Any:
    """Return the server, its K/V caches in the request's dtype and nothing fitted to the machine.

    The key keeps other users of the machine out of the port that it listens on.
    """
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
    # The server wants one free place beyond the last token.
    params.n_ctx = longest + request["max_new_tokens"] + 1
    params.n_batch = params.n_ubatch = max(longest + request["max_new_tokens"], 32)
    params.n_parallel = 1
    params.cache_type_k = params.cache_type_v = cache
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.fit_params = False
    params.warmup = False
    params.verbosity = 2  # warnings and errors
    params.api_keys = [key]
    if "OMP_NUM_THREADS" in os.environ:
        params.cpuparams.n_threads = int(os.environ["OMP_NUM_THREADS"])
        params.cpuparams_batch.n_threads = int(os.environ["OMP_NUM_THREADS"])
    return xllamacpp.Server(params)


PARSE = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"
SERVER = 12  # LLAMA_EXAMPLE_SERVER, llama.cpp common/common.h


def add_control_vector(xllamacpp: Any, params: Any, path: str) -> None:
    """Do what `llama-server --control-vector PATH` does, by llama.cpp's own command line.

    The package has no property for it, but its library has the parser of the command line. What the
    parser fills is the C++ structure that a parameters object wraps; where it lies in the object is
    seen from the structure's first field, before anything is written.
    """
    address = id(params) + object.__basicsize__
    before, mark = params.n_predict, 0x5EED
    params.n_predict = mark
    found = ctypes.c_int32.from_address(address).value
    params.n_predict = before
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    if found != mark or not hasattr(library, PARSE):
        raise SystemExit(f"xllamacpp {xllamacpp.__version__} takes no control vector")
    parse = library[PARSE]
    parse.restype = ctypes.c_bool
    parse.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
    )
    # The value is a row of comma-separated values; quotes keep a comma in a path from parting it.
    quoted = '"' + path.replace('"', '""') + '"'
    words = [b"llama-server", b"--control-vector", quoted.encode()]
    line = (ctypes.c_char_p * (len(words) + 1))(*words, None)
    if not parse(len(words), line, address, SERVER, None):
        raise SystemExit(f"llama.cpp does not understand --control-vector {path}")


class Client:
    """Ask the server that lives in this process."""

    def __init__(self, server: Any, key: str) -> None:
        self.server = server  # it stops when it is collected
        self.headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        # No proxy of the environment may stand between this process and itself.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.text_token = self.find_text_token()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the server's JSON answer; an error's text goes to stderr first."""
        request = urllib.request.Request(
            self.server.listening_address + path,
            data=json.dumps(body).encode(),
            headers=self.headers,
        )
        try:
            with self.opener.open(request) as answer:
                parsed: dict[str, Any] = json.load(answer)
                return parsed
        except urllib.error.HTTPError as error:
            print(error.read().decode(errors="replace"), file=sys.stderr)
            raise

    def find_text_token(self) -> int:
        """Return a token whose text is whole characters, never a fragment of one."""
        pieces = self.post("/tokenize", {"content": "a", "with_pieces": True})["tokens"]
        ids: list[int] = [piece["id"] for piece in pieces if isinstance(piece["piece"], str)]
        return ids[0]

    def prompt_logprobs(self, prompt: list[int], vocab_size: int) -> npt.NDArray[np.float32]:
        """Return [tokens, vocab]: row t is log p(next token | the first t + 1 tokens)."""
        return np.stack(
            [self.next_token(prompt[:t], vocab_size) for t in range(1, len(prompt) + 1)]
        )

    def next_token(self, prefix: list[int], vocab_size: int) -> npt.NDArray[np.float32]:
        """Return [vocab] log-probabilities after the prefix, from the logits before any sampler."""
        answer = self.post(
            "/completion",
            {
                "prompt": prefix,
                "n_predict": 1,
                "n_probs": vocab_size + 1,  # one more than wanted, to see a larger vocabulary
                "temperature": 0.0,
                "cache_prompt": False,
                # subtle: the server leaves the probabilities out when the sampled token ends in the
                # middle of a character. The bias chooses what is sampled; what is reported is
                # computed from the logits themselves, and does not see it.
                "logit_bias": [[self.text_token, 1e9]],
            },
        )
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        if sorted(entry["id"] for entry in entries) != list(range(vocab_size)):
            raise SystemExit(f"the file's vocabulary is not one of {vocab_size} tokens")
        row = np.empty(vocab_size, dtype=np.float32)
        for entry in entries:
            row[entry["id"]] = entry["logprob"]
        if row.min() < SMALLEST_LOGPROB:
            raise SystemExit(f"log-probability {row.min()} is below what the server can report")
        return row

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Return the arg-max continuation; an end-of-text token does not end it."""
        tokens: list[int] = []
        while len(tokens) < count:
            answer = self.post(
                "/completion",
                {
                    "prompt": prompt + tokens,
                    "n_predict": count - len(tokens),
                    "temperature": 0.0,
                    "cache_prompt": False,
                    "return_tokens": True,
                },
            )
            if not answer["tokens"]:
                raise SystemExit(f"the server generated nothing: {answer['stop_type']}")
            tokens += answer["tokens"]
        return tokens


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
