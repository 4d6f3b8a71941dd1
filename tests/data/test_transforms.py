import pickle
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from batchformer.data import batch_policies, batch_transforms
from batchformer.data.errors import DataError
from batchformer.data.samplers import generator
from batchformer.data.transforms import (
    PRESETS,
    BatchAugment,
    Mix,
    cut_file,
    image_eval,
    image_keep,
    normalize,
    resolve_steps,
)

SHAPES = [(6, 3, 32, 32), (5, 1, 28, 28), (4, 3, 20, 33)]


def pictures(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Smooth random pictures, so that a wrong shift or sign shows and rounding does not."""
    coarse = torch.rand(shape[0], shape[1], 5, 5, generator=generator(seed))
    fine = torch.nn.functional.interpolate(coarse, shape[2:], mode="bicubic", align_corners=False)
    return fine.clamp(0, 1).mul(255).to(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str, shape: tuple[int, ...]) -> None:
    images = pictures(shape)
    untouched = images.clone()
    augment = BatchAugment(preset, shape[-1])
    state = torch.get_rng_state()
    one, same, other = (augment(images, generator(seed)) for seed in (1, 1, 2))
    assert one.shape == images.shape
    assert one.dtype == torch.uint8
    assert one.equal(same)
    assert images.equal(untouched)
    assert torch.get_rng_state().equal(state)
    assert preset == "none" or not one.equal(other)
    assert pickle.loads(pickle.dumps(augment))(images, generator(1)).equal(one)


def test_crop_is_a_window_of_the_padded_image() -> None:
    images = torch.arange(1, 3 * 2 * 36 + 1).to(torch.uint8).reshape(3, 2, 6, 6)
    seen = set()
    for seed in range(60):
        for image, cut in zip(images, batch_transforms.crop(images, generator(seed), padding=1), strict=True):
            padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
            places = [(i, j) for i in range(3) for j in range(3) if padded[:, i : i + 6, j : j + 6].equal(cut)]
            assert len(places) == 1
            seen.add(places[0])
    assert len(seen) == 9  # every window comes up


def test_flip_mirrors_some_and_leaves_the_others() -> None:
    images = pictures((400, 1, 6, 6))
    flipped = batch_transforms.flip(images, generator(0))
    mirrored = torch.tensor([new.equal(old.flip(-1)) for new, old in zip(flipped, images, strict=True)])
    same = torch.tensor([new.equal(old) for new, old in zip(flipped, images, strict=True)])
    assert (mirrored | same).all()
    assert 150 < int(mirrored.sum()) < 250
    assert batch_transforms.flip(images, generator(0), 0.0).equal(images)


@pytest.mark.parametrize("size", [1, 4, 5, 40])
def test_cutout_is_a_square(size: int) -> None:
    images = torch.full((200, 3, 16, 20), 9, dtype=torch.uint8)
    sides = set()
    for image in batch_transforms.cutout(images, generator(0), size):
        rows, columns = (image[0] == 0).any(1).nonzero().flatten(), (image[0] == 0).any(0).nonzero().flatten()
        expected = torch.full((3, 16, 20), 9, dtype=torch.uint8)
        expected[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
        assert image.equal(expected)
        sides.add((len(rows), len(columns)))
    assert max(height for height, _ in sides) == min(size, 16)
    assert max(width for _, width in sides) == min(size, 20)
    assert min(min(side) for side in sides) >= min((size + 1) // 2, size // 2 or 1, 16)


def test_rotate_turns_about_the_centre() -> None:
    images = torch.zeros(100, 1, 33, 33, dtype=torch.uint8)
    images[:, :, 16, 28] = 255  # 12 pixels to the right of the centre
    angles = []
    for image in batch_transforms.rotate(images, generator(0), 15):
        place = image[0].nonzero().double()
        if len(place):  # one pixel may fall between the cracks of a nearest look-up
            y, x = place.mean(0).tolist()
            angles.append(np.degrees(np.arctan2(y - 16, x - 16)))
            assert abs(np.hypot(y - 16, x - 16) - 12) < 1
    assert max(angles) > 10
    assert min(angles) < -10
    assert max(map(abs, angles)) < 18


def test_resized_crop_shows_a_part_enlarged() -> None:
    ramp = torch.linspace(0, 255, 64).to(torch.uint8).expand(100, 1, 64, 64).contiguous()
    cut = batch_transforms.resized_crop(ramp, generator(0), 0.25).float()
    assert (cut.diff(dim=3) >= 0).all()
    assert (cut.diff(dim=2).abs() <= 1).all()
    width = (cut[..., -1] - cut[..., 0]).mean((1, 2)) / 255
    assert 0.4 < float(width.min()) < 0.55
    assert float(width.max()) > 0.9
    assert batch_transforms.resized_crop(ramp, generator(0), 1.0).shape == ramp.shape


def test_color_jitter_keeps_what_is_switched_off() -> None:
    images = pictures((50, 3, 8, 8))
    jitter = partial(batch_transforms.color_jitter, images)
    assert jitter(generator(0), 0, 0, 0, 0).equal(images)
    assert jitter(generator(0), 0.4, 0.4, 0.4, 0.1, 0.0).equal(images)
    lit = jitter(generator(0), 0.5, 0, 0, 0).float().mean((1, 2, 3)) / images.float().mean((1, 2, 3))
    assert 0.45 < float(lit.min()) < 0.7
    assert float(lit.max()) > 1.2
    turned = jitter(generator(0), 0, 0, 0, 0.5).float()
    moved = (batch_transforms.grey(turned) - batch_transforms.grey(images)).abs()
    assert not turned.to(torch.uint8).equal(images)
    assert float(moved.median()) < 2  # a turn of the hue keeps the light


def test_grayscale_and_blur() -> None:
    images = pictures((200, 3, 16, 16))
    grey = batch_transforms.grayscale(images, generator(0), 0.5)
    without = (grey[:, 0] == grey[:, 1]).flatten(1).all(1) & (grey[:, 0] == grey[:, 2]).flatten(1).all(1)
    assert 70 < int(without.sum()) < 130
    assert grey[~without].equal(images[~without])
    expected = TF.rgb_to_grayscale(images[without], 3)
    assert (grey[without].int() - expected.int()).abs().max() <= 1
    noise = torch.randint(0, 256, (50, 3, 40, 40), generator=generator(0)).to(torch.uint8)
    blurred = batch_transforms.blur(noise, generator(0), 1.0).float()
    assert (blurred.std((1, 2, 3)) <= noise.float().std((1, 2, 3)) + 0.5).all()
    assert (blurred.mean((1, 2, 3)) - noise.float().mean((1, 2, 3))).abs().max() < 3
    assert batch_transforms.blur(noise, generator(0), 0.0).equal(noise)
    flat = torch.full((4, 1, 40, 40), 7, dtype=torch.uint8)
    assert batch_transforms.blur(flat, generator(0), 1.0).equal(flat)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", v2.AutoAugment._AUGMENTATION_SPACE)
def test_operations_equal_torchvision_one_by_one(name: str, shape: tuple[int, ...]) -> None:
    oracle = v2.AutoAugment(fill=128)
    levels, signed = oracle._AUGMENTATION_SPACE[name]
    table = levels(10, *shape[-2:])
    images = pictures(shape)
    for sign in (1, -1) if signed else (1,):
        strength_N = torch.zeros(len(images)) if table is None else table[torch.arange(len(images))].float() * sign
        ours = batch_policies.operation(name, images, strength_N, 128)
        for image, strength, result in zip(images, strength_N.tolist(), ours, strict=True):
            theirs = oracle._apply_image_or_video_transform(
                image, name, strength, interpolation=oracle.interpolation, fill=oracle._fill
            )
            differ = (result.int() - theirs.int()).abs() > 1
            # Nearest look-ups that fall between two pixels may go either way.
            assert differ.float().mean() <= (0.05 if name.startswith("Shear") else 0.0), (name, strength)


@pytest.mark.parametrize("policy", [v2.AutoAugmentPolicy.CIFAR10, v2.AutoAugmentPolicy.IMAGENET])
def test_autoaugment_uses_operations_as_often_as_its_policy_says(
    policy: v2.AutoAugmentPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, int] = {}

    def count(images: Tensor, groups: dict[str, list[tuple[int, float]]], fill: int) -> Tensor:
        for name, members in groups.items():
            used[name] = used.get(name, 0) + len(members)
        return images

    monkeypatch.setattr(batch_policies, "_apply_groups", count)
    n = 20000
    batch_policies.AutoAugment(policy)(torch.zeros(n, 1, 8, 8, dtype=torch.uint8), generator(0))
    expected: dict[str, float] = {}
    for pair in v2.AutoAugment(policy)._policies:
        for name, probability, _ in pair:
            expected[name] = expected.get(name, 0) + probability * n / 25
    for name, number in expected.items():
        assert abs(used.get(name, 0) - number) < 5 * (number + 1) ** 0.5, name


def test_randaugment_magnitude_zero_to_ten() -> None:
    images = pictures((64, 3, 16, 16))
    assert not BatchAugment(["randaugment=2,10"], 16)(images, generator(0)).equal(images)
    assert BatchAugment(["randaugment=0,5"], 16)(images, generator(0)).equal(images)
    with pytest.raises(DataError, match="magnitude from 0 to 10, got 11"):
        BatchAugment(["randaugment=2,11"], 16)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_window_is_cut_out_of_a_file(mode: str) -> None:
    image = Image.fromarray(pictures((1, 3, 90, 70))[0].permute(1, 2, 0).numpy()).convert(mode)
    cut = partial(cut_file, image, size=35)
    whole = TF.pil_to_tensor(TF.resize(image, [35, 35]))
    assert cut(torch.tensor([2.0, 2.0, 0.3, -0.7])).equal(whole)  # more than there is: all of it
    corner = TF.pil_to_tensor(TF.resize(image.crop((35, 0, 70, 45)), [35, 35]))
    stretch = (90 / 70) ** 0.5  # windows are those of a square of the same area
    found = cut(torch.tensor([0.5 / stretch, 0.5 * stretch, 1.0, -1.0]))
    assert (found.int() - corner.int()).abs().max() <= 1
    seen = set()
    for seed in range(200):
        (window,) = batch_transforms.windows(1, generator(seed), 0.25)
        wide, high = window[0] * stretch * 70, window[1] / stretch * 90
        assert 0.249 < wide * high / (70 * 90) <= 1.0001
        assert 0.749 < wide / high < 1.334
        seen.add(cut(window).sum().item())
    assert len(seen) > 190


def test_evaluation_pipeline() -> None:
    image = Image.fromarray(pictures((1, 3, 300, 400))[0].permute(1, 2, 0).numpy())
    expected = v2.functional.pil_to_tensor(v2.CenterCrop(224)(v2.Resize(256)(image)))
    assert image_eval(224)(image).equal(expected)
    assert image_eval(32)(image).shape == (3, 32, 32)
    assert image_eval(224)(torch.zeros(2, 1, 300, 400, dtype=torch.uint8)).shape == (2, 1, 224, 224)


def test_what_is_kept_in_memory_for_training() -> None:
    image = Image.fromarray(pictures((1, 3, 300, 400))[0].permute(1, 2, 0).numpy())
    square = v2.functional.pil_to_tensor(v2.CenterCrop(224)(v2.Resize(224)(image)))
    assert image_keep(["imagenet"], 224)(image).equal(square)  # resized_crop: as much as there is
    assert image_keep(["paco_query", "paco_key"], 224)(image).equal(square)
    for steps in ([["flip"]], ["none"], ["imagenet", ["flip"]]):  # as in the evaluation
        assert image_keep(steps, 224)(image).equal(image_eval(224)(image))


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("strong", "unknown 'strong'"),
        (["flip", "crp=4", "cutout=a"], "unknown 'crp=4'; 'cutout=a' with something that is not a positive number"),
        (["flip=0.5,1"], "'flip=0.5,1' with 2 numbers, at most 1 allowed"),
        (["autoaugment=1"], "'autoaugment=1' with 1 numbers, at most 0"),
        (["crop=-4"], "not a positive number"),
    ],
)
def test_wrong_steps(augment: str | list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve_steps(augment, 32)


def test_auto_depends_on_the_size() -> None:
    assert resolve_steps("auto", 64) == PRESETS["crop_flip"]
    assert resolve_steps("auto", 224) == PRESETS["inat"]
    assert resolve_steps("crop=2 flip", 32) == ("crop=2", "flip")


def test_normalize_against_torchvision() -> None:
    images = pictures((2, 3, 5, 7))
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    expected = TF.normalize(images.float() / 255, list(mean), list(std))
    torch.testing.assert_close(normalize(images, mean, std), expected, atol=1e-5, rtol=1e-5)


def test_mixup_is_a_convex_mixture_with_the_same_weights_for_targets() -> None:
    images, labels = torch.rand(16, 3, 8, 8), torch.arange(16) % 4
    mixed, soft = Mix(4, mixup_alpha=1.0)(images, labels, seed=3)
    weight = ((mixed - images.roll(1, 0)) / (images - images.roll(1, 0)))[0, 0, 0, 0]
    torch.testing.assert_close(mixed, weight * images + (1 - weight) * images.roll(1, 0))
    one_hot = torch.eye(4)[labels]
    torch.testing.assert_close(soft, weight * one_hot + (1 - weight) * one_hot.roll(1, 0), atol=1e-5, rtol=1e-4)


def test_cutmix_targets_follow_the_area() -> None:
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 20, 20).contiguous()
    mixed, soft = Mix(8, cutmix_alpha=1.0)(images, torch.arange(8), seed=1)
    for k in range(8):
        own = (mixed[k] == k).float().mean()
        torch.testing.assert_close(soft[k, k], own, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(soft[k, (k - 1) % 8], 1 - own, atol=1e-5, rtol=1e-5)


def test_mix_repeats_with_its_seed_and_leaves_the_global_stream() -> None:
    images, labels = torch.rand(8, 1, 6, 6), torch.arange(8) % 2
    mix = Mix(2, mixup_alpha=0.4, cutmix_alpha=1.0)
    state = torch.get_rng_state()
    results = [mix(images, labels, seed=seed) for seed in (0, 0, 1)]
    assert torch.get_rng_state().equal(state)
    assert results[0][0].equal(results[1][0])
    assert not results[0][0].equal(results[2][0])
    for arguments in ({}, {"mixup_alpha": -1.0, "cutmix_alpha": 1.0}):
        with pytest.raises(DataError, match="non-negative alphas, at least one above 0"):
            Mix(2, **arguments)
