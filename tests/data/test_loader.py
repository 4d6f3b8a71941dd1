import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from batchformer.data.errors import DataError
from batchformer.data.lists import read_folder
from batchformer.data.loader import ImageDataset, ImageLoader, TensorLoader
from batchformer.data.samplers import EpochSampler, EvalSampler
from batchformer.data.transforms import BatchAugment, Mix, image_augment, image_eval, normalize

Writer = Callable[..., Path]
Loader = TensorLoader | ImageLoader
IMAGES = torch.randint(0, 256, (37, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
LABELS = torch.arange(37) % 3
STATISTICS: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def tensor_loader(seed: int = 0, views: int = 1, **arguments: object) -> TensorLoader:
    sampler = EpochSampler(LABELS, batch_size=8, seed=seed, drop_last=True)
    augment = [BatchAugment("cifar", 16), BatchAugment("paco_key_small", 16)][:views]
    return TensorLoader(IMAGES, LABELS, sampler, augment, **STATISTICS, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def image_loader(tmp_path: Path, write_images: Writer) -> Callable[..., ImageLoader]:
    samples = read_folder(write_images(tmp_path, [8, 6, 5]))["all"]

    def build(seed: int = 0, views: int = 1, **arguments: object) -> ImageLoader:
        sampler = EpochSampler(samples.labels, batch_size=4, seed=seed, drop_last=True)
        pipelines = [image_augment("paco_query", 24), image_augment("paco_key", 24)][:views]
        dataset = ImageDataset(samples, pipelines, seed=seed)
        return ImageLoader(dataset, sampler, **STATISTICS, **arguments)  # type: ignore[arg-type]

    return build


@pytest.fixture(params=["tensor", "files"])
def build(request: pytest.FixtureRequest, image_loader: Callable[..., ImageLoader]) -> Callable[..., Loader]:
    return tensor_loader if request.param == "tensor" else image_loader


def epoch(loader: Loader, number: int) -> list[Tensor]:
    """All tensors of an epoch, flat."""
    loader.sampler.set_epoch(number)
    return flatten(loader)


def flatten(batches: Iterable[tuple[Tensor | list[Tensor], Tensor]]) -> list[Tensor]:
    flat: list[Tensor] = []
    for images, labels in batches:
        flat += [*(images if isinstance(images, list) else [images]), labels]
    return flat


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("views", [1, 2])
def test_epoch_is_a_function_of_seed_and_number(build: Callable[..., Loader], views: int) -> None:
    first = epoch(build(views=views), 3)
    assert len(first) == len(build()) * (views + 1) == 4 * (views + 1)
    other = build(views=views)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    epoch(other, 0)
    assert equal(epoch(other, 3), first)
    assert torch.get_rng_state().equal(state)
    assert not equal(epoch(other, 4), first)
    assert not equal(epoch(build(seed=1, views=views), 3), first)
    assert not first[0].equal(first[-views - 1])


@pytest.mark.parametrize("stopped", [0, 1, 3, 4])
def test_resume_inside_an_epoch(build: Callable[..., Loader], stopped: int) -> None:
    whole = epoch(build(), 2)
    running = build()
    running.sampler.set_epoch(2)
    batches = iter(running)
    for _ in range(stopped):
        next(batches)
    state = pickle.loads(pickle.dumps(running.state_dict()))
    resumed = build()
    resumed.load_state_dict(state)
    lazy = iter(resumed)  # trainers ask for the iterator first and set the epoch afterwards
    resumed.sampler.set_epoch(2)
    flat = flatten(lazy)
    assert equal(flat, whole[2 * stopped :])
    assert equal(epoch(resumed, 2), whole)  # only once
    assert equal(epoch(resumed, 3), epoch(build(), 3))


def test_state_of_a_finished_epoch_starts_the_next_one_at_its_first_batch(build: Callable[..., Loader]) -> None:
    running = build()
    epoch(running, 0)
    resumed = build()
    resumed.load_state_dict(running.state_dict())
    assert equal(epoch(resumed, 1), epoch(build(), 1))


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_give_the_same_batches(image_loader: Callable[..., ImageLoader], start_method: str) -> None:
    alone = image_loader(views=2)
    shared = image_loader(views=2, num_workers=2, start_method=start_method)
    for number in (1, 0):
        assert equal(epoch(shared, number), epoch(alone, number))


def test_dataset_can_be_sent_to_a_process(image_loader: Callable[..., ImageLoader]) -> None:
    dataset = image_loader(views=2).dataset
    assert equal(pickle.loads(pickle.dumps(dataset))[2, 3][0], dataset[2, 3][0])


def test_augmentation_follows_the_image_and_not_its_place_in_the_batch(
    image_loader: Callable[..., ImageLoader],
) -> None:
    dataset = image_loader().dataset
    (one,), label = dataset[5, 7]
    assert dataset[5, 7][0][0].equal(one)
    assert not dataset[6, 7][0][0].equal(one)
    assert label == int(dataset.labels[7])


def test_evaluation_changes_nothing() -> None:
    loader = TensorLoader(IMAGES, LABELS, EvalSampler(37, batch_size=10), **STATISTICS)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert len(loader) == 4
    assert images.equal(normalize(IMAGES, **STATISTICS))
    assert labels.equal(LABELS)
    assert images.dtype == torch.float32


def test_evaluation_of_files(tmp_path: Path, write_images: Writer) -> None:
    samples = read_folder(write_images(tmp_path, [3, 2]))["all"]
    loader = ImageLoader(ImageDataset(samples, [image_eval(16)]), EvalSampler(5, batch_size=2), **STATISTICS)
    labels = torch.cat([labels for _, labels in loader])
    assert labels.equal(samples.labels)
    assert len(loader) == 3


def test_ranks_augment_differently_and_share_the_images() -> None:
    plain = [
        TensorLoader(
            IMAGES, torch.arange(37), EpochSampler(LABELS, batch_size=4, rank=r, world_size=2), BatchAugment("none", 16)
        )
        for r in range(2)
    ]
    rows = [torch.cat([labels for _, labels in loader]) for loader in plain]
    assert len(rows[0]) == len(rows[1]) == 19  # 37 images and one that is there twice
    assert set(torch.cat(rows).tolist()) == set(range(37))
    same = torch.zeros_like(IMAGES) + IMAGES[:1]
    samplers = [EpochSampler(LABELS, batch_size=4, rank=r, world_size=2) for r in range(2)]
    crops = [next(iter(TensorLoader(same, LABELS, sampler, BatchAugment("crop_flip", 16))))[0] for sampler in samplers]
    assert not torch.equal(crops[0], crops[1])  # type: ignore[arg-type]


def test_mix_gives_soft_labels(build: Callable[..., Loader]) -> None:
    mix = Mix(3, mixup_alpha=1.0)
    first, again = epoch(build(mix=mix), 1), epoch(build(mix=mix), 1)
    assert equal(first, again)
    assert first[1].shape[1] == 3
    torch.testing.assert_close(first[1].sum(1), torch.ones(len(first[1])))
    with pytest.raises(DataError, match="Expected one view with mixup or cutmix, got two"):
        build(mix=mix, views=2)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.float(), r"Expected uint8 images \(M, C, H, W\) and M labels, got torch.float32"),
        (IMAGES[:5], r"\(5, 3, 16, 16\) and 37 labels"),
        (IMAGES[:, 0], r"got torch.uint8 \(37, 16, 16\)"),
        (IMAGES[:, :2], r"mean and std for 2 channel\(s\), got 3 and 3 numbers"),
    ],
)
def test_errors(images: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TensorLoader(images, LABELS, EpochSampler(LABELS, batch_size=4), **STATISTICS)
