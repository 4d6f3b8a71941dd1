"""Long tails as pure functions: the exponential profile, the choice of images, and groups of classes.

Axes: M images, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from batchformer.data.errors import DataError
from batchformer.data.samplers import generator


def long_tail_profile(num_classes: int, n_max: int, imbalance_factor: float) -> list[int]:
    """Compute the images of each class in the exponential profile ``n_i = int(n_max * IF^(-i / (K - 1)))``, at least 1.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, section 5.1.

    Args:
        num_classes: K, at least 2.
        n_max: Images of the most frequent class, at least 1.
        imbalance_factor: Ratio of the most to the least frequent class, at least 1.

    Returns:
        K numbers in descending order.

    Raises:
        DataError: When an argument is out of range.

    Example:
        >>> sum(long_tail_profile(10, 5000, 200)), sum(long_tail_profile(100, 500, 100))
        (11203, 10847)
    """
    if num_classes < 2 or n_max < 1 or imbalance_factor < 1:
        raise DataError(
            "Expected at least 2 classes, n_max of at least 1 and an imbalance_factor of at least 1; got "
            f"{num_classes}, {n_max} and {imbalance_factor}."
        )
    return [max(1, int(n_max * (1 / imbalance_factor) ** (i / (num_classes - 1)))) for i in range(num_classes)]


def unmet(asked: Sequence[int], available: Sequence[int], imbalance_factor: float) -> str | None:
    """Describe how the data falls short of a long tail; ``None`` where it has all the images.

    Args:
        asked: Images of each class in the profile, most frequent first.
        available: Images that the same classes have.
        imbalance_factor: Ratio of the most to the least frequent class that was asked for.

    Returns:
        A sentence with asked and available numbers and the way out.

    Example:
        >>> print(unmet([100, 10], [40, 30], 10.0))
        Expected 100, 10 training images per class (imbalance factor 10), got 40, 10 (factor 4): 1 of 2 classes has \
fewer. Lower n_max or imbalance_factor, or take this for the data of the run.
        >>> unmet([40, 4], [40, 30], 10.0)
    """
    got = [min(pair) for pair in zip(asked, available, strict=True)]
    short = sum(one < other for one, other in zip(got, asked, strict=True))
    if not short and asked[0] >= imbalance_factor:
        return None
    # A profile that would end below one image still gives each class one.
    why = (
        f"{short} of {len(asked)} classes {'has' if short == 1 else 'have'} fewer"
        if short
        else "no class can go below 1"
    )
    reached = max(got) / max(1, min(got))
    return (
        f"Expected {_listed(asked)} training images per class (imbalance factor {imbalance_factor:g}), got "
        f"{_listed(got)} (factor {reached:.3g}): {why}. Lower n_max or imbalance_factor, or take this for the data of "
        "the run."
    )


def _listed(counts: Sequence[int], most: int = 10) -> str:
    shown = [str(count) for count in counts]
    return ", ".join(shown if len(shown) <= most else [*shown[: most - 3], "...", *shown[-2:]])


def class_order(available: Tensor, seed: int | None) -> list[int]:
    """Order the classes by the count that each will get, largest first.

    Classes with more images come first; classes with equally many keep their index order (``seed=None``) or are
    permuted. On data whose hardest class has a low index, index order would mix up hardness with rarity.

    Args:
        available: Images of each class, (K,).
        seed: Seed of the permutation, ``None`` for none.

    Returns:
        The K class indices.

    Example:
        >>> class_order(torch.tensor([3, 9, 5]), None)
        [1, 2, 0]
    """
    k = len(available)
    order = torch.arange(k) if seed is None else torch.randperm(k, generator=generator(seed, k))
    return order[torch.argsort(available[order], descending=True, stable=True)].tolist()


def long_tail_indices(labels: Tensor, counts: Sequence[int], seed: int) -> Tensor:
    """Choose ``counts[k]`` images of every class k.

    A class's images are drawn in an order that depends on the class and the seed alone, so a smaller count is
    always a subset of a larger one.

    Args:
        labels: Class of every image, (M,).
        counts: Images to keep of each class, K numbers; all are kept where there are fewer.
        seed: Seed of the choice.

    Returns:
        Indices in ascending order.

    Example:
        >>> len(long_tail_indices(torch.tensor([0, 0, 0, 1, 1]), [2, 1], seed=0))
        3
    """
    kept = []
    for k, count in enumerate(counts):
        own = (labels == k).nonzero().squeeze(1)
        kept.append(own[torch.randperm(len(own), generator=generator(seed, k))[:count]])
    return torch.cat(kept).sort().values


def shot_groups(counts: Tensor, many_over: int = 100, few_under: int = 20) -> dict[str, list[int]]:
    """Group classes by their training images: many (> ``many_over``), few (< ``few_under``), medium (the rest).

    Source: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019, section 4.

    Args:
        counts: Training images of each class, (K,).
        many_over: Training images above which a class counts as "many".
        few_under: Training images below which a class counts as "few".

    Returns:
        Class indices under "many", "medium" and "few".

    Raises:
        DataError: When ``few_under`` is larger than ``many_over + 1``: a class would be both.

    Example:
        >>> shot_groups(torch.tensor([500, 100, 20, 19]))
        {'many': [0], 'medium': [1, 2], 'few': [3]}
    """
    if few_under > many_over + 1:
        raise DataError(f"Expected few_under of at most many_over + 1 = {many_over + 1}, got {few_under}.")
    groups: dict[str, list[int]] = {"many": [], "medium": [], "few": []}
    for k, n in enumerate(counts.tolist()):
        groups["many" if n > many_over else "few" if n < few_under else "medium"].append(k)
    return groups
