"""Tables: the paper's rows as printed, ours beside them, three styles."""

from __future__ import annotations

import re

import pytest

from labelpenet.data.dataset import VOC_CLASSES
from labelpenet.errors import InputError
from labelpenet.evaluation import beside_paper, cascade_table, evaluate, paper_table, paper_tables, summary_table

from .scenes import random_set


def result(classes, value=0.5):
    per_class = dict.fromkeys(classes, value)
    return {
        "box": {"mAP": value, "per_class": per_class, "CorLoc": value, "CorLoc_per_class": per_class},
        "mask": {
            **{f"mAP@{threshold}": value for threshold in (0.25, 0.5, 0.75)},
            **dict.fromkeys(("per_class", "per_class@0.25", "per_class@0.75", "ABO_per_class"), per_class),
            "ABO": value,
        },
        "semantic": {"mIoU": value, "per_class": {"background": value, **per_class}},
    }


def test_every_table_of_the_paper_is_complete():
    sizes = {1: (12, 21), 2: (9, 21), 3: (7, 21), 4: (6, 21), 5: (7, 22), 6: (3, 4)}
    for number, (rows, columns) in sizes.items():
        table = paper_table(number)
        assert len(table.rows) == rows
        assert len(table.columns) == columns
        assert all(len(values) == columns for _, values in table.rows)
        assert all(0 < value < 100 for _, values in table.rows for value in values if value is not None)
    with pytest.raises(InputError, match="tables are 1 to 6"):
        paper_table(7)


def test_printed_means_are_the_means_of_the_rows_but_for_two():
    odd = []
    for number in range(1, 6):
        for name, values in paper_table(number).rows:
            numbers = [value for value in values[:-1] if value is not None]
            mean = values[-1]
            if numbers and mean is not None and abs(sum(numbers) / len(numbers) - mean) > 0.06:
                odd.append((number, name))
    assert odd == [(1, "Object Det Module ‡"), (3, "HCP+DSD+OSSH3 [20]")]


@pytest.mark.parametrize("number", range(1, 7))
def test_ours_with_all_classes_stand_below_the_paper_as_printed(number):
    theirs = paper_table(number)
    both = beside_paper(number, {"module 3": result(VOC_CLASSES, 0.25), "module 4": result(VOC_CLASSES)})
    assert both.columns == theirs.columns
    assert both.rows[:-2] == theirs.rows
    assert both.rows[-2:] == (
        ("module 3", (25.0,) * len(theirs.columns)),
        ("module 4", (50.0,) * len(theirs.columns)),
    )


def test_fewer_classes_restrict_the_paper_and_its_means():
    both = beside_paper(1, {"ours": result(["cow", "cat", "emu"])})
    assert both.columns == ("cat", "cow", "emu", "mAP")
    assert "means over the 3 classes shown" in both.title
    assert both.rows[0] == ("OM+MIL+FRCNN [25]", (46.1, 57.1, None, pytest.approx(51.6)))
    assert both.rows[-1] == ("ours", (50.0, 50.0, 50.0, 50.0))
    semantic = dict(beside_paper(5, {"ours": result(["cow", "cat"])}).rows)
    assert semantic["AE-PSL [40]"] == (None,) * 4
    assert semantic["SEC [22]"] == (83.5, 71.3, 54.0, pytest.approx(69.6))


def test_which_tables_stand_beside_a_protocol():
    def numbers(what, protocol):
        return [int(re.findall(r"Table (\d)", table.title)[0]) for table in paper_tables(what, protocol)]

    assert numbers(result(VOC_CLASSES), "voc07") == [1, 3]
    assert numbers(result(VOC_CLASSES), "voc12") == [2, 4, 5, 6]
    assert numbers({"box": result(["cat"])["box"]}, "voc12") == [2, 4]
    assert numbers(result(VOC_CLASSES), "coco") == []
    with pytest.raises(InputError, match="ours has no mask result"):
        beside_paper(6, {"ours": {"box": {}}})


def test_summary_and_cascade_hold_what_was_measured():
    predictions, truths = random_set(4)
    measured = evaluate(predictions, truths, ["cat", "dog", "cow"])
    summary = summary_table(measured)
    rows = dict(summary.rows)
    assert summary.columns == ("AP", "CorLoc", "AP^r .25", "AP^r .5", "AP^r .75", "ABO", "IoU")
    assert rows["mean"][0] == 100 * measured["box"]["mAP"]
    assert rows["mean"][-1] == 100 * measured["semantic"]["mIoU"]
    assert rows["dog"][5] == 100 * measured["mask"]["ABO_per_class"]["dog"]
    assert rows["background"][:6] == (None,) * 6
    cascade = cascade_table({"module 1": {"box": {"CorLoc": 0.25}}, "module 2": measured}, {"module 2": measured})
    assert cascade.rows[0] == ("module 1", (25.0, *(None,) * 6))
    assert cascade.rows[1][1] == tuple(
        100 * measured[part][key]
        for part, key in (
            ("box", "CorLoc"),
            ("box", "mAP"),
            ("mask", "mAP@0.25"),
            ("mask", "mAP@0.5"),
            ("mask", "mAP@0.75"),
            ("mask", "ABO"),
            ("semantic", "mIoU"),
        )
    )


def test_styles_hold_the_same_cells():
    table = beside_paper(6, {"ours & yours_1 | 50 %": result(["cat"], 0.12345)})
    text, markdown, latex = (table.render(style) for style in ("text", "markdown", "latex"))  # type: ignore[arg-type]
    lines = text.splitlines()
    assert len({len(line) for line in lines[1:]}) == 1  # columns stand under each other
    assert lines[-1].split()[-4:] == ["12.3"] * 4
    assert markdown.splitlines()[-1] == r"| ours & yours_1 \| 50 % | 12.3 | 12.3 | 12.3 | 12.3 |"
    assert r"ours \& yours\_1 | 50 \% & 12.3 & 12.3 & 12.3 & 12.3 \\" in latex
    assert r"PRM-VGG16 [43] & - & 22.0 & - & - \\" in latex
    assert r"Multi-label Cls Module $\dagger$" in paper_table(1).render("latex")
    rows = re.findall(r"^    (?!\\)(.*) \\\\$", latex, re.MULTILINE)
    assert all(len(re.split(r"(?<!\\)&", row)) == 5 for row in rows)
    with pytest.raises(InputError, match="unknown table style html; valid are text, markdown, latex"):
        table.render("html")  # type: ignore[arg-type]
