"""Pictures that tasks leave in their run folders, the same one of several arms side by side."""

import os
from pathlib import Path

from .runs import BASELINE, Comparison

__all__ = ["picture_table"]

_MOST = 8


def picture_table(comparison: Comparison, folder: Path) -> str | None:
    """``pictures/<name>.png`` of the arms' runs with one seed, as a Markdown table.

    Args:
        comparison: Its finished runs.
        folder: Of the report, to which the links are relative.

    Returns:
        The table; None without pictures.
    """
    for seed in comparison.seeds:
        runs = [run for run in comparison.runs if run.seed == seed and (run.path / "pictures").is_dir()]
        runs.sort(key=lambda run: comparison.arms.index(run.arm))
        if any(run.arm == BASELINE for run in runs) or (runs and seed == comparison.seeds[-1]):
            break
    else:
        return None
    names = sorted({path.name for run in runs for path in (run.path / "pictures").glob("*.png")})
    lines = [["", *(f"{run.arm}, seed {run.seed}" for run in runs)], ["---"] * (1 + len(runs))]
    for name in names[:_MOST]:
        paths = [run.path / "pictures" / name for run in runs]
        links = [f"![{name}](<{os.path.relpath(path, folder)}>)" if path.is_file() else "" for path in paths]
        lines.append([name.removesuffix(".png"), *links])
    more = f"\n{len(names) - _MOST} more are in the run folders.\n" if len(names) > _MOST else ""
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines) + more if names else None
