"""Reports and tables as Markdown: the template is filled in, and every value in it is escaped."""

import os
import re
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import quote

from .contents import Contents
from .render import Table, one_line

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["escape_markdown", "to_markdown"]

_TEMPLATE = "report.md.j2"
# Signs that would begin code, emphasis, a cell, HTML, an entity or the target of a link; `_` inside a word is harmless.
_SPECIAL = re.compile(r"[\\`*|~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])")
_ENTITY = re.compile(r"&(?=#?\w+;)")
# Beginnings of a line that would make it a heading, a quotation, a list or a rule.
_BLOCK = re.compile(r"^(?:([-+#=](?=[\s#=+-]|$)|>)|(\d{1,9})([.)])(?=\s|$))")


def escape_markdown(text: str) -> str:
    r"""Text that Markdown shows letter by letter, on one line.

    Example:
        >>> print(escape_markdown("a|b `c` <i> self_only\n_d_"))
        a\|b \`c\` &lt;i> self_only \_d\_
    """
    escaped = _SPECIAL.sub(r"\\\g<0>", _ENTITY.sub("&amp;", one_line(text))).replace("<", "&lt;")
    return _BLOCK.sub(lambda found: f"{found[2] or ''}\\{found[1] or found[3]}", escaped)


def _code(text: str) -> str:
    """Inline code, between more backticks than the text has in a row."""
    line = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _link(path: str) -> str:
    """The target of a link to a file."""
    return quote(os.fsencode(path))


@lru_cache(maxsize=1)
def _environment() -> "Environment":
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:  # torch brings both
        raise ImportError("Writing a report needs Jinja2: pip install jinja2") from error

    def finalize(value: object) -> Markup:
        """Escape a value; macros and the filters below give Markup, which stays."""
        return value if isinstance(value, Markup) else Markup(escape_markdown(str(value)))

    environment = Environment(
        loader=PackageLoader("batchformer.report"),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = lambda text: Markup(_code(str(text)))
    environment.filters["link"] = lambda path: Markup(_link(str(path)))
    return environment


def to_markdown(shown: Contents | Table) -> str:
    r"""A report, or one table with its notes, as Markdown (GitHub's flavour).

    Example:
        >>> print(to_markdown(Table("Runs", ("run", "top-1"), (("a|b", "81.00"),))))
        | run | top-1 |
        | --- | ---: |
        | a\|b | 81.00 |
        <BLANKLINE>
    """
    template = _environment().get_template(_TEMPLATE)
    if isinstance(shown, Table):
        return str(template.make_module({"report": None}).table(shown))  # type: ignore[attr-defined]
    return re.sub(r"\n{3,}", "\n\n", template.render(report=shown)).strip() + "\n"
