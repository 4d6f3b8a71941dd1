"""Three sentences on top of a report: the question, the answer with its certainty, and the next step as a command."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from .measures import INTERVAL, Measure
from .paired import FEW_SEEDS, PairedDifference
from .planning import duration, seconds_per_seed
from .power import seeds_to_equal
from .render import in_words
from .runs import BASELINE, TREATMENT, Comparison

__all__ = ["FirstScreen", "first_screen"]

_BETTER_NUMBER = 10  # seeds to go on with when three or four were not enough and no margin says how many are
_ENOUGH = 5


@dataclass(frozen=True)
class FirstScreen:
    """The three sentences.

    Attributes:
        asked: The question.
        answer: The result and its certainty.
        advice: The next step.
        command: The command of the next step.
    """

    asked: str
    answer: str
    advice: str
    command: str

    @property
    def lines(self) -> tuple[str, str, str]:
        """The sentences with the words that introduce them, without the command."""
        return f"Question: {self.asked}", f"Answer: {self.answer}", f"Next: {self.advice}"


def first_screen(comparison: Comparison) -> FirstScreen:
    """The three sentences about a comparison, finished or not.

    Example:
        >>> from pathlib import Path
        >>> from batchformer.report.runs import Run
        >>> runs = (Run(Path(), "r", "plain", 0, {"top1": 0.7}), Run(Path(), "r", "batchformer", 0, {"top1": 0.8}))
        >>> shown = first_screen(Comparison(Path("c"), "r", ("plain", "batchformer"), (0,), "top1", runs))
        >>> print(shown.answer)
        With 1 seed BatchFormer was 10.00 points better, but one or two seeds cannot tell a gain from luck.
    """
    difference = comparison.difference(TREATMENT, BASELINE, comparison.primary)
    measure = comparison.measure(comparison.primary)
    advice, command = _next(comparison, difference)
    return FirstScreen(_question(comparison, measure), _answer(comparison, difference, measure), advice, command)


def _question(comparison: Comparison, measure: Measure) -> str:
    seeds = len(comparison.seeds)
    more = ""
    if comparison.margin is not None:
        more = f" by at least {measure.amount(measure.unscaled(comparison.margin))}"
    units = f" on each of {in_words([unit.label for unit in comparison.units])}" if comparison.has_units else ""
    direction = f" ({measure.direction})" if measure.direction else ""
    return (
        f"Does BatchFormer improve {measure.label}{direction} in {comparison.recipe}{more}, when the same network is "
        f"trained with and without it on the same {seeds} seed{'' if seeds == 1 else 's'}{units}?"
    )


def _answer(comparison: Comparison, difference: PairedDifference, measure: Measure) -> str:
    if not difference.n:
        arm = next((arm for arm in (TREATMENT, BASELINE) if not comparison.of(arm)), None)
        missing = "seed is finished in both arms" if arm is None else f"run of {arm} is finished"
        return f"This is not known yet, since no {missing}."
    if not difference.same_data:
        return "The runs were made on different data, so that they cannot be compared and there is no verdict."
    seeds = f"{difference.n} seed{'' if difference.n == 1 else 's'}"
    found = _found(difference, measure)
    if not difference.has_interval:
        return f"With {seeds} BatchFormer was {found}, but one or two seeds cannot tell a gain from luck."
    if difference.no_spread:
        return f"BatchFormer was {found}, and by exactly as much with each of {seeds}, which is not what seeds do."
    interval = f"{INTERVAL} {measure.signed(difference.low)} to {measure.signed(difference.high)}"
    rough = f"rough with {seeds}" if difference.few else ""
    numbers = f"({'; '.join(filter(None, (interval, measure.direction, rough)))})"
    margin = "" if difference.margin is None else f"the margin of {measure.amount(difference.margin)}"
    meaning = {
        "improves": ", which luck alone would rarely do: it helps on these data",
        "worsens": ", which luck alone would rarely do: it hurts on these data",
        "no difference shown": ", which may be luck: these runs show neither a gain nor that there is none",
        "better": f", which is a gain larger than {margin}",
        "worse": f", which is a loss larger than {margin}",
        "practically equal": f", which is too little to matter: the whole interval is closer to zero than {margin}",
        "undecided": f", so these runs do not decide whether the difference is larger than {margin}",
    }[difference.words]
    return f"Over {seeds} BatchFormer was {found} on average {numbers}{meaning}."


def _found(difference: PairedDifference, measure: Measure) -> str:
    if difference.mean == 0 or (difference.no_spread and abs(difference.mean) < 1e-12):
        return f"as good as plain in {measure.label}" if difference.has_interval else "as good as plain"
    better = (difference.mean > 0) == difference.higher_is_better
    size = f"{measure.signed(difference.mean)[1:]} {'points' if measure.is_fraction else measure.unit}".rstrip()
    return f"{size} {'better' if better else 'worse'}"


def _next(comparison: Comparison, difference: PairedDifference) -> tuple[str, str]:
    """The next step in words, and its command."""
    if not difference.same_data:
        return "Delete the runs on other data, which the caveats name, and train them anew:", _again(comparison)
    absent = [entry for entry in comparison.left_out if entry.arm is not None]
    if absent or not difference.n:
        runs = f"the {len(absent)} runs that are" if len(absent) > 1 else "the run that is" if absent else "the runs"
        return f"Finish {runs}{' missing' if absent else ''}:", _again(comparison)
    if not difference.has_interval:
        return _more_seeds(comparison, _ENOUGH, "an interval takes three seeds, and five make it useful")
    if difference.no_spread:
        one, other = (comparison.of(TREATMENT)[index].path for index in (0, -1))
        words = "Find out whether the seed changes anything; the records of two seeds must differ:"
        return words, shlex.join(["diff", str(one / "metrics.csv"), str(other / "metrics.csv")])
    if difference.margin is not None:
        return _next_by_margin(comparison, difference)
    if difference.verdict == "no difference shown" and difference.n > FEW_SEEDS:
        margin = _example_margin(comparison, difference)
        words = f"Name the smallest difference that matters to you ({margin:g} is an example), and the report says "
        return f"{words}whether it can be ruled out and how many seeds that takes:", _report(comparison, margin)
    if difference.few:
        return _more_seeds(comparison, _BETTER_NUMBER, "so few seeds give only a rough interval")
    return _next_when_settled(comparison, gain=difference.verdict == "improves")


def _next_by_margin(comparison: Comparison, difference: PairedDifference) -> tuple[str, str]:
    margin, sd = difference.margin or math.nan, difference.sd
    if difference.decision != "undecided":
        return _next_when_settled(comparison, gain=difference.decision == "better")
    # So many seeds call the arms practically equal when they are alike, and a difference of two margins larger.
    wanted = seeds_to_equal(margin, sd)
    if wanted is None:
        words = "No practical number of seeds settles this margin, so name a larger one:"
        return words, _report(comparison, 4 * (comparison.margin or math.nan))
    if wanted <= difference.n:
        why = "the difference lies near the margin, where more seeds help slowly"
        return _more_seeds(comparison, 2 * difference.n, why)
    why = "by the spread of these seeds so many make the interval narrow enough for the margin"
    return _more_seeds(comparison, max(wanted, _ENOUGH), why)


def _next_when_settled(comparison: Comparison, *, gain: bool) -> tuple[str, str]:
    if gain and "self_only" not in comparison.controls:
        words = "Find out whether the gain comes from relations between samples, with the control self_only:"
        return words, _again(comparison, controls="self_only")
    arm = TREATMENT if gain else BASELINE
    words = "Take the network that BatchFormer trained:" if gain else "Keep the plain network, which trains faster:"
    return words, shlex.join(["batchformer", "export", str(comparison.of(arm)[0].path)])


def _more_seeds(comparison: Comparison, wanted: int, why: str) -> tuple[str, str]:
    seeds = list(comparison.seeds)
    for seed in range(max(seeds) + wanted + 1):
        if len(seeds) < wanted and seed not in seeds:
            seeds.append(seed)
    time = seconds_per_seed(comparison) * (len(seeds) - len(comparison.seeds))
    words = f"about {duration(time)} of training" if math.isfinite(time) and time > 0 else "more training"
    counted = sorted(seeds) == list(range(len(seeds)))
    text = str(len(seeds)) if counted else ",".join(str(seed) for seed in seeds)
    return f"Train {len(seeds)} seeds in all, since {why} ({words}):", _again(comparison, seeds=text)


def _again(comparison: Comparison, **changed: str) -> str:
    """The command of the comparison with ``--resume`` and with other options, such as ``seeds``."""
    try:
        words = shlex.split(comparison.command)
    except ValueError:  # a quotation that does not end
        words = []
    words = _without(words, [*changed, "resume", "margin", "out", "name"])
    if words[:2] != ["batchformer", "compare"]:
        words = ["batchformer", "compare", comparison.recipe]
    if comparison.path.parent != Path("runs"):
        words += ["--out", str(comparison.path.parent)]
    words += ["--name", comparison.path.name]
    command = shlex.join([*words, *(word for key, text in changed.items() for word in (f"--{key}", text)), "--resume"])
    if comparison.margin is None or not comparison.margin_after:
        return command
    return f"{command} && {_report(comparison, comparison.margin)}"


def _without(words: list[str], options: list[str]) -> list[str]:
    """The words of a command without some options and their values."""
    kept: list[str] = []
    skip = False
    for word in words:
        name = word.removeprefix("--").partition("=")[0] if word.startswith("--") else None
        if not skip and name not in options:
            kept.append(word)
        skip = name in options and name != "resume" and "=" not in word
    return kept


def _example_margin(comparison: Comparison, difference: PairedDifference) -> float:
    """Half a point; in other units about a tenth of plain's values."""
    if comparison.measure(comparison.primary).is_fraction:
        return 0.5
    values = [abs(value) for value in comparison.values(BASELINE, comparison.primary).values()]
    size = max((value for value in values if math.isfinite(value)), default=0.0) or difference.high - difference.low
    return float(10.0 ** (math.floor(math.log10(size)) - 1))


def _report(comparison: Comparison, margin: float) -> str:
    return shlex.join(["batchformer", "report", str(comparison.path), "--margin", f"{margin:g}"])
