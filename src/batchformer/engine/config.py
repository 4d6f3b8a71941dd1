"""A recipe and its overrides become a data module, a task and the Trainer's arguments; errors come all at once."""

import contextlib
import difflib
import io
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from batchformer.tasks.training.checkpoint import no_run
from batchformer.tasks.training.contract import Measure

from .errors import ConfigError
from .stages import StageSettings, fold, leaves, word
from .tasks import task_class, task_part, tasks

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]
INSTEAD = {"trainer.precision": "precision", "data.seed": "seed", "model.seed": "seed", "seed_everything": "seed"}
"""Settings that follow from others: the setting, and the one to set."""
RUN_CONFIG = "config.yaml"
"""Name of the resolved settings in a run folder."""
CIRCUMSTANCES = ("default_root_dir", "enable_progress_bar")
"""Arguments of the Trainer about the place of a run, which may be moved; they are no part of its settings."""


class _Cli(LightningCLI):
    """Lightning's command line without its verbs: parses, links the seed and the precision, instantiates."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        known = Literal[tuple(tasks())]  # type: ignore[valid-type]
        parser.add_argument("--task", type=known, default="longtail", help="Task that the recipe is for.")
        parser.add_argument(
            "--seed", type=int, default=0, help="Seed of initial weights, data order, augmentation and dropout."
        )
        parser.add_argument(
            "--precision", type=Precision, default="auto", help="auto: bf16 where the processor has it, else fp32."
        )
        parser.add_argument(
            "--stages",
            type=list[StageSettings] | None,
            default=None,
            help="Stages that are fitted in turn, each with name, epochs and settings; one setting of one stage: "
            "--stages.NAME.epochs=5.",
        )
        parser.link_arguments("seed", "data.seed")
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("precision", "trainer.precision", compute_fn=resolve_precision)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            # jsonargparse prints its usage on an error; ours lists every problem instead.
            with contextlib.redirect_stderr(io.StringIO()):
                # Not super(): it warns of every command line that it does not read itself.
                self.config = parser.parse_args(args)
        except (ArgumentError, SystemExit) as error:
            raise _Refused(parser, error) from None


class _Refused(Exception):
    """A command line that the parser refuses, with the parser and its own word."""

    def __init__(self, parser: LightningArgumentParser, error: BaseException) -> None:
        super().__init__(str(error))
        self.parser, self.error = parser, error


def parse(
    recipe: Path, overrides: Sequence[str] = (), of_stage: Sequence[str] = (), **trainer_defaults: Any
) -> LightningCLI:
    """Parse and instantiate a recipe.

    Args:
        recipe: YAML file.
        overrides: ``--key=value`` or ``--key value``.
        of_stage: Settings that a stage adds, in the same form; they are of this version, whatever the others are.
        trainer_defaults: Arguments of the Trainer that are not the recipe's business (folders, callbacks).

    Returns:
        Lightning's command line with ``.model``, ``.datamodule``, ``.trainer``, ``.config`` and ``.parser``.

    Raises:
        ConfigError: For unknown keys, with the nearest ones, and values of the wrong type; all in one message.
    """
    task = task_class(task_of(recipe))
    overrides = fold(overrides, _read(recipe).get("stages"))
    given, problems = _given(recipe, overrides)
    source, words = _in_todays_terms(task, recipe, overrides, given)
    try:
        return _Cli(
            task,
            task.data_type,
            args=["--config", source, *words, *of_stage],
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            trainer_class=Trainer,
            trainer_defaults=trainer_defaults,
            parser_kwargs={"exit_on_error": False},
            auto_configure_optimizers=False,
        )
    except _Refused as refused:
        given |= _overrides(of_stage)[0]
        raise ConfigError(_all_problems(refused.parser, refused.error, recipe, given, problems)) from None
    except MisconfigurationException as error:  # the Trainer's word on arguments that do not go together
        raise ConfigError(str(error)) from error


def _in_todays_terms(
    task: Any, recipe: Path, overrides: Sequence[str], given: dict[str, list[Any]]
) -> tuple[str, list[str]]:
    """Return what the parser reads: recipe and overrides, or one text where a setting is of an older version."""
    before = {key: readings[0] for key, readings in given.items()}
    now = task.translate_settings(dict(before))
    if now == before:
        return str(recipe), list(overrides)
    gone = [key for key in before if key not in now]
    new = {key: value for key, value in now.items() if key not in before or before[key] != value}
    if recipe.name != RUN_CONFIG:
        _warn_once(
            f"Settings of an older version in {recipe} or its overrides: {', '.join(gone)}. In today's words they are: "
            f"{' '.join(shlex.quote(word(key, value)) for key, value in new.items())}"
        )
    # Words that mean today what they meant then stay words, which the parser reads by their types.
    kept = {key: readings[-1] for key, readings in _overrides(overrides)[0].items() if key in now and key not in new}
    source = {key: value for key, value in now.items() if key not in kept}
    return yaml.safe_dump(_nested(source), sort_keys=False), [f"--{key}={text}" for key, text in kept.items()]


_TOLD: set[str] = set()


def _warn_once(text: str) -> None:
    """Warn once in a process, however often the recipe is read."""
    if text not in _TOLD:
        _TOLD.add(text)
        warnings.warn(text, FutureWarning, stacklevel=2)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        inside = tree
        for group in groups:
            inside = inside.setdefault(group, {})
        inside[name] = value
    return tree


def dump(cli: LightningCLI, *, absolute: Sequence[str] = ()) -> str:
    """Return the resolved config as YAML, which is a recipe again.

    Args:
        cli: Parsed command line.
        absolute: Settings whose paths are made absolute, so that they hold in any working folder.
    """
    config = cli.config.clone()
    for name in ("config", *(f"trainer.{name}" for name in CIRCUMSTANCES)):
        config.pop(name, None)
    for stage in config.get("stages") or ():
        # A stage says what differs from the settings of the run, so that equal runs have equal configs.
        stage.settings = {key: value for key, value in stage.settings.items() if config.get(key) != value}
    for key in absolute:
        if config.get(key) is not None:
            config[key] = str(Path(config[key]).expanduser().absolute())
    text: str = cli.parser.dump(config, skip_none=False, skip_link_targets=True)
    return text


def differences(before: str, now: str) -> list[str]:
    """Return the settings that differ between two resolved configs (YAML), as lines ``key: new (was: old)``.

    Example:
        >>> differences("a: {b: 1}", "a: {b: 2}")
        ['a.b: 2 (was: 1)']
    """
    old, new = (dict(leaves(_by_name(yaml.safe_load(text) or {}))) for text in (before, now))
    return [
        f"{key}: {new.get(key)} (was: {old.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the stages by their names, so that one difference is one line."""
    if not isinstance(settings.get("stages"), list):
        return settings
    return {**settings, "stages": {one["name"]: {**one, "place": i} for i, one in enumerate(settings["stages"], 1)}}


def resolve_precision(precision: str) -> str:
    """Resolve ``auto`` to bf16 on devices and processors with bf16 instructions, and to fp32 elsewhere.

    Example:
        >>> resolve_precision("16-mixed")
        '16-mixed'
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "bf16-mixed" if _cpu_has_bf16() else "32-true"


def _cpu_has_bf16() -> bool:
    # torch emulates bf16 on any processor, slowly; only the instructions make it worth while.
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(name in flags.split() for name in ("avx512_bf16", "amx_bf16", "bf16"))


def task_of(recipe: Path) -> str:
    """Return the task of a recipe.

    Raises:
        ConfigError: For an unknown one, and a file that is no recipe.
    """
    task = _read(recipe).get("task", "longtail")
    if task not in tasks():
        raise ConfigError(f"Expected task to be one of {', '.join(sorted(tasks()))} in {recipe}, got {task!r}.")
    return str(task)


def run_part(run: Path, part: str) -> ModuleType:
    """Import a module of the task that a run is of: ``restore`` or ``predict``.

    Raises:
        FileNotFoundError: When it is no run folder.
        ImportError: When a package is missing; names the extra.
    """
    config = run / RUN_CONFIG
    if not config.is_file():
        raise no_run(run, RUN_CONFIG)
    return task_part(task_of(config), part)


def measures_of(config: Path) -> tuple[Measure, ...]:
    """Return the measures of the task that a recipe, or the config of a run, is for."""
    return task_class(task_of(config)).measures


def _read(recipe: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"Expected YAML in {recipe}, got: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"Expected a YAML mapping in {recipe}, got {type(content).__name__}.")
    return content


def _all_problems(
    parser: LightningArgumentParser,
    error: BaseException,
    recipe: Path,
    given: dict[str, list[Any]],
    problems: list[str],
) -> str:
    """Try every setting by itself: unknown keys get the nearest ones, the others what was expected."""
    problems = list(problems)
    known = {key for key in parser.get_defaults().keys() if key != "config"} - set(INSTEAD)  # noqa: SIM118  # a Namespace
    groups = {key.rpartition(".")[0] for key in known}
    for key, readings in given.items():
        if key in INSTEAD:
            problems.append(f"{key} follows from {INSTEAD[key]}. Set that.")
        elif key not in known and key not in groups and not _inside_dict(key, known):
            problems.append(f"Unknown setting {key}." + _nearest(key, known))
        elif key in groups and not isinstance(readings[0], dict):
            problems.append(f"{key}: expected a mapping of settings, got {readings[0]!r}.")
        elif problem := _problem(parser, key, readings):
            problems.append(f"{key}: {problem}")
    if not problems:
        problems = [str(error)]
    plural = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    return f"{plural} in {recipe} and its overrides:\n" + "\n".join(f"  - {problem}" for problem in problems)


def setting(recipe: Path, overrides: Sequence[str], key: str) -> Any:
    """Return what a recipe and its overrides say of one setting, ``None`` where they are silent; nothing is checked."""
    words = fold(overrides, _read(recipe).get("stages"))
    given = {name: readings[0] for name, readings in _given(recipe, words)[0].items()}
    return task_class(task_of(recipe)).translate_settings(given).get(key)


def _given(recipe: Path, overrides: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    given = {key: [value] for key, value in leaves(_read(recipe))}
    found, problems = _overrides(overrides)
    return given | found, problems


def _problem(parser: LightningArgumentParser, key: str, readings: list[Any]) -> str | None:
    """Return the problem with a value, which may be read in several ways (123: a number, or a name); else ``None``."""
    for nested in readings:
        for part in reversed(key.split(".")):
            nested = {part: nested}
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                parser.parse_object(nested)
        except (ArgumentError, SystemExit, ValueError, TypeError) as error:
            last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:]
        else:
            return None
    action = next((action for action in parser._actions if action.dest == key), None)
    if (hint := getattr(action, "_typehint", None)) is not None:
        return f"expected {_in_words(hint)}, got {readings[0]!r}."
    return "".join(last) or "not accepted."


def _in_words(hint: Any) -> str:
    """Return a type as an error message says it.

    Example:
        >>> _in_words(int | None), _in_words(Literal["a", "b"]), _in_words(list[str])
        ('an integer or null', 'one of a, b', 'a list (each: text)')
    """
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null", Path: "a path"}
    origin, inside = get_origin(hint), get_args(hint)
    if hint in plain:
        return plain[hint]
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_in_words(part) for part in inside))
    if origin is Literal:
        return ("one of " if len(inside) > 1 else "") + ", ".join(map(str, inside))
    if origin is tuple:
        return f"a list of {len(inside)} (each: {_in_words(inside[0])})"
    if origin is list:
        return f"a list (each: {_in_words(inside[0])})"
    if origin is dict:
        return "a mapping"
    return getattr(hint, "__name__", str(hint))


def _overrides(args: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    found: dict[str, list[Any]] = {}
    problems: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            problems.append(f"Expected --key=value, got {word!r}.")
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                problems.append(f"Expected a value for --{key}.")
                continue
            value = rest.pop(0)
        found[key] = [_yaml(value), value]
    return found, problems


def _yaml(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _inside_dict(key: str, known: set[str]) -> bool:
    """Return whether a part of the key is a setting that takes any keys, as in ``model.loss.settings.tau``."""
    parts = key.split(".")
    return any(".".join(parts[:i]) in known for i in range(1, len(parts)))


def _nearest(key: str, known: set[str]) -> str:
    """Name the nearest settings: in the same group, then of the same last name anywhere, then by the whole key."""
    group, _, name = key.rpartition(".")
    inside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == group]
    near = [f"{group}.{k}".lstrip(".") for k in difflib.get_close_matches(name, inside, n=2, cutoff=0.7)]
    if not near:
        last = difflib.get_close_matches(name, {k.rpartition(".")[2] for k in known}, n=1, cutoff=0.75)
        near = sorted(k for k in known if last and k.rpartition(".")[2] == last[0])[:3]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
