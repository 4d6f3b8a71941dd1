"""A table as a value, and its renderings: Markdown, aligned text for a terminal, CSV with full precision."""

import csv
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["WIDTH", "Cell", "Table", "to_csv", "to_markdown", "to_text", "wrap"]

WIDTH = 119
Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table ready to be rendered: every row has one cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Expected {len(self.columns)} cells ({', '.join(self.columns)}), got {len(row)}: {row}"
                )


def to_markdown(table: Table) -> str:
    """Pipe table with its notes; a `|` in a cell is escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    aligns = ["---:" if right else "---" for right in _right_aligned(table)]
    text = "\n".join([line(table.columns), line(aligns), *(line(row) for row in table.rows)])
    return text + "".join(f"\n\n{note}" for note in table.notes) + "\n"


_NUMBER = re.compile(r"[-+\[\d]|n/a$|none$|$")


def _right_aligned(table: Table) -> list[bool]:
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return [index > 0 and all(_NUMBER.match(cell) for cell in cells) for index, cells in enumerate(columns)]


def to_text(table: Table, width: int = WIDTH) -> str:
    """Aligned text of at most ``width`` columns; further columns follow in blocks that repeat the first one.

    Example:
        >>> print(to_text(Table("Runs", ("run", "top-1"), (("a", "81.00"), ("bcd", "9.50")))))
        Runs
        run  top-1
        ---  -----
        a    81.00
        bcd   9.50
        <BLANKLINE>
    """
    widths = [max(len(row[index]) for row in (table.columns, *table.rows)) for index in range(len(table.columns))]
    right = _right_aligned(table)
    blocks: list[list[int]] = [[]]
    for index in range(1, len(table.columns)):
        used = widths[0] + sum(widths[i] + 2 for i in blocks[-1])
        if blocks[-1] and used + 2 + widths[index] > width:
            blocks.append([])
        blocks[-1].append(index)

    def line(cells: Sequence[str], block: Sequence[int]) -> str:
        padded = (cells[i].rjust(widths[i]) if right[i] else cells[i].ljust(widths[i]) for i in (0, *block))
        return "  ".join(padded).rstrip()

    rule = ["-" * size for size in widths]
    texts = ["\n".join(line(row, block) for row in (table.columns, rule, *table.rows)) for block in blocks]
    return f"{table.title}\n" + "\n\n".join(texts) + "\n" + "".join(f"{wrap(note, width)}\n" for note in table.notes)


def wrap(text: str, width: int = WIDTH, indent: str = "") -> str:
    """A paragraph broken into lines; lines after the first start with ``indent``."""
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def to_csv(rows: Sequence[Mapping[str, Cell]]) -> str:
    """Records as CSV: the union of their keys as columns, full precision, ``nan`` for undefined, empty for absent.

    Example:
        >>> print(to_csv([{"arm": "plain", "top1": 0.1 + 0.2}, {"arm": "frozen"}]))
        arm,top1
        plain,0.30000000000000004
        frozen,
        <BLANKLINE>
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
