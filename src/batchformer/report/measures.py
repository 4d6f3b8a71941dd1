"""Measures: the label, unit and direction of a metric, and the one place where numbers become text.

A result says of each of its metrics how to show it. Values are kept as the run folders hold them: a measure with the
unit "%" is a fraction from 0 to 1, shown times 100, with differences in percentage points; a measure with any other
unit (years, pixels, or none) is shown as it is.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .paired import CONFIDENCE, PairedDifference, Summary
from .render import in_words

__all__ = [
    "ABSENT",
    "INTERVAL",
    "Measure",
    "as_percent",
    "difference_units",
    "find_measure",
    "heads",
    "is_described",
    "lower_is_better_note",
    "order_metrics",
    "units_note",
]

ABSENT = "n/a"


def as_percent(fraction: float) -> str:
    """A fraction as words: 0.95 is "95 %".

    Example:
        >>> as_percent(0.95), as_percent(1.1)
        ('95 %', '110 %')
    """
    return f"{100 * fraction:.4g} %"


INTERVAL = f"{as_percent(CONFIDENCE)} interval"


@dataclass(frozen=True)
class Measure:
    """A metric as a result describes it.

    Attributes:
        name: Name of the metric in ``result.json``.
        label: Words for tables, pictures and sentences.
        unit: "%" for a fraction from 0 to 1; any other unit, or none, for a number that is shown as it is.
        higher_is_better: False for errors, where a smaller number is the better one.
        part: Name of the part of the classes or objects on which this is the primary metric ("few-shot classes",
            "small objects"); empty for every other measure.
        decimals: Decimals in tables and sentences.
    """

    name: str
    label: str
    unit: str = "%"
    higher_is_better: bool = True
    part: str = ""
    decimals: int = 2

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> "Measure":
        """Read an entry of ``measures`` in ``result.json``.

        Raises:
            ValueError: The entry lacks a key, or holds a value of another type.

        Example:
            >>> Measure.read({"name": "mae", "label": "mean error", "unit": "years", "higher_is_better": False}).head
            'mean error (years)'
        """
        kinds = {"name": str, "label": str, "unit": str, "higher_is_better": bool}
        for key, kind in kinds.items():
            if not isinstance(entry.get(key), kind):
                raise ValueError(
                    f"result.json has {entry.get(key)!r} as {key} of a measure, expected a {kind.__name__}"
                )
        name, label, unit, higher_is_better = (entry[key] for key in kinds)
        return cls(name, label, unit, higher_is_better, part=str(entry.get("part") or ""))

    @property
    def is_fraction(self) -> bool:
        """True for a fraction that is shown in percent."""
        return self.unit == "%"

    @property
    def head(self) -> str:
        """Label with the unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def axis(self) -> str:
        """Label with the unit, and with the direction where lower is better."""
        return self.head if self.higher_is_better else f"{self.head}, {self.direction}"

    @property
    def difference_unit(self) -> str:
        """Unit of a difference, in words: percentage points for fractions."""
        return "percentage points" if self.is_fraction else self.unit

    @property
    def direction(self) -> str:
        """The words "lower is better" where that is so, otherwise nothing."""
        return "" if self.higher_is_better else "lower is better"

    def fitted(self, values: Sequence[float]) -> "Measure":
        """The measure with as many decimals as show four digits of the largest value; fractions keep two.

        Args:
            values: All values that will stand in one table; those that are not finite do not count.

        Example:
            >>> Measure("mae", "error", "years").fitted([3.21, 0.4]).decimals
            3
        """
        largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
        if self.is_fraction or not largest:
            return self
        return replace(self, decimals=min(9, max(0, 3 - math.floor(math.log10(largest)))))

    def scaled(self, value: float) -> float:
        """A value, or a difference of values, as it is drawn on an axis.

        Example:
            >>> Measure("AP", "AP").scaled(0.25), Measure("mae", "error", "years").scaled(0.25)
            (25.0, 0.25)
        """
        return 100 * value if self.is_fraction else value

    def unscaled(self, shown: float) -> float:
        """A difference as the run folders hold it, from one as it is shown: 0.5 points are 0.005.

        Example:
            >>> Measure("AP", "AP").unscaled(50.0), Measure("mae", "error", "years").unscaled(0.5)
            (0.5, 0.5)
        """
        return shown / 100 if self.is_fraction else shown

    def amount(self, difference: float) -> str:
        """The size of a difference with its unit and without a sign, such as a margin.

        Example:
            >>> Measure("AP", "AP").amount(-0.005), Measure("mae", "error", "years").amount(1.25)
            ('0.5 points', '1.25 years')
        """
        number = f"{self.scaled(abs(difference)):.3g}"
        unit = ("point" if number == "1" else "points") if self.is_fraction else self.unit
        return f"{number} {unit}".rstrip()

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest possible place on an axis."""
        return (0.0, 100.0) if self.is_fraction else (-math.inf, math.inf)

    def number(self, value: float) -> str:
        """A value without its unit; "n/a" where it is not defined."""
        return ABSENT if math.isnan(value) else f"{self.scaled(value):.{self.decimals}f}"

    def short(self, value: float) -> str:
        """A value with one decimal less, for pictures."""
        return f"{self.scaled(value):.{max(0, self.decimals - 1)}f}"

    def spread(self, summary: Summary) -> str:
        """Mean ± sample standard deviation; the mean alone of a single value.

        Example:
            >>> from batchformer.report.paired import summarize
            >>> Measure("AP", "AP").spread(summarize([0.5, 0.25])), Measure("mae", "error", "px").spread(summarize([3]))
            ('37.50 ± 17.68', '3.00')
        """
        mean = self.number(summary.mean)
        return mean if summary.n < 2 else f"{mean} ± {self.number(summary.sd)}"

    def signed(self, difference: float, *, keep_sign: bool = True) -> str:
        """A difference with its sign and without its unit.

        Args:
            difference: Difference of two values of the run folders.
            keep_sign: Give a difference that would be rounded to zero as many decimals as show its first digit.
                The verdict depends on the side of zero on which the end of an interval lies, so rounding must not hide
                it. What is no more than rounding of the computer stays zero.

        Example:
            >>> AP, mae = Measure("AP", "AP"), Measure("mae", "error", "years")
            >>> AP.signed(0.0123), AP.signed(-0.00001234), AP.signed(0.0), mae.signed(-1.5)
            ('+1.23', '-0.001', '+0.00', '-1.50')
        """
        if math.isnan(difference):
            return ABSENT
        shown = self.scaled(difference)
        rounded = f"{shown:+.{self.decimals}f}"
        if float(rounded) != 0.0:
            return rounded
        noise = 1e-9 if self.is_fraction else 1e-12
        if not keep_sign or abs(difference) <= noise:
            return f"{0.0:+.{self.decimals}f}"
        return f"{shown:+.{-math.floor(math.log10(abs(shown)))}f}"

    def mean(self, difference: PairedDifference) -> str:
        """The mean of a paired difference; "n/a" without a pair."""
        return self.signed(difference.mean) if difference.n else ABSENT

    def interval(self, difference: PairedDifference) -> str:
        """The interval of a paired difference in brackets; "none" where there are too few pairs for one."""
        return f"[{self.signed(difference.low)}, {self.signed(difference.high)}]" if difference.has_interval else "none"

    def described(self, difference: PairedDifference) -> str:
        """A paired difference with unit, interval and number of pairs, for a sentence.

        Example:
            >>> from batchformer.report.paired import paired_difference
            >>> Measure("AP", "AP").described(paired_difference({0: 0.84, 1: 0.83}, {0: 0.82, 1: 0.82}))
            '+1.50 points, no interval, 2 pairs'
        """
        if difference.n == 0:
            return "no pair of seeds"
        unit = "points" if self.is_fraction else self.unit
        mean = f"{self.signed(difference.mean)} {unit}".rstrip()
        pairs = f"{difference.n} pair{'' if difference.n == 1 else 's'}"
        if not difference.has_interval:
            return f"{mean}, no interval, {pairs}"
        words = f"{as_percent(difference.confidence)} interval"
        return f"{mean}, {words} {self.signed(difference.low)} to {self.signed(difference.high)}, {pairs}"


def find_measure(name: str, measures: Sequence[Measure]) -> Measure:
    """The measure of a metric, which may be one of a further split (``unseen_AP``) or of validation (``val_AP``).

    Args:
        name: Name of a metric, or of a column of ``metrics.csv``.
        measures: The described ones.

    Returns:
        The described measure. A name that nothing describes (``train_loss``) is a number without a unit.

    Example:
        >>> [find_measure(name, [Measure("AP", "AP")]).head for name in ("AP", "unseen_AP", "val_AP", "train_loss")]
        ['AP (%)', 'unseen AP (%)', 'validation AP (%)', 'train loss']
    """
    split, measure = _split_and_measure(name, measures)
    if measure is None:
        return Measure(name, name.replace("_", " "), unit="")
    words = "validation" if split == "val" else split.replace("_", " ")
    return replace(measure, name=name, label=f"{words} {measure.label}", part="") if split else measure


def is_described(name: str, measures: Sequence[Measure]) -> bool:
    """True when one of the measures is that of the metric, on whichever split.

    Example:
        >>> is_described("unseen_AP", [Measure("AP", "AP")]), is_described("loss", [Measure("AP", "AP")])
        (True, False)
    """
    return _split_and_measure(name, measures)[1] is not None


def _split_and_measure(name: str, measures: Sequence[Measure]) -> tuple[str, Measure | None]:
    fitting = [measure for measure in measures if name == measure.name or name.endswith(f"_{measure.name}")]
    measure = max(fitting, key=lambda entry: len(entry.name), default=None)  # `mask_AP` is no further split of `AP`
    return ("" if measure is None else name.removesuffix(measure.name).rstrip("_")), measure


def order_metrics(names: Iterable[str], measures: Sequence[Measure]) -> list[str]:
    """Metrics in the order of a table: as described, then the same of each further split, then all others by name.

    Example:
        >>> order_metrics(["loss", "unseen_AP", "AP50", "AP"], [Measure("AP", "AP"), Measure("AP50", "AP50")])
        ['AP', 'AP50', 'unseen_AP', 'loss']
    """
    described = [measure.name for measure in measures]

    def place(name: str) -> tuple[int, str, int, str]:
        split, measure = _split_and_measure(name, measures)
        return (2, "", 0, name) if measure is None else (int(bool(split)), split, described.index(measure.name), name)

    return sorted(names, key=place)


def heads(measures: Sequence[Measure]) -> list[str]:
    """Heads of the columns of a table: the units stand in them unless all numbers are percent.

    Example:
        >>> AP, mae = Measure("AP", "AP"), Measure("mae", "error", "years")
        >>> heads([AP]), heads([mae, AP])
        (['AP'], ['error (years)', 'AP (%)'])
    """
    return [measure.label if _all_percent(measures) else measure.head for measure in measures]


def units_note(measures: Sequence[Measure]) -> str:
    """The units of the numbers of a table, as the first words of a note.

    Example:
        >>> units_note([Measure("AP", "AP")]), units_note([Measure("mae", "error", "years")])
        ('Percent', 'In the units of the column heads')
    """
    return "Percent" if _all_percent(measures) else "In the units of the column heads"


def difference_units(measures: Sequence[Measure]) -> str:
    """The units of the differences of a table, in words.

    Example:
        >>> AP, mae = Measure("AP", "AP"), Measure("mae", "error", "years")
        >>> difference_units([AP]), difference_units([AP, mae])
        ('percentage points', 'percentage points and years')
    """
    return in_words(list(dict.fromkeys(measure.difference_unit or "plain numbers" for measure in measures)))


def _all_percent(measures: Sequence[Measure]) -> bool:
    return all(measure.is_fraction for measure in measures)


def lower_is_better_note(measures: Sequence[Measure]) -> list[str]:
    """One sentence that names the measures of which less is better; empty where there are none."""
    lower = [measure.label for measure in measures if not measure.higher_is_better]
    return [f"Lower is better: {'; '.join(lower)}."] if lower else []
