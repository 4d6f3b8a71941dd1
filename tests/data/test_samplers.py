import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DistributedSampler

from batchformer.data import samplers
from batchformer.data.errors import DataError
from batchformer.data.samplers import (
    EpochSampler,
    EvalSampler,
    SamplerKind,
    class_probabilities,
    derive_seed,
    generator,
)

COUNTS = [60, 30, 10]
LABELS = torch.tensor([k for k, n in enumerate(COUNTS) for _ in range(n)])[torch.randperm(100, generator=generator(7))]
KINDS: list[SamplerKind] = ["instance", "class_balanced", "square_root", "progressive"]


def slow_probabilities(counts: list[int], q: float) -> list[float]:
    total = sum(n**q for n in counts if n)
    return [n**q / total if n else 0.0 for n in counts]


@pytest.mark.parametrize("counts", [COUNTS, [5, 0, 3], [1]])
def test_probabilities_against_the_equations(counts: list[int]) -> None:
    n_K = torch.tensor(counts)
    for kind, q in (("instance", 1.0), ("square_root", 0.5), ("class_balanced", 0.0)):
        expected = torch.tensor(slow_probabilities(counts, q), dtype=torch.float64)
        torch.testing.assert_close(class_probabilities(n_K, kind), expected)  # type: ignore[arg-type]
    for epoch in range(11):
        mixed = [
            (1 - epoch / 10) * a + epoch / 10 * b
            for a, b in zip(slow_probabilities(counts, 1), slow_probabilities(counts, 0), strict=True)
        ]
        p_K = class_probabilities(n_K, "progressive", epoch=epoch, epochs=11)
        torch.testing.assert_close(p_K, torch.tensor(mixed, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_order_is_a_function_of_seed_and_epoch_alone(kind: SamplerKind) -> None:
    one = EpochSampler(LABELS, batch_size=8, kind=kind, seed=3, epochs=5)
    one.set_epoch(2)
    expected = list(one)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    other = EpochSampler(LABELS, batch_size=8, kind=kind, seed=3, epochs=5)
    for epoch in (4, 0, 2):  # whatever came before
        other.set_epoch(epoch)
        drawn = list(other)
    assert drawn == expected == other.indices(2).tolist()
    assert torch.get_rng_state().equal(state)
    assert other.indices(1).tolist() != expected
    assert EpochSampler(LABELS, batch_size=8, kind=kind, seed=4, epochs=5).indices(2).tolist() != expected
    assert list(pickle.loads(pickle.dumps(other))) == list(copy.deepcopy(other)) == expected


def test_order_is_the_same_in_another_process() -> None:
    code = (
        "from batchformer.data.samplers import EpochSampler;"
        "print(EpochSampler([0, 1] * 20, batch_size=4, kind='class_balanced', seed=5).indices(3).tolist())"
    )
    src = Path(samplers.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=src, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(
        EpochSampler([0, 1] * 20, batch_size=4, kind="class_balanced", seed=5).indices(3).tolist()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_class_shares(kind: SamplerKind) -> None:
    epochs = 300
    sampler = EpochSampler(LABELS, batch_size=10, kind=kind, epochs=epochs)
    for part in (range(100), range(200, 300)):
        share = torch.zeros(3, dtype=torch.float64)
        expected = torch.zeros(3, dtype=torch.float64)
        for epoch in part:
            share += torch.bincount(LABELS[sampler.indices(epoch)], minlength=3) / 100 / 100
            expected += class_probabilities(torch.tensor(COUNTS), kind, epoch=epoch, epochs=epochs) / 100
        assert (share - expected).abs().max() < 0.02  # 10,000 draws: three deviations are 0.015


def test_every_image_of_a_class_is_as_likely() -> None:
    sampler = EpochSampler(LABELS, batch_size=10, kind="class_balanced")
    seen = torch.bincount(torch.cat([sampler.indices(e) for e in range(300)]), minlength=100)
    for k, n in enumerate(COUNTS):
        own = seen[k == LABELS].double()
        assert (own > 0).all()
        assert (own / own.mean() - 1).abs().max() < 5 * (n / 10000) ** 0.5


def test_instance_is_a_shuffle_without_repetition() -> None:
    sampler = EpochSampler(LABELS, batch_size=8)
    assert sorted(sampler) == list(range(100))
    assert len(sampler) == 100
    short = EpochSampler(LABELS, batch_size=8, drop_last=True)
    assert len(short) == len(list(short)) == 96
    assert list(short) == list(sampler)[:96]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_the_batches_of_one_process(kind: SamplerKind, world: int, drop_last: bool) -> None:
    common = {"kind": kind, "seed": 1, "epochs": 4, "drop_last": drop_last}
    whole = EpochSampler(LABELS, batch_size=4 * world, **common)  # type: ignore[arg-type]
    ranks = [
        EpochSampler(LABELS, batch_size=4, rank=r, world_size=world, **common)  # type: ignore[arg-type]
        for r in range(world)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(rank) == len(list(rank)) for rank in ranks)
    for batch in range(100 // (4 * world)):
        together = torch.cat([rank.indices(3)[4 * batch : 4 * batch + 4] for rank in ranks])
        single = whole.indices(3)[4 * world * batch : 4 * world * (batch + 1)]
        assert sorted(together.tolist()) == sorted(single.tolist())
    assert all(isinstance(rank, DistributedSampler) for rank in ranks)  # trainers leave these in place


@pytest.mark.parametrize("size", [1, 2, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once(size: int, world: int) -> None:
    ranks = [EvalSampler(size, batch_size=2, rank=r, world_size=world) for r in range(world)]
    assert all(len(rank) == len(list(rank)) >= 1 for rank in ranks)
    seen = sorted(i for rank in ranks for i in rank)
    assert seen == sorted(list(range(size)) + [0] * max(0, world - size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank from 0 to world_size - 1 = 1, got 2"),
        ({"batch_size": 60, "world_size": 2, "drop_last": True}, "at least one batch of 60 on 2 .*, got 100 training"),
        ({"batch_size": 4, "kind": "progressive"}, "number of epochs for the progressive sampler"),
        ({"batch_size": 4, "kind": "balanced"}, "Expected sampler instance, .* got 'balanced'"),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        EpochSampler(LABELS, **arguments)  # type: ignore[arg-type]


def test_no_images() -> None:
    with pytest.raises(DataError, match="at least one image, got none"):
        EpochSampler([], batch_size=1)


def test_seeds_do_not_collide() -> None:
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
