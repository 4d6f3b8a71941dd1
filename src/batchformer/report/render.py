"""A table as a value, and its renderings as aligned text for a terminal and as CSV with full precision."""

import csv
import io
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["WIDTH", "Cell", "Table", "in_words", "one_line", "to_csv", "to_text", "wrap"]

WIDTH = 119
_NUMBER = re.compile(r"[-+\[\d]|n/a$|none$|$")
Cell = str | int | float | None


def in_words(names: Sequence[str]) -> str:
    """A list of names for a sentence.

    Example:
        >>> in_words(["photo"]), in_words(["photo", "sketch", "painting"])
        ('photo', 'photo, sketch and painting')
    """
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def one_line(text: str) -> str:
    r"""Text without line breaks and control characters, which names of classes and files may contain.

    Example:
        >>> one_line("two\nlines \x1b[31mred") == "two lines \ufffd[31mred"
        True
    """
    words = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(sign) in ("Cc", "Cs") else sign for sign in words)


@dataclass(frozen=True)
class Table:
    """A table ready to be rendered.

    Attributes:
        title: Heading of the table.
        columns: Heads of the columns.
        rows: Cells of each row, one for each column.
        notes: Sentences that stand below the table.
        leading: Number of columns at the beginning that name a row.

    Raises:
        ValueError: A row has another number of cells than there are columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    leading: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Expected {len(self.columns)} cells ({', '.join(self.columns)}), got {len(row)}: {row}"
                )

    @property
    def right_aligned(self) -> tuple[bool, ...]:
        """True for each column of numbers."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        return tuple(
            index >= self.leading and all(_NUMBER.match(cell) for cell in cells) for index, cells in enumerate(columns)
        )


def to_text(table: Table, width: int = WIDTH) -> str:
    """Aligned text of at most ``width`` columns; further columns follow in blocks that repeat the leading ones.

    Example:
        >>> print(to_text(Table("Runs", ("run", "top-1"), (("a", "81.00"), ("bcd", "9.50")))))
        Runs
        run  top-1
        ---  -----
        a    81.00
        bcd   9.50
        <BLANKLINE>
    """
    lines = [[one_line(cell) for cell in cells] for cells in (table.columns, *table.rows)]
    widths = [max(len(cells[index]) for cells in lines) for index in range(len(table.columns))]
    right = table.right_aligned
    leading = [*range(table.leading)]
    blocks = [leading.copy()]
    for index in range(table.leading, len(table.columns)):
        used = sum(widths[i] + 2 for i in blocks[-1])
        if len(blocks[-1]) > table.leading and used + widths[index] > width:
            blocks.append(leading.copy())
        blocks[-1].append(index)

    def line(cells: Sequence[str], block: Sequence[int]) -> str:
        padded = (cells[i].rjust(widths[i]) if right[i] else cells[i].ljust(widths[i]) for i in block)
        return "  ".join(padded).rstrip()

    rule = ["-" * size for size in widths]
    texts = ["\n".join(line(row, block) for row in (lines[0], rule, *lines[1:])) for block in blocks]
    return (
        f"{one_line(table.title)}\n"
        + "\n\n".join(texts)
        + "\n"
        + "".join(f"{wrap(note, width)}\n" for note in table.notes)
    )


def wrap(text: str, width: int = WIDTH, indent: str = "") -> str:
    """A paragraph broken into lines; lines after the first start with ``indent``."""
    return textwrap.fill(
        one_line(text), width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


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
