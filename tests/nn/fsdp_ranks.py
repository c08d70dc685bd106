"""What each rank of a sharded model does, in a module of its own: ranks import it."""

from typing import Any

import torch
from linear_support import BF16, normal_linear
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fastfp8

STEPS, FEATURES = 2, 200


def model() -> nn.Sequential:
    """Sizes of which neither 128 nor, on two ranks, the number of ranks times anything is a divisor."""
    first = normal_linear(FEATURES, 301)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        last = fastfp8.nn.RMSNormLinear(48, 35, recipe=fastfp8.Recipe())
    return nn.Sequential(first, nn.Tanh(), normal_linear(301, 48, seed=1), last)


def loss_of(network: nn.Module, step: int, rank: int) -> Tensor:
    x = torch.randn(20, FEATURES, generator=torch.Generator().manual_seed(2 * step + rank))
    return network(x).float().square().mean()  # type: ignore[no-any-return]


def train_sharded(group: Any, mixed: bool) -> tuple[list[Tensor], list[float], list[torch.dtype]]:
    """The parameters after some steps, whole again; the losses; the dtypes saved for backward beside BF16 weights."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (group.size(),))
    network = model()
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32) if mixed else MixedPrecisionPolicy()
    for layer in (network[0], network[2], network[3], network):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    fastfp8.nn.share_weights(network, optimizer)  # leaves sharded weights alone
    losses, saved = [], []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.dtype)
        return t

    for step in range(STEPS):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = loss_of(network, step, group.rank())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return [p.full_tensor().detach() for p in network.parameters()], losses, saved


def train_whole(world: int, mixed: bool) -> tuple[list[Tensor], list[list[float]]]:
    """The same on one rank: gradients averaged over the batches of all."""
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        gradients = []
        losses.append([])
        for rank in range(world):
            run = network
            if mixed:
                run = model().to(BF16)
                run.load_state_dict(network.state_dict())
            inputs = list(run.parameters())
            x = torch.randn(20, FEATURES, generator=torch.Generator().manual_seed(2 * step + rank))
            loss = run(x.to(BF16) if mixed else x).float().square().mean()
            gradients.append([g.float() for g in torch.autograd.grad(loss, inputs)])
            losses[-1].append(loss.item())
        for parameter, *each in zip(network.parameters(), *gradients, strict=True):
            parameter.grad = sum(each) / world
        optimizer.step()
    return [p.detach() for p in network.parameters()], losses
