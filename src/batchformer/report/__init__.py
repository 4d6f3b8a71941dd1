"""Reports: reads run folders and comparison folders, never trains, and imports nothing else of the project.

The line: folders -> :func:`find_runs` -> statistics -> tables, plots, sentences -> :func:`write_report`.
"""

from .paired import PairedDifference, Summary, paired_difference, summarize
from .reading import find_runs, read_comparison, read_run
from .render import Table, to_csv, to_markdown, to_text
from .runs import ClassResult, Comparison, Found, LeftOut, ReportError, Run
from .tables import comparison_text
from .write import ReportPaths, write_report

__all__ = [
    "ClassResult",
    "Comparison",
    "Found",
    "LeftOut",
    "PairedDifference",
    "ReportError",
    "ReportPaths",
    "Run",
    "Summary",
    "Table",
    "comparison_text",
    "find_runs",
    "paired_difference",
    "read_comparison",
    "read_run",
    "summarize",
    "to_csv",
    "to_markdown",
    "to_text",
    "write_report",
]
