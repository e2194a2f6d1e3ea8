"""Memory that one process of a training run needs, from the settings alone.

No step runs: parameters are counted on a model without storage (meta device), activations by what autograd keeps of
each line of `model/layers.py`, the loss by what `objective/cross_entropy.py` holds at once, sharding by what
`training/parallel.py` gathers. Tests compare it with bytes counted in real steps of one process and of two
(docs/scale-out.md); for GPUs, whose kernels keep less than a CPU's, it has not been compared yet.

A step on fake tensors would count by itself, but a torch built for CPUs makes no fake tensor of a GPU, and a process
group would have to be faked as well. A dry run has to work on such a machine, for any number of GPUs.
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
    """Distribution of a run: the share that one process holds, and what it computes at once."""

    processes: int
    """Number of processes."""
    sharers: int
    """Processes that share one copy of weights, gradients and optimizer state."""
    rows: int
    """Rows of a micro-batch of one process."""
    micro_batches: int
    """Micro-batches of one process in a step."""
    reshard_after_forward: bool
    """Free a block's gathered weights until its backward."""
    reduce_each_micro_batch: bool
    """Sum gradients over processes after every micro-batch instead of once a step."""
    activation_checkpointing: bool
    """Keep only the input of each block of the trunk, and compute the rest again in the backward."""


def layout(config: RunConfig, processes: int) -> Layout:
    """Return the layout. Raise UsageError if the step's rows, or the copies, cannot be divided evenly."""
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
"""Processes assumed for a node: by default, a hybrid run keeps a copy inside each node."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process at each moment of a step, by use."""

    moments: dict[str, dict[str, int]]

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.at_peak.values())

    @property
    def peak_moment(self) -> str:
        """Moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes at the peak by use."""
        return self.moments[self.peak_moment]


def estimate(config: RunConfig, layout: Layout, device: Literal["cpu", "gpu"], budget: int = LOGITS_BYTES) -> Estimate:
    """Estimate the peak memory of a training step after the first, when the optimizer's state exists.

    Blocks are not compiled; compiled blocks keep less. On a GPU, torch's own memory (about 1 GiB), the communication's
    buffers and what the allocator cannot reuse come on top; leave a tenth of the device free.
    """
    step = _Step(config, layout, device)
    taught = config.loss.heads != "cross-entropy"
    budget //= 2 if taught else 1  # a teacher's logits are held too
    kept, tokens, checkpointing = step.kept, step.tokens, layout.activation_checkpointing
    in_loss, of_heads, unreduced = step.gradients()
    gathered = step.gathered()
    trunk, one_block = kept.trunk(config.model.trunk_layers, checkpointing) * tokens, kept.block() * tokens
    head, working = step.modules * kept.head() * tokens, kept.backward() * tokens
    moments = {
        "the loss of the last head": step.moment(
            in_loss, unreduced, gathered.in_heads, activations_of_the_trunk=trunk, activations_of_the_head=head,
            gradients_of_the_loss=step.loss(), chunk_of_logits=step.chunk(budget, taught),
            distributions_of_the_teacher=distributions(config, tokens, device, budget) if taught else 0,
        ),
        "the backward of the last head": step.moment(
            of_heads, unreduced, gathered.in_heads, activations_of_the_trunk=trunk, activations_of_the_head=head,
            working_space_of_the_backward=working + gathered.reduced_head,
        ),
        "the start of the trunk's backward": step.moment(
            of_heads, unreduced, gathered.in_trunk, activations_of_the_trunk=trunk,
            activations_computed_again=one_block if checkpointing else 0,
            working_space_of_the_backward=working + gathered.reduced_block,
        ),
        "the end of the trunk's backward": step.moment(
            step.parameters if of_heads else 0, unreduced, gathered.in_trunk, activations_of_the_trunk=one_block,
            working_space_of_the_backward=working + gathered.reduced_block,
        ),
        "the update of the weights": {**step.always(), "gradients (float32)": step.shared(step.parameters)},
    }  # fmt: skip
    return Estimate(moments)


@dataclass(frozen=True)
class _Gathered:
    """Bytes of weights gathered or cast, and of the largest gradient before it is reduced."""

    in_heads: int
    in_trunk: int
    reduced_head: int
    reduced_block: int


class _Step:
    """The sizes that the moments of a step share."""

    def __init__(self, config: RunConfig, layout: Layout, device: Literal["cpu", "gpu"]) -> None:
        self.config, self.layout, self.device, self.shape = config, layout, device, config.model
        self.model = empty_model(config)
        self.half, self.spread = config.in_bfloat16, layout.processes > 1
        self.compute = 2 if self.half else FLOAT32
        # One process computes under autocast: weights, and so the residual stream, stay float32. Several gather weights
        # in the compute dtype (FSDP2's mixed precision), and the residual stream follows.
        self.residual = self.compute if self.spread else FLOAT32
        self.tokens = layout.rows * config.positions
        self.matrix = self.shape.vocab_size * self.shape.dim
        self.parameters, self.of_trunk = (
            count_parameters(self.model.parameters()),
            count_parameters(self.model.trunk.parameters()),
        )
        self.heads = [count_parameters(head.parameters()) for head in self.model.heads]
        self.on_path = _depth(self.shape)
        """Heads whose activations are alive together: 1 on the parallel tree."""
        plain = self.shape.kind.reads_tokens and self.shape.parents[1:2] != (0,)
        self.modules = self.on_path - plain
        """Number of these heads that are modules; head 1 of sequential heads is none."""
        self.kept = Kept(config, self.compute, self.residual, device)

    def shared(self, count: int) -> int:
        """Return the bytes of this process's share of `count` float32 values."""
        return FLOAT32 * -(-count // self.layout.sharers)

    def always(self) -> dict[str, int]:
        """Return the bytes that are held throughout the step."""
        groups = parameter_groups(self.model, self.config.optimizer)
        muon = sum(count_parameters(group.parameters.values()) for group in groups if group.muon)
        return {
            "weights (float32)": self.shared(self.parameters),
            "optimizer state": self.shared(muon) + 2 * self.shared(self.parameters - muon),
            "tokens and targets": 8 * (2 + self.shape.heads) * self.tokens * self.layout.micro_batches,
        }

    def gradients(self) -> tuple[int, int, int]:
        """Return the gradients held in the last head's loss and after its backward, and the bytes of unreduced ones.

        Gradients of the heads and the unembedding come first. From the second micro-batch on, all exist.
        """
        of_heads = self.parameters - self.of_trunk + (self.matrix if self.shape.tied else 0)
        # The loss makes the gradient of the last head's own matrix; the gradient of a shared one exists before.
        own_matrix = self.shape.heads == 1 or len(self.model.unembedding.weights) > 1
        in_loss = of_heads - (0 if self.shape.kind.repeats_module else self.heads[-1])
        in_loss -= self.matrix if own_matrix else 0
        if self.spread and self.layout.micro_batches > 1 and not self.layout.reduce_each_micro_batch:
            return 0, 0, FLOAT32 * self.parameters
        # The unembedding's gradient is added up over the heads before it is reduced.
        unreduced = FLOAT32 * self.matrix if self.spread else 0
        if self.layout.micro_batches > 1:
            return self.parameters, self.parameters, unreduced
        return in_loss, of_heads, unreduced

    def gathered(self) -> _Gathered:
        """Return the bytes of weights gathered or cast."""
        if self.spread:
            # The embedding stays gathered through the step, the unembedding through the walk. One block is used while
            # the next is fetched; the gradient of one waits next to its float32 form to be reduced.
            largest = max(count_parameters(block.parameters()) for block in self.model.trunk.blocks)
            blocks = count_parameters(self.model.trunk.blocks.parameters())
            always = count_parameters(self.model.unembedding.parameters()) + self.of_trunk - blocks
            always -= self.matrix if self.shape.tied else 0
            reshards = self.layout.reshard_after_forward
            return _Gathered(
                self.compute * (always + self.on_path * max(self.heads) + (0 if reshards else blocks)),
                self.compute * (always + (2 * largest if reshards else blocks)),
                (self.compute + FLOAT32) * max(self.heads),
                (self.compute + FLOAT32) * largest,
            )
        # Autocast keeps each matrix that it has cast until the micro-batch ends.
        residuals = self.model.unembedding.residuals
        parts = (self.model.trunk.blocks, self.model.heads, *([] if residuals is None else [residuals]))
        cast = [p.numel() for part in parts for p in part.parameters() if p.ndim > 1]
        held = self.compute * sum(cast) if self.half else 0
        # A matrix's gradient is made in the compute dtype, then added to the float32 one.
        accumulated = FLOAT32 if self.layout.micro_batches > 1 else 0
        reduced = max(cast) * ((self.compute if self.half else 0) + accumulated)
        return _Gathered(held, held, reduced, reduced)

    def loss(self) -> int:
        """Return the bytes of the loss's own gradients and of the unembedding's."""
        cast = self.compute if self.half and not self.spread else 0
        of_weights = FLOAT32 + (self.compute if self.half else 0) + cast
        return self.kept.loss() * self.tokens + self.matrix * of_weights

    def chunk(self, budget: int, taught: bool) -> int:
        """Return the bytes of a chunk of logits."""
        V, on_cpu = self.shape.vocab_size, self.device == "cpu"
        if on_cpu:
            rows, held = chunk_rows(V, budget, self.compute), self.compute
        else:  # as products give them, and in float32
            rows, held = chunk_rows(V, budget), FLOAT32 + (self.compute if self.half else 0)
        piece = min(self.tokens * V * FLOAT32, PIECE_BYTES) if on_cpu and self.half and not taught else 0
        return min(self.tokens, rows) * V * held + piece

    def moment(self, gradients: int, unreduced: int, gathered: int, **held: int) -> dict[str, int]:
        """Return the bytes of a moment by name, without those that are 0."""
        parts = {
            **self.always(),
            "gradients (float32)": self.shared(gradients),
            "gradients before they are shared out (float32)": unreduced,
            f"weights gathered or cast ({self.config.dtype})": gathered,
            # The trunk's gradient is summed over the heads in float32; a chain holds one more for each head above.
            "gradients of latents": (FLOAT32 + (self.modules - 1) * self.residual) * self.shape.dim * self.tokens,
            **{name.replace("_", " "): size for name, size in held.items()},
        }
        return {name: size for name, size in parts.items() if size}


@dataclass(frozen=True)
class Kept:
    """Bytes per position that autograd keeps, line by line of `model/layers.py`."""

    config: RunConfig
    compute: int
    residual: int
    device: Literal["cpu", "gpu"]

    def norm(self) -> int:
        """Return the bytes of an RMSNorm.

        A GPU's kernel keeps its input; torch's plain version also keeps the input divided by its size, both in float32.
        """
        D = self.config.model.dim
        return 2 * FLOAT32 * D if self.device == "cpu" else self.residual * D

    def attention(self) -> int:
        """Return the bytes of an attention."""
        shape, c = self.config.model, self.compute
        q, kv = shape.attention_dim, shape.key_value_heads * shape.dim_per_head
        T = self.config.length
        if self.written_out() and c == FLOAT32:
            # copies of queries, keys and values; probabilities up to each block's end; the mixture and its copy
            return c * (q + 2 * kv + shape.attention_heads * (T + BLOCK) // 2 + 2 * q)
        if self.written_out():
            # copies of scaled queries, keys and values; probabilities; the mixture
            return c * (q + 2 * kv + shape.attention_heads * T + q)
        mask = c * T if self.config.data.attention_within_documents else 0
        # rotated queries and keys, all of qkv for the values in it, the mixture, a float32 logarithm for each head
        return c * (q + kv) + c * (q + 2 * kv) + c * q + FLOAT32 * shape.attention_heads + mask

    def written_out(self) -> bool:
        """Return whether attention holds its scores, in plain products (`attention.causal_attention`)."""
        shortest = BLOCK + 1 if self.compute == FLOAT32 else 1
        plain = self.device == "cpu" and shortest <= self.config.length <= WRITTEN_OUT_LENGTH
        return plain and not self.config.data.attention_within_documents

    def block(self) -> int:
        """Return the bytes of a block."""
        shape = self.config.model
        # two norms, the inputs of qkv and of gate_up, attention; gate_up, silu(gate) and its product with up
        return 2 * self.norm() + 2 * self.compute * shape.dim + self.attention() + 4 * self.compute * shape.hidden

    def run_block(self) -> int:
        """Return the peak of a block that runs without a graph: its input, a norm and one of its two halves."""
        shape = self.config.model
        halves = max(self.attention(), 4 * self.compute * shape.hidden)
        return self.norm() + 2 * self.residual * shape.dim + halves

    def trunk(self, layers: int, checkpointing: bool) -> int:
        """Return the bytes of the trunk."""
        output = self.residual * self.config.model.dim
        handed_out = self.residual * (self.config.model.state_dim - self.config.model.dim)
        return output + handed_out + layers * (output if checkpointing else self.block())

    def head(self) -> int:
        """Return the bytes of one head and its latent, without its parent's latent."""
        return self.config.model.kind.kept_bytes(self)

    def loss(self) -> int:
        """Return the bytes of the unembedding's norm, of its result in both dtypes, and of its gradient."""
        D = self.config.model.dim
        cast = self.compute if self.compute != self.residual else 0
        norm = self.norm() - (self.residual * D if self.residual == FLOAT32 or self.device == "gpu" else 0)
        return norm + (self.residual + cast + self.compute) * D

    def backward(self) -> int:
        """Return the peak of a block's backward, beyond the bytes that it frees on the way."""
        shape = self.config.model
        # The scores of one block of rows in float32, of all rows in bfloat16.
        seen = BLOCK if self.compute == FLOAT32 else self.config.length
        scores = shape.attention_heads * seen if self.written_out() else 0
        return self.compute * max(2 * shape.hidden, 2 * scores) + (2 * self.residual + self.compute) * shape.dim


def distributions(
    config: RunConfig, tokens: int, device: Literal["cpu", "gpu"], budget: int = LOGITS_BYTES // 2
) -> int:
    """Return the bytes that `objective/distillation.py` holds in addition to a chunk of logits.

    They are the log-probabilities and probabilities of teacher and head and their gradient, in float32, and the latents
    of the teacher.
    """
    vocab_size = config.model.vocab_size
    rows = PIECE_BYTES // (FLOAT32 * vocab_size) if device == "cpu" else chunk_rows(vocab_size, budget)
    latents = (2 * FLOAT32 + (2 if config.in_bfloat16 else FLOAT32)) * config.model.dim * tokens
    return 6 * FLOAT32 * vocab_size * min(tokens, max(1, rows)) + latents


def _depth(config: ModelConfig) -> int:
    """Return the longest path from the trunk to a head."""
    depth = [0] * (config.heads + 1)
    order = range(1, config.heads + 1)
    for k in reversed(order) if config.wiring == "anticausal" else order:
        depth[k] = depth[config.parents[k - 1]] + 1
    return max(depth)


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Count the values of parameters."""
    return sum(parameter.numel() for parameter in parameters)
