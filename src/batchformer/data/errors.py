"""Errors about data. Each message names what was expected, what was found, and a way out."""

from collections.abc import Iterable, Sequence
from pathlib import Path

MOST_SHOWN = 20
"""Number of offenders that a message lists; the rest is counted."""


class DataError(ValueError):
    """Error for data that is there but cannot be used: a corrupt image, a label out of range, a wrong checksum."""


class DataNotFoundError(DataError):
    """Error for data that is not there; the message lists where it was looked for and how to get it.

    Args:
        what: Name of the missing data.
        looked_in: Places that were tried, in order.
        ways: Ways out for the user, one sentence each.

    Example:
        >>> from pathlib import Path
        >>> print(DataNotFoundError("CIFAR-10", [Path("data")], ["Unpack it to data/cifar-10-batches-py."]))
        Could not find CIFAR-10. Looked in:
          data
        What to do:
          - Unpack it to data/cifar-10-batches-py.
    """

    def __init__(self, what: str, looked_in: Sequence[Path], ways: Sequence[str]) -> None:
        self.what, self.looked_in, self.ways = what, list(looked_in), list(ways)
        places = "".join(f"\n  {place}" for place in looked_in) or "\n  (nowhere: no place was given)"
        advice = "".join(f"\n  - {way}" for way in ways)
        super().__init__(f"Could not find {what}. Looked in:{places}\nWhat to do:{advice}")

    def __reduce__(self) -> tuple[type["DataNotFoundError"], tuple[str, list[Path], list[str]]]:
        return type(self), (self.what, self.looked_in, self.ways)


def listing(offenders: Iterable[object]) -> str:
    """Write the first ``MOST_SHOWN`` offenders, each on a line of its own, then the number of the others.

    Example:
        >>> print(listing(["a.png", "b.png"]))
        <BLANKLINE>
          a.png
          b.png
    """
    lines = [str(offender) for offender in offenders]
    text = "".join(f"\n  {line}" for line in lines[:MOST_SHOWN])
    return text + (f"\n  ... and {len(lines) - MOST_SHOWN} more" if len(lines) > MOST_SHOWN else "")
