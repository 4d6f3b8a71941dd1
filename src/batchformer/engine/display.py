"""The live display of runs that are side by side, one line for each run, and the time that is left."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tqdm import tqdm  # type: ignore[import-untyped]

from .callbacks import Progress

_WITH_BAR, _TEXT = "{desc} {bar:24} {percentage:3.0f} %", "{desc}"


class Display:
    """Show a line for each run that trains, on stderr when that is a terminal, and nothing otherwise.

    Args:
        total: Number of runs.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.on = sys.stderr.isatty()
        self._bars: dict[str, tqdm] = {}
        self._last: tqdm | None = None

    def show(self, running: Mapping[str, Progress | None], finished: int, seconds_left: float | None) -> None:
        """Draw the lines anew.

        Args:
            running: Title of each run to how far it is; ``None`` before its first step.
            finished: Number of runs that have ended.
            seconds_left: Estimate of the time to go; ``None`` while it is not known.
        """
        if not self.on:
            return
        if self._bars.keys() != running.keys():
            self.close()
            self._bars = {title: self._line(place, _WITH_BAR) for place, title in enumerate(running)}
            self._last = self._line(len(running), _TEXT)
        for title, bar in self._bars.items():
            progress = running[title]
            bar.n = 0.0 if progress is None else progress.fraction
            bar.set_description_str(f"{title}: {'starting' if progress is None else progress.words}", refresh=True)
        if self._last is not None:
            left = "" if seconds_left is None else f", {time_to_go(seconds_left)}"
            self._last.set_description_str(f"{finished} of {self.total} runs ended{left}", refresh=True)

    def _line(self, place: int, form: str) -> tqdm:
        return tqdm(total=1.0, position=place, leave=False, bar_format=form, file=sys.stderr, dynamic_ncols=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the lines away while something else is printed."""
        if not self.on:
            yield
            return
        with tqdm.external_write_mode(file=sys.stdout):
            yield

    def close(self) -> None:
        """Remove the lines."""
        for bar in [*self._bars.values(), *([self._last] if self._last is not None else [])]:
            bar.close()
        self._bars, self._last = {}, None


def seconds_left(done: Sequence[float], running: Sequence[tuple[float, float]], waiting: int) -> float | None:
    """Estimate the time to go, from the mean time of a run.

    Args:
        done: Seconds that each finished run took, side by side with others.
        running: Seconds and finished fraction (0 to 1) of each run that trains.
        waiting: Number of runs that have not been started.

    Returns:
        Seconds, or ``None`` while nothing is finished and no run is far enough to tell.

    Example:
        >>> seconds_left([60.0], [(30.0, 0.5), (30.0, 0.5)], waiting=2)
        90.0
    """
    told = list(done) or [seconds / fraction for seconds, fraction in running if fraction > 0.1]
    if not told:
        return None
    whole = sum(told) / len(told)
    work = waiting * whole + sum((1 - fraction) * whole for _, fraction in running)
    return work / max(1, len(running))


def time_to_go(seconds: float) -> str:
    """Return a time to go as words.

    Example:
        >>> time_to_go(204), time_to_go(8100)
        ('about 3.4 minutes to go', 'about 2.2 hours to go')
    """
    return f"about {seconds / 60:.1f} minutes to go" if seconds < 5400 else f"about {seconds / 3600:.1f} hours to go"
