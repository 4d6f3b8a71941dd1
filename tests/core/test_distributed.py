"""Real processes on gloo: different data and uneven batches on every rank; gradients compared with one process."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import Command
from ranks import processes, run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchformer import BatchFormer, insert
from batchformer.core import distributed

ROWS = {2: (3, 5), 3: (4, 1, 2)}
TOKENS, DIM, CLASSES = 3, 8, 4


class Net(nn.Module):
    """A network with parameters before the module, in it, and after it."""

    def __init__(self, tokens: bool, layers: int, gather: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(6, DIM)
        self.batchformer = BatchFormer(DIM, drop=0.0, layers=layers, gather=gather)
        self.head = nn.Linear(DIM, CLASSES)
        self.tokens = tokens
        self.double()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = self.head(self.batchformer(self.backbone(x), mask=mask))
        return out.mean(1) if self.tokens else out


def batch(rank: int, world: int, tokens: bool, masked: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    stream = torch.Generator().manual_seed(100 + rank)
    rows = ROWS[world][rank]
    x = torch.randn(rows, *([TOKENS] if tokens else []), 6, generator=stream, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (rows,), generator=stream)
    mask = torch.rand(rows, TOKENS, generator=stream) < 0.3 if masked else None
    return x, labels, mask


def loss_of(net: nn.Module, x: Tensor, labels: Tensor, mask: Tensor | None, total: int) -> Tensor:
    """Sum over the own rows over the rows of all ranks: adds up over ranks to the mean."""
    out = net(x, mask) if mask is not None else net(x)
    return nn.functional.cross_entropy(out, torch.cat((labels, labels)), reduction="sum") / (2 * total)


def reference(world: int, tokens: bool, layers: int, masked: bool = False) -> dict[str, Tensor]:
    """Gradients of one process that holds the batches of all ranks."""
    parts = [batch(rank, world, tokens, masked) for rank in range(world)]
    x, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))  # type: ignore[misc]
    mask = torch.cat([part[2] for part in parts]) if masked else None  # type: ignore[misc]
    net = Net(tokens, layers, "none")
    loss_of(net, x, labels, mask, len(x)).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def same_gradients(net: nn.Module, expected: dict[str, Tensor], scale: float = 1.0) -> float:
    """Largest difference; ``scale`` undoes the average that wrappers take over ranks."""
    found = {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, gradient in found.items():
        assert gradient is not None, name
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        worst = max(worst, float((scale * full - expected[name]).abs().max()))
    return worst


def summed(net: nn.Module) -> None:
    for parameter in net.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)


# ---------------------------------------------------------------- what runs on every rank


def plain_processes(rank: int, world: int) -> None:
    for tokens, layers, masked in ((False, 1, False), (True, 1, False), (True, 2, False), (True, 1, True)):
        net = Net(tokens, layers, "all").train()
        loss_of(net, *batch(rank, world, tokens, masked), sum(ROWS[world])).backward()
        summed(net)
        worst = same_gradients(net, reference(world, tokens, layers, masked))
        assert worst < 1e-10, (tokens, layers, masked, worst)


def under_ddp(rank: int, world: int) -> None:
    net = DistributedDataParallel(Net(True, 1, "all"))
    loss_of(net, *batch(rank, world, True)[:2], None, sum(ROWS[world])).backward()
    worst = same_gradients(net, reference(world, True, 1), scale=world)
    assert worst < 1e-10, worst


def under_fsdp(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = Net(True, 1, "all")
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(net.batchformer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    loss_of(net, *batch(rank, world, True)[:2], None, sum(ROWS[world])).backward()
    worst = same_gradients(net, reference(world, True, 1), scale=world)
    assert worst < 1e-10, worst


def inserted_twice_under_fsdp(rank: int, world: int) -> None:
    """Points after the first, with shared and with separate weights, each BatchFormer wrapped by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    for share in (True, False):
        results = []
        for sharded in (False, True):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(6, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, CLASSES)).double()
            handle = insert(net, after=["0", "1"], drop=0.0, share=share)
            if sharded:
                mesh = init_device_mesh("cpu", (world,))
                for module in handle.modules:
                    fully_shard(module, mesh=mesh)
                fully_shard(net, mesh=mesh)
            out = net(x)
            out.square().sum().backward()
            results.append(out.detach())
        assert results[0].shape == (6, CLASSES)
        torch.testing.assert_close(results[0], results[1])


def compiled(rank: int, world: int) -> None:
    """The sizes of the other ranks are asked for outside of the graph; the numbers stay exact, with other rows too."""
    net = Net(True, 2, "all")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own, where a graph goes on behind a break
        fast = torch.compile(net, backend="aot_eager")
        for masked in (False, True):
            net.zero_grad()
            loss_of(fast, *batch(rank, world, True, masked), sum(ROWS[world])).backward()
            summed(net)
            worst = same_gradients(net, reference(world, True, 2, masked))
            assert worst < 1e-10, worst
        torch.compiler.reset()  # else what was compiled with the break is taken
        with pytest.raises(torch._dynamo.exc.Unsupported):  # the one exception to "no graph break"
            torch.compile(net, backend="aot_eager", fullgraph=True)(batch(rank, world, True)[0])


def wrong_gather_is_seen(rank: int, world: int) -> None:
    """A backward pass that keeps the own rank's gradient only: the fault of older libraries."""

    def own_only(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        sizes = ctx.sizes
        return grads[0][sizes.offset : sizes.offset + sizes.rows[sizes.rank]], None

    distributed._GatherRows.backward = staticmethod(own_only)  # type: ignore[method-assign]
    net = Net(False, 1, "all")
    loss_of(net, *batch(rank, world, False)[:2], None, sum(ROWS[world])).backward()
    summed(net)
    assert same_gradients(net, reference(world, False, 1)) > 1e-4


def empty_batch_raises_everywhere(rank: int, world: int) -> None:
    module = BatchFormer(DIM, gather="all")
    with pytest.raises(ValueError, match=r"at least one sample on every rank, got \[0, 4\] samples by rank"):
        module(torch.randn(4 * rank, DIM))


def token_counts_must_agree(rank: int, world: int) -> None:
    module = BatchFormer(DIM, gather="all")
    with pytest.raises(ValueError, match="same tokens and channels on every rank"):
        module(torch.randn(2, 3 + rank, DIM))


def masks_must_be_on_every_rank_or_on_none(rank: int, world: int) -> None:
    """A rank without a mask would not take part in gathering them: the others would wait for ever."""
    mask = torch.zeros(2, 3, dtype=torch.bool) if rank == 0 else None
    with pytest.raises(ValueError, match=r"a mask on every rank or on none .* got \[True, False\] by rank"):
        BatchFormer(DIM, gather="all")(torch.randn(2, 3, DIM), mask=mask)


def uneven_rows_are_gathered_without_gradient(rank: int, world: int) -> None:
    """Also from a rank that has none, and integers too."""
    rows = torch.full((2 * rank, 3), float(rank), requires_grad=True)
    expected = torch.cat([torch.full((2 * r, 3), float(r)) for r in range(world)])
    found = distributed.gather_rows(rows)
    assert torch.equal(found, expected) and not found.requires_grad
    labels = distributed.gather_rows(torch.arange(rank + 1))
    assert labels.tolist() == [i for r in range(world) for i in range(r + 1)]


def one_sample_each_is_no_single_sample(rank: int, world: int) -> None:
    """No warning (warnings are errors here): there are other samples, on the other rank."""
    assert BatchFormer(DIM, gather="all")(torch.randn(1, DIM)).shape == (2, DIM)


def all_of(rank: int, world: int, checks: list[Callable[[int, int], None]]) -> None:
    for check in checks:
        check(rank, world)


@processes
@pytest.mark.timeout(240)
def test_two_processes(command: Command, tmp_path: Path) -> None:
    checks = [
        plain_processes,
        under_ddp,
        under_fsdp,
        inserted_twice_under_fsdp,
        empty_batch_raises_everywhere,
        token_counts_must_agree,
        masks_must_be_on_every_rank_or_on_none,
        one_sample_each_is_no_single_sample,
        uneven_rows_are_gathered_without_gradient,
        compiled,
        wrong_gather_is_seen,  # last: it breaks the gather
    ]
    run_on_ranks(command, 2, all_of, tmp_path, checks)


@processes
@pytest.mark.timeout(240)
def test_three_processes(command: Command, tmp_path: Path) -> None:
    run_on_ranks(command, 3, all_of, tmp_path, [plain_processes, under_ddp, uneven_rows_are_gathered_without_gradient])


def test_without_a_process_group_all_is_none() -> None:
    x = torch.randn(4, DIM)
    torch.manual_seed(0)
    alone = BatchFormer(DIM, drop=0.0)
    torch.manual_seed(0)
    every = BatchFormer(DIM, drop=0.0, gather="all")
    assert torch.equal(alone(x), every(x))
