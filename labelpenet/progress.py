"""A line that tells how far a long piece of work is: a live one on a terminal, elsewhere one every half minute."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_log = logging.getLogger(__name__)
_FIGURES = {
    "images_per_s": "{:.3g} images/s", "data_s": "data {:.2g} s", "memory_mb": "{:.0f} MB", "skipped": "{} skipped",
}  # fmt: skip


class Progress:
    """The line of one stage.

    Args:
        steps: number of steps of the whole stage, of which ``start`` were finished before this session.
        log: where plain lines go; with None, the live line on a terminal, else Python's logging.
        every: seconds between plain lines.
    """

    def __init__(
        self, stage: str, steps: int, start: int = 0, log: Callable[[str], None] | None = None, every: float = 30.0
    ) -> None:
        self._stage, self._steps, self._start, self._every = stage, steps, start, every
        self._began = self._shown = time.monotonic()
        self._log, self._warn = log or _log.info, log or _log.warning
        self._bar = _live_bar(stage, steps, start) if log is None and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Prints a warning in a line of its own, above the live one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            self._warn(message)

    def tracked(self, items: Iterable[T], done: int = 0) -> Iterator[T]:
        """The items, of which ``done`` came before; `show` is called after each."""
        for step, item in enumerate(items, done + 1):
            yield item
            self.show(step, {})

    def show(self, step: int, row: Mapping[str, Any]) -> None:
        """Shows the state after ``step`` steps with the values of ``row``, if the last time is long enough ago."""
        now = time.monotonic()
        last = self._bar is not None and step == self._steps
        if not last and now - self._shown < (0.5 if self._bar is not None else self._every):
            return
        self._shown = now
        each = (now - self._began) / max(step - self._start, 1)
        line = f"{describe(row) or f'{1 / max(each, 1e-9):.3g}/s'}, {duration(each * (self._steps - step))} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, status=line)
        else:
            self._log(f"{self._stage} {step}/{self._steps}: {line}")


def log_notes(*notes: str) -> None:
    """Logs what a user should know of, each as a line of its own."""
    for note in notes:
        _log.warning("note: %s", note)


def silent(message: str) -> None:
    """Takes what the processes other than the first would say."""


def describe(row: Mapping[str, Any]) -> str:
    """A row of metrics as a reader wants it: losses, speed, share of time spent waiting for data, memory."""
    losses = {key.removeprefix("loss/"): value for key, value in row.items() if key.startswith("loss/")}
    total = losses.pop("total", None)
    parts = []
    if total is not None:
        terms = ", ".join(f"{key} {value:.3g}" for key, value in losses.items())
        parts.append(f"loss {total:.4g}" + (f" ({terms})" if len(losses) > 1 else ""))
    return ", ".join(parts + [form.format(row[key]) for key, form in _FIGURES.items() if row.get(key)])


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: ``45 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _live_bar(stage: str, steps: int, start: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
    bar = Bar(*columns, console=Console(stderr=True))
    bar.add_task(stage, total=steps, completed=start, status="starting")
    return bar
