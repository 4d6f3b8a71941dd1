"""Sentences about a comparison: only those that its numbers allow.

An interval that includes zero is "no difference shown", which is neither a win nor a proof of no effect; and a gain is
put down to relations between samples only when BatchFormer also beats the arm in which no sample sees another.
"""

from collections.abc import Sequence

from .measures import INTERVAL, Measure, as_percent
from .paired import MIN_SEEDS, PairedDifference
from .render import in_words
from .runs import BASELINE, TREATMENT, Comparison
from .sequence import Step
from .settings import single_stream

__all__ = [
    "DIFFERENT_DATA",
    "arm_text",
    "conclusions",
    "control_sentence",
    "gain_sentence",
    "multiple_comparisons",
    "stop_sentence",
    "verdict_text",
]

DIFFERENT_DATA = "Runs were made on different data: no verdict."
"""Sentence about a comparison whose runs have different fingerprints of their data."""

# Descriptions of the arms; the cards use the same words.
_ARMS = {
    "plain": "the network without BatchFormer",
    "batchformer": "BatchFormer: trained, two streams, every sample attends to the whole batch",
    "frozen": "a random BatchFormer that is never trained",
    "self_only": "the same layer, trained, each sample attending to itself alone",
    "duplicate": "a second stream with dropout only, no layer",
    "single_stream": "the mixed features only, no plain stream in training",
}
# The arms that differ where a comparison's BatchFormer has the mixed stream alone (`mode: single_stream`).
_SINGLE_STREAM_ARMS = {
    "batchformer": "BatchFormer: trained, the mixed stream alone, every sample attends to the whole batch",
    "frozen": "a random BatchFormer that is never trained, the mixed stream alone",
    "self_only": "the same layer, trained, the mixed stream alone, each sample attending to itself alone",
    "duplicate": "a plain stream and a second one with dropout only, no layer",
}

# Of each control: the meaning of BatchFormer being better, the question that stays open, and the meaning of its being
# worse.
_MEANING = {
    "self_only": (
        "The same layer did worse when no sample could see another, so relations between samples matter here.",
        "relations between samples matter",
        "The same layer did better when no sample could see another, so relations between samples do not explain a "
        "gain here.",
    ),
    "frozen": (
        "A random module that was never trained did worse, so what the module learns matters here.",
        "what the module learns matters",
        "A random module that was never trained did better, so what the module learns does not explain a gain here.",
    ),
    "duplicate": (
        "A second stream with dropout alone did worse, so the layer itself matters here.",
        "the layer itself matters",
        "A second stream with dropout alone did better, so the layer itself does not explain a gain here.",
    ),
    "single_stream": (
        "Training without the plain stream did worse, so keeping the plain stream matters here.",
        "the plain stream is needed",
        "Training without the plain stream did better, so the plain stream is not needed here.",
    ),
}
_OTHER_CONTROL = (
    "BatchFormer did better than this arm, so the difference between the two matters here.",
    "the difference between the two matters",
    "This arm did better than BatchFormer, so the difference between the two does not explain a gain here.",
)


def arm_text(comparison: Comparison, arm: str) -> str:
    """Description of an arm, by the settings of the comparison's runs."""
    special = _SINGLE_STREAM_ARMS if single_stream(comparison) else {}
    return special.get(arm, _ARMS.get(arm, "not described"))


def verdict_text(difference: PairedDifference) -> str:
    """The verdict with its reservation.

    Example:
        >>> from batchformer.report.paired import paired_difference
        >>> verdict_text(paired_difference({0: 0.9, 1: 0.8, 2: 0.9}, {0: 0.5, 1: 0.5, 2: 0.5}))
        'improves (few seeds)'
    """
    few = difference.few and difference.same_data
    return f"{difference.words} (few seeds)" if few else difference.words


def gain_sentence(difference: PairedDifference, measure: Measure) -> str:
    """The effect of BatchFormer on the primary metric, compared with the plain network, and with the margin."""
    direction = f"; {measure.direction}" if measure.direction else ""
    numbers, label = f"({measure.described(difference)}{direction})", measure.label
    if difference.margin is not None and difference.has_interval and difference.same_data:
        return _margin_sentence(difference, label, numbers, measure.amount(difference.margin)) + _reservations(
            difference
        )
    sentence = {
        "improves": f"BatchFormer improves {label} over the plain network {numbers}.",
        "worsens": f"BatchFormer worsens {label} against the plain network {numbers}.",
        "no difference shown": f"These runs show no difference in {label} between BatchFormer and the plain network "
        f"{numbers}. The interval includes zero, which is neither a gain nor a proof of no effect.",
        "too few seeds": f"There are too few seeds to say whether BatchFormer changes {label} {numbers}. "
        f"At least {MIN_SEEDS} paired seeds are needed; 5 or more are better.",
        "no verdict": DIFFERENT_DATA,
    }[difference.verdict]
    return sentence + _reservations(difference)


def _margin_sentence(difference: PairedDifference, label: str, numbers: str, margin: str) -> str:
    sentence = {
        "better": f"BatchFormer is better in {label} than the plain network by more than the margin of {margin} "
        f"{numbers}.",
        "worse": f"BatchFormer is worse in {label} than the plain network by more than the margin of {margin} "
        f"{numbers}.",
        "practically equal": f"BatchFormer and the plain network are practically equal in {label} {numbers}: the whole "
        f"interval is closer to zero than the margin of {margin}.",
        "undecided": f"These runs do not decide whether the difference in {label} between BatchFormer and the plain "
        f"network exceeds the margin of {margin} {numbers}.",
    }[str(difference.decision)]
    if difference.decision in ("practically equal", "undecided") and difference.verdict in ("improves", "worsens"):
        kind = "gain" if difference.verdict == "improves" else "loss"
        size = "it is smaller than the margin" if difference.decision == "practically equal" else "its size is open"
        sentence += f" A {kind} is shown, but {size}."
    return sentence


def control_sentence(control: str, difference: PairedDifference, measure: Measure, *, single: bool = False) -> str:
    """The answer of one control to the question where a gain comes from.

    Args:
        control: Name of the arm.
        difference: ``batchformer - control`` on the primary metric.
        measure: The primary metric.
        single: True when BatchFormer has the mixed stream alone: then it differs in more than the layer from
            ``duplicate``, which always has two streams.

    Example:
        >>> from batchformer.report.paired import paired_difference
        >>> two = paired_difference({0: 0.8, 1: 0.8}, {0: 0.8, 1: 0.7})
        >>> print(control_sentence("self_only", two, Measure("top1", "top-1")))
        BatchFormer minus self_only: +5.00 points, no interval, 2 pairs. There are too few seeds to say more.
    """
    known = {} if single and control == "duplicate" else _MEANING
    better, question, worse = known.get(control, _OTHER_CONTROL)
    meaning = {
        "improves": better,
        "worsens": worse,
        "no difference shown": f"{control} did about as well; these runs do not show that {question}.",
        "too few seeds": "There are too few seeds to say more.",
        "no verdict": DIFFERENT_DATA,
    }[difference.verdict]
    if difference.margin is not None and difference.has_interval and difference.same_data:
        meaning += f" Measured by the margin of {measure.amount(difference.margin)}: {difference.decision}."
    numbers = measure.described(difference)
    return f"BatchFormer minus {control}: {numbers}. {meaning}{_reservations(difference)}"


def _reservations(difference: PairedDifference) -> str:
    words = ""
    if difference.few:
        words += f" With {difference.n} seeds the interval is only rough."
    if difference.no_spread:
        words += " Every seed gives the same difference: check that the seeds change anything."
    return words


def conclusions(comparison: Comparison) -> list[str]:
    """The sentences that a comparison allows, the main one first.

    Args:
        comparison: Finished runs may be missing in any arm.

    Example:
        >>> from pathlib import Path
        >>> from batchformer.report.runs import Run
        >>> runs = (Run(Path(), "r", "plain", 0, {"top1": 0.7}), Run(Path(), "r", "batchformer", 0, {"top1": 0.8}))
        >>> comparison = Comparison(Path(), "r", ("plain", "batchformer"), (0,), "top1", runs)
        >>> print(conclusions(comparison)[0])  # doctest: +ELLIPSIS
        There are too few seeds to say whether BatchFormer changes top-1 (+10.00 points, no interval, 1 pair). ...
    """
    if not comparison.of(TREATMENT):
        return ["No run with BatchFormer is finished, so nothing can be said about it yet."]
    if comparison.mixed_splits:
        return [DIFFERENT_DATA]
    measure = comparison.measure(comparison.primary)
    sentences = []
    gain = None
    if comparison.of(BASELINE):
        gain = comparison.difference(TREATMENT, BASELINE, comparison.primary)
        sentences.append(gain_sentence(gain, measure))
    else:
        sentences.append("No plain run is finished, so the effect of BatchFormer is not known yet.")
    if comparison.controls and gain is not None and gain.verdict in ("no difference shown", "worsens"):
        sentences.append("These runs show no gain over the plain network, so the controls have no gain to explain.")
    told = {step.reference: step.difference for step in comparison.steps if step.asked and step.reference != BASELINE}
    others = [reference for arm, reference in comparison.beside if arm == TREATMENT]
    told |= {name: comparison.difference(TREATMENT, name, comparison.primary) for name in others}
    single = single_stream(comparison)
    sentences += [control_sentence(name, difference, measure, single=single) for name, difference in told.items()]
    if any(not step.asked for step in comparison.steps):
        sentences.append(stop_sentence(comparison.steps))
    if gain is not None and gain.verdict == "improves" and "self_only" not in comparison.controls:
        sentences.append(
            "These runs cannot tell whether the gain comes from relations between samples. The control self_only can: "
            "add --controls self_only."
        )
    return sentences


def stop_sentence(steps: Sequence[Step]) -> str:
    """The step at which the sequence of questions stops, and the meaning of that; all were asked where it does not.

    Example:
        >>> from batchformer.report.sequence import walk
        >>> from batchformer.report.paired import paired_difference
        >>> none = paired_difference({0: 0.9, 1: 0.8, 2: 0.9}, {0: 0.9, 1: 0.9, 2: 0.8})
        >>> print(stop_sentence(walk({"plain": none, "frozen": none})))
        The sequence of questions stops at plain: no gain is shown, so frozen was not asked.
    """
    missing = [step.reference for step in steps if not step.asked]
    if not missing:
        return "The sequence of questions was asked to its end."
    stop = [step for step in steps if step.asked][-1]
    meaning = {
        BASELINE: "no gain is shown",
        "self_only": "there is a gain, but it is not shown to come from relations between samples",
        "frozen": "there is a gain, but it is not shown to come from what the module learns",
    }[stop.reference]
    if stop.difference.verdict == "too few seeds":
        meaning = "there are too few seeds for an answer"
    return (
        f"The sequence of questions stops at {stop.reference}: {meaning}, so {in_words(missing)} "
        f"{'was' if len(missing) == 1 else 'were'} not asked."
    )


def multiple_comparisons(comparison: Comparison) -> str:
    """The number of questions that were asked at once, and its consequence for the answers."""
    primary = comparison.primary
    asked = sum(step.asked and step.difference.has_interval for step in comparison.steps)
    aside = sum(comparison.difference(*pair, primary).has_interval for pair in comparison.beside)
    text = (
        f"The primary metric, {comparison.measure(primary).label}, was chosen before the runs; it alone has verdicts."
    )
    if asked:
        questions = "1 question was" if asked == 1 else f"{asked} questions were"
        text += (
            f" {questions} asked in sequence, each with its full {INTERVAL}: by luck alone, at most one comparison in "
            "20 claims a gain that is not there."
        )
    if aside:
        beside = "1 other interval" if aside == 1 else f"{aside} other intervals"
        each = f", each at {as_percent(comparison.beside_confidence)}" if len(comparison.beside) > 1 else ""
        text += f" {beside} against plain or a control{each}: all of them hold at once in 19 of 20 comparisons."
    if not asked + aside:
        text += f" There are no intervals: they take at least {MIN_SEEDS} paired seeds."
    if others := len(comparison.metric_names) - 1:
        metrics = "other metric" if others == 1 else f"{others} other metrics"
        text += f" The {metrics} and the classes are descriptive: no verdict, and no correction for their number."
    return text
