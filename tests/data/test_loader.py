import pickle
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from batchformer.data.errors import DataError
from batchformer.data.images import decode_all
from batchformer.data.lists import Samples, read_folder
from batchformer.data.loader import ImageLoader, TensorLoader
from batchformer.data.samplers import EpochSampler, EvalSampler, derive_seed, generator
from batchformer.data.transforms import PRESETS, BatchAugment, Mix, image_eval, image_keep, normalize

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
        augment = [BatchAugment("paco_query", 24), BatchAugment("paco_key", 24)][:views]
        return ImageLoader(samples, sampler, augment, size=24, **STATISTICS, **arguments)  # type: ignore[arg-type]

    return build


@pytest.fixture(params=["tensor", "files"])
def build(request: pytest.FixtureRequest, image_loader: Callable[..., ImageLoader]) -> Callable[..., Loader]:
    return tensor_loader if request.param == "tensor" else image_loader


def epoch(loader: Loader, number: int) -> list[Tensor]:
    """All tensors of an epoch, flat."""
    return flatten(epoch_of(loader, number))


def epoch_of(loader: Loader, number: int) -> Loader:
    loader.sampler.set_epoch(number)
    return loader


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


def test_the_randomness_of_a_batch_is_that_of_seed_epoch_number_rank_and_view() -> None:
    """As in every version so far: runs of earlier versions go on with the same numbers."""
    loader = tensor_loader(seed=5, views=2)
    *_, (views, labels) = epoch_of(loader, 3)
    indices = loader.sampler.indices(3)[24:32]
    assert labels.equal(LABELS[indices])
    for view, (steps, images) in enumerate(zip(("cifar", "paco_key_small"), views, strict=True)):
        stream = generator(derive_seed(5, 3, 3, 0, view))
        assert images.equal(normalize(BatchAugment(steps, 16)(IMAGES[indices], stream), **STATISTICS))


def test_an_epoch_that_was_left_does_not_change_the_next(build: Callable[..., Loader]) -> None:
    loader = build()
    loader.sampler.set_epoch(2)
    next(iter(loader))
    lazy = iter(loader)  # trainers ask for the iterator first and set the epoch afterwards
    loader.sampler.set_epoch(3)
    assert equal(flatten(lazy), epoch(build(), 3))


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


def pictures(root: Path, sizes: list[tuple[int, int]], channels: int = 3) -> Samples:
    """Smooth random pictures of these widths and heights in files without loss."""
    for index, (width, height) in enumerate(sizes):
        stream = torch.Generator().manual_seed(index)
        coarse = torch.rand(1, channels, 5, 5, generator=stream)
        pixels = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1).mul(255)
        picture = pixels[0].to(torch.uint8).permute(1, 2, 0).squeeze(2).numpy()
        Image.fromarray(picture).save(root / f"{index:02}.png")
    names = [f"{index:02}.png" for index in range(len(sizes))]
    return Samples(root, names, torch.arange(len(sizes)) % 3, ["a", "b", "c"])


def from_both(samples: Samples, steps: list[Any], size: int, channels: int = 3, **more: Any) -> list[list[Tensor]]:
    """An epoch of the same files, kept in memory at the working size and read anew."""
    sampler = EpochSampler(samples.labels, batch_size=4, seed=1)
    views = [BatchAugment(view, size) for view in steps]
    numbers = {"mean": (0.5,) * channels, "std": (0.25,) * channels, **more}
    kept = decode_all(samples, image_keep(steps, size), size, channels)
    loaders: list[Loader] = [
        TensorLoader(kept, samples.labels, sampler, views, **numbers),
        ImageLoader(samples, sampler, views, size=size, channels=channels, **numbers),
    ]
    return [epoch(loader, 2) for loader in loaders]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_files_of_the_working_size_give_the_batches_of_memory(preset: str, channels: int, tmp_path: Path) -> None:
    samples = pictures(tmp_path, [(32, 32)] * 11, channels)
    memory, files = from_both(samples, [preset], 32, channels)
    assert equal(memory, files)


@pytest.mark.parametrize("size", [32, 80])
def test_larger_files_give_the_batches_of_memory_without_resized_crop(size: int, tmp_path: Path) -> None:
    samples = pictures(tmp_path, [(90, 110), (200, 81), (80, 80)] * 3)
    for steps in (["cifar"], ["crop=4 color_jitter blur", ["flip", "resized_crop", "randaugment"]]):
        memory, files = from_both(samples, steps, size)
        assert equal(memory, files)
    memory, files = from_both(samples, ["cifar"], size, mix=Mix(3, mixup_alpha=1.0))
    assert equal(memory, files)


def test_a_resized_crop_cuts_the_same_window_from_larger_files(tmp_path: Path) -> None:
    samples = pictures(tmp_path, [(96, 96)] * 8)
    memory, files = from_both(samples, [["resized_crop", "flip"]], 32)
    for one, other in zip(memory[::2], files[::2], strict=True):
        assert not one.equal(other)  # the file has more pixels
        assert float((one - other).abs().mean()) < 0.05  # of about 4


def test_a_resized_crop_sees_the_whole_picture_in_its_file(tmp_path: Path) -> None:
    ramp = torch.linspace(0, 255, 90).to(torch.uint8).expand(3, 30, 90)  # from left to right
    Image.fromarray(ramp.permute(1, 2, 0).numpy()).save(tmp_path / "wide.png")
    samples = Samples(tmp_path, ["wide.png"] * 100, torch.zeros(100, dtype=torch.int64), ["one"])
    memory, files = (torch.cat(batches[::2]) for batches in from_both(samples, ["inat"], 16))
    assert memory.min() > -1 and memory.max() < 1  # the third in the middle
    assert files.min() < -1.8 and files.max() > 1.8


def test_every_image_gets_an_augmentation_of_its_own(tmp_path: Path) -> None:
    pictures(tmp_path, [(40, 40)])
    samples = Samples(tmp_path, ["00.png"] * 4, torch.zeros(4, dtype=torch.int64), ["one"])
    seen: list[Tensor] = []
    for rank, size in ((0, 1), (1, 1), (0, 2)):  # another batch, another rank, another place in the batch
        sampler = EvalSampler(4, batch_size=size, rank=rank, world_size=2)
        loader = ImageLoader(samples, sampler, BatchAugment("inat", 24), size=24, **STATISTICS)
        seen += [image for images, _ in loader for image in images]
    assert len(seen) == 6
    assert all(not one.equal(other) for one, other in combinations(seen, 2))


def test_evaluation_changes_nothing() -> None:
    loader = TensorLoader(IMAGES, LABELS, EvalSampler(37, batch_size=10), **STATISTICS)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert len(loader) == 4
    assert images.equal(normalize(IMAGES, **STATISTICS))
    assert labels.equal(LABELS)
    assert images.dtype == torch.float32


def test_evaluation_of_files(tmp_path: Path, write_images: Writer) -> None:
    samples = read_folder(write_images(tmp_path, [3, 2]))["all"]
    loader = ImageLoader(samples, EvalSampler(5, batch_size=2), size=16, **STATISTICS)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert labels.equal(samples.labels)
    assert images.equal(normalize(decode_all(samples, image_eval(16), 16, 3), **STATISTICS))
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
