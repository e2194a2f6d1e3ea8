"""The shape of a model: its sizes, what its blocks compute, and which latent feeds which head.

`ModelConfig` (config.py) adds what depends on the kind of the heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

from headstart.errors import UsageError
from headstart.model.bounds import check_numbers

Wiring = Literal["parallel", "causal", "anticausal"]
QKNorm = Literal["none", "head", "full"]
NormPlacement = Literal["pre", "post", "both"]
Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["linear", "llama3", "yarn"]


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless `value` is one of the choices."""
    if value not in choices:
        raise UsageError(f"{name} {value!r} is unknown; take one of {', '.join(choices)}")


@dataclass(frozen=True)
class RopeScaling:
    """Stretched rotary positions, for contexts longer than those of the first training; see `rotary.py`."""

    kind: RopeKind
    """linear: all frequencies divided by `factor`; llama3: the slow ones; yarn: by turns within `original_context`."""
    factor: float
    """Factor by which the slowest pairs turn slower."""
    original_context: int = 0
    """llama3, yarn: the context before the stretching, in tokens."""
    low_freq_factor: float = 1.0
    """llama3: the largest number of turns within the old context of a pair that is slowed down by the whole factor."""
    high_freq_factor: float = 4.0
    """llama3: the smallest number of turns within the old context of a pair that keeps its frequency."""
    beta_fast: float = 32.0
    """yarn: the smallest number of turns within the old context of a pair that keeps its frequency."""
    beta_slow: float = 1.0
    """yarn: the largest number of turns within the old context of a pair that is slowed down by the whole factor."""
    attention_factor: float = 1.0
    """Factor of queries and keys."""
    truncate: bool = True
    """yarn: whether the two limits are rounded to whole pairs."""

    def __post_init__(self) -> None:
        check_choice("rope_scaling.kind", self.kind, get_args(RopeKind))
        check_numbers(self, "rope_scaling")
        if self.kind != "linear" and self.original_context < 1:
            raise UsageError(f"rope_scaling {self.kind} needs original_context, the context before it; give it")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UsageError("rope_scaling.high_freq_factor must be greater than low_freq_factor; change one of them")


@dataclass(frozen=True)
class DraftBlock:
    """Describe what the block of EAGLE-3 heads that others have trained has other than the model's blocks."""

    hidden_dim: int | None = None
    """Hidden width of its SwiGLU (None: the model's)."""
    rope_theta: float | None = None
    """Base of its rotary positions (None: they are the model's)."""
    rope_scaling: RopeScaling | None = None
    """Stretching of its own rotary positions."""
    norm_before_residual: bool = False
    """True if the normed state, not the state, is added to the output of attention."""

    def __post_init__(self) -> None:
        check_numbers(self, "draft_block")
        if self.rope_scaling is not None and self.rope_theta is None:
            raise UsageError("draft_block.rope_scaling needs draft_block.rope_theta; give both")


@dataclass(frozen=True)
class Shape:
    """The fields of a model's configuration, and what follows from them whatever the kind of the heads."""

    vocab_size: int = 256
    """Rows of the embedding and of the unembedding."""
    dim: int = 256
    """Width of the residual stream."""
    layers: int = 6
    """Transformer blocks in all, those of transformer heads included."""
    attention_heads: int = 4
    """Query heads of each attention."""
    kv_heads: int | None = None
    """Key/value heads, shared by groups of query heads (None: as many as query heads)."""
    head_dim: int | None = None
    """Width of one attention head (None: dim / attention_heads)."""
    hidden_dim: int | None = None
    """Hidden width of the SwiGLU (None: 8/3 of dim, to the nearest multiple of 32)."""
    context: int = 512
    """Longest sequence the model is meant for, in tokens."""
    heads: int = 1
    """n: how many future tokens are predicted. Head k predicts token t+k; head 1 is the next-token head."""
    head_kind: str = "transformer"
    """A key of `HEAD_KINDS` (heads.py)."""
    shared: bool = True
    """sequential: one module for all heads (FastMTP), false: one for each (DeepSeek-V3). medusa: the heads share the
    unembedding, false: each has its own, at first a copy."""
    wiring: Wiring = "parallel"
    """Latent that feeds head k: parallel (the trunk's), causal (head k-1's), anticausal (head k+1's)."""
    extra_layers: int = 0
    """The paper's "+layers": how many blocks of the heads are added on top instead of taken from the trunk."""
    tied: bool = False
    """True if the unembedding is the embedding matrix."""
    attention_bias: bool = False
    """Biases in the attention's linear maps."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary positions."""

    # What families other than Llama compute differently; the defaults are Llama's. Layers are counted from 0, like in
    # their files.
    family: str | None = None
    """The family whose directories hold the model, such as qwen3 (None: the first of `formats/families.py` that can).
    """
    rope_scaling: RopeScaling | None = None
    """Stretching of rotary positions (None: none)."""
    qkv_bias: bool = False
    """Biases of queries, keys and values, without one of the output (Qwen2)."""
    qk_norm: QKNorm = "none"
    """RMSNorm of queries and keys before their rotation: of each head (Qwen3), or over all heads at once (OLMo2)."""
    norm_placement: NormPlacement = "pre"
    """Norms of a block: the inputs of attention and SwiGLU (pre), their outputs (post, OLMo2), or both (Gemma)."""
    norm_offset: bool = False
    """Norms multiply by 1 + weight instead of weight (Gemma)."""
    activation: Activation = "silu"
    """Activation of the gate: silu, or gelu in its tanh form (Gemma)."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of dim (Gemma)."""
    query_scalar: float | None = None
    """Scores are divided by its square root (None: head_dim; Gemma 3 has another in one size)."""
    window: int | None = None
    """Sliding attention: a position sees itself and window - 1 before it (None: all before it)."""
    window_layers: tuple[int, ...] | None = None
    """The layers whose attention slides (None: all, if there is a window)."""
    local_rope_theta: float | None = None
    """Base of the unscaled rotary positions in layers that slide (None: rope_theta, scaled like everywhere)."""
    nope_layers: tuple[int, ...] = ()
    """The layers without rotary positions (SmolLM3)."""

    offsets: tuple[int, ...] | None = None
    """Distance that each head predicts ahead, head 1's first: ascending from 1, such as [1, 2, 4] (None: 1 to n)."""
    draft_vocab: int | None = None
    """Tokens that heads 2..n predict, those of the map `d2t` among the heads' tensors (None: the whole vocabulary)."""
    features: tuple[int, ...] | None = None
    """eagle3: the layers whose inputs the heads read, ascending; the number of layers means the trunk's output (None:
    2, layers / 2 and layers - 3)."""
    norm_output: bool = False
    """eagle3, sequential: the output of a step is normed before the next step reads it (EAGLE-3.1, MiMo). Sequential
    heads are then steps of one module over one set of keys and values."""
    draft_block: DraftBlock | None = None
    """eagle3: what the block has other than the model's (None: nothing)."""

    def __post_init__(self) -> None:
        check_numbers(self, "model")
        for name, choices in (("qk_norm", QKNorm), ("norm_placement", NormPlacement), ("activation", Activation)):
            check_choice(f"model.{name}", getattr(self, name), get_args(choices))
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise UsageError(f"model.rope_theta is {self.rope_theta}; with yarn it must be greater than 1")
        if self.window is None and (self.window_layers is not None or self.local_rope_theta is not None):
            name = "window_layers" if self.window_layers is not None else "local_rope_theta"
            raise UsageError(f"model.{name} is for layers whose attention slides; give model.window, or leave it out")
        if self.head_dim is None and self.dim % self.attention_heads:
            raise UsageError(
                f"model.dim {self.dim} is not divisible by model.attention_heads {self.attention_heads}; "
                "change one of them or give model.head_dim"
            )
        if self.dim_per_head % 2:
            raise UsageError("model.head_dim must be even: rotary positions turn pairs of coordinates")
        if self.attention_heads % self.key_value_heads:
            raise UsageError(
                f"model.attention_heads {self.attention_heads} is not a multiple of model.kv_heads {self.kv_heads}; "
                "change one of them"
            )
        check_choice("model.wiring", self.wiring, get_args(Wiring))
        if self.draft_vocab is not None and self.draft_vocab > self.vocab_size:
            raise UsageError(
                f"model.draft_vocab is {self.draft_vocab}, and the vocabulary has {self.vocab_size} tokens; take fewer"
            )
        if self.draft_vocab is not None and self.heads == 1:
            raise UsageError("model.draft_vocab is for heads 2 and up, and the model has one head; leave it out")
        self._check_offsets()

    def _check_offsets(self) -> None:
        offsets = self.offset_of_heads
        if len(offsets) != self.heads:
            raise UsageError(f"model.offsets has {len(offsets)} entries for {self.heads} heads; give one per head")
        if offsets[0] != 1 or any(after <= before for before, after in pairwise(offsets)):
            raise UsageError(f"model.offsets is {list(offsets)}; it must begin with 1 and ascend, such as [1, 2, 4]")

    @property
    def offset_of_heads(self) -> tuple[int, ...]:
        """Distance that each head predicts ahead: entry k-1 is head k's."""
        return self.offsets or tuple(range(1, self.heads + 1))

    @property
    def drafting_heads(self) -> int:
        """Number of heads before the first gap in the offsets; a head behind a gap cannot draft."""
        return sum(offset == k for k, offset in enumerate(self.offset_of_heads, start=1))

    @property
    def drafted_tokens(self) -> int:
        """Number of tokens that heads 2..n predict."""
        return self.vocab_size if self.draft_vocab is None else self.draft_vocab

    @property
    def key_value_heads(self) -> int:
        """Key/value heads of each attention."""
        return self.attention_heads if self.kv_heads is None else self.kv_heads

    @property
    def dim_per_head(self) -> int:
        """Width of one attention head."""
        return self.dim // self.attention_heads if self.head_dim is None else self.head_dim

    @property
    def attention_dim(self) -> int:
        """Width of all query heads together."""
        return self.dim_per_head * self.attention_heads

    @property
    def hidden(self) -> int:
        """Hidden width of the SwiGLU."""
        return max(32, round(8 * self.dim / 3 / 32) * 32) if self.hidden_dim is None else self.hidden_dim

    @property
    def score_dim(self) -> float:
        """The number whose square root divides the scores."""
        return self.dim_per_head if self.query_scalar is None else self.query_scalar

    @property
    def draft_rope(self) -> DraftBlock | None:
        """The rotary positions of EAGLE's block, if they are not the model's."""
        return None if self.draft_block is None or self.draft_block.rope_theta is None else self.draft_block

    @property
    def rotary_dim(self) -> int:
        """Width of the tables of cosines and sines: the model's, that of layers that slide, that of EAGLE's block."""
        return self.dim_per_head * (1 + (self.local_rope_theta is not None) + (self.draft_rope is not None))

    @property
    def block_weights(self) -> int:
        """Entries of the matrices of a block."""
        q, kv = self.attention_dim, self.key_value_heads * self.dim_per_head
        return self.dim * (2 * q + 2 * kv + 3 * self.hidden)

    @property
    def block_parameters(self) -> int:
        """Parameters of a block: matrices, biases and norms."""
        q, kv = self.attention_dim, self.key_value_heads * self.dim_per_head
        bias = q + 2 * kv if self.attention_bias or self.qkv_bias else 0
        bias += self.dim if self.attention_bias else 0
        norms = (4 if self.norm_placement == "both" else 2) * self.dim
        norms += {"none": 0, "head": 2 * self.dim_per_head, "full": q + kv}[self.qk_norm]
        return self.block_weights + bias + norms

    def window_of(self, layer: int) -> int | None:
        """Return how many positions the attention of a layer sees, its own included; None: all up to it."""
        return self.window if self.window_layers is None or layer in self.window_layers else None

    @property
    def parents(self) -> tuple[int, ...]:
        """The tree of heads: entry k-1 is the head that feeds head k, 0 for the trunk (paper section B)."""
        return self.wired

    @cached_property
    def wired(self) -> tuple[int, ...]:
        """The tree of heads that `wiring` names."""
        ks = range(1, self.heads + 1)
        if self.wiring == "causal":
            return tuple(k - 1 for k in ks)
        if self.wiring == "anticausal":
            return tuple(k + 1 if k < self.heads else 0 for k in ks)
        return tuple(0 for _ in ks)

    def children(self, k: int) -> tuple[int, ...]:
        """Return the heads fed by head k, or by the trunk for k = 0."""
        return tuple(child for child, parent in enumerate(self.parents, start=1) if parent == k)

    def path(self, k: int) -> list[int]:
        """Return the heads between the trunk and head k in order of computation, head k last."""
        order = []
        while k:
            order.append(k)
            k = self.parents[k - 1]
        return order[::-1]
