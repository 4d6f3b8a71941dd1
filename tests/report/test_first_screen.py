"""The three sentences on top: every outcome has its question, its answer and a command that the program accepts."""

import shlex
from pathlib import Path

import pytest

from batchformer import cli
from batchformer.report import Comparison, LeftOut, Measure, Run, comparison_text, read_comparison, write_report
from batchformer.report.first_screen import first_screen
from batchformer.report.power import seeds_to_equal

PLAIN = (0.80, 0.81, 0.79, 0.80, 0.82, 0.78, 0.80, 0.81, 0.79, 0.80)
NOISE = (0.002, -0.001, 0.001, -0.002, 0.001, 0.0, -0.001, 0.001, 0.002, -0.002)
YEARS = Measure("mae", "mean error", "years", higher_is_better=False)
COMMAND = "batchformer compare longtail/fashion-mnist-lt --trainer.max_epochs=4 --seeds 3 --controls=frozen --out old"


def comparison(pairs, points, *controls, measure=None, size=1.0, **more):
    """BatchFormer better by so many points, times ``size``, on so many seeds."""
    metric = measure.name if measure else "top1"
    plain = [size * value for value in PLAIN[:pairs]]
    arm = [a + size * (points / 100 + noise) for a, noise in zip(plain, NOISE, strict=False)]
    arms = {"plain": plain, "batchformer": arm, **dict.fromkeys(controls, plain)}
    described = {"measures": (measure,)} if measure else {}
    runs = [
        Run(Path(f"c/{name}/seed{seed}"), "r", name, seed, {metric: v}, cost={"train_seconds": 60.0}, **described)
        for name, values in arms.items()
        for seed, v in enumerate(values)
    ]
    more = {"command": COMMAND, **more}
    return Comparison(Path("runs/c"), "r", tuple(arms), tuple(range(pairs)), metric, tuple(runs), **more)


def accepted(command):
    """The verb and the options of a command, parsed as the program does."""
    words = shlex.split(command)
    if words[0] == "diff":
        return None
    assert words[0] == "batchformer"
    parser, verbs = cli._parsers()
    own, overrides = cli._take_overrides(words[1:], verbs[words[1]]) if words[1] == "compare" else (words[1:], [])
    return parser.parse_args(own), overrides


OUTCOMES = {
    # name: (comparison, part of the answer, part of the command)
    "one": (
        comparison(1, 2),
        "With 1 seed BatchFormer was 2.20 points better, but one or two",
        "--seeds 5 --resume",
    ),
    "two": (comparison(2, -2), "With 2 seeds BatchFormer was 1.95 points worse, but one or two seeds", "--seeds 5"),
    "three": (comparison(3, 2), "luck alone would rarely do: it helps on these data", "--seeds 10 --resume"),
    "rough": (comparison(3, 2), "; rough with 3 seeds)", "--seeds 10"),
    "gain": (
        comparison(5, 2),
        "Over 5 seeds BatchFormer was 2.02 points better on average (95 %",
        "self_only",
    ),
    "known gain": (comparison(5, 2, "self_only"), "it helps on these data", "export c/batchformer/seed0"),
    "loss": (comparison(5, -2), "1.98 points worse on average", "export c/plain/seed0"),
    "open": (
        comparison(10, 0.05),
        "may be luck: these runs show neither a gain nor",
        "report runs/c --margin 0.5",
    ),
    "tie": (
        comparison(3, 0, size=0.0),
        "as good as plain in top-1, and by exactly as",
        "diff c/batchformer/seed0",
    ),
    "better": (
        comparison(5, 2, margin=0.5),
        "a gain larger than the margin of 0.5",
        "--controls self_only --resume",
    ),
    "worse": (comparison(5, -2, margin=0.5), "a loss larger than the margin of 0.5 points", "export c/plain/seed0"),
    "equal": (
        comparison(10, 0, margin=0.5),
        "too little to matter: the whole interval is",
        "export c/plain/seed0",
    ),
    "undecided": (comparison(5, 0.5, margin=0.5), "do not decide whether the difference is larger", "--resume"),
    "hopeless": (comparison(5, 0, margin=1e-5), "do not decide", "--margin 4e-05"),
    "years": (
        comparison(10, -2, measure=YEARS, size=10.0),
        "0.199 years better on average (95 % interval -0.210 to -0.188; lower is better)",
        "self_only",
    ),
    "years, open": (comparison(10, 0.05, measure=YEARS, size=10.0), "may be luck", "--margin 0.1"),
    "later margin": (
        comparison(5, 0.5, margin=0.5, margin_after=True),
        "do not decide",
        "--resume && batchformer report runs/c --margin 0.5",
    ),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_every_outcome_has_an_answer_and_a_command_that_works(name):
    shown, answer, command = OUTCOMES[name]
    first = first_screen(shown)
    assert answer in first.answer
    assert command in first.command
    for line in (first.asked, first.answer):
        assert line[0].isupper()
        assert line[-1] in ".?"
    assert first.advice[0].isupper()
    assert first.advice.endswith(":")
    for part in first.command.split(" && "):
        accepted(part)


def test_the_command_keeps_the_settings_and_finds_the_folder():
    arguments, overrides = accepted(first_screen(comparison(3, 2)).command)
    assert overrides == ["--trainer.max_epochs=4"]
    assert (arguments.out, arguments.name, arguments.seeds, arguments.resume) == ("runs", "c", "10", True)
    assert arguments.controls == "frozen"
    unknown = comparison(3, 2, command="")
    assert first_screen(unknown).command == "batchformer compare r --name c --seeds 10 --resume"
    assert first_screen(comparison(3, 2, command="batchformer 'compare")).command.startswith("batchformer compare r ")
    more = first_screen(comparison(5, 2)).command
    assert accepted(more)[0].controls == "self_only"


def test_seeds_that_are_a_list_stay_in_it():
    shown = comparison(2, 2)
    seeds = (3, 8)
    runs = tuple(Run(r.path, r.recipe, r.arm, seeds[r.seed], r.metrics) for r in shown.runs)
    listed = Comparison(Path("x/c"), "r", shown.arms, seeds, "top1", runs, command=COMMAND)
    first = first_screen(listed)
    assert "--seeds 3,8,0,1,2 --resume" in first.command
    assert "--out x --name c" in first.command
    assert "Train 5 seeds in all" in first.advice
    assert "(more training)" in first.advice


def test_the_seeds_of_an_undecided_margin_and_their_time():
    shown = comparison(5, 0.2, margin=0.2)
    wanted = seeds_to_equal(0.002, shown.difference("batchformer", "plain", "top1").sd)
    first = first_screen(shown)
    assert f"--seeds {wanted} --resume" in first.command
    assert f"about {2 * (wanted - 5)} minutes of training" in first.advice
    assert "by at least 0.2 points, when" in first.asked


def test_missing_runs_are_finished_first():
    absent = LeftOut(Path("c/plain/seed9"), "missing", "plain", 9)
    first = first_screen(comparison(5, 2, left_out=(absent,)))
    assert first.advice == "Finish the run that is missing:"
    assert first.command.endswith("--resume")
    assert "--seeds 3" in first.command
    nothing = Comparison(Path("c"), "r", ("plain", "batchformer"), (0,), "top1", ())
    assert first_screen(nothing).answer == "This is not known yet, since no run of batchformer is finished."


def test_the_sentences_stand_before_every_table(folders, tmp_path):
    folder = folders.comparison(tmp_path / "c")
    page, text = write_report([folder], tmp_path / "out").report.read_text(), comparison_text(read_comparison(folder))
    for shown, table in ((page, "| arm |"), (text, "arm  ")):
        places = [shown.index(word) for word in ("Question: ", "Answer: ", "Next: ", "batchformer compare", table)]
        assert places == sorted(places)
    assert text.startswith("Question: ")
