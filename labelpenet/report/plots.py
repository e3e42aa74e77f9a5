"""Loss curves as SVG that sits in a page: its lines and letters take the page's colours, light or dark."""

import io
import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import escape

Row = Mapping[str, Any]

_INK = "#010203"  # stands for the page's text colour until the SVG is written
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
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": one.stage, "text.parse_math": False, "font.size": 9,
        "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        window = max(1, len(one.steps) // 20)
        marker = "o" if len(one.steps) == 1 else None  # a line through one point is not to be seen
        for (name, values), colour in zip(one.terms.items(), itertools.cycle(_COLOURS)):
            axes.plot(one.steps, smoothed(values, window), color=colour, linewidth=1.2, label=name, marker=marker)
        axes.plot(one.steps, one.total, color=_INK, linewidth=0.7, alpha=0.25)
        axes.plot(one.steps, smoothed(one.total, window), color=_INK, linewidth=1.6, label="total", marker=marker)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        if np.isfinite(one.total).any():
            axes.set_ylim(bottom=min(0.0, float(np.nanmin(one.total))))
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
        if one.terms:
            axes.legend(fontsize=8, ncols=2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embedded(buffer.getvalue(), one.stage)


def _embedded(svg: str, stage: str) -> str:
    """The ``<svg>`` element alone, scalable, without metadata (which names addresses), in the page's colour.

    Its ids get a prefix of the stage's, because a page holds several plots and an id may be there once.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    viewed = re.search(r'viewBox="([^"]*)"', body)
    assert viewed is not None
    head = f'<svg viewBox="{viewed[1]}" role="img" aria-label="loss curves of {escape(stage)}">'
    body = head + body[body.index(">") + 1 :].replace("xlink:href", "href").replace(_INK, "currentColor")
    prefix = f"p{zlib.crc32(stage.encode()):08x}-"
    return re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{prefix}", body)


def number_of(value: Any) -> float:
    """A number as it is, NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) else float("nan")
