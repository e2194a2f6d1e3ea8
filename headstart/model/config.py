"""The configuration of a model: its shape and the kind of its heads, and the counts that follow from both."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from headstart.errors import UsageError
from headstart.model.heads import HEAD_KINDS, HeadKind
from headstart.model.shape import Shape, check_choice

if TYPE_CHECKING:
    HeadKindName = str
else:
    HeadKindName = Literal[tuple(HEAD_KINDS)]  # the choices of command lines and YAML files

WRITTEN = (
    *("vocab_size", "dim", "layers", "attention_heads", "kv_heads", "head_dim", "hidden_dim", "context"),
    *("heads", "head_kind", "shared", "wiring", "extra_layers", "tied", "attention_bias", "norm_eps", "rope_theta"),
)
"""The fields that every stored configuration has, in their order there."""
WRITTEN_IF_SET = (
    *("family", "rope_scaling", "qkv_bias", "qk_norm", "norm_placement", "norm_offset", "activation"),
    *("scaled_embedding", "query_scalar", "window", "window_layers", "local_rope_theta", "nope_layers", "offsets"),
    *("draft_vocab", "features", "norm_output", "draft_block"),
)
"""The fields that follow in a stored configuration if they differ from their defaults. A new field belongs here: files
written before it, and their digests, stay the same."""


@dataclass(frozen=True)
class ModelConfig(Shape):
    """A Llama-style decoder with `heads` prediction heads (paper sections 2 and B).

    Transformer heads are counted among the `layers` (the paper's parameter matching: the trunk keeps
    `layers - heads + extra_layers` blocks); heads of every other kind leave all `layers` in the trunk.
    """

    head_kind: HeadKindName = "transformer"
    """transformer: one block per head; linear: one matrix per head; replicated: one unembedding per head; medusa: a
    residual layer per head behind the final norm; stern: one feed-forward layer with an output per head there;
    sequential: a block that also reads the token before the one to predict, DeepSeek-V3's (wiring: causal); eagle3: one
    block that reads several layers of the trunk and then its own outputs (wiring: causal)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model.head_kind", self.head_kind, tuple(HEAD_KINDS))
        self.kind.check()
        if self.trunk_layers < 1:
            raise UsageError(
                f"model.heads {self.heads} {self.head_kind} heads leave no layer of {self.layers} to the trunk; "
                "take fewer heads, more model.layers, or model.extra_layers"
            )

    @cached_property
    def kind(self) -> HeadKind:
        """The modules, numbers and names of the heads."""
        return HEAD_KINDS[self.head_kind](self)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """The tree of heads: entry k-1 is the head that feeds head k, 0 for the trunk (paper section B)."""
        return self.kind.parents

    @cached_property
    def trunk_layers(self) -> int:
        """Blocks of the trunk."""
        return self.kind.trunk_layers

    @property
    def ahead(self) -> int:
        """Number of tokens behind a row that the heads read: head k at position t reads the tokens up to t + k - 1."""
        return self.heads - 1 if self.kind.reads_tokens else 0

    @cached_property
    def handed_out(self) -> tuple[int, ...]:
        """The layers whose inputs the trunk hands out in addition to its output, ascending."""
        return tuple(layer for layer in self.kind.features if layer < self.trunk_layers)

    @property
    def state_dim(self) -> int:
        """Width of what the trunk returns: the inputs that it hands out, then its output."""
        return (len(self.handed_out) + 1) * self.dim

    @cached_property
    def head_blocks(self) -> int:
        """Blocks that heads run through, counted once for each head: those of the last heads, in order."""
        return sum(map(self.kind.has_block, range(1, self.heads + 1)))

    @property
    def cached_blocks(self) -> int:
        """Blocks with keys and values of their own: the trunk's, then those of heads."""
        return self.trunk_layers + (min(1, self.head_blocks) if self.kind.one_cache else self.head_blocks)

    @property
    def carried(self) -> int:
        """Latents of each slot that decoding carries from pass to pass."""
        return 0 if self.kind.one_cache else max(0, self.ahead - 1)

    @cached_property
    def block_layers(self) -> tuple[int, ...]:
        """The layer of each block: the trunk's blocks, then those of heads, in order."""
        first = self.heads - self.head_blocks + 1
        heads = [self.kind.layer(k) for k in range(first, self.heads + 1)]
        return (*range(self.trunk_layers), *heads)

    @property
    def next_token_layers(self) -> int:
        """Blocks between a token and the logits of head 1: the layers of the ordinary decoder that they are."""
        return self.trunk_layers + sum(map(self.kind.has_block, self.path(1)))

    @property
    def next_token_decoder(self) -> ModelConfig:
        """Trunk and head 1 alone: the configuration of an ordinary decoder, whose last layer is head 1."""
        layers = self.next_token_layers
        return replace(
            self, layers=layers, heads=1, shared=True, wiring="parallel", extra_layers=0, offsets=None,
            draft_vocab=None, features=None, norm_output=False, draft_block=None,
            # A head needs a trunk below it. If there is one layer, it is the trunk, and head 1 reads it as it is.
            head_kind="transformer" if layers > 1 else "linear",
        )  # fmt: skip

    @property
    def windowed(self) -> bool:
        """True if a block cannot see the whole context."""
        windows = map(self.window_of, self.block_layers)
        return any(window is not None and window < self.context for window in windows)

    @property
    def llama_blocks(self) -> bool:
        """True if blocks compute what Llama's compute, up to biases and stretched rotary positions."""
        plain = self.qk_norm, self.norm_placement, self.norm_offset, self.activation
        return (
            plain == ("none", "pre", False, "silu")
            and self.score_dim == self.dim_per_head
            and not (self.nope_layers or self.windowed)
            and self.rotary_dim == self.dim_per_head
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that files store (`WRITTEN`, `WRITTEN_IF_SET`), as JSON has them."""
        values, defaults = asdict(self), {field.name: field.default for field in fields(self)}
        set_ones = [name for name in WRITTEN_IF_SET if getattr(self, name) != defaults[name]]
        return {name: values[name] for name in (*WRITTEN, *set_ones)}

    def parameters(self) -> dict[str, int]:
        """Return exact parameter counts without building the model: the rows that `headstart inspect` prints."""
        matrix = self.vocab_size * self.dim
        per_head = [self.kind.parameters(k) for k in range(1, self.heads + 1)]
        counts = {
            "embedding": matrix,
            "trunk": self.trunk_layers * self.block_parameters,
            "heads": sum(per_head),
            "unembedding": self.dim + (0 if self.tied else matrix),
        }
        counts["total"] = sum(counts.values())
        counts["non_embedding"] = counts["total"] - matrix - (0 if self.tied else matrix)
        # What ordinary decoding reads: the heads on the path from the trunk to head 1, and no others.
        path = sum(per_head[k - 1] for k in self.path(1))
        counts["next_token_path"] = counts["total"] - counts["heads"] + path
        return counts

    def flops_per_token(self, length: int) -> int:
        """Return the FLOPs of training on one token in rows of `length`: matrix products, forward and backward.

        6 x (weights multiplied, n unembeddings included) + 12 x blocks x attention_dim x length: a multiplication and
        an addition per weight, once forward and twice backward. Attention is counted in full, as PaLM counts for its
        model FLOPs utilisation (arXiv 2204.02311, appendix B), though causal attention needs half of it; where it
        slides, no more positions than its window has.
        """
        heads = sum(map(self.kind.multiplied_weights, range(1, self.heads + 1)))
        blocks = self.trunk_layers + self.head_blocks
        logits = self.vocab_size + (self.heads - 1) * self.drafted_tokens
        weights = blocks * self.block_weights + heads + logits * self.dim
        seen = sum(min(length, self.window_of(layer) or length) for layer in self.block_layers)
        return 6 * weights + 12 * self.attention_dim * seen
