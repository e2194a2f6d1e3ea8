"""Loops of others on several processes: what would lose gradients is refused by the name of the right call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from headstart.errors import UsageError
from headstart.integrations.multi_token import multi_token_step
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.training.parallel import ParallelConfig, materialize, parallelize

CONFIG = ModelConfig(vocab_size=50, dim=16, layers=4, attention_heads=2, heads=3, context=64)
TOKENS = torch.arange(30).reshape(2, 15)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A group of this process alone: wrappers and hooks are the same as in one of many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    return found


@pytest.mark.parametrize("inside", [False, True])
def test_distributed_data_parallel_is_refused(inside: bool) -> None:
    wrapped = torch.nn.parallel.DistributedDataParallel(model())
    with pytest.raises(UsageError, match=r"multi_token_step.*DistributedDataParallel.* take \S+parallelize") as raised:
        multi_token_step(wrapped.module if inside else wrapped, TOKENS)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value) and "all_reduce" in str(raised.value)


def test_a_plain_model_beside_another_in_ddp_is_right() -> None:
    """Gradients may be summed by hand."""
    plain, other = model(), torch.nn.parallel.DistributedDataParallel(model())
    holder = {"module": plain}
    multi_token_step(plain, TOKENS)
    assert gradients(plain) and other.module is not holder["module"]


def test_fully_shard_alone_is_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for whole in (True, False):
        sharded = model()
        for block in sharded.trunk.blocks:
            fully_shard(block, mesh=mesh)
        if whole:
            fully_shard(sharded, mesh=mesh)
        with pytest.raises(UsageError, match=r"sharded by fully_shard alone; take \S+parallelize and its micro_batch"):
            multi_token_step(sharded, TOKENS)


def spread(sharding: str = "full"):
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    with torch.device("meta"):
        made = Transformer(CONFIG)
    sums = parallelize(made, mesh, ParallelConfig(sharding=sharding), compile=False, dtype="float32")
    materialize(made, torch.device("cpu"), seed=0)
    return made, sums


@pytest.mark.parametrize("sharding", ["full", "replicate"])
def test_a_parallelized_model_needs_its_micro_batch(sharding: str) -> None:
    made, _ = spread(sharding)
    with pytest.raises(UsageError, match=r"wrap each multi_token_step in `with sums.micro_batch\(last"):
        multi_token_step(made, TOKENS)
    with pytest.raises(UsageError, match=r"micro_batch.*and other passes in torch.no_grad\(\)$"):
        made(TOKENS, heads=3)
    with torch.no_grad():
        assert made(TOKENS, heads=3).isfinite().all()


def test_within_micro_batches_gradients_are_those_of_the_plain_model() -> None:
    made, sums = spread()
    plain = Transformer(CONFIG)
    plain.load_state_dict({name: value.full_tensor() for name, value in made.state_dict().items()})
    for i in range(2):
        counts = torch.tensor([24, 24, 24])
        with sums.micro_batch(last=i == 1, losses=3):
            multi_token_step(made, TOKENS[i : i + 1], counts=counts)
        multi_token_step(plain, TOKENS[i : i + 1], counts=counts)
    ours, theirs = gradients(made), gradients(plain)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
