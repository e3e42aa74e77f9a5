"""Loss curves as SVG that sits in a page: its lines and letters take the page's colours, light or dark."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import escape

Row = Mapping[str, Any]
_Place = Callable[[float, float], tuple[float, float]]  # from step and loss to x and y

_WIDTH, _LEFT, _TOP, _BASE = 374, 44, 20, 170  # of the plot and its axes, in points
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#8c8c8c")


@dataclass(frozen=True)
class Curves:
    """The losses of one training stage.

    Attributes:
        steps: (S,) int64, ascending.
        total: (S,) float64, NaN where a row has none.
        terms: for each term of the loss its (S,) values; empty where the total is the only term.
        images_per_s: median speed, or None where it was not logged.
    """

    stage: str
    steps: np.ndarray
    total: np.ndarray
    terms: dict[str, np.ndarray]
    images_per_s: float | None

    @property
    def last(self) -> float | None:
        """The mean of the last tenth of the total, at least one row; None if nothing of it is a number."""
        tail = self.total[-max(1, len(self.total) // 10) :]
        return float(np.nanmean(tail)) if np.isfinite(tail).any() else None


def curves(rows: Sequence[Row]) -> list[Curves]:
    """The losses of every stage in rows of `engine.log.read_metrics`, in the order in which the stages first appear.

    Rows without a stage, step or loss are skipped.
    """
    stages: dict[str, dict[int, Row]] = {}
    for row in rows:
        step = row.get("step")
        if isinstance(row.get("stage"), str) and isinstance(step, int) and any(key.startswith("loss/") for key in row):
            stages.setdefault(row["stage"], {})[step] = row
    return [_curves(stage, [by_step[step] for step in sorted(by_step)]) for stage, by_step in stages.items()]


def _curves(stage: str, rows: Sequence[Row]) -> Curves:
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("loss/"))
    values = {name.removeprefix("loss/"): np.array([number_of(row.get(name)) for row in rows]) for name in names}
    total = values.pop("total", None)
    if total is None:
        total = np.sum(list(values.values()), axis=0)
    speeds = [row["images_per_s"] for row in rows if isinstance(row.get("images_per_s"), (int, float))]
    return Curves(
        stage,
        np.array([row["step"] for row in rows]),
        total,
        values if len(values) > 1 else {},
        float(np.median(speeds)) if speeds else None,
    )


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean (S,) over the last ``window`` values that are numbers; NaN where there is none."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first = np.maximum(np.arange(len(values)) + 1 - window, 0)
    last = np.arange(len(values)) + 1
    total, count = sums[last] - sums[first], counts[last] - counts[first]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def loss_plot(one: Curves) -> str:
    """The losses of a stage against its steps, as an ``<svg>`` element without any reference to the outside."""
    window = max(1, len(one.steps) // 20)
    lines = [(name, smoothed(values, window)) for name, values in one.terms.items()]
    colours = dict(zip(one.terms, itertools.cycle(_COLOURS), strict=False))
    lines.append(("total", smoothed(one.total, window)))
    known = np.concatenate([one.total, *(values for _, values in lines)])
    known = known[np.isfinite(known)]
    down = _ticks(min(0.0, known.min(initial=0)), known.max(initial=1e-6))
    along = _ticks(float(one.steps[0]), max(float(one.steps[-1]), one.steps[0] + 1))

    def place(step: float, loss: float) -> tuple[float, float]:
        across, up = (step - along[0]) / (along[-1] - along[0]), (loss - down[0]) / (down[-1] - down[0])
        return _LEFT + across * (_WIDTH - _LEFT - 10), _BASE - up * (_BASE - _TOP)

    parts = []
    for loss in down:
        y = place(along[0], loss)[1]
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - 10}" stroke-opacity=".12"/>')
        parts.append(_text(_LEFT - 6, y + 3, f"{loss:g}", "end"))
    for step in along:
        parts.append(_text(place(step, down[0])[0], _BASE + 14, f"{step:g}", "middle"))
    parts.append(f'<path d="M{_LEFT} {_TOP}V{_BASE}H{_WIDTH - 10}"/>')
    parts.append(_text((_LEFT + _WIDTH) / 2, _BASE + 30, "step", "middle"))
    parts.append(_text(_LEFT, _TOP - 8, "loss", "end"))
    parts.append(_line(place, one.steps, one.total, 'stroke-opacity=".25"'))
    for row, (name, values) in enumerate(lines):
        style = f'stroke="{colours[name]}"' if name in colours else 'stroke-width="1.6"'
        parts.append(_line(place, one.steps, values, style))
        if one.terms:
            x, y = _WIDTH - 190 + 100 * (row % 2), _TOP + 7 + 14 * (row // 2)
            parts.append(f'<path d="M{x} {y}h14" {style}/>{_text(x + 18, y + 3, name)}')
    head = f'<svg viewBox="0 0 {_WIDTH} {_BASE + 40}" role="img" aria-label="loss curves of {escape(one.stage)}">'
    return f'{head}<g fill="none" stroke="currentColor" font-size="9">{"".join(parts)}</g></svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers at equal distances, the first not above ``low`` and the last not below ``high``."""
    raw = (high - low) / 4
    unit = 10.0 ** np.floor(np.log10(raw))
    step = unit * max(one for one in (1, 2, 2.5, 5) if one * unit <= raw)
    return [float(round(k * step, 12)) for k in range(int(np.floor(low / step)), int(np.ceil(high / step)) + 1)]


def _line(place: _Place, steps: np.ndarray, values: np.ndarray, style: str) -> str:
    """A line through the values that are numbers, broken at the others; a dot if there is one alone."""
    finite = np.isfinite(values)
    moves = np.where(finite & ~np.concatenate([[False], finite[:-1]]), "M", "L")
    points = [
        f"{move}{x:.1f} {y:.1f}"
        for move, (x, y) in zip(moves[finite], map(place, steps[finite], values[finite]), strict=True)
    ]
    path = "".join(points) + ("h.1" if len(points) == 1 else "")
    return f'<path d="{path}" stroke-linecap="round" {style}/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    head = f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor" stroke="none">'
    return f"{head}{escape(text)}</text>"


def number_of(value: Any) -> float:
    """A number as it is, NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) else float("nan")
