"""Pictures that tasks leave in their run folders, the same one of several arms side by side."""

import os
from pathlib import Path

from .runs import BASELINE, Comparison

__all__ = ["picture_table"]

_MOST = 8


def picture_table(comparison: Comparison, folder: Path) -> str | None:
    """``pictures/<name>.png`` of the arms' runs with one seed, as a Markdown table: one row for each name.

    Before them stands ``pictures/given/<name>.png``, where a run has it: image and truth, the same in every arm.

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
    sources = [(f"{run.arm}, seed {run.seed}", run.path / "pictures") for run in runs]
    given = next((run.path / "pictures" / "given" for run in runs if (run.path / "pictures" / "given").is_dir()), None)
    if given is not None:
        sources.insert(0, ("given", given))
    lines = [["", *(title for title, _ in sources)], ["---"] * (1 + len(sources))]
    for name in names[:_MOST]:
        paths = [source / name for _, source in sources]
        links = [f"![{name}](<{os.path.relpath(path, folder)}>)" if path.is_file() else "" for path in paths]
        lines.append([name.removesuffix(".png"), *links])
    more = f"\n{len(names) - _MOST} more are in the run folders.\n" if len(names) > _MOST else ""
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines) + more if names else None
