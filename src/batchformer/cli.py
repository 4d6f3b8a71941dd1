"""The ``batchformer`` command. Each verb imports what it needs when it runs, so that help and ``ls`` answer at once."""

import argparse
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

AddVerb = Callable[..., argparse.ArgumentParser]
MAIN_RECIPE = "longtail/fashion-mnist-lt"
FOLDER_RECIPE = "longtail/folder"
OVERRIDES = (
    "Every setting of the recipe can be overridden: --model.optimizer.lr=0.05 --data.batch_size=64 --seed=1. "
    "See them all with: batchformer fit RECIPE --print-config"
)

SCENES = {
    "size": (int, "pixels of each side of a scene (default: 160)"),
    "train": (int, "number of training scenes (default: 3000)"),
    "val": (int, "number of validation scenes (default: 200)"),
    "test": (int, "number of test scenes made of photographs seen in training (default: 500)"),
    "unseen": (int, "number of test scenes made of photographs never seen in training (default: 300)"),
    "least_objects": (int, "smallest number of photographs in a scene (default: 1)"),
    "most_objects": (int, "largest number of photographs in a scene (default: 4)"),
    "least_side": (float, "smallest longer side of a photograph, as a share of the scene's side (default: 0.3)"),
    "most_side": (float, "largest longer side of a photograph, as a share of the scene's side (default: 0.65)"),
    "visible": (float, "share of a photograph that other photographs may not hide (default: 0.5)"),
    "seed": (int, "seed of all random choices (default: 0)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # batchformer ls | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str]) -> int:
    command = shlex.join(["batchformer", *words])
    parser, verbs = _parsers()
    verb = next((word for word in words if not word.startswith("-")), None)
    overrides: list[str] = []
    if verb in ("fit", "test", "compare"):
        words, overrides = _take_overrides(words, verbs[verb])
    arguments = parser.parse_args(words)
    if arguments.verb is None:
        parser.print_help()
        return 0
    arguments.overrides = overrides
    arguments.command = command
    try:
        status = arguments.run(arguments)
    except KeyboardInterrupt:
        again = command if "--resume" in words else f"{command} --resume"
        way = f" Nothing is lost: go on with\n    {again}" if arguments.verb in ("fit", "compare") else ""
        print(f"\nInterrupted.{way}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("BATCHFORMER_TRACEBACK") or not _explains_itself(error):
            raise
        print(f"batchformer {arguments.verb}: {error}", file=sys.stderr)
        return 2
    return int(status or 0)


def _explains_itself(error: Exception) -> bool:
    """Return whether an error is one that the user can mend, and not a defect of the program."""
    users = (ValueError, OSError, ImportError, FloatingPointError)
    return isinstance(error, users) or type(error).__name__ == "MisconfigurationException"  # the Trainer's word


class _Parser(argparse.ArgumentParser):
    """Argument parser that names the option or verb nearest to a wrong one."""

    def error(self, message: str) -> NoReturn:
        wrong, known = "", list(self._option_string_actions)
        if "invalid choice" in message:
            wrong, *known = re.findall(r"'([^']*)'", message)
        elif message.startswith(("unrecognized", "unknown option")):
            wrong = next((word for word in message.split() if word.startswith("-")), "")
        near = difflib.get_close_matches(wrong.partition("=")[0], known, n=1)
        self.exit(
            2, f"{self.prog}: {message}{f'. Did you mean {near[0]}?' if near else ''}\nHelp: {self.prog} --help\n"
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but let a verb refuse unknown arguments in its own name."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    from . import __version__

    parser = _Parser(
        prog="batchformer",
        description="Learn from the relations between the samples of a mini-batch.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"batchformer {__version__}")
    sub = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    def add(name: str, run: Any, text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        verb = sub.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
        verb.set_defaults(run=run)
        return verb

    _add_data_verbs(add)
    _add_training_verbs(add)
    _add_result_verbs(add)
    add("env", _env, "print versions and hardware, for a report of a problem")
    return parser, dict(sub.choices)


def _add_data_verbs(add: AddVerb) -> None:
    ls = add("ls", _ls, "list recipes, their data, and whether the data is on this machine")
    ls.add_argument("recipe", nargs="?", help="show the header of this recipe")

    data = add("data", _data, "fetch data sets, or list where they are looked for")
    data.add_argument("action", choices=("get", "ls"))
    data.add_argument("name", nargs="?", help="name of the data set; get needs it")
    data.add_argument("--root", help="folder of all data (default: BATCHFORMER_DATA, else ~/.cache/batchformer)")

    scenes = add("scenes", _scenes, "write scenes of real photographs with boxes and masks, as a COCO folder")
    scenes.add_argument("folder", metavar="OUT", help="new folder")
    for name, (kind, text) in SCENES.items():
        scenes.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=text)


def _add_training_verbs(add: AddVerb) -> None:
    fit = add("fit", _fit, "train one run, then test the plain network", OVERRIDES)
    fit.add_argument("recipe", metavar="RECIPE", help="recipe by name, a .yaml file, or a run folder with --resume")
    fit.add_argument("--name", help="name of the run folder (default: recipe, arm and seed)")
    fit.add_argument("--out", default="runs", help="folder that run folders are made in (default: runs)")
    fit.add_argument("--resume", action="store_true", help="go on exactly where it stopped (moved data: --data.root)")
    fit.add_argument("--print-config", action="store_true", help="print every setting with its value, and stop")

    moved = "For data that was moved: --data.root=FOLDER, and --data.num_workers=N, --data.memory_gib=N."
    test = add("test", _test, "test the plain network of a run on the test split", moved)
    test.add_argument("run_folder", metavar="RUN")

    compare = add("compare", _compare, "compare plain with +BatchFormer on the same seeds and data order", OVERRIDES)
    default = f"recipe (default: {MAIN_RECIPE}, or {FOLDER_RECIPE} with --data.root)"
    compare.add_argument("recipe", metavar="RECIPE", nargs="?", help=default)
    compare.add_argument("--seeds", default="3", help="number of seeds, or a list such as 3,5,8 (default: 3)")
    compare.add_argument("--controls", default="", help="control arms out of frozen,self_only,duplicate,single_stream")
    compare.add_argument(
        "--margin", type=float, help="smallest difference that matters, in points or in the metric's unit"
    )
    compare.add_argument("--jobs", type=int, help="runs side by side (default: one on each GPU, else one on each core)")
    compare.add_argument("--threads", type=int, help="threads of each run; its numbers can depend on it (default: 1)")
    compare.add_argument("--name", help="name of the comparison's folder (default: compare- and the recipe)")
    compare.add_argument("--out", default="runs", help="folder that it is made in (default: runs)")
    compare.add_argument("--resume", action="store_true", help="go on where it stopped, or add seeds and controls")


def _add_result_verbs(add: AddVerb) -> None:
    report = add("report", _report, "write tables and plots of runs and comparisons")
    report.add_argument("runs", metavar="RUN", nargs="+", help="run or comparison folders, or folders of such folders")
    report.add_argument(
        "--margin", type=float, help="smallest difference that matters, for comparisons made without one"
    )
    report.add_argument("--out", help="folder of the report (default: report/ in the first RUN)")

    export = add("export", _export, "write the plain network as safetensors and ONNX")
    export.add_argument("run_folder", metavar="RUN")
    export.add_argument("--out", help="folder of the files (default: export/ in RUN)")
    export.add_argument("--format", default="safetensors,onnx", help="formats out of safetensors,onnx (default: both)")

    predict = add("predict", _predict, "apply the plain network of a run to images")
    predict.add_argument("run_folder", metavar="RUN")
    predict.add_argument("images", metavar="IMAGES", nargs="+", help="image files, or folders of images")
    predict.add_argument("--out", help="folder of the predictions (default: predictions/ in RUN)")
    predict.add_argument("--threshold", type=float, help="lowest score to show, 0 to 1 (default: the task's own)")
    predict.add_argument("--beside", metavar="RUN", nargs="+", help="runs whose maps are drawn beside it (panoptic)")

    convert = add(
        "convert", _convert, "turn a published checkpoint of the DETR family into a folder that transformers loads"
    )
    convert.add_argument(
        "checkpoint", metavar="CHECKPOINT", help=".pth file of the official code, with or without BatchFormer"
    )
    convert.add_argument("--out", required=True, help="folder that is written")


def _take_overrides(words: list[str], verb: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Split the words into the verb's own and the recipe's settings, ``--key=value`` or ``--key value``."""
    own = verb._option_string_actions
    mine: list[str] = []
    settings: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, _ = word.partition("=")
        if not key.startswith("--") or key in own:
            mine.append(word)
        elif "." not in key and difflib.get_close_matches(key, own, n=1, cutoff=0.8):
            verb.error(f"unknown option {key}")
        elif equals or not rest or rest[0].startswith("--"):
            settings.append(word)
        else:
            settings.append(f"{word}={rest.pop(0)}")
    return mine, settings


def _ls(arguments: argparse.Namespace) -> None:
    from .data import fetch
    from .engine.recipes import find_recipe, recipes

    if arguments.recipe:
        print("\n".join(find_recipe(arguments.recipe).header))
        return
    rows = [("RECIPE", "DATA", "HERE", "WHAT")]
    for recipe in recipes():
        dataset = recipe.value("dataset") or "-"
        here = "--data.root" if dataset == "folder" else "yes" if fetch.locate(dataset) else "no"
        rows.append((recipe.name, dataset, here, recipe.header[0] if recipe.header else ""))
    _print_columns(rows)
    print("\nFetch data: batchformer data get NAME. Where data is looked for: batchformer data ls.")


def _data(arguments: argparse.Namespace) -> None:
    from .data import fetch

    if arguments.action == "get":
        if not arguments.name:
            raise ValueError(
                f"Expected the name of a data set: batchformer data get NAME, one of {', '.join(fetch.DATASETS)}."
            )
        print(fetch.get(arguments.name, arguments.root))
        return
    names = [arguments.name] if arguments.name else list(fetch.DATASETS)
    rows = [("DATA", "HERE", "WHAT")]
    for name in names:
        found = fetch.locate(name, arguments.root)
        rows.append((name, str(found) if found else "no", fetch.describe(name).content))
    _print_columns(rows)


def _scenes(arguments: argparse.Namespace) -> None:
    from .data import fetch

    settings = {name: value for name, value in vars(arguments).items() if name in SCENES}
    print(fetch.make(Path(arguments.folder), **settings))


def _fit(arguments: argparse.Namespace) -> None:
    from .engine.recipes import find_recipe, run_name

    recipe = find_recipe(arguments.recipe)  # before the slow imports
    from .engine.config import dump, measures_of, parse
    from .engine.metrics import line
    from .engine.run import first_rank, fit, quiet

    if arguments.print_config:
        quiet()
        print(dump(parse(recipe.path, arguments.overrides, logger=False)))
        return
    if Path(arguments.recipe).is_dir():
        if not arguments.resume:
            raise ValueError(f"{arguments.recipe} is a run folder. Go on with --resume, or name a recipe.")
        folder = Path(arguments.recipe)
    else:
        folder = Path(arguments.out) / (arguments.name or run_name(recipe.name, arguments.overrides))
    result = fit(
        recipe.path, arguments.overrides, folder, name=recipe.name, resume=arguments.resume, command=arguments.command
    )
    if first_rank():
        print(line(result["metrics"], measures_of(recipe.path)))
        print(f"Run: {folder}")


def _test(arguments: argparse.Namespace) -> None:
    from .engine.config import RUN_CONFIG, measures_of
    from .engine.metrics import line
    from .engine.run import test

    run = Path(arguments.run_folder)
    print(line(test(run, arguments.overrides), measures_of(run / RUN_CONFIG)))


def _compare(arguments: argparse.Namespace) -> None:
    from .engine.recipes import find_recipe, folder_name

    given_root = any(word.startswith("--data.root=") for word in arguments.overrides)
    recipe = find_recipe(arguments.recipe or (FOLDER_RECIPE if given_root else MAIN_RECIPE))
    seeds = _seeds(arguments.seeds)
    controls = [control.strip() for control in arguments.controls.split(",") if control.strip()]
    folder = Path(arguments.out) / (arguments.name or f"compare-{folder_name(recipe.name)}")

    from .engine.compare import compare
    from .engine.errors import RunsFailed

    options = {name: getattr(arguments, name) for name in ("jobs", "threads", "resume", "margin", "command")}
    try:
        compare(recipe.path, arguments.overrides, folder, name=recipe.name, seeds=seeds, controls=controls, **options)
    except RunsFailed:  # the report is of those that finished
        if any(folder.glob("*/*/done")):
            _print_comparison(folder)
        raise
    _print_comparison(folder)


def _print_comparison(folder: Path) -> None:
    from .report import comparison_text, read_comparison

    print()
    print(comparison_text(read_comparison(folder)))
    _report(argparse.Namespace(runs=[folder], out=None, margin=None))


def _report(arguments: argparse.Namespace) -> None:
    from .report import write_report

    folder = Path(arguments.out or Path(arguments.runs[0]) / "report")
    written = write_report(arguments.runs, folder, margin=arguments.margin)
    print(*written.notes, f"Report: {written.report}", sep="\n", flush=True)


def _export(arguments: argparse.Namespace) -> None:
    from .engine.export import export

    run = Path(arguments.run_folder)
    for path in export(run, Path(arguments.out or run / "export"), tuple(arguments.format.split(","))):
        print(path)


def _predict(arguments: argparse.Namespace) -> None:
    from .data.lists import image_files

    images = image_files(arguments.images)
    from .engine.predict import predict
    from .engine.run import quiet

    quiet()
    run = Path(arguments.run_folder)
    options: dict[str, Any] = {} if arguments.threshold is None else {"threshold": arguments.threshold}
    if arguments.beside:
        options["beside"] = [Path(folder) for folder in arguments.beside]
    for path in predict(run, images, Path(arguments.out or run / "predictions"), **options):
        print(path)


def _convert(arguments: argparse.Namespace) -> None:
    from .tasks.set_prediction.published.convert import convert

    report, files = convert(Path(arguments.checkpoint), Path(arguments.out))
    print(report)
    for path in files:
        print(path)


def _env(arguments: argparse.Namespace) -> None:
    import json

    from .engine.environment import environment

    print(json.dumps(environment(), indent=2))


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"Expected --seeds as a number or a list such as 0,1,2, got {text!r}.") from None
    if len(numbers) == 1 and "," not in text:
        if numbers[0] < 1:
            raise ValueError(f"Expected at least one seed, got {text}.")
        return list(range(numbers[0]))
    return numbers


def _print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
