"""The questions of a comparison in their order, and the confidence of everything beside them.

Whether BatchFormer beats plain comes first. Only when that is shown is it asked against ``self_only``, then against
``frozen``, then against ``duplicate``: a fixed-sequence procedure (Maurer, Hothorn and Lehmacher 1995; Westfall and
Krishen 2001), in which every question keeps the full level and the probability of any false claim stays at that level.
Everything else with a verdict, such as a control against plain, gets simultaneous intervals by Bonferroni: these need
no assumption about the dependence between the comparisons, which share arms, and they stay exact with three seeds,
where the joint distribution that a max-t interval needs cannot be estimated; Holm's steps give no intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .paired import CONFIDENCE, PairedDifference

__all__ = ["BASELINE", "ORDER", "TREATMENT", "Step", "beside", "references", "simultaneous", "walk"]

BASELINE = "plain"
TREATMENT = "batchformer"
ORDER = (BASELINE, "self_only", "frozen", "duplicate")


@dataclass(frozen=True)
class Step:
    """A question of the sequence: does BatchFormer beat this arm?

    Attributes:
        reference: Name of the arm.
        difference: BatchFormer minus the arm on the primary metric.
        asked: True when every question before it was answered with "improves".
    """

    reference: str
    difference: PairedDifference
    asked: bool

    @property
    def passed(self) -> bool:
        """True when the question was asked and answered with "improves"."""
        return self.asked and self.difference.verdict == "improves"


def references(arms: Sequence[str]) -> tuple[str, ...]:
    """Arms that BatchFormer is compared with in sequence; arms that a comparison lacks are passed over.

    Example:
        >>> references(["plain", "batchformer", "single_stream", "frozen", "self_only"])
        ('plain', 'self_only', 'frozen')
    """
    return tuple(arm for arm in ORDER if arm in arms) if TREATMENT in arms else ()


def beside(arms: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs (arm, reference) that have a verdict and are no question of the sequence.

    Example:
        >>> beside(["plain", "batchformer", "self_only", "single_stream"])
        (('self_only', 'plain'), ('single_stream', 'plain'), ('batchformer', 'single_stream'))
    """
    controls = [arm for arm in arms if arm not in (BASELINE, TREATMENT)]
    against_plain = [(arm, BASELINE) for arm in controls if BASELINE in arms]
    others = [(TREATMENT, arm) for arm in controls if arm not in ORDER and TREATMENT in arms]
    return (*against_plain, *others)


def simultaneous(count: int, confidence: float = CONFIDENCE) -> float:
    r"""Confidence of each of several intervals that shall hold all at once, :math:`1 - (1 - c) / m` (Bonferroni).

    Args:
        count: Number of intervals; 0 and 1 leave the confidence as it is.
        confidence: Confidence that all of them hold, in (0, 1).

    Example:
        >>> simultaneous(5)
        0.99
    """
    return 1 - (1 - confidence) / count if count > 1 else confidence


def walk(differences: Mapping[str, PairedDifference]) -> tuple[Step, ...]:
    """The steps of the sequence; after the first one that does not show a gain, none is asked.

    Args:
        differences: Reference -> BatchFormer minus the reference, in the order of the questions.

    Example:
        >>> from batchformer.report.paired import paired_difference
        >>> gain = paired_difference({0: 0.9, 1: 0.8, 2: 0.9}, {0: 0.5, 1: 0.5, 2: 0.5})
        >>> none = paired_difference({0: 0.9, 1: 0.8, 2: 0.9}, {0: 0.9, 1: 0.9, 2: 0.8})
        >>> [step.asked for step in walk({"plain": gain, "self_only": none, "frozen": gain})]
        [True, True, False]
    """
    steps: list[Step] = []
    for reference, difference in differences.items():
        steps.append(Step(reference, difference, asked=all(step.passed for step in steps)))
    return tuple(steps)
