"""Results as tables: text, Markdown and LaTeX, ours beside the paper's, and a cascade module by module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
        cells = [(name, *map(_cell, values)) for name, values in self.rows]
        if style == "text":
            return _text(self.title, ("", *self.columns), cells)
        if style == "markdown":
            return _markdown(self.title, ("", *self.columns), cells)
        if style == "latex":
            return _latex(self.title, ("", *self.columns), cells)
        raise InputError(f"unknown table style {style}; valid are {', '.join(get_args(Style))}")


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
    """A cascade module by module (section 4.6 of the paper, and what it leaves out).

    Args:
        train: for each module the result of its instances on the training images, for CorLoc.
        val: for each module the result of its predictions on held-out images, for everything else.
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
    if number not in _ROWS:
        raise InputError(f"the paper has no table {number} of results; its tables are 1 to 6")
    title, columns = _TITLES[number]
    lines = _ROWS[number].strip().splitlines()
    rows = (
        (name, tuple(None if value == "-" else float(value) for value in values.split()))
        for name, values in zip(lines[::2], lines[1::2], strict=True)
    )
    return Table(f"Table {number}: {title}, in %", columns, tuple(rows))


def beside_paper(number: int, ours: Mapping[str, Result]) -> Table:
    """A table of the paper, by its number 1 to 6, with rows of ours below: a result for each name.

    If ours measure other classes than VOC's twenty, the columns are ours, and the mean of the paper's rows is taken
    over the columns that they have numbers for. The images of the paper are those of its title, whatever ours were.

    Raises:
        InputError: another number; or a result without the part that the table is about.
    """
    table = paper_table(number)
    part, key, mean = _MEASURES[number]
    for name, result in ours.items():
        if part not in result:
            raise InputError(f"{name} has no {part} result, which table {number} is about; {part} truth is missing")
    if number == 6:
        keys = ("mAP@0.25", "mAP@0.5", "mAP@0.75", "ABO")
        rows = [(name, tuple(_percent(result[part][one]) for one in keys)) for name, result in ours.items()]
        return Table(table.title, table.columns, (*table.rows, *rows))
    full: tuple[str, ...] = ("background", *VOC_CLASSES) if number == 5 else VOC_CLASSES
    measured = dict.fromkeys(name for result in ours.values() for name in result[part][key])
    columns: tuple[str, ...] = tuple(name for name in full if name in measured) + tuple(
        name for name in measured if name not in full
    )
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


def paper_tables(result: Result, protocol: str, name: str = "ours") -> list[Table]:
    """The tables of the paper that a result can stand beside: 1 and 3 for ``voc07``, 2, 4, 5 and 6 for ``voc12``.

    ``protocol`` is the one that it was measured by, ``name`` that of our row.
    """
    numbers = {"voc07": (1, 3), "voc12": (2, 4, 5, 6)}.get(protocol, ())
    return [beside_paper(number, {name: result}) for number in numbers if _MEASURES[number][0] in result]


def _chosen(values: Mapping[str, float | None], columns: Iterable[str]) -> tuple[float | None, ...]:
    shown = [values.get(name) for name in columns]
    known = [value for value in shown if value is not None]
    return (*shown, sum(known) / len(known) if known else None)


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None or math.isnan(fraction) else 100 * fraction


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


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

    return (
        "\n".join(
            [
                r"\begin{table}",
                rf"  \caption{{{_escaped(title)}}}",
                rf"  \begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
                r"    \hline",
                line(headings),
                r"    \hline",
                *map(line, cells),
                r"    \hline",
                r"  \end{tabular}",
                r"\end{table}",
            ]
        )
        + "\n"
    )


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    special |= {"†": r"$\dagger$", "‡": r"$\ddagger$"} | {one: f"\\{one}" for one in "&%$#_{}"}
    return "".join(special.get(one, one) for one in text)


_SHORT = (
    *("aero", "bike", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("table", "dog", "horse", "mbike", "person", "plant", "sheep", "sofa", "train", "tv"),
)
_TITLES: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("average precision on the VOC 2007 detection test set", (*_SHORT, "mAP")),
    2: ("average precision on the VOC 2012 detection test set", (*_SHORT, "mAP")),
    3: ("CorLoc on the VOC 2007 detection trainval set", (*_SHORT, "mCorLoc")),
    4: ("CorLoc on the VOC 2012 detection trainval set", (*_SHORT, "mCorLoc")),
    5: ("IoU on the VOC 2012 segmentation test set", ("bg", *_SHORT, "mIoU")),
    6: ("instance segmentation on the VOC 2012 validation set", ("mAP^r .25", "mAP^r .5", "mAP^r .75", "ABO")),
}
_MEASURES = {
    1: ("box", "per_class", "mAP"),
    2: ("box", "per_class", "mAP"),
    3: ("box", "CorLoc_per_class", "CorLoc"),
    4: ("box", "CorLoc_per_class", "CorLoc"),
    5: ("semantic", "per_class", "mIoU"),
    6: ("mask", "per_class", "mAP@0.5"),
}
# The paper's rows, name and numbers in turn, as printed (some printed means are not the means of their rows).
# Modules marked with a dagger are after cascaded pre-training, with a double dagger after forward-backward learning.
_ROWS = {
    1: """
OM+MIL+FRCNN [25]
54.5 47.4 41.3 20.8 17.7 51.9 63.5 46.1 21.8 57.1 22.1 34.4 50.5 61.8 16.2 29.9 40.7 15.9 55.3 40.2 39.5
HCP+DSD+OSSH3 [20]
54.2 52.0 35.2 25.9 15.0 59.6 67.9 58.7 10.1 67.4 27.3 37.8 54.8 67.3 5.1 19.7 52.6 43.5 56.9 62.5 43.7
OICR-Ens+FRCNN [36]
65.5 67.2 47.2 21.6 22.1 68.0 68.5 35.9 5.7 63.1 49.5 30.3 64.7 66.1 13.0 25.6 50.0 57.1 60.2 59.0 47.0
MEFF+FRCNN [12]
64.3 68.0 56.2 36.4 23.1 68.5 67.2 64.9 7.1 54.1 47.0 57.0 69.3 65.4 20.8 23.2 50.7 59.6 65.2 57.0 51.2
Multi-label Cls Module †
41.2 42.0 6.5 17.1 7.1 54.1 40.5 8.5 17.3 33.0 13.2 10.3 24.4 54.0 5.5 7.5 20.0 39.2 49.9 47.3 26.9
Object Det Module †
49.1 61.3 24.8 15.9 46.9 58.9 25.3 17.7 23.3 41.8 28.9 42.4 67.1 25.3 6.7 50.4 40.9 62.4 50.4 42.3 39.1
Instance Ref Module †
62.3 68.3 47.2 27.9 53.8 69.1 39.9 41.9 25.9 56.5 40.1 53.0 70.0 44.9 13.3 53.5 51.1 68.6 60.9 45.2 49.7
Instance Seg Module †
63.8 69.0 47.9 35.3 56.1 68.9 41.5 42.7 25.9 58.3 44.3 52.5 70.3 44.4 13.8 56.9 52.9 70.0 62.3 49.9 51.3
Multi-label Cls Module ‡
42.4 43.8 8.9 18.7 6.5 55.7 42.0 10.0 18.3 34.3 14.5 11.4 24.8 56.2 3.7 9.1 22.1 40.5 51.1 46.5 28.0
Object Det Module ‡
51.2 63.0 28.8 17.5 51.1 60.3 28.9 20.7 25.9 41.0 31.2 46.4 68.1 27.1 6.0 50.9 43.6 65.8 50.6 40.3 40.3
Instance Ref Module ‡
63.2 67.5 48.3 29.8 54.8 70.4 40.9 42.6 27.9 55.0 41.5 54.3 70.0 43.2 15.3 55.4 52.4 69.0 62.2 46.8 50.5
Instance Seg Module ‡
65.7 69.4 50.6 35.8 55.5 71.9 43.6 45.3 27.5 58.5 45.4 55.4 71.7 45.8 18.2 56.6 56.1 72.0 64.6 51.4 53.1
""",
    2: """
OICR-VGG16 [36]
67.7 61.2 41.5 25.6 22.2 54.6 49.7 25.4 19.9 47.0 18.1 26.0 38.9 67.7 2.0 22.6 41.1 34.3 37.9 55.3 37.9
WSDDN+context [7]
64.0 54.9 36.4 8.1 12.6 53.1 40.5 28.4 6.6 35.3 34.4 49.1 42.6 62.4 19.8 15.2 27.0 33.1 33.0 50.0 35.3
HCP+DSD+OSSH3+NR [20]
60.8 54.2 34.1 14.9 13.1 54.3 53.4 58.6 3.7 53.1 8.3 43.4 49.8 69.2 4.1 17.5 43.8 25.6 55.0 50.1 38.3
OICR-Ens+FRCNN [36]
71.4 69.4 55.1 29.8 28.1 55.0 57.9 24.4 17.2 59.1 21.8 26.6 57.8 71.3 1.0 23.1 52.7 37.5 33.5 56.6 42.5
MEFF+FRCNN [12]
71.0 66.9 55.9 33.8 24.0 57.6 58.0 61.4 22.5 58.4 19.2 58.7 61.9 75.0 11.2 23.9 50.3 44.9 41.3 54.3 47.5
Multi-label Cls Module ‡
37.1 40.0 5.9 11.7 5.5 48.3 40.5 7.0 16.3 29.2 9.9 8.3 19.3 51.1 3.0 6.1 17.0 36.3 46.4 39.1 23.9
Object Det Module ‡
49.2 57.0 25.1 13.9 49.5 53.3 25.3 15.9 20.0 36.5 29.1 42.1 60.9 22.9 5.5 43.5 37.8 63.4 48.7 35.8 36.8
Instance Ref Module ‡
57.9 65.5 43.9 26.9 50.9 64.7 35.9 38.7 22.8 50.9 38.9 50.9 65.5 39.5 13.6 52.9 48.9 65.7 57.9 41.9 46.7
Instance Seg Module ‡
60.8 65.4 46.2 31.4 50.3 68.3 40.7 39.9 25.3 52.8 43.4 53.9 68.2 40.8 15.9 53.1 50.0 68.1 59.8 49.0 49.2
""",
    3: """
OICR-VGG16 [36]
81.7 80.4 48.7 49.5 32.8 81.7 85.4 40.1 40.6 79.5 35.7 33.7 60.5 88.8 21.8 57.9 76.3 59.9 75.3 81.4 60.6
WSDDN-Ens [7]
68.9 68.7 65.2 42.5 40.6 72.6 75.2 53.7 29.7 68.1 33.5 45.6 65.9 86.1 27.5 44.9 76.0 62.4 66.3 66.8 58.0
OM+MIL+FRCNN [25]
78.2 67.1 61.8 38.1 36.1 61.8 78.8 55.2 28.5 68.8 18.5 49.2 64.1 73.5 21.4 47.4 64.6 22.3 60.9 52.3 52.4
HCP+DSD+OSSH3 [20]
72.2 55.3 53.0 27.8 35.2 68.6 81.9 60.7 11.6 71.6 29.7 54.3 64.3 88.2 22.2 53.7 72.2 52.6 68.9 74.4 54.9
OICR-Ens+FRCNN [36]
85.8 82.7 62.8 45.2 43.5 84.8 87.0 46.8 15.7 82.2 51.0 45.6 83.7 91.2 22.2 59.7 75.3 65.1 76.8 78.1 64.3
MEFF+FRCNN [12]
88.3 77.6 74.8 63.3 37.8 78.2 83.6 72.7 19.4 79.5 46.4 78.1 84.7 90.4 28.6 43.6 76.3 68.3 77.9 70.6 67.0
Label-PEnet
89.8 82.6 75.3 65.7 39.2 80.2 81.6 77.7 18.4 82.7 49.3 75.0 86.9 85.9 30.7 49.6 75.3 71.5 76.1 70.6 68.2
""",
    4: """
OICR-VGG16 [36]
86.2 84.2 68.7 55.4 46.5 82.8 74.9 32.2 46.7 82.8 42.9 41.0 68.1 89.6 9.2 53.9 81.0 52.9 59.5 83.2 62.1
WSDDN+context [7]
78.3 70.8 52.5 34.7 36.6 80.0 58.7 38.6 27.7 71.2 32.3 48.7 76.2 77.4 16.0 48.4 69.9 47.5 66.9 62.9 54.8
HCP+DSD+OSSH3+NR [20]
82.4 68.1 54.5 38.9 35.9 84.7 73.1 64.8 17.1 78.3 22.5 57.0 70.8 86.6 18.7 49.7 80.7 45.3 70.1 77.3 58.8
OICR-Ens+FRCNN [36]
89.3 86.3 75.2 57.9 53.5 84.0 79.5 35.2 47.2 87.4 43.4 43.8 77.0 91.0 10.4 60.7 86.8 55.7 62.0 84.7 65.6
MEFF+FRCNN [12]
88.0 81.6 75.8 60.9 46.2 85.3 75.3 76.5 47.2 85.4 47.7 74.3 87.8 91.4 21.6 55.3 77.9 68.8 64.9 75.0 69.4
Label-PEnet
89.1 84.3 78.8 63.2 47.9 88.7 76.8 77.2 46.3 87.2 50.4 78.9 91.8 90.1 25.7 56.3 78.5 66.3 69.9 78.3 71.3
""",
    5: """
SEC [22]
83.5 56.4 28.5 64.1 23.6 46.5 70.6 58.5 71.3 23.2 54.0 28.0 68.1 62.1 70.0 55.0 38.4 58.0 39.9 38.4 48.3 51.7
FCL [32]
85.7 58.8 30.5 67.6 24.7 44.7 74.8 61.8 73.7 22.9 57.4 27.5 71.3 64.8 72.4 57.3 37.0 60.4 42.8 42.2 50.6 53.7
TP-BM [21]
83.4 62.2 26.4 71.8 18.2 49.5 66.5 63.8 73.4 19.0 56.6 35.7 69.3 61.3 71.7 69.2 39.1 66.3 44.8 35.9 45.5 53.8
AE-PSL [40]
- - - - - - - - - - - - - - - - - - - - - 55.7
MEFF [12]
86.6 72.0 30.6 68.0 44.8 46.2 73.4 56.6 73.0 18.9 63.3 32.0 70.1 72.2 68.2 56.1 34.5 67.5 29.6 60.2 43.6 55.6
MCOF-VGG16 [39]
85.8 74.1 23.6 66.4 36.6 62.0 75.5 68.5 78.2 18.8 64.6 29.6 72.5 61.6 63.1 55.5 37.7 65.8 32.4 68.4 39.9 56.2
Label-PEnet
88.3 73.5 33.2 70.1 43.2 49.1 74.7 57.0 75.9 20.7 64.3 32.3 72.3 74.1 71.1 57.4 38.3 69.1 31.2 61.1 45.2 57.2
""",
    6: """
PRM-VGG16 [43]
- 22.0 - -
PRM-ResNet50 [43]
44.3 26.8 9.0 37.6
Label-PEnet
49.1 30.2 12.9 41.4
""",
}
