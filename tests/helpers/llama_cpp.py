"""llama.cpp itself, its own server in a process beside this one: tokens, and the log-probabilities of what comes next."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

_SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.port, params.verbosity, params.cpuparams.n_threads = 128, 0, -1, 2
params.warmup = params.ui = False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """A GGUF file that llama.cpp serves at an address."""

    def __init__(self, address: str) -> None:
        self._address = address

    def tokenize(self, text: str) -> list[int]:
        """A text's tokens, without one for its beginning."""
        found: list[int] = self._ask("/tokenize", content=text, add_special=False)["tokens"]
        return found

    def log_probabilities(self, tokens: list[int], vocabulary: int, at: Sequence[int]) -> NDArray[np.float64]:
        """After some of the tokens, log p of every token of the vocabulary: [len(at), vocabulary]."""
        found = np.full((len(at), vocabulary), np.nan)
        # What is drawn is a letter: half a character, or an end, would come without the probabilities, which are the model's own.
        drawn = {"n_predict": 1, "logit_bias": [[self.tokenize("a")[-1], 1000]], "cache_prompt": True}
        for row, n in zip(found, at, strict=True):
            said = self._ask("/completion", prompt=tokens[: n + 1], n_probs=vocabulary, **drawn)
            for one in said["completion_probabilities"][0]["top_logprobs"]:
                row[one["id"]] = one["logprob"]
        return found

    def says(self, prompt: str, tokens: int) -> str:
        """The most likely text after a prompt."""
        text: str = self._ask("/completion", prompt=prompt, n_predict=tokens, temperature=0.0)["content"]
        return text

    def _ask(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)


@contextmanager
def llama_cpp(path: Path) -> Iterator[LlamaCpp]:
    """Serve a GGUF file on loopback; the test is skipped where llama.cpp is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, "llama.cpp did not take the file"
            yield LlamaCpp(address)
        finally:
            process.kill()
