"""What `llama-server ARGUMENTS` does, with a question to answer.

    python -I llama_server.py WORKER question.json OUT ARGUMENTS

The package xllamacpp brings llama.cpp's server and its command line's parser, but not the program.
Here the parser (as WORKER, bake's own `_llamacpp_worker.py`, calls it) reads the arguments as they
are, the server is started with what it understood, and is asked over the loopback interface. OUT
gets the answer.
"""

import importlib.util
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Below this the server's float32 probability is subnormal, and its logarithm has lost digits.
SMALLEST_LOGPROB = -87.0


def main(worker_path: Path, question_path: Path, out: Path, arguments: list[str]) -> None:
    """Start the server and write `OUT/logprobs.npz` and `OUT/result.json`."""
    import xllamacpp

    spec = importlib.util.spec_from_file_location("worker", worker_path)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    question = json.loads(question_path.read_text(encoding="utf-8"))
    params = xllamacpp.CommonParams()
    worker.parse(xllamacpp, params, arguments)
    client = Client(xllamacpp.Server(params), params.api_keys[0])
    rows = [client.prompt_logprobs(p, question["vocab_size"]) for p in question["prompts"]]
    greedy = [client.greedy(p, question["max_new_tokens"]) for p in question["prompts"]]
    np.savez(out / "logprobs.npz", **{f"prompt_{i}": row for i, row in enumerate(rows)})
    result = {"version": xllamacpp.__version__, "greedy": greedy, "environment": {}}
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


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
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
