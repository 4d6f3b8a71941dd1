"""A recipe and its overrides become a data module, a task and the Trainer's arguments; errors come all at once."""

import contextlib
import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from batchformer.tasks.longtail.data import LongTailData
from batchformer.tasks.longtail.task import LongTailTask

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]
TASKS: dict[str, tuple[type[LightningModule], type[LightningDataModule]]] = {"longtail": (LongTailTask, LongTailData)}


class ConfigError(ValueError):
    """Everything that is wrong with a recipe and its overrides, in one message."""


class _Cli(LightningCLI):
    """Lightning's command line without its verbs: parses, links the seed and the precision, instantiates."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--task", type=Literal[tuple(TASKS)], default="longtail", help="Which task the recipe is of.")  # type: ignore[valid-type]
        parser.add_argument("--seed", type=int, default=0, help="Of weights, data order, augmentation and dropout.")
        parser.add_argument(
            "--precision", type=Precision, default="auto", help="auto: bf16 where the processor has it, else fp32."
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
            raise ConfigError(_all_problems(parser, list(args), error)) from None


def parse(recipe: Path, overrides: Sequence[str] = (), **trainer_defaults: Any) -> LightningCLI:
    """Parse and instantiate a recipe.

    Args:
        recipe: YAML file.
        overrides: ``--key=value`` or ``--key value``.
        trainer_defaults: Arguments of the Trainer that are not the recipe's business (folders, callbacks).

    Returns:
        With ``.model``, ``.datamodule``, ``.trainer``, ``.config`` and ``.parser``.

    Raises:
        ConfigError: For unknown keys, with the nearest ones, and values of the wrong type; all in one message.
    """
    task, data = TASKS[_task_of(recipe)]
    return _Cli(
        task,
        data,
        args=["--config", str(recipe), *overrides],
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_class=Trainer,
        trainer_defaults=trainer_defaults,
        parser_kwargs={"exit_on_error": False},
        auto_configure_optimizers=False,
    )


def dump(cli: LightningCLI) -> str:
    """The resolved config as YAML: it is a recipe again."""
    config = cli.config.clone() if isinstance(cli.config, Namespace) else Namespace(cli.config)
    config.pop("config", None)
    text: str = cli.parser.dump(config, skip_none=False, skip_link_targets=True)
    return text


def resolve_precision(precision: str) -> str:
    """``auto`` is bf16 on devices and processors with bf16 instructions, fp32 elsewhere.

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


def _task_of(recipe: Path) -> str:
    task = _read(recipe).get("task", "longtail")
    if task not in TASKS:
        raise ConfigError(f"Expected task to be one of {sorted(TASKS)} in {recipe}, got {task!r}.")
    return str(task)


def _read(recipe: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"Expected YAML in {recipe}, got: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"Expected a YAML mapping in {recipe}, got {type(content).__name__}.")
    return content


def _all_problems(parser: LightningArgumentParser, args: list[str], error: BaseException) -> str:
    """Try every setting by itself: unknown keys get the nearest ones, the others jsonargparse's own words."""
    given: dict[str, Any] = dict(_leaves(_read(Path(args[1]))))
    overrides, problems = _overrides(args[2:])
    given.update(overrides)
    known = {key for key in parser.get_defaults().keys() if key != "config"}  # noqa: SIM118  # a Namespace
    groups = {key.rpartition(".")[0] for key in known}
    for key, value in given.items():
        if key not in known and key not in groups and not _inside_dict(key, known):
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or _same_last_part(key, known)
            problems.append(f"Unknown setting {key!r}." + (f" Did you mean {' or '.join(map(repr, near))}?" if near else ""))
        elif problem := _problem(parser, key, value):
            problems.append(f"{key}={value!r}: {problem}")
    if not problems:
        problems = [str(error)]
    plural = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    return f"{plural} in {args[1]} and its overrides:\n" + "\n".join(f"  - {problem}" for problem in problems)


def _problem(parser: LightningArgumentParser, key: str, value: Any) -> str | None:
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parser.parse_object(nested)
    except (ArgumentError, SystemExit, ValueError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else "not accepted"
    return None


def _overrides(args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, Any] = {}
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
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[key] = value
    return found, problems


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves


def _inside_dict(key: str, known: set[str]) -> bool:
    """Whether a part of the key is a setting that takes any keys (``model.loss.settings.tau``)."""
    parts = key.split(".")
    return any(".".join(parts[:i]) in known for i in range(1, len(parts)))


def _same_last_part(key: str, known: set[str]) -> list[str]:
    last = difflib.get_close_matches(key.rpartition(".")[2], {k.rpartition(".")[2] for k in known}, n=1, cutoff=0.7)
    return sorted(k for k in known if last and k.rpartition(".")[2] == last[0])[:3]
