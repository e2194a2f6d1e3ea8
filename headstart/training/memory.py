"""How much memory one process of a training run needs, from the settings alone.

Nothing is run: parameters are counted on a model without storage (meta device), activations by what autograd keeps of
each line of `model/layers.py`, the loss by what `objective/cross_entropy.py` holds at once, sharding by what
`training/parallel.py` gathers. Compared with bytes counted in real steps of one process and of two (docs/scale-out.md);
for GPUs, whose kernels keep less than a CPU's, not compared yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from headstart.errors import UsageError
from headstart.model.attention import BLOCK, WRITTEN_OUT_LENGTH
from headstart.model.config import ModelConfig
from headstart.objective.cross_entropy import LOGITS_BYTES, PIECE_BYTES, chunk_rows
from headstart.training.config import RunConfig
from headstart.training.new_model import empty_model
from headstart.training.optimizer import parameter_groups

FLOAT32 = 4


@dataclass(frozen=True)
class Layout:
    """How a run is spread: what one process holds and computes at once."""

    processes: int
    """In all."""
    sharers: int
    """Processes that share one copy of weights, gradients and optimiser state."""
    rows: int
    """Rows of a micro-batch of one process."""
    micro_batches: int
    """Micro-batches of one process in a step."""
    reshard_after_forward: bool
    """Whether a block's gathered weights are freed until its backward."""
    reduce_each_micro_batch: bool
    """Whether gradients are summed over processes after every micro-batch instead of once a step."""
    activation_checkpointing: bool
    """Whether the trunk keeps the input of each block only, and computes the rest again in the backward."""


def layout(config: RunConfig, processes: int) -> Layout:
    """Raises UsageError where the step's rows, or the copies, cannot be shared out evenly."""
    if processes < 1:
        raise UsageError(f"--processes is {processes}; it must be at least 1")
    micro_batches, rows = config.micro_batches(processes)
    parallel = config.parallel
    _, sharers = parallel.mesh_shape(processes, PROCESSES_PER_NODE)
    return Layout(
        processes=processes,
        sharers=sharers,
        rows=rows,
        micro_batches=micro_batches,
        reshard_after_forward=parallel.reshard_after_forward and sharers > 1,
        reduce_each_micro_batch=parallel.reduce_each_micro_batch,
        activation_checkpointing=parallel.activation_checkpointing,
    )


PROCESSES_PER_NODE = 8
"""Processes of a node where the run does not say: a hybrid run then keeps a copy inside each node."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process at each moment of a step, by what they are for."""

    moments: dict[str, dict[str, int]]

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def at_peak(self) -> dict[str, int]:
        return self.moments[self.peak_moment]


def estimate(config: RunConfig, layout: Layout, device: Literal["cpu", "gpu"], budget: int = LOGITS_BYTES) -> Estimate:
    """Peak memory of a training step after the first (the optimiser's state is there), blocks not compiled.

    Compiled blocks keep less. On a GPU, torch's own memory (about 1 GiB), the communication's buffers and what the
    allocator cannot reuse come on top; leave a tenth of the device free.
    """
    model = empty_model(config)
    shape, half, spread = config.model, config.in_bfloat16, layout.processes > 1
    compute = 2 if half else FLOAT32
    # One process computes under autocast: weights, and so the residual stream, stay float32. Several gather weights in
    # the compute dtype (FSDP2's mixed precision), and the residual stream follows.
    residual = compute if spread else FLOAT32
    tokens = layout.rows * config.positions
    D, matrix_VD = shape.dim, shape.vocab_size * shape.dim
    parameters, trunk_parameters = _count(model.parameters()), _count(model.trunk.parameters())
    unembedding = _count(model.unembedding.parameters())
    largest_block = max(_count(block.parameters()) for block in model.trunk.blocks)
    heads = [_count(head.parameters()) for head in model.heads]
    on_path = _depth(shape)  # heads whose activations are alive together: 1 on the parallel tree
    kept = Kept(config, compute, residual, device)

    def shared(count: int) -> int:
        """float32 values of which this process holds its share."""
        return FLOAT32 * -(-count // layout.sharers)

    groups = parameter_groups(model, config.optimizer)
    muon = sum(_count(group.parameters.values()) for group in groups if group.muon)
    always = {
        "weights (float32)": shared(parameters),
        "optimizer state": shared(muon) + 2 * shared(parameters - muon),
        "tokens and targets": 8 * (2 + shape.heads) * tokens * layout.micro_batches,
    }

    # Gradients of the heads and the unembedding come first. From the second micro-batch on, all are there.
    of_heads = parameters - trunk_parameters + (matrix_VD if shape.tied else 0)
    # Of the last head alone: its matrix's is made in its loss, and what others share has been made before.
    own_matrix = shape.heads == 1 or len(model.unembedding.weights) > 1
    shared_module = shape.kind.repeats_module
    in_loss = of_heads - (0 if shared_module else heads[-1]) - (matrix_VD if own_matrix else 0)
    if layout.micro_batches > 1:
        of_heads = in_loss = parameters
    unreduced = 0
    if spread and layout.micro_batches > 1 and not layout.reduce_each_micro_batch:
        unreduced, of_heads, in_loss = FLOAT32 * parameters, 0, 0
    elif spread:
        unreduced = FLOAT32 * matrix_VD  # the unembedding's, added up over the heads before it is reduced

    if spread:
        # The embedding stays gathered through the step, the unembedding through the walk. One block is used while the
        # next is fetched; the gradient of one waits beside its float32 form to be reduced.
        blocks = _count(model.trunk.blocks.parameters())
        always_gathered = unembedding + trunk_parameters - blocks - (matrix_VD if shape.tied else 0)
        in_heads = compute * (always_gathered + on_path * max(heads) + (0 if layout.reshard_after_forward else blocks))
        in_trunk = compute * (always_gathered + (2 * largest_block if layout.reshard_after_forward else blocks))
        reduced_head, reduced_block = (compute + FLOAT32) * max(heads), (compute + FLOAT32) * largest_block
    else:
        # Autocast keeps each matrix that it has cast until the micro-batch ends.
        between = [] if model.unembedding.residuals is None else [model.unembedding.residuals]
        parts = (model.trunk.blocks, model.heads, *between)
        cast = [p.numel() for part in parts for p in part.parameters() if p.ndim > 1]
        in_heads = in_trunk = compute * sum(cast) if half else 0
        # A matrix's gradient is made in the compute dtype, then added to the float32 one.
        reduced_head = reduced_block = max(cast) * (
            (compute if half else 0) + (FLOAT32 if layout.micro_batches > 1 else 0)
        )

    trunk = kept.trunk(shape.trunk_layers, layout.activation_checkpointing) * tokens
    one_block = kept.block() * tokens
    loss = kept.loss() * tokens + _loss_weights(matrix_VD, compute, cast=half and not spread)
    taught = config.loss.heads != "cross-entropy"
    budget //= 2 if taught else 1  # a teacher's logits are held too
    if device == "gpu":  # as products give them, and in float32
        rows, held = chunk_rows(shape.vocab_size, budget), FLOAT32 + (compute if half else 0)
    else:
        rows, held = chunk_rows(shape.vocab_size, budget, compute), compute
    piece = min(tokens * shape.vocab_size * FLOAT32, PIECE_BYTES) if device == "cpu" and half and not taught else 0
    chunk = min(tokens, rows) * shape.vocab_size * held + piece

    def moment(gradients: int, gathered: int, unreduced: int = unreduced, **held: int) -> dict[str, int]:
        parts = {
            "gradients (float32)": shared(gradients),
            "gradients before they are shared out (float32)": unreduced,
            f"weights gathered or cast ({config.dtype})": gathered,
            # The trunk's gradient is summed over the heads in float32; a chain holds one more for each head above.
            "gradients of latents": (FLOAT32 + (on_path - 1) * residual) * D * tokens,
        }
        named = {name.replace("_", " "): size for name, size in held.items()}
        return {name: size for name, size in {**always, **parts, **named}.items() if size}

    if shape.kind.reads_tokens:
        on_path -= 1  # head 1 is no module
    head, working = on_path * kept.head() * tokens, kept.backward() * tokens
    updating = {**always, "gradients (float32)": shared(parameters)}
    return Estimate(
        {
            "the loss of the last head": moment(
                in_loss, in_heads, activations_of_the_trunk=trunk, activations_of_the_head=head,
                gradients_of_the_loss=loss, chunk_of_logits=chunk,
                distributions_of_the_teacher=distributions(config, tokens, device, budget) if taught else 0,
            ),
            "the backward of the last head": moment(
                of_heads, in_heads, activations_of_the_trunk=trunk, activations_of_the_head=head,
                working_space_of_the_backward=working + reduced_head,
            ),
            "the start of the trunk's backward": moment(
                of_heads, in_trunk, activations_of_the_trunk=trunk,
                activations_computed_again=one_block if layout.activation_checkpointing else 0,
                working_space_of_the_backward=working + reduced_block,
            ),
            "the end of the trunk's backward": moment(
                parameters if of_heads else 0, in_trunk, activations_of_the_trunk=one_block,
                working_space_of_the_backward=working + reduced_block,
            ),
            "the update of the weights": updating,
        }
    )  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """Bytes per position that autograd keeps, line by line of `model/layers.py`."""

    config: RunConfig
    compute: int
    residual: int
    device: Literal["cpu", "gpu"]

    def norm(self) -> int:
        """RMSNorm: a GPU's kernel keeps its input; torch's plain version also keeps the input divided by its size, both
        in float32."""
        D = self.config.model.dim
        return 2 * FLOAT32 * D if self.device == "cpu" else self.residual * D

    def attention(self) -> int:
        shape, c = self.config.model, self.compute
        q, kv = shape.attention_dim, shape.key_value_heads * shape.dim_per_head
        T = self.config.length
        if self.written_out() and c == FLOAT32:
            # queries, keys and values copied, probabilities up to each block's end, the mixture, and its copy
            return c * (q + 2 * kv + shape.attention_heads * (T + BLOCK) // 2 + 2 * q)
        if self.written_out():
            # scaled queries, keys and values copied, probabilities, the mixture
            return c * (q + 2 * kv + shape.attention_heads * T + q)
        mask = c * T if self.config.data.attention_within_documents else 0
        # rotated queries and keys, all of qkv for the values in it, the mixture, a float32 logarithm for each head
        return c * (q + kv) + c * (q + 2 * kv) + c * q + FLOAT32 * shape.attention_heads + mask

    def written_out(self) -> bool:
        """Whether attention is written out in products, holding its scores (`attention.causal_attention`)."""
        shortest = BLOCK + 1 if self.compute == FLOAT32 else 1
        plain = self.device == "cpu" and shortest <= self.config.length <= WRITTEN_OUT_LENGTH
        return plain and not self.config.data.attention_within_documents

    def block(self) -> int:
        shape = self.config.model
        # two norms, the inputs of qkv and of gate_up, attention; gate_up, silu(gate) and its product with up
        return 2 * self.norm() + 2 * self.compute * shape.dim + self.attention() + 4 * self.compute * shape.hidden

    def run_block(self) -> int:
        """What a block holds at its widest that is run without a graph: its input, a norm and one of its two halves."""
        shape = self.config.model
        halves = max(self.attention(), 4 * self.compute * shape.hidden)
        return self.norm() + 2 * self.residual * shape.dim + halves

    def trunk(self, layers: int, checkpointing: bool) -> int:
        output = self.residual * self.config.model.dim
        return output + layers * (output if checkpointing else self.block())

    def head(self) -> int:
        """One head and its latent, beside its parent's latent, which is there already."""
        return self.config.model.kind.kept_bytes(self)

    def loss(self) -> int:
        """The unembedding's norm, its result, that in the dtype of the products, and its gradient."""
        D = self.config.model.dim
        cast = self.compute if self.compute != self.residual else 0
        norm = self.norm() - (self.residual * D if self.residual == FLOAT32 or self.device == "gpu" else 0)
        return norm + (self.residual + cast + self.compute) * D

    def backward(self) -> int:
        """What a block's backward needs at its widest, beyond what it frees on the way."""
        shape = self.config.model
        # Of one block of rows in float32, of all in bfloat16.
        seen = BLOCK if self.compute == FLOAT32 else self.config.length
        scores = shape.attention_heads * seen if self.written_out() else 0
        return self.compute * max(2 * shape.hidden, 2 * scores) + (2 * self.residual + self.compute) * shape.dim


def distributions(
    config: RunConfig, tokens: int, device: Literal["cpu", "gpu"], budget: int = LOGITS_BYTES // 2
) -> int:
    """Return the bytes that `objective/distillation.py` holds in addition to a chunk of logits: log-probabilities and
    probabilities of teacher and head and their gradient, in float32, and the latents that the teacher's are made of."""
    vocab_size = config.model.vocab_size
    rows = PIECE_BYTES // (FLOAT32 * vocab_size) if device == "cpu" else chunk_rows(vocab_size, budget)
    latents = (2 * FLOAT32 + (2 if config.in_bfloat16 else FLOAT32)) * config.model.dim * tokens
    return 6 * FLOAT32 * vocab_size * min(tokens, max(1, rows)) + latents


def _loss_weights(size: int, compute: int, cast: bool) -> int:
    """The unembedding's gradient in float32; in bfloat16 also a chunk's share of it, and the weight if it is cast."""
    return size * (FLOAT32 + (compute if compute < FLOAT32 else 0) + (compute if cast else 0))


def _depth(config: ModelConfig) -> int:
    """Longest way from the trunk to a head."""
    depth = [0] * (config.heads + 1)
    order = range(1, config.heads + 1)
    for k in reversed(order) if config.wiring == "anticausal" else order:
        depth[k] = depth[config.parents[k - 1]] + 1
    return max(depth)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
