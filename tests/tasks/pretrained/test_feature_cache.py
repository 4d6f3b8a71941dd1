"""Cached features are the network's, whatever interrupts the filling, and their key follows what they depend on."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from batchformer.tasks.pretrained.feature_cache import FeatureCache, fill

SHAPES = [(4, 8, 8), (8, 4, 4)]


class Body(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.first(x)
        return [x, self.second(x)]


def load(image: int, mirrored: bool) -> Tensor:
    pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(image))
    return pixels.flip(-1) if mirrored else pixels


def test_cached_maps_are_the_backbones_for_both_mirror_images(tmp_path: Path) -> None:
    cache, network = FeatureCache(tmp_path, 5, SHAPES), Body()
    told: list[tuple[int, int]] = []
    fill(cache, network, load, batch_size=3, say=lambda done, of: told.append((done, of)))
    assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]
    assert cache.missing() == []
    images, mirrored = [4, 0, 4], [True, False, False]
    expected = network(torch.stack([load(i, m) for i, m in zip(images, mirrored, strict=True)]))
    for found, wanted in zip(FeatureCache(tmp_path, 5, SHAPES).read(images, mirrored), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        assert found.dtype == torch.float32


def test_a_filling_that_stops_goes_on_where_it_was(tmp_path: Path) -> None:
    cache, network, loaded = FeatureCache(tmp_path, 40, SHAPES), Body(), []

    def until(image: int, mirrored: bool) -> Tensor:
        if image == 20:
            raise KeyboardInterrupt
        return load(image, mirrored)

    with pytest.raises(KeyboardInterrupt):
        fill(cache, network, until, batch_size=1)
    again = FeatureCache(tmp_path, 40, SHAPES)
    # Marked are whole blocks of sixteen batches, which were on the disk before their marks.
    assert again.missing()[0] == (16, False)

    def counted(image: int, mirrored: bool) -> Tensor:
        loaded.append((image, mirrored))
        return load(image, mirrored)

    fill(again, network, counted)
    assert loaded[0] == (16, False) and len(loaded) == 48
    assert again.missing() == []
    torch.testing.assert_close(again.read([0], [False])[0], network(load(0, False)[None])[0], rtol=1e-3, atol=1e-3)


def test_processes_fill_their_shares_of_one_cache(tmp_path: Path) -> None:
    first, second = FeatureCache(tmp_path, 5, SHAPES), FeatureCache(tmp_path, 5, SHAPES)
    fill(first, Body(), load, rank=0, world_size=2)
    assert sorted({image for image, _ in second.missing()}) == [1, 3]
    fill(second, Body(), load, rank=1, world_size=2)
    assert first.missing() == []


def test_the_key_changes_with_what_the_features_depend_on(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        file.write_bytes(b"pixels")
    facts = {"strides": [2, 4], "size": 160, "files": files}
    key = FeatureCache.key(Body(), facts)
    assert FeatureCache.key(Body(), facts) == key
    changed = ({"strides": [4]}, {"size": 128}, {"files": files[:1]}, {"files": files[::-1]})
    others = {FeatureCache.key(Body(), {**facts, **change}) for change in changed} | {FeatureCache.key(Body(1), facts)}
    os.utime(files[0], (1, 1))
    others.add(FeatureCache.key(Body(), facts))
    assert key not in others and len(others) == 6


def test_features_may_have_any_shape(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 3, [(4,)], mirrored=False)
    fill(cache, lambda pixels: [pixels.mean((2, 3)).repeat(1, 2)[:, :4]], load)
    (found,) = cache.read([2, 0], [False, False])
    assert found.shape == (2, 4)
    torch.testing.assert_close(found[0, :3], load(2, False).mean((1, 2)), rtol=1e-3, atol=1e-3)


def test_maps_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 1, [(1, 1, 1)])
    with pytest.raises(FloatingPointError, match=r"fit into half precision.*data.cache_features=false"):
        cache.write(0, False, [torch.full((1, 1, 1), 1e6)])
    assert len(cache.missing()) == 2


def test_files_of_another_size_are_refused(tmp_path: Path) -> None:
    FeatureCache(tmp_path, 1, [(1, 1, 1)])
    with pytest.raises(OSError, match=r"maps-0.f16 of 8 bytes, found 4. Delete its folder"):
        FeatureCache(tmp_path, 2, [(1, 1, 1)])
