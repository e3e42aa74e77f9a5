"""Results as tables: text, Markdown and LaTeX, ours beside the paper's, and a cascade module by module."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from labelpenet.data.dataset import VOC_CLASSES
from labelpenet.errors import InputError

Style = Literal["text", "markdown", "latex"]
Result = Mapping[str, Any]  # what `evaluate` returns


@dataclass(frozen=True)
class Table:
    """A table of numbers under a title: headings of the K columns of numbers (the column of names has none), and rows
    of a name and K numbers in percent, None where there is none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]

    def render(self, style: Style = "text") -> str:
        """The table in a style (else an `InputError`), numbers with one decimal; ends with a line break."""
        cells = [(name, *("-" if one is None else f"{one:.1f}" for one in values)) for name, values in self.rows]
        styles = {"text": _text, "markdown": _markdown, "latex": _latex}
        if style not in styles:
            raise InputError(f"unknown table style {style}; valid are {', '.join(styles)}")
        return styles[style](self.title, ("", *self.columns), cells)


def summary_table(result: Result, title: str = "by class") -> Table:
    """One result class by class, the means in the last row; columns for the parts that the result holds."""
    parts = [
        ("AP", "box", "per_class", "mAP"),
        ("CorLoc", "box", "CorLoc_per_class", "CorLoc"),
        ("AP^r .25", "mask", "per_class@0.25", "mAP@0.25"),
        ("AP^r .5", "mask", "per_class", "mAP@0.5"),
        ("AP^r .75", "mask", "per_class@0.75", "mAP@0.75"),
        ("ABO", "mask", "ABO_per_class", "ABO"),
        ("IoU", "semantic", "per_class", "mIoU"),
    ]
    parts = [part for part in parts if part[1] in result]
    names = dict.fromkeys(name for _, part, key, _ in parts for name in result[part][key])
    rows = [(name, tuple(_percent(result[part][key].get(name)) for _, part, key, _ in parts)) for name in names]
    rows.append(("mean", tuple(_percent(result[part][mean]) for _, part, _, mean in parts)))
    return Table(title, tuple(heading for heading, *_ in parts), tuple(rows))


def cascade_table(train: Mapping[str, Result], val: Mapping[str, Result]) -> Table:
    """A cascade module by module (section 4.6 of the paper, and what it leaves out): of each the result of its
    instances on the training images, for CorLoc, and of its predictions on held-out images, for everything else.
    """
    columns = {
        "train CorLoc": (train, "box", "CorLoc"),
        "box mAP": (val, "box", "mAP"),
        "mask mAP .25": (val, "mask", "mAP@0.25"),
        "mask mAP .5": (val, "mask", "mAP@0.5"),
        "mask mAP .75": (val, "mask", "mAP@0.75"),
        "ABO": (val, "mask", "ABO"),
        "mIoU": (val, "semantic", "mIoU"),
    }
    modules = dict.fromkeys([*train, *val])
    rows = (
        (module, tuple(_percent(of.get(module, {}).get(part, {}).get(key)) for of, part, key in columns.values()))
        for module in modules
    )
    return Table("module by module, in %", tuple(columns), tuple(rows))


def paper_table(number: int) -> Table:
    """One of the paper's tables 1 to 6, as printed; `InputError` for another number."""
    if number not in _TABLES:
        raise InputError(f"the paper has no table {number} of results; its tables are 1 to 6")
    title, columns, _ = _TABLES[number]
    printed = Path(__file__).with_name("paper_tables.txt").read_text(encoding="utf-8")
    lines = printed.split(f"\nTable {number}\n")[1].partition("\n\n")[0].splitlines()
    rows = (
        (name, tuple(None if value == "-" else float(value) for value in values.split()))
        for name, values in zip(lines[::2], lines[1::2], strict=True)
    )
    return Table(f"Table {number}: {title}, in %", columns, tuple(rows))


def beside_paper(number: int, ours: Mapping[str, Result]) -> Table:
    """A table of the paper, by its number 1 to 6, with rows of ours below: a result for each name.

    If ours measure other classes than VOC's twenty, the columns are ours, and the mean of the paper's rows is taken
    over the columns that they have numbers for. The images of the paper are those of its title, whatever ours were.
    `InputError` for another number, or a result without the part that the table is about.
    """
    table = paper_table(number)
    part, key, mean = _TABLES[number][2]
    for name, result in ours.items():
        if part not in result:
            raise InputError(f"{name} has no {part} result, which table {number} is about; {part} truth is missing")
    if number == 6:
        keys = ("mAP@0.25", "mAP@0.5", "mAP@0.75", "ABO")
        rows = [(name, tuple(_percent(result[part][one]) for one in keys)) for name, result in ours.items()]
        return Table(table.title, table.columns, (*table.rows, *rows))
    full: tuple[str, ...] = ("background", *VOC_CLASSES) if number == 5 else VOC_CLASSES
    measured = dict.fromkeys(name for result in ours.values() for name in result[part][key])
    columns = (*(name for name in full if name in measured), *(name for name in measured if name not in full))
    title, theirs = table.title, table.rows
    if columns == full:
        headings = table.columns
    else:
        title = f"{title}; means over the {len(columns)} classes shown"
        short: dict[str, str] = dict(zip(full, table.columns, strict=False))
        headings = (*(short.get(name, name) for name in columns), table.columns[-1])
        theirs = tuple((name, _chosen(dict(zip(full, values, strict=False)), columns)) for name, values in table.rows)
    rows = [
        (name, (*(_percent(result[part][key].get(column)) for column in columns), _percent(result[part][mean])))
        for name, result in ours.items()
    ]
    return Table(title, headings, (*theirs, *rows))


def paper_tables(result: Result, protocol: str) -> list[Table]:
    """The tables of the paper that a result can stand beside: 1 and 3 for ``voc07``, 2, 4, 5 and 6 for ``voc12``, the
    protocol that it was measured by.
    """
    numbers = {"voc07": (1, 3), "voc12": (2, 4, 5, 6)}.get(protocol, ())
    return [beside_paper(number, {"ours": result}) for number in numbers if _TABLES[number][2][0] in result]


def _chosen(values: Mapping[str, float | None], columns: Iterable[str]) -> tuple[float | None, ...]:
    shown = [values.get(name) for name in columns]
    known = [value for value in shown if value is not None]
    return (*shown, sum(known) / len(known) if known else None)


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None or math.isnan(fraction) else 100 * fraction


def _text(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (headings, *cells)
    ]
    rule = "-" * len(lines[0])
    return "\n".join([title, lines[0], rule, *lines[1:]]) + "\n"


def _markdown(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rows = [headings, ["---", *["---:"] * (len(headings) - 1)], *cells]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"**{title}**", "", *lines]) + "\n"


def _latex(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    def line(row: Sequence[str]) -> str:
        return "    " + " & ".join(map(_escaped, row)) + r" \\"

    rule, body = r"    \hline", "\n".join(map(line, cells))
    return rf"""\begin{{table}}
  \caption{{{_escaped(title)}}}
  \begin{{tabular}}{{l{"r" * (len(headings) - 1)}}}
{rule}
{line(headings)}
{rule}
{body}
{rule}
  \end{{tabular}}
\end{{table}}
"""


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    special |= {"†": r"$\dagger$", "‡": r"$\ddagger$"} | {one: f"\\{one}" for one in "&%$#_{}"}
    return "".join(special.get(one, one) for one in text)


_SHORT = (
    *("aero", "bike", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("table", "dog", "horse", "mbike", "person", "plant", "sheep", "sofa", "train", "tv"),
)
_AP, _CORLOC = ("box", "per_class", "mAP"), ("box", "CorLoc_per_class", "CorLoc")
# Of each table title, headings, and where a result has its part, its figures by class and their mean.
_TABLES: dict[int, tuple[str, tuple[str, ...], tuple[str, str, str]]] = {
    1: ("average precision on the VOC 2007 detection test set", (*_SHORT, "mAP"), _AP),
    2: ("average precision on the VOC 2012 detection test set", (*_SHORT, "mAP"), _AP),
    3: ("CorLoc on the VOC 2007 detection trainval set", (*_SHORT, "mCorLoc"), _CORLOC),
    4: ("CorLoc on the VOC 2012 detection trainval set", (*_SHORT, "mCorLoc"), _CORLOC),
    5: ("IoU on the VOC 2012 segmentation test set", ("bg", *_SHORT, "mIoU"), ("semantic", "per_class", "mIoU")),
    6: (
        "instance segmentation on the VOC 2012 validation set",
        *(("mAP^r .25", "mAP^r .5", "mAP^r .75", "ABO"), ("mask", "per_class", "mAP@0.5")),
    ),
}
