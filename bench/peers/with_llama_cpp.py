"""llama.cpp, through the C functions that llama-cpp-python binds: its class `Llama` copies logits in Python."""

from __future__ import annotations

import ctypes
import importlib.metadata
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import llama_cpp
import numpy as np

PIECE = 512
"""Tokens of a prompt that are read at once at most: llama.cpp's own default."""


class Peer:
    """llama.cpp's decoder."""

    def __init__(self, case: dict[str, Any]) -> None:
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.version = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
        self.rows, self.new_tokens, self.threads = case["rows"], case["new_tokens"], case["threads"]
        self.length = case["prompt_tokens"] + self.new_tokens
        self.model = llama_cpp.llama_model_load_from_file(case["gguf"].encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {case['gguf']}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.variants: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {
            "greedy": partial(self.decode, self.context(llama_cpp.GGML_TYPE_F16)),
        }
        if case["dtype"] == "float32" and case["gguf"] != case["model"]:
            self.variants["greedy, fp32 cache"] = partial(self.decode, self.context(llama_cpp.GGML_TYPE_F32))

    def context(self, cache_type: int) -> Any:
        """Return a context with a cache of that type."""
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max = self.rows
        parameters.n_ctx = self.rows * -(-self.length // 256) * 256
        parameters.n_batch = parameters.n_ubatch = max(PIECE, self.rows)
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.type_k = parameters.type_v = cache_type
        context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context")
        return context

    def decode(self, context: Any, prompts: list[list[int]]) -> dict[str, Any]:
        """Decode the prompts as one batch, greedily."""
        rows = len(prompts)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(max(PIECE, rows), 0, rows)
        for row, prompt in enumerate(prompts):
            for start in range(0, len(prompt) - 1, PIECE):
                piece = prompt[:-1][start : start + PIECE]
                self._feed(context, batch, [(t, start + i, row) for i, t in enumerate(piece)], logits=False)
        last = [prompt[-1] for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in range(rows)]
        stamps = []
        for step in range(self.new_tokens):
            fed = [(last[row], len(prompts[row]) - 1 + step, row) for row in range(rows)]
            self._feed(context, batch, fed, logits=True)
            for row in range(rows):
                logits = llama_cpp.llama_get_logits_ith(context, row)
                last[row] = int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())
                tokens[row].append(last[row])
            stamps.append((time.perf_counter(), [1] * rows))
        llama_cpp.llama_batch_free(batch)
        return {"stamps": stamps, "tokens": tokens}

    def _feed(self, context: Any, batch: Any, tokens: list[tuple[int, int, int]], logits: bool) -> None:
        """Feed tokens, each as (token, position, row)."""
        batch.n_tokens = len(tokens)
        for i, (token, position, row) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Answer the prompts of `bench engines` greedily, through the class that users of llama-cpp-python call."""
    llm = llama_cpp.Llama(
        case["model"],
        n_ctx=case["context"],
        n_threads=case["threads"],
        n_threads_batch=case["threads"],
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    outputs = []
    for prompt in case["prompts"]:
        options = {"max_tokens": 1, "temperature": 0.0, "repeat_penalty": 1.0}
        if isinstance(prompt, str):
            read = llm.create_completion(prompt, **options)
        else:
            read = llm.create_chat_completion(prompt, **options)
        ids = llm.input_ids[: read["usage"]["prompt_tokens"]].tolist()
        tokens: list[int] = []
        for token in llm.generate(ids, temp=0.0, repeat_penalty=1.0):
            tokens.append(token)
            if len(tokens) == case["new_tokens"] or llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
        behind = len(tokens) - 1
        outputs.append({"prompt": ids, "tokens": tokens, "behind": behind, "passes": behind})
    return {"version": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}", "outputs": outputs}
