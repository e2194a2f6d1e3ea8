"""OpenVINO GenAI on a CPU, through the pipeline that reads GGUF files of Llama's and Qwen's architectures itself."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]


class Peer:
    """OpenVINO's pipeline."""

    def __init__(self, case: dict[str, Any]) -> None:
        if case["rows"] != 1:
            raise ValueError("streams one sequence at a time: take --batches 1")
        self.version = f"openvino-genai {importlib.metadata.version('openvino-genai')}"
        self.pipeline = openvino_genai.LLMPipeline(case["model"], "CPU", INFERENCE_NUM_THREADS=case["threads"])
        self.config = openvino_genai.GenerationConfig()
        self.config.max_new_tokens, self.config.do_sample, self.config.ignore_eos = case["new_tokens"], False, True
        self.config.apply_chat_template = False
        self.variants: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {"greedy": self.decode}

    def decode(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Decode the only prompt, greedily."""
        stamps: list[tuple[float, list[int]]] = []

        class Stamps(openvino_genai.StreamerBase):
            """A streamer that receives the tokens of each pass."""

            def write(self, token: int | list[int]) -> Any:
                """Note the time of what a pass committed."""
                stamps.append((time.perf_counter(), [len(token) if isinstance(token, list) else 1]))
                return openvino_genai.StreamingStatus.RUNNING

            def end(self) -> None:
                """Do nothing."""

        ids = openvino.Tensor(np.array(prompts, dtype=np.int64))
        answer = self.pipeline.generate(ids, self.config, Stamps())
        return {"stamps": stamps, "tokens": [list(map(int, answer.tokens[0]))]}
