"""Run by tests in a process without modelstore: loads folders in vLLM, and prints what it answers, a line of JSON each.

python vllm_answers.py '{"prompt": [1, 2, 3], "tokens": 8, "folders": {"name": "path"}}'
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def answer(folder: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    """The greedy tokens after a prompt, and the logarithms of the probabilities of all tokens."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=folder, enforce_eager=True, max_model_len=128, dtype="bfloat16", skip_tokenizer_init=True)
    how = SamplingParams(
        max_tokens=tokens, temperature=0, logprobs=1, prompt_logprobs=1, detokenize=False, ignore_eos=True
    )
    (result,) = llm.generate([{"prompt_token_ids": prompt}], how, use_tqdm=False)
    (made,) = result.outputs
    given = zip(prompt[1:], (result.prompt_logprobs or [])[1:], strict=True)
    chosen = zip(made.token_ids, made.logprobs, strict=True)
    found = {
        "tokens": list(made.token_ids),
        "logprobs": [each[token].logprob for token, each in (*given, *chosen)],
    }
    llm.llm_engine.engine_core.shutdown()
    return found


def main() -> None:
    """All folders, one after another."""
    os.environ.update(SETTINGS)
    asked = json.loads(sys.argv[1])
    for name, folder in asked["folders"].items():
        try:
            found = answer(folder, asked["prompt"], asked["tokens"])
        except Exception as error:  # what it cannot run, it says in many ways
            found = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main()
