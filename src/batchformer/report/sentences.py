"""What the numbers of a comparison allow to say, in sentences.

The rule of every sentence: an interval that includes zero is "not shown", which is neither a win nor a proof of no
effect; and a gain is put down to relations between samples only when BatchFormer also beats the arm in which no sample
sees another.
"""

from .caveats import flatten_config
from .paired import CONFIDENCE, PairedDifference
from .runs import BASELINE, TREATMENT, Comparison

__all__ = [
    "arm_text",
    "conclusions",
    "control_sentence",
    "describe_difference",
    "gain_sentence",
    "label",
    "multiple_comparisons",
    "points",
    "verdict_text",
]

# What each arm is; the cards and the report use the same words.
_ARMS = {
    "plain": "the network without BatchFormer",
    "batchformer": "BatchFormer: trained, two streams, every sample attends to the whole batch",
    "frozen": "a random BatchFormer that is never trained",
    "self_only": "the same layer, trained, each sample attending to itself alone",
    "duplicate": "a second stream with dropout only, no layer",
    "single_stream": "the mixed features only, no plain stream in training",
}

# Per control: what it means that batchformer is better, not shown to differ, worse.
_MEANING = {
    "self_only": (
        "The same layer does less well when no sample sees another, so relations between samples matter here.",
        "A layer in which no sample sees another is not shown to do less well, "
        "so it is not shown that relations between samples matter here.",
        "The layer does better when no sample sees another, so relations between samples do not explain a gain here.",
    ),
    "frozen": (
        "The module does less well untrained, so what it learns matters here.",
        "A random module that is never trained is not shown to do less well, "
        "so it is not shown that what the module learns matters here.",
        "A random module that is never trained does better, so what the module learns does not explain a gain here.",
    ),
    "duplicate": (
        "A second stream with dropout alone does less well, so the layer itself matters here.",
        "A second stream with dropout alone is not shown to do less well, "
        "so it is not shown that the layer itself matters here.",
        "A second stream with dropout alone does better, so the layer itself does not explain a gain here.",
    ),
    "single_stream": (
        "Training without the plain stream does less well, so keeping the plain stream matters here.",
        "Training without the plain stream is not shown to do less well, "
        "so it is not shown that the plain stream is needed here.",
        "Training without the plain stream does better, so the plain stream is not needed here.",
    ),
}
_OTHER_CONTROL = (
    "BatchFormer does better than this arm, so what sets the two apart matters here.",
    "It is not shown that what sets BatchFormer and this arm apart matters here.",
    "This arm does better than BatchFormer, so what sets the two apart does not explain a gain here.",
)


# Where a comparison's BatchFormer has the mixed stream alone (`mode: single_stream`).
_SINGLE_STREAM_ARMS = {
    "batchformer": "BatchFormer: trained, the mixed stream alone, every sample attends to the whole batch",
    "frozen": "a random BatchFormer that is never trained, the mixed stream alone",
    "self_only": "the same layer, trained, the mixed stream alone, each sample attending to itself alone",
    "duplicate": "a plain stream and a second one with dropout only, no layer",
}


def arm_text(comparison: Comparison, arm: str) -> str:
    """What an arm is, by the settings of the comparison's runs."""
    special = _SINGLE_STREAM_ARMS if single_stream(comparison) else {}
    return special.get(arm, _ARMS.get(arm, "not described"))


def single_stream(comparison: Comparison) -> bool:
    """Whether BatchFormer, in this comparison, has the mixed stream alone."""
    modes = {flatten_config(run.config).get("model.batchformer.mode") for run in comparison.of(TREATMENT)}
    return "single_stream" in modes


_METRIC_LABELS = {
    "top1": "top-1",
    "top5": "top-5",
    "macro_f1": "macro F1",
    "ece": "ECE",
    "APS": "AP small",
    "APM": "AP medium",
    "APL": "AP large",
}


def label(metric: str) -> str:
    """How a metric is called in tables, plots and sentences.

    Example:
        >>> label("top1"), label("val_macro_f1"), label("train_loss"), label("unseen_APS"), label("PQ_things")
        ('top-1', 'val macro F1', 'train loss', 'unseen AP small', 'PQ things')
    """
    for name, text in _METRIC_LABELS.items():
        if metric == name or metric.endswith(f"_{name}"):
            return metric.removesuffix(name).replace("_", " ") + text
    return metric.replace("_", " ")


def points(difference: float) -> str:
    """A difference of fractions in percentage points, signed, to two decimals or as many as its sign takes.

    Rounding must not hide on which side of zero an end of an interval lies: the verdict hangs on it.

    Example:
        >>> points(0.0123), points(-0.00001234), points(0.0)
        ('+1.23', '-0.001', '+0.00')
    """
    rounded = f"{100 * difference:+.2f}"
    if float(rounded) != 0.0:
        return rounded
    return f"{100 * difference:+.1g}" if abs(difference) > 1e-9 else "+0.00"


def verdict_text(difference: PairedDifference) -> str:
    """The verdict with its reservation.

    Example:
        >>> from batchformer.report.paired import paired_difference
        >>> verdict_text(paired_difference({0: 0.9, 1: 0.8, 2: 0.9}, {0: 0.5, 1: 0.5, 2: 0.5}))
        'improves (few seeds)'
    """
    return f"{difference.verdict} (few seeds)" if difference.few else difference.verdict


def describe_difference(difference: PairedDifference) -> str:
    """A difference in percentage points with its interval.

    Example:
        >>> from batchformer.report.paired import paired_difference
        >>> describe_difference(paired_difference({0: 0.84, 1: 0.83}, {0: 0.82, 1: 0.82}))
        '+1.50 points, no interval, 2 pairs'
    """
    pairs = f"{difference.n} pair{'' if difference.n == 1 else 's'}"
    if difference.n == 0:
        return "no pair of seeds"
    mean = f"{points(difference.mean)} points"
    if not difference.has_interval:
        return f"{mean}, no interval, {pairs}"
    percent = f"{100 * difference.confidence:g} %"
    return f"{mean}, {percent} interval {points(difference.low)} to {points(difference.high)}, {pairs}"


def gain_sentence(difference: PairedDifference, metric: str) -> str:
    """Whether BatchFormer does better than the plain network on the primary metric."""
    numbers, metric = f"({describe_difference(difference)})", label(metric)
    sentence = {
        "improves": f"BatchFormer improves {metric} over the plain network {numbers}.",
        "worsens": f"BatchFormer worsens {metric} against the plain network {numbers}.",
        "no difference shown": f"No difference in {metric} between BatchFormer and the plain network is shown "
        f"{numbers}. The interval includes zero: this is neither a gain nor a proof that there is none.",
        "too few seeds": f"Too few seeds to say whether BatchFormer changes {metric} {numbers}: "
        "at least 3 paired seeds are needed, 5 or more are better.",
    }[difference.verdict]
    return sentence + _reservations(difference)


def control_sentence(control: str, difference: PairedDifference, *, single: bool = False) -> str:
    """What one control says about the source of a gain.

    Args:
        control: Name of the arm.
        difference: ``batchformer - control`` on the primary metric.
        single: Whether BatchFormer has the mixed stream alone: from ``duplicate``, which always has two, it then
            differs in more than the layer.

    Example:
        >>> from batchformer.report.paired import paired_difference
        >>> print(control_sentence("self_only", paired_difference({0: 0.8, 1: 0.8}, {0: 0.8, 1: 0.7})))
        self_only (BatchFormer minus it: +5.00 points, no interval, 2 pairs): Too few seeds to say.
    """
    known = {} if single and control == "duplicate" else _MEANING
    better, open_question, worse = known.get(control, _OTHER_CONTROL)
    meaning = {
        "improves": better,
        "worsens": worse,
        "no difference shown": open_question,
        "too few seeds": "Too few seeds to say.",
    }[difference.verdict]
    return f"{control} (BatchFormer minus it: {describe_difference(difference)}): {meaning}{_reservations(difference)}"


def _reservations(difference: PairedDifference) -> str:
    words = ""
    if difference.few:
        words += f" Only {difference.n} pairs: the interval leans on an assumed normal distribution."
    if difference.no_spread:
        words += " Every seed gives the same difference: check that the seeds change anything."
    return words


def conclusions(comparison: Comparison) -> list[str]:
    """The sentences that a comparison allows, the main one first.

    Args:
        comparison: With or without finished runs in each arm.

    Example:
        >>> from pathlib import Path
        >>> from batchformer.report.runs import Run
        >>> runs = (Run(Path(), "r", "plain", 0, {"top1": 0.7}), Run(Path(), "r", "batchformer", 0, {"top1": 0.8}))
        >>> comparison = Comparison(Path(), "r", ("plain", "batchformer"), (0,), "top1", runs)
        >>> print(conclusions(comparison)[0])  # doctest: +ELLIPSIS
        Too few seeds to say whether BatchFormer changes top-1 (+10.00 points, no interval, 1 pair): at least 3 ...
    """
    if not comparison.of(TREATMENT):
        return ["No finished run with BatchFormer: nothing can be said about it yet."]
    sentences = []
    gain = None
    if comparison.of(BASELINE):
        gain = comparison.difference(TREATMENT, BASELINE, comparison.primary)
        sentences.append(gain_sentence(gain, comparison.primary))
    else:
        sentences.append("No finished plain run: it cannot be said what BatchFormer changes.")
    controls = {name: comparison.difference(TREATMENT, name, comparison.primary) for name in comparison.controls}
    if controls and gain is not None and gain.verdict in ("no difference shown", "worsens"):
        sentences.append("As no gain over the plain network is shown, the controls have no gain to explain.")
    single = single_stream(comparison)
    sentences += [control_sentence(name, difference, single=single) for name, difference in controls.items()]
    if gain is not None and gain.verdict == "improves" and "self_only" not in controls:
        sentences.append(
            "Whether the gain comes from relations between samples is open: that takes the control `self_only` "
            "(--controls self_only)."
        )
    return sentences


def multiple_comparisons(comparison: Comparison) -> str:
    """How many questions were asked at once, and what follows for the answers."""
    others = len(comparison.metric_names) - 1
    arms = [arm for arm in comparison.arms if arm != BASELINE]
    primary = len(arms) + len(comparison.controls if TREATMENT in arms else ())
    text = (
        f"One metric, {label(comparison.primary)}, was named as primary before the runs; verdicts are about it. "
        f"Intervals on it: {primary}, each at {100 * CONFIDENCE:g} %, not all together; "
        "without any real effect, one interval in 20 excludes zero by chance."
    )
    if others:
        text += f" Other metrics ({others}) and the classes are descriptive: not corrected, no verdict."
    return text
