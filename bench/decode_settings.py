"""Settings of `bench decode`, and the models with random weights that it decodes with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bench.report import BenchSettings, count
from headstart.decoding.kernels.int8 import Quantize
from headstart.errors import UsageError
from headstart.evaluation.inputs import load_prompts
from headstart.model.config import ModelConfig
from headstart.model.presets import PRESETS

Part = Literal["plain", "bandwidth", "window", "merged", "deferred", "sweep", "peers", "rows", "model"]
Peer = Literal["transformers", "llama.cpp", "vllm"]
Size = Literal["12M", "105M", "235M", "1.3B", "6.7B"]

SIZES: dict[str, ModelConfig] = {
    "12M": ModelConfig(vocab_size=4096, dim=256, layers=13, attention_heads=4, context=4096),
    # 32 blocks, so that four transformer heads stand to the trunk as in the paper's 7B model: 28 + 4.
    "105M": ModelConfig(vocab_size=4096, dim=512, layers=32, attention_heads=8, context=4096),
    "235M": ModelConfig(vocab_size=4096, dim=768, layers=32, attention_heads=12, context=4096),
    # The paper's own (Table S14), for GPUs; the larger one is that of its Tables S2 and S3.
    "1.3B": PRESETS["1.3B"],
    "6.7B": PRESETS["6.7B"],
}
"""Models by their approximate number of parameters."""
QUICK: dict[str, Any] = {
    "sizes": PRESETS["1M"],
    "model_sizes": ("12M",),
    "sweep_sizes": ("12M",),
    "sweep_batches": (1, 4),
    "sweep_lengths": ((16, 32),),
    "sweep_tune_seconds": 0.5,
    "peer_batches": (1,),
    "compile_peers": False,
    "repetitions": 2,
    "passes": 6,
    "prompt_tokens": 16,
    "new_tokens": 32,
    "deferred_heads": (4,),
    "stream_mebibytes": 64,
    "prompt_count": 2,
}
"""Settings that `quick` replaces."""


def four_heads(config: ModelConfig) -> ModelConfig:
    """Return `config` with the heads of the paper's Table S2: four parallel transformer heads from its layers."""
    return replace(config, heads=4, head_kind="transformer", wiring="parallel")


def byte_heads(config: ModelConfig) -> ModelConfig:
    """Return `config` with the heads of Table S3: eight byte heads, each with an unembedding of its own."""
    return replace(config, vocab_size=256, heads=8, head_kind="replicated", wiring="parallel")


@dataclass(frozen=True)
class DecodeSettings(BenchSettings):
    """Speed of decoding. The part "model" takes a trained model; the others use random weights."""

    parts: tuple[Part, ...] = ("plain", "bandwidth", "window", "deferred", "sweep", "peers")
    """plain: against transformers; bandwidth: share of the memory bandwidth; window: 8 rows against 1; merged:
    verifying and drafting in one pass, against the bytes it reads; deferred: heads on one row against all rows; sweep:
    heads, batch, lengths, temperature at the paper's acceptance; peers: against transformers, llama.cpp and vLLM; rows:
    passes by rows, also in int8, of --model if given; model: a trained model for K = 1, 2, 4, 8 (runs whenever --model
    is given)."""
    quick: bool = False
    """Small models, few and short rounds, whatever the other settings say: shows in minutes that all parts run."""
    sizes: ModelConfig = field(default_factory=lambda: PRESETS["100M"])
    """Model with random weights; each part sets its heads."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads, each number in a process of its own; the parts model, sweep and peers use the last."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the weights (auto: the faster one here)."""
    quantize: Quantize | None = None
    """int8: the part model decodes in int8, whatever the dtype."""
    device: str = "cpu"
    """cpu or cuda."""
    repetitions: int = 5
    """Rounds of whole generations (parts plain, sweep, peers and model)."""
    passes: int = 60
    """Rounds of single passes (parts bandwidth, window, merged, deferred and rows)."""
    prompt_tokens: int = 64
    """Length of a prompt."""
    new_tokens: int = 128
    """Tokens generated after it."""
    window: int = 8
    """Rows of the part window."""
    deferred_heads: tuple[int, ...] = (4, 8)
    """Numbers of heads n = K of the part deferred."""
    deferred_batches: tuple[int, ...] = (1, 4)
    """Batch sizes of the part deferred."""
    model_sizes: tuple[Size, ...] = ("12M", "105M", "235M")
    """Models with random weights of the part peers; it also takes a trained one that --model names."""
    peers: tuple[Peer, ...] = ("transformers", "llama.cpp", "vllm")
    """Peers to compare with. The table reports one that is not installed."""
    install_peers: bool = False
    """Make environments in the user's cache folder for peers that are not installed here: llama.cpp is compiled, vLLM
    takes 2.5 GB."""
    compile_peers: bool = True
    """Also measure transformers compiled over a static cache, and vLLM compiled: minutes each."""
    peer_batches: tuple[int, ...] = (1, 8)
    """Batch sizes of the part peers."""
    sweep_sizes: tuple[Size, ...] = ("105M",)
    """Models with random weights of the part sweep."""
    sweep_kinds: tuple[Literal["tokens", "bytes"], ...] = ("tokens", "bytes")
    """Heads of the part sweep: four transformer heads (Table S2), eight byte heads (Table S3)."""
    sweep_batches: tuple[int, ...] = (1, 4, 16, 64)
    """Batch sizes of the part sweep. The first value of each of its settings holds while another setting changes."""
    sweep_lengths: tuple[tuple[int, int], ...] = ((64, 64), (512, 64), (64, 256))
    """Lengths of the part sweep: of the prompt, and of the output."""
    sweep_tune_seconds: float = 5.0
    """Seconds in which the policy of the part sweep measures the cost of passes, at each batch size."""
    stream_mebibytes: int = 512
    """Size of what is read to measure the memory bandwidth."""
    model: Path | None = None
    """Directory of a trained model (None: with the part model, the model in the box)."""
    prompts: Path | None = None
    """Prompts for it: a line each, or .jsonl with "prompt" or "text" (None: those in its directory, or pieces of
    held-out documents of its run)."""
    data: Path | None = None
    """Folder of prepared tokens whose held-out documents give the prompts (None: that of the model's run)."""
    prompt_count: int = 8
    """Number of prompts."""
    heads: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of heads K to decode with; those that the model does not have are left out."""
    temperatures: tuple[float, ...] = (0.0, 0.8)
    """Temperatures of the parts model and sweep; 0: greedy."""
    batch: int = 1
    """Prompts that the part model decodes at once."""

    @property
    def cached(self) -> int:
        """Cached positions of a single pass: the middle of a generation."""
        return self.prompt_tokens + self.new_tokens // 2

    def check(self) -> None:
        """Raise UsageError for settings that some part cannot run with."""
        if 1 not in self.heads:
            raise UsageError("--heads lacks 1; add it, for plain decoding is what the others are compared with")
        for name in ("peer_batches", "sweep_batches", "sweep_lengths", "temperatures"):
            if not getattr(self, name):
                raise UsageError(f"--{name.replace('_', '-')} is empty; name one value or more")
        if "peers" in self.parts and self.device != "cpu":
            raise UsageError(f"--device {self.device}: the part peers runs on a CPU; name the other --parts")

    def case(self, config: ModelConfig, **details: Any) -> dict[str, Any]:
        """Return the case of a measuring process, with `details` of its part."""
        return {
            "config": asdict(config),
            "dtype": self.dtype,
            "device": self.device,
            "passes": self.passes,
            "repetitions": self.repetitions,
            "length": self.cached,
            **details,
        }

    def thread_labels(self) -> Iterator[tuple[int, str]]:
        """Yield each number of threads with its name."""
        for threads in self.threads:
            yield threads, count(threads, "thread")

    def load_prompts(self) -> list[list[int]]:
        """Return the prompts for the trained model."""
        assert self.model is not None
        found = load_prompts(
            self.model,
            prompts=self.prompts,
            data=self.data,
            count=self.prompt_count,
            tokens=self.prompt_tokens,
            room=self.new_tokens,
        )
        return [list(prompt) for prompt in found]
