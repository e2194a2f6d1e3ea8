"""The shape of a model: sizes, heads, wiring, and the thirteen sizes of the paper."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from headstart.errors import UsageError
from headstart.model.bounds import check_numbers
from headstart.model.offsets import before_gap, check_offsets

HeadKind = Literal["transformer", "linear", "replicated", "medusa", "stern", "sequential"]
Wiring = Literal["parallel", "causal", "anticausal"]
QKNorm = Literal["none", "head", "full"]
NormPlacement = Literal["pre", "post", "both"]
Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched for contexts longer than those first trained on; see `model/rotary.py`."""

    kind: RopeKind
    """linear: all frequencies divided by `factor`; llama3: the slow ones; yarn: by turns within `original_context`."""
    factor: float
    """How many times slower the slowest pairs turn."""
    original_context: int = 0
    """llama3, yarn: the context before, in tokens."""
    low_freq_factor: float = 1.0
    """llama3: pairs that turn at most this often within the context before are slowed down as a whole."""
    high_freq_factor: float = 4.0
    """llama3: pairs that turn at least this often there are left as they are."""
    beta_fast: float = 32.0
    """yarn: pairs that turn at least this often within the context before are left as they are."""
    beta_slow: float = 1.0
    """yarn: pairs that turn at most this often there are slowed down as a whole."""
    attention_factor: float = 1.0
    """What queries and keys are multiplied by."""
    truncate: bool = True
    """yarn: whether the two limits are rounded to whole pairs."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise UsageError(f"rope_scaling.kind {self.kind!r} is unknown; take one of {', '.join(get_args(RopeKind))}")
        check_numbers(self, "rope_scaling")
        if self.kind != "linear" and self.original_context < 1:
            raise UsageError(f"rope_scaling {self.kind} needs original_context, the context before it; give it")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UsageError("rope_scaling.high_freq_factor must be greater than low_freq_factor; change one of them")


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder with `heads` prediction heads (paper sections 2 and B).

    Transformer heads are counted among the `layers` (the paper's parameter matching: the trunk keeps
    `layers - heads + extra_layers` blocks); heads of every other kind leave all `layers` in the trunk.
    """

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
    head_kind: HeadKind = "transformer"
    """transformer: one block per head; linear: one matrix per head; replicated: one unembedding per head; medusa: a
    residual layer per head behind the final norm; stern: one feed-forward layer with an output per head there;
    sequential: a block that also reads the token before the one to predict, DeepSeek-V3's (wiring: causal)."""
    shared: bool = True
    """sequential: one module for all heads (FastMTP), false: one for each (DeepSeek-V3). medusa: the heads share the
    unembedding, false: each has its own, at first a copy."""
    wiring: Wiring = "parallel"
    """Which latent feeds head k: parallel (the trunk's), causal (head k-1's), anticausal (head k+1's)."""
    extra_layers: int = 0
    """The paper's "+layers": how many blocks of the heads are added on top instead of taken from the trunk."""
    tied: bool = False
    """Whether the unembedding is the embedding matrix."""
    attention_bias: bool = False
    """Biases in the attention's linear maps."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary positions."""

    # What families other than Llama do otherwise; the defaults are Llama's. Layers are numbered as in files, from 0.
    family: str | None = None
    """Whose directories hold the model, such as qwen3 (None: the first of `formats/families.py` that can)."""
    rope_scaling: RopeScaling | None = None
    """How rotary positions are stretched (None: not at all)."""
    qkv_bias: bool = False
    """Biases of queries, keys and values, without one of the output (Qwen2)."""
    qk_norm: QKNorm = "none"
    """RMSNorm of queries and keys before they are turned: of each head (Qwen3), or over all heads at once (OLMo2)."""
    norm_placement: NormPlacement = "pre"
    """Where a block norms: what attention and SwiGLU read (pre), what they add (post, OLMo2), or both (Gemma)."""
    norm_offset: bool = False
    """Norms multiply by 1 + weight instead of weight (Gemma)."""
    activation: Activation = "silu"
    """Of the gate: silu, or gelu in its tanh form (Gemma)."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of dim (Gemma)."""
    query_scalar: float | None = None
    """Scores are divided by its square root (None: head_dim; Gemma 3 has another in one size)."""
    window: int | None = None
    """Sliding attention: a position sees itself and window - 1 before it (None: all before it)."""
    window_layers: tuple[int, ...] | None = None
    """The layers whose attention slides (None: all, if there is a window)."""
    local_rope_theta: float | None = None
    """Base of the rotary positions in layers that slide, unscaled there (None: as everywhere)."""
    nope_layers: tuple[int, ...] = ()
    """The layers without rotary positions (SmolLM3)."""

    offsets: tuple[int, ...] | None = None
    """How far ahead each head predicts, head 1's first: ascending from 1, such as [1, 2, 4] (None: 1 to n)."""

    def __post_init__(self) -> None:
        check_numbers(self, "model")
        for name, known in (("qk_norm", QKNorm), ("norm_placement", NormPlacement), ("activation", Activation)):
            if getattr(self, name) not in get_args(known):
                raise UsageError(
                    f"model.{name} {getattr(self, name)!r} is unknown; take one of {', '.join(get_args(known))}"
                )
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
        if self.attention_dim // self.attention_heads % 2:
            raise UsageError("model.head_dim must be even: rotary positions turn pairs of coordinates")
        if self.attention_heads % self.key_value_heads:
            raise UsageError(
                f"model.attention_heads {self.attention_heads} is not a multiple of model.kv_heads {self.kv_heads}; "
                "change one of them"
            )
        if self.head_kind not in get_args(HeadKind):
            raise UsageError(
                f"model.head_kind {self.head_kind!r} is unknown; take one of {', '.join(get_args(HeadKind))}"
            )
        if self.wiring not in ("parallel", "causal", "anticausal"):
            raise UsageError(f"model.wiring {self.wiring!r} is unknown; take parallel, causal or anticausal")
        if self.in_unembedding and self.wiring != "parallel":
            raise UsageError(
                f"{self.head_kind} heads have no latent of their own to chain; set model.wiring to parallel"
            )
        if self.head_kind == "sequential" and self.wiring != "causal":
            raise UsageError("sequential heads read one another's latents in turn; set model.wiring to causal")
        if not self.shared and self.head_kind not in ("sequential", "medusa"):
            raise UsageError(
                f"model.shared false is for sequential and medusa heads, not {self.head_kind}; leave it out"
            )
        check_offsets(self.offset_of_heads, self.heads, self.head_kind)
        if not 0 <= self.extra_layers <= self.heads - 1:
            raise UsageError(f"model.extra_layers is {self.extra_layers}; it must lie between 0 and heads - 1")
        if self.head_kind != "transformer" and self.extra_layers:
            raise UsageError(f"model.extra_layers is for transformer heads; {self.head_kind} heads take no trunk layer")
        if self.trunk_layers < 1:
            raise UsageError(
                f"model.heads {self.heads} transformer heads leave no layer of {self.layers} to the trunk; "
                "take fewer heads, more model.layers, or model.extra_layers"
            )

    @property
    def offset_of_heads(self) -> tuple[int, ...]:
        """Entry k-1: how far ahead head k predicts."""
        return self.offsets or tuple(range(1, self.heads + 1))

    @property
    def drafting_heads(self) -> int:
        """Heads 1 to the first gap in the offsets."""
        return before_gap(self.offset_of_heads)

    @property
    def trunk_layers(self) -> int:
        return self.layers - self.heads + self.extra_layers if self.head_kind == "transformer" else self.layers

    @property
    def in_unembedding(self) -> bool:
        """Whether heads 2..n are made of what the unembedding holds: they all read the trunk's latent as it is."""
        return self.head_kind in ("replicated", "medusa", "stern")

    @property
    def ahead(self) -> int:
        """How many tokens behind a row the heads read: head k at position t reads the tokens up to t + k - 1."""
        return self.heads - 1 if self.head_kind == "sequential" else 0

    @property
    def head_blocks(self) -> int:
        """Blocks that heads run through, each with keys and values of its own: those of the last heads, in order."""
        return {"transformer": self.heads, "sequential": self.heads - 1}.get(self.head_kind, 0)

    @property
    def key_value_heads(self) -> int:
        return self.attention_heads if self.kv_heads is None else self.kv_heads

    @property
    def attention_dim(self) -> int:
        """Width of all query heads together."""
        return self.dim if self.head_dim is None else self.head_dim * self.attention_heads

    @property
    def dim_per_head(self) -> int:
        return self.attention_dim // self.attention_heads

    @property
    def hidden(self) -> int:
        return max(32, round(8 * self.dim / 3 / 32) * 32) if self.hidden_dim is None else self.hidden_dim

    @property
    def stern_hidden(self) -> int:
        """Width of the layer that stern heads share: that of a SwiGLU for each of heads 2..n."""
        return (self.heads - 1) * self.hidden

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """The tree of heads: entry k-1 is the head that feeds head k, 0 for the trunk (paper section B)."""
        ks = range(1, self.heads + 1)
        if self.wiring == "causal":
            return tuple(k - 1 for k in ks)
        if self.wiring == "anticausal":
            return tuple(k + 1 if k < self.heads else 0 for k in ks)
        return tuple(0 for _ in ks)

    def children(self, k: int) -> tuple[int, ...]:
        """The heads fed by head k, or by the trunk for k = 0."""
        return tuple(child for child, parent in enumerate(self.parents, start=1) if parent == k)

    def layer_of_head(self, k: int) -> int:
        """The layer of the block of head k: how many blocks lie below it. That of shared sequential heads is one."""
        if self.head_kind == "sequential":
            return self.trunk_layers + (0 if self.shared else k - 2)
        below = 0
        while parent := self.parents[k - 1]:
            below, k = below + 1, parent
        return self.trunk_layers + below

    @cached_property
    def block_layers(self) -> tuple[int, ...]:
        """The layer of each block: the trunk's, then those of heads that are blocks, in order."""
        first = self.heads - self.head_blocks + 1
        heads = [self.layer_of_head(k) for k in range(first, self.heads + 1)]
        return (*range(self.trunk_layers), *heads)

    def window_of(self, layer: int) -> int | None:
        """How many positions attention sees in a layer, its own included; None: all up to it."""
        return self.window if self.window_layers is None or layer in self.window_layers else None

    @property
    def windowed(self) -> bool:
        """Whether any block cannot see all of a context before it."""
        windows = map(self.window_of, self.block_layers)
        return any(window is not None and window < self.context for window in windows)

    @property
    def llama_blocks(self) -> bool:
        """Whether blocks compute what Llama's do, biases and stretched rotary positions allowed for."""
        plain = self.qk_norm, self.norm_placement, self.norm_offset, self.activation
        return (
            plain == ("none", "pre", False, "silu")
            and self.score_dim == self.dim_per_head
            and not (self.nope_layers or self.windowed)
            and self.local_rope_theta is None
        )

    @property
    def score_dim(self) -> float:
        """What scores are divided by the square root of."""
        return self.dim_per_head if self.query_scalar is None else self.query_scalar

    @property
    def rotary_dim(self) -> int:
        """Width of the tables of cosines and sines: of one base, or of both side by side."""
        return self.dim_per_head * (1 if self.local_rope_theta is None else 2)

    @property
    def plain_decoder(self) -> bool:
        """Whether trunk and head 1 together are an ordinary decoder of its family, so that any tool can load them."""
        return self.head_kind != "linear" or self.wiring != "anticausal"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them; of those that families other than Llama need, the ones that say something. So
        files written before there were others, and digests of them, stay what they are."""
        values, defaults = asdict(self), {field.name: field.default for field in fields(self)}
        later = list(defaults)[list(defaults).index("family") :]
        return {name: x for name, x in values.items() if name not in later or getattr(self, name) != defaults[name]}

    def parameters(self) -> dict[str, int]:
        """Exact parameter counts, without building the model: a row each of what `headstart inspect` prints."""
        d, kv = self.dim, self.key_value_heads * self.dim_per_head
        bias = self.attention_dim + 2 * kv if self.attention_bias or self.qkv_bias else 0
        bias += d if self.attention_bias else 0
        norms = (4 if self.norm_placement == "both" else 2) * d
        norms += {"none": 0, "head": 2 * self.dim_per_head, "full": self.attention_dim + kv}[self.qk_norm]
        block = d * (self.attention_dim + 2 * kv) + self.attention_dim * d + bias + 3 * d * self.hidden + norms
        if self.head_kind == "transformer":
            per_head = [block] * self.heads
        elif self.head_kind == "linear":
            # Head 1 reads the trunk as it is, so that trunk + head 1 stays a plain decoder; see heads.py.
            per_head = [0 if k == 1 and self.plain_decoder else d * d for k in range(1, self.heads + 1)]
        else:
            further, own = self.heads - 1, 0 if self.shared else self.vocab_size * d
            per_head = [0] + {
                "replicated": [self.vocab_size * d] * further,
                "medusa": [d * d + d + own] * further,
                "stern": [d * self.stern_hidden + (d * self.stern_hidden if k == 0 else 0) for k in range(further)],
                "sequential": [2 * d * d + 2 * d + block if k == 0 or not self.shared else 0 for k in range(further)],
            }[self.head_kind]
        counts = {
            "embedding": self.vocab_size * d,
            "trunk": self.trunk_layers * block,
            "heads": sum(per_head),
            "unembedding": d + (0 if self.tied else self.vocab_size * d),
        }
        counts["total"] = sum(counts.values())
        counts["non_embedding"] = counts["total"] - counts["embedding"] - (0 if self.tied else self.vocab_size * d)
        # What ordinary decoding with head 1 reads: the heads on the way from the trunk to head 1.
        path, k = 0, 1
        while k:
            path += per_head[k - 1]
            k = self.parents[k - 1]
        counts["next_token_path"] = counts["total"] - counts["heads"] + path
        return counts

    def flops_per_token(self, length: int) -> int:
        """FLOPs of training on one token in rows of `length`: matrix products, forward and backward.

        6 x (weights multiplied, n unembeddings included) + 12 x blocks x attention_dim x length: a multiplication and
        an addition per weight, once forward and twice backward. Attention is counted in full, as PaLM counts for its
        model FLOPs utilisation (arXiv 2204.02311, appendix B), though causal attention needs half of it; where it
        slides, no more positions than its window has.
        """
        d, kv = self.dim, self.key_value_heads * self.dim_per_head
        block = d * (self.attention_dim + 2 * kv) + self.attention_dim * d + 3 * d * self.hidden
        blocks, further = self.trunk_layers + self.head_blocks, self.heads - 1
        maps = {
            "linear": (self.heads - self.plain_decoder) * d * d,
            "medusa": further * d * d,
            "stern": further * 2 * d * self.stern_hidden,  # each loss computes the hidden layer anew
            "sequential": further * 2 * d * d,
        }.get(self.head_kind, 0)
        weights = blocks * block + maps + self.heads * self.vocab_size * d
        seen = sum(min(length, self.window_of(layer) or length) for layer in self.block_layers)
        return 6 * weights + 12 * self.attention_dim * seen


def _paper(dim: int, layers: int, attention_heads: int, context: int) -> ModelConfig:
    return ModelConfig(vocab_size=32000, dim=dim, layers=layers, attention_heads=attention_heads, context=context)


PRESETS: dict[str, ModelConfig] = {
    # Table S14. The first seven are named by non-embedding parameters, the last six by all parameters. Context: S13.
    "1M": _paper(128, 5, 4, 2048),
    "3M": _paper(256, 4, 8, 2048),
    "10M": _paper(384, 6, 8, 2048),
    "30M": _paper(512, 10, 8, 2048),
    "100M": _paper(768, 14, 12, 2048),
    "300M": _paper(1024, 25, 16, 2048),
    "1B": _paper(1536, 36, 24, 2048),
    "0.3B": _paper(1024, 18, 16, 4096),
    "0.6B": _paper(1280, 27, 20, 4096),
    "1.3B": _paper(2048, 24, 16, 4096),
    "3B": _paper(2560, 36, 20, 4096),
    "6.7B": _paper(4096, 32, 32, 4096),
    "13B": _paper(5120, 40, 40, 4096),
}


def preset(name: str, **changes: object) -> ModelConfig:
    """One of the paper's sizes (Table S14), with `changes` to any field: `preset("100M", heads=4)`."""
    if name not in PRESETS:
        raise UsageError(f"no size is called {name!r}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
