"""Find the run folders and comparison folders at or below some paths."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .reading import RUN_FILES, read_comparison, read_run
from .runs import Found, LeftOut, ReportError, Run

__all__ = ["find_runs"]


def find_runs(paths: Sequence[str | os.PathLike[str]]) -> Found:
    """Read every run and comparison at or below the given paths.

    Args:
        paths: Run folders, comparison folders, folders that hold such folders, or patterns (``"runs/cifar*"``) that the
            shell has not expanded.

    Returns:
        The :class:`Found` runs and comparisons; a folder reached by two paths appears once.

    Raises:
        ReportError: A path does not exist, no run was found at all, or a comparison mixes recipes, splits or
            selection rules.

    Example:
        >>> find_runs(["no/such/folder"])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        batchformer.report.runs.ReportError: Expected run folders, but no/such/folder does not exist. ...
    """
    comparison_folders: dict[Path, Path] = {}
    run_folders: dict[Path, Path] = {}
    for root in _expand(paths):
        for folder in _walk(root):
            kind = comparison_folders if (folder / "compare.json").is_file() else run_folders
            kind.setdefault(folder.resolve(), folder)
    comparisons = tuple(read_comparison(folder) for folder in comparison_folders.values())
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for resolved, folder in run_folders.items():
        if not any(parent in comparison_folders for parent in resolved.parents):
            entry = read_run(folder)
            (runs if isinstance(entry, Run) else left_out).append(entry)  # type: ignore[arg-type]
    if not comparisons and not runs:
        raise _nothing_found(paths, left_out)
    return Found(comparisons, tuple(runs), tuple(left_out))


def _expand(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    if not paths:
        raise ReportError("Expected at least one run or comparison folder, got none. Name one: batchformer report RUNS")
    for given in paths:
        path = Path(given)
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(os.fspath(path)))]
        if not matches:
            raise ReportError(
                f"Expected run folders, but {path} does not exist. "
                "Name a folder that `batchformer fit` or `batchformer compare` has written."
            )
        yield from matches


def _walk(root: Path) -> Iterator[Path]:
    """Comparison and run folders at or below ``root``, sorted; a folder inside one of them is not looked at."""
    for current, children, files in os.walk(root):
        children.sort()
        if "compare.json" in files or any(name in files for name in RUN_FILES):
            children.clear()
            yield Path(current)


def _nothing_found(paths: Sequence[str | os.PathLike[str]], left_out: Sequence[LeftOut]) -> ReportError:
    given = ", ".join(os.fspath(path) for path in paths)
    if left_out:
        reasons = "\n".join(f"  {entry.path}: {entry.reason}" for entry in left_out)
        return ReportError(f"Expected at least one finished run below {given}, found none that can be used:\n{reasons}")
    return ReportError(
        f"Expected run folders (with config.yaml, result.json and the mark `done`) or comparison folders (with "
        f"compare.json) below {given}, found neither. `batchformer fit` and `batchformer compare` write them."
    )
