"""PaCo's momentum encoder and queue, and which rows double."""

from pathlib import Path

import pytest
import torch
from commands import Command
from ranks import processes, run_on_ranks
from torch import Tensor

from batchformer import insert
from batchformer.tasks.image_classification.backbone import ResNet
from batchformer.tasks.longtail.criterion import build_loss
from batchformer.tasks.longtail.paco import PaCo, PaCoOutput

K = 5


def network(queue_size: int = 10, momentum: float = 0.9) -> PaCo:
    torch.manual_seed(0)
    backbone = ResNet((1, 1), (4, 8), in_channels=1)
    return PaCo(backbone, K, embed_dim=6, queue_size=queue_size, momentum=momentum)


def batch(samples: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(samples, 1, 8, 8, generator=generator) for _ in range(2))
    return one, two, torch.randint(K, (samples,), generator=generator)


def test_a_step_returns_its_keys_before_the_queue_and_enqueues_them_after() -> None:
    model = network()
    first = model(*batch(4))
    assert isinstance(first, PaCoOutput)
    assert first.keys.shape == (14, 6)
    assert first.key_targets.tolist() == [*batch(4)[2].tolist(), *[-1] * 10]
    assert torch.equal(model.queue.column("keys")[:4], first.keys[:4])
    second = model(*batch(4, seed=1))
    assert torch.equal(second.keys[4:8], first.keys[:4])
    assert second.key_targets[4:8].tolist() == batch(4)[2].tolist()
    torch.testing.assert_close(second.keys[:8].norm(dim=1), torch.ones(8))
    assert not second.keys.requires_grad
    assert (first.key_targets[4:] == -1).all()  # the later step has not changed the earlier output


def test_the_key_encoder_follows_by_momentum() -> None:
    model = network(momentum=0.9)
    keys, queries = list(model.key_encoder.parameters()), [*model.backbone.parameters(), *model.head.mlp.parameters()]
    assert all(torch.equal(k, q) for k, q in zip(keys, queries, strict=True))
    with torch.no_grad():
        for query in queries:
            query.add_(torch.randn_like(query))
    expected = [0.9 * k.detach().double() + 0.1 * q.detach().double() for k, q in zip(keys, queries, strict=True)]
    model(*batch(4))
    for key, value in zip(keys, expected, strict=True):
        torch.testing.assert_close(key.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_the_keys_are_those_of_the_moved_encoder() -> None:
    model = network(momentum=0.5)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.1)
    one, two, labels = batch(4)
    output = model(one, two, labels)
    again = torch.nn.functional.normalize(model.key_encoder(two), dim=1)
    torch.testing.assert_close(output.keys[:4], again)


def test_batchformer_doubles_the_queries_and_not_the_keys() -> None:
    model = network()
    handle = insert(model, before="auto", num_heads=1)
    output = model(*batch(4))
    assert output.logits.shape == (8, K)
    assert output.queries.shape == (8, 6)
    assert output.keys.shape == (14, 6)
    plain, mixed = handle.split(output.anchors)
    criterion, labels = build_loss("paco", torch.arange(K) + 1), batch(4)[2]
    assert plain is not None
    assert mixed is not None
    losses = [criterion(output.with_anchors(*stream), labels) for stream in (plain, mixed)]
    torch.stack(losses).mean().backward()
    encoders = [p for name, p in model.named_parameters() if not name.startswith("key_")]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoders)
    with pytest.raises(TypeError, match=r"PaCoOutput"):
        handle.split(output)  # keys have other rows: splitting them would be silently wrong


def test_eval_is_backbone_and_classifier() -> None:
    model = network()
    model(*batch(4))
    queue = model.queue.column("keys").clone()
    model.eval()
    images = batch(3)[0]
    expected = model.head.classifier(model.backbone(images))
    assert torch.equal(model(images), expected)
    assert torch.equal(model.plain()(images), expected)
    assert torch.equal(model.queue.column("keys"), queue)


def test_the_queue_survives_a_checkpoint() -> None:
    model = network()
    model(*batch(4))
    other = network()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.queue.column("keys"), model.queue.column("keys"))
    assert int(other.queue.position) == 4
    first, second = (m(*batch(4, seed=3)) for m in (model, other))
    assert torch.equal(first.keys, second.keys)


def test_a_checkpoint_of_an_earlier_version_loads() -> None:
    model, other = network(), network()
    model(*batch(4))
    today = {"queue.keys": "queue", "queue.targets": "queue_targets", "queue.position": "queue_at"}
    state = {
        today.get(name, name).replace("key_encoder.0.", "key_backbone.").replace("key_encoder.1.", "key_mlp."): value
        for name, value in model.state_dict().items()
    }
    assert {"queue", "queue_targets", "queue_at", "key_mlp.0.weight", "key_backbone.conv1.weight"} <= state.keys()
    holder = torch.nn.ModuleDict({"network": other})
    holder.load_state_dict({f"network.{name}": value for name, value in state.items()})
    assert all(value.equal(other.state_dict()[name]) for name, value in model.state_dict().items())


def one_rank(rank: int, world: int, folder: Path) -> None:
    model = network(queue_size=10)
    outputs = []
    for step in range(3):
        size = 2 + rank + step  # uneven, and more than the queue takes in all
        outputs.append(model(*batch(size, seed=10 * step + rank)))
    torch.save(
        {
            "queue": model.queue.column("keys"),
            "targets": model.queue.column("targets"),
            "at": model.queue.position,
            "keys": [output.keys[: 2 + rank + step] for step, output in enumerate(outputs)],
        },
        folder / f"rank{rank}.pt",
    )


@processes
def test_two_processes_fill_their_queues_alike(command: Command, tmp_path: Path) -> None:
    run_on_ranks(command, 2, one_rank, tmp_path, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    ring, labels, at = torch.zeros(10, 6), [-1] * 10, 0
    for step in range(3):
        for rank in range(2):
            targets = batch(2 + rank + step, seed=10 * step + rank)[2].tolist()
            for row, label in zip(ranks[rank]["keys"][step], targets, strict=True):
                ring[at], labels[at] = row, label
                at = (at + 1) % 10
    for saved in ranks:
        assert torch.equal(saved["queue"], ring)
        assert saved["targets"].tolist() == labels
        assert int(saved["at"]) == at


def test_errors() -> None:
    model = network()
    one, two, labels = batch(4)
    with pytest.raises(ValueError, match=r"two views and class indices"):
        model(one)
    with pytest.raises(ValueError, match=r"mixup and cutmix cannot be used"):
        model(one, two, torch.eye(K)[labels])
    with pytest.raises(ValueError, match=r"0 <= momentum <= 1"):
        network(momentum=1.5)
    with pytest.raises(RuntimeError, match=r"network.plain\(\)"):
        model.freeze()
