"""Distribution of a model over processes: activation checkpointing, compilation, FSDP2 sharding, mixed precision.

`parallelize` is the one place that does it; the model does not know. Trunk, each head and the unembedding are FSDP
roots of their own, because the walk (`objective/walk.py`) runs n + 2 backward passes a step and a root takes the end of
each backward for the end of all: with one root the first head's backward would finish groups that have not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headstart.arguments import AT_LEAST_1, check_fields
from headstart.errors import UsageError
from headstart.model.heads import SequentialHead
from headstart.model.layers import Block
from headstart.model.transformer import TRAINING_ALONE, Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ParallelConfig:
    """Distribution of the model over several processes (`torchrun`); one process ignores the sharding."""

    sharding: Literal["full", "hybrid", "replicate"] = "full"
    """full: every process holds a share of the weights; hybrid: groups of processes share a copy; replicate: every
    process holds all (small models)."""
    processes_per_copy: int | None = None
    """hybrid: number of processes that share one copy (None: those of one node)."""
    activation_checkpointing: bool = False
    """Recompute the trunk's blocks in the backward: a third more arithmetic, a fraction of the memory."""
    reshard_after_forward: bool = True
    """full and hybrid: free a block's gathered weights until its backward; false trades memory for communication."""
    reduce_each_micro_batch: bool = False
    """Sum gradients over processes after every micro-batch instead of once a step. With batch.accumulate it saves each
    process a whole fp32 gradient."""

    def __post_init__(self) -> None:
        check_fields(self, "parallel.", processes_per_copy=AT_LEAST_1)
        if self.processes_per_copy is not None and self.sharding != "hybrid":
            raise UsageError(
                f"parallel.processes_per_copy is for parallel.sharding hybrid, not {self.sharding}; leave one out"
            )

    def mesh_shape(self, processes: int, per_node: int) -> tuple[int, int]:
        """Return the number of copies of the model, and of the processes that share one copy."""
        shared = {"full": processes, "replicate": 1}.get(self.sharding, self.processes_per_copy or per_node)
        if processes % shared:
            raise UsageError(
                f"parallel.processes_per_copy {shared} does not divide the {processes} processes; "
                "take a divisor, or start another number of processes"
            )
        return processes // shared, shared


def parallelize(
    model: Transformer, mesh: DeviceMesh | None, config: ParallelConfig, *, compile: bool, dtype: str
) -> GradientSums:
    """Change `model` in place, which may be on the meta device; build optimizers after it.

    `mesh` is (copies, processes that share one), named ("replicate", "shard"); None: one process, no sharding. Matrix
    products run in `dtype`, "bfloat16" or "float32", in which weights are gathered. Sharded weights, optimizer state
    and the sums of gradients stay float32.

    Return the sums of gradients, whose `micro_batch` surrounds each micro-batch of a training step. On several
    processes a forward pass with gradients outside of it raises UsageError, because gradients would be summed at the
    wrong time or not at all.
    """
    # 1. Checkpointing comes first, so that the compiled code contains the recomputation. Heads are not checkpointed:
    #    the walk holds one head's activations at a time.
    if config.activation_checkpointing:
        for block in model.trunk.blocks:
            # Replacing the bound method keeps the parameter names; a wrapping module would change them.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    # 2. Blocks are compiled one by one, never the step as a whole: its backward passes begin and end inside the walk.
    #    Compiling before sharding keeps FSDP's hooks outside the compiled code.
    if compile:
        for module in (*model.trunk.blocks, *model.heads):
            block = module.block if isinstance(module, SequentialHead) else module
            if isinstance(block, Block):
                block.compile()
    # 3. Sharding comes last, and brings mixed precision.
    if mesh is not None:
        _shard(model, mesh, config, dtype)
        _PARALLELIZED.add(model)
    return GradientSums(model, config.reduce_each_micro_batch)


_PARALLELIZED: WeakSet[nn.Module] = WeakSet()


def is_parallelized(model: nn.Module) -> bool:
    """Return whether `parallelize` has spread the model over processes."""
    return model in _PARALLELIZED


def _shard(model: Transformer, mesh: DeviceMesh, config: ParallelConfig, dtype: str) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # A process that holds a whole copy gains nothing from gathering it twice.
    reshard = config.reshard_after_forward and mesh["shard"].size() > 1
    if mesh["replicate"].size() == 1:
        mesh = mesh["shard"]  # or every sum would go through a group of one as well
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if dtype == "bfloat16" else None, reduce_dtype=torch.float32
    )
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy)
    tied = {model.trunk.embedding.weight} if model.config.tied else set()
    for block in model.trunk.blocks:
        shard(block, reshard_after_forward=reshard)
    shard(model.trunk, reshard_after_forward=False, ignored_params=tied)  # the embedding alone
    for head in model.heads:
        if next(head.parameters(), None) is not None:
            shard(head, reshard_after_forward=False)  # its backward follows its forward at once
    if (repeated := _repeated(model)) is not None:
        cast(FSDPModule, repeated).set_reshard_after_backward(False)
    # The unembedding is gathered once a step, for n losses and n backward passes. If heads have parameters in it, it is
    # gathered in float32: each loss has some of its own, so at the last one the others' gradients are float32 sums
    # already, and one sum over processes takes one dtype.
    if model.config.kind.in_unembedding or model.unembedding.order is not None:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    shard(model.unembedding, reshard_after_forward=False, mp_policy=policy)
    cast(FSDPModule, model.unembedding).set_reshard_after_backward(False)
    if tied:
        _embed_through_unembedding(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by the counts of all processes already
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def _embed_through_unembedding(model: Transformer) -> None:
    """Give a tied matrix to the unembedding's FSDP group alone, and let the look-up of tokens run its hooks."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    embedding, unembedding = cast(Any, model.trunk.embedding), cast(Any, model.unembedding)
    # FSDP exchanges whole and sharded parameters in the modules of the group; the embedding lies outside of them.
    (group,) = unembedding._get_fsdp_state()._fsdp_param_groups
    parameter = next(p for p in group.fsdp_params if p._module_info.module is unembedding.weights)  # the first of them
    parameter._module_info.shared_modules.append(embedding)
    parameter._module_info.shared_param_names.append("weight")
    embedding.weight = parameter.sharded_param

    unembedding.look_up = embedding.forward
    register_fsdp_forward_method(unembedding, "look_up")
    embedding.forward = unembedding.look_up


def _repeated(model: Transformer) -> nn.Module | None:
    """Return the module that several heads share, which has several forwards and backwards in a pass; None if none."""
    return model.head(2) if model.config.kind.repeats_module else None


class GradientSums:
    """Sum gradients over processes once a step, however many backward passes and micro-batches the step has."""

    def __init__(self, model: Transformer, each_micro_batch: bool) -> None:
        from torch.distributed.fsdp import FSDPModule

        self._model, self._each = model, each_micro_batch
        candidates = (model.trunk, *model.heads, model.unembedding)
        self._roots: list[Any] = [module for module in candidates if isinstance(module, FSDPModule)]
        self._losses_left = 0
        self._inside = False
        self._wanted = True
        self._repeated = _repeated(model) if self._roots else None
        self._runs = 0
        if self._roots:
            model.unembedding.register_forward_pre_hook(self._before_loss)
            model.trunk.register_forward_hook(self._after_trunk)
        if self._repeated is not None:
            self._repeated.register_forward_hook(self._after_repeated)

    @contextmanager
    def micro_batch(self, *, last: bool, losses: int) -> Iterator[None]:
        """Surround one `walk_step` or `multi_token_step` of so many losses, one for each head whose weight is not 0."""
        self._wanted, self._losses_left, self._runs = last or self._each, losses, 0
        for root in self._roots:
            late = root is self._model.unembedding or root is self._repeated
            root.set_requires_gradient_sync(self._wanted and not late)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        if last:
            self.free()

    def free(self) -> None:
        """Free gathered weights, before the optimizer changes them and after a pass without a backward."""
        for root in self._roots:
            root.reshard()

    def _before_loss(self, *_: object) -> None:
        # The weight's gradient is complete with the last loss; a tied one's only with the trunk's backward.
        if torch.is_grad_enabled():
            if not self._inside:
                raise UsageError(
                    "a model that parallelize has spread makes gradients only within its GradientSums: wrap each "
                    "multi_token_step in `with sums.micro_batch(last=..., losses=...)` (docs/scale-out.md, Loops of "
                    "your own), and other passes in torch.no_grad()"
                )
            self._losses_left -= 1
            if self._losses_left == 0 and not self._model.config.tied:
                self._roots[-1].set_requires_gradient_sync(self._wanted)

    def _after_repeated(self, module: nn.Module, arguments: object, latent_BTD: Tensor) -> None:
        # The first head to run is the last to be differentiated: with it the shared gradient is complete.
        self._runs += 1
        if self._runs == 1 and latent_BTD.requires_grad:
            repeated = cast(Any, module)
            latent_BTD.register_hook(lambda _: repeated.set_requires_gradient_sync(self._wanted))

    def _after_trunk(self, module: nn.Module, arguments: object, output: Tensor | tuple[Tensor, Tensor]) -> None:
        z_BTD = output[0] if isinstance(output, tuple) else output
        if z_BTD.requires_grad and self._model.config.tied:
            z_BTD.register_hook(lambda _: self._roots[-1].set_requires_gradient_sync(self._wanted))


def materialize(
    model: Transformer, device: torch.device, seed: int, given: Mapping[str, Tensor | None] = MappingProxyType({})
) -> None:
    """Allocate a model on the meta device and give it its first weights.

    They are the same for every device and number of processes. No process has more than one whole parameter at a time,
    except for those that are `given`: the first process has them all and sends each to the others, whose entries are
    None.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    model.to_empty(device=device)
    if model.config.tied:
        model.trunk.embedding.weight = cast(nn.Parameter, model.unembedding.weights[0])
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape)
        if name not in given:
            model.first_value_(name, value, generator)
        elif (own := given[name]) is not None:
            value.copy_(own)
        if isinstance(parameter, DTensor):
            # Where every process has made the whole value, it takes its share, and nothing is sent.
            source = 0 if name in given else None
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=source)
        with torch.no_grad():
            parameter.copy_(value)
    if not given:
        model.copy_first_values()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be spread over processes as a plain one, on each of them."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_model(model: Transformer, dtype: torch.dtype, keep: bool) -> Transformer | None:
    """Return a copy of a sharded model with whole parameters of `dtype` on the CPU, or None unless `keep`.

    All processes call it together.
    """
    parameters: dict[str, Tensor] = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        value = whole(parameter.detach())
        if keep and name not in TRAINING_ALONE:
            parameters[name] = nn.Parameter(value.to("cpu", dtype))
    if not keep:
        return None
    if model.config.tied:
        parameters["unembedding.weights.0"] = parameters["trunk.embedding.weight"]
    with torch.device("meta"):
        copy = Transformer(model.config)
    copy.load_state_dict(parameters, assign=True)
    return copy
