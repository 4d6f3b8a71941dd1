"""Reports: read run folders and comparison folders, never train, and know no task.

The line: folders -> :func:`find_runs` -> paired statistics -> tables, sentences, plots -> contents -> Markdown and CSV
(:func:`write_report`).
"""

from .finding import find_runs
from .markdown import to_markdown
from .measures import Measure
from .paired import PairedDifference, Summary, paired_difference, summarize
from .reading import read_comparison, read_run
from .render import Table, to_csv, to_text
from .runs import ClassResult, Comparison, Found, LeftOut, ReportError, Run, StageCost, Unit
from .terminal import comparison_text
from .write import ReportPaths, write_report

__all__ = [
    "ClassResult",
    "Comparison",
    "Found",
    "LeftOut",
    "Measure",
    "PairedDifference",
    "ReportError",
    "ReportPaths",
    "Run",
    "StageCost",
    "Summary",
    "Table",
    "Unit",
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
