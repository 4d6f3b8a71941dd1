"""A comparison as text for a terminal."""

from dataclasses import replace

from .caveats import caveats
from .certainty import certainty_table
from .costs import cost_table
from .first_screen import first_screen
from .planning import planning_table
from .render import WIDTH, one_line, to_text, wrap
from .runs import Comparison
from .sentences import conclusions, multiple_comparisons
from .tables import controls_table, main_table, units_table

__all__ = ["comparison_text"]


def comparison_text(comparison: Comparison, width: int = WIDTH) -> str:
    """A whole comparison for the terminal: question, answer and next step, then tables, conclusions, caveats.

    Args:
        comparison: Finished runs may be missing in any arm.
        width: Largest number of columns of a line.
    """
    tables = [main_table(comparison)]
    if comparison.has_units:
        tables.append(units_table(comparison))
    if comparison.controls:
        table = controls_table(comparison)
        tables.append(replace(table, columns=table.columns[:-1], rows=tuple(row[:-1] for row in table.rows)))
    tables += [*certainty_table(comparison), *planning_table(comparison), cost_table(comparison)]
    first = first_screen(comparison)
    sentences = "\n".join(wrap(line, width, "  ") for line in first.lines)
    # The command stays on one line, so that it can be copied.
    parts = [f"{sentences}\n  {one_line(first.command)}\n", *(to_text(table, width) for table in tables)]
    for title, lines in (
        ("Conclusions", [*conclusions(comparison), multiple_comparisons(comparison)]),
        ("Caveats", caveats(comparison)),
    ):
        if lines:
            parts.append("\n".join([title, *(wrap(f"- {line}", width, "  ") for line in lines)]) + "\n")
    return "\n".join(parts)
