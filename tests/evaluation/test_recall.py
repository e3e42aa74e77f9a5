"""Recall and average best overlap of proposals against a loop over objects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labelpenet.data.dataset import Truth
from labelpenet.evaluation.recall import recall, recall_table
from labelpenet.instances import Instances


def truth(boxes: list, labels: list[int], difficult: list[bool] | None = None) -> Truth:
    n = len(boxes)
    objects = Instances(torch.tensor(boxes).float().reshape(n, 4), torch.tensor(labels), torch.ones(n), (100, 100))
    hard = torch.tensor(difficult if difficult is not None else [False] * n, dtype=torch.bool)
    return Truth(objects, hard, torch.zeros(n, dtype=torch.bool))


def slow_iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


def random_boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    low = rng.integers(0, 60, (number, 2))
    return np.concatenate([low, low + rng.integers(1, 40, (number, 2))], 1).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_recall_is_what_loops_over_objects_give(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes, counts = ("a", "b", "c"), (1, 4, 50)
    truths, found = {}, {}
    for i in range(4):
        n = int(rng.integers(0, 5))
        labels = rng.integers(0, 2, n)  # no object of class c
        truths[str(i)] = truth(random_boxes(rng, n).tolist(), labels, (rng.random(n) < 0.3).tolist())
        if i:
            found[str(i)] = random_boxes(rng, int(rng.integers(0, 12)))  # image 0 has no proposals
    result = recall(found, truths, classes, counts)
    for row, count in zip(result["rows"], counts, strict=True):
        means = []
        for label, name in enumerate(classes):
            best = []
            for image_id, annotation in truths.items():
                for box, its, hard in zip(
                    annotation.instances.boxes.tolist(), annotation.instances.labels, annotation.difficult, strict=True
                ):
                    if its == label and not hard:
                        candidates = found.get(image_id, np.zeros((0, 4)))[:count].tolist()
                        best.append(max([slow_iou(one, box) for one in candidates], default=0.0))
            assert result["objects"][name] == len(best)
            if best:
                figures = [np.mean(np.array(best) >= 0.5), np.mean(np.array(best) >= 0.7), np.mean(best)]
                got = row["per_class"][name]
                np.testing.assert_allclose([got["recall@0.5"], got["recall@0.7"], got["ABO"]], figures, atol=1e-6)
                means.append(figures)
            else:
                assert name not in row["per_class"]
        if means:
            mean = np.mean(means, 0)
            np.testing.assert_allclose([row["recall@0.5"], row["recall@0.7"], row["ABO"]], mean, atol=1e-6)
        assert row["boxes"] == pytest.approx(np.mean([min(count, len(found.get(str(i), []))) for i in range(4)]))
    table = recall_table(result).splitlines()
    assert [line.split()[0] for line in table[-4:]] == ["a", "b", "c", "mean"]
    assert "no objects" in table[-2]


def test_crowds_do_not_count() -> None:
    annotation = truth([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0])
    annotation = replace(annotation, crowd=torch.tensor([False, True]))
    row = recall({"i": np.array([[0, 0, 10, 10]], np.float32)}, {"i": annotation}, ("a",))["rows"][0]
    assert (row["recall@0.5"], row["recall@0.7"], row["ABO"], row["boxes"]) == (1, 1, 1, 1)


def test_recall_without_any_object_is_not_a_number() -> None:
    result = recall({}, {"i": truth([], [])}, ("a", "b"))
    assert np.isnan(result["rows"][0]["ABO"]) and "nan" in recall_table(result)
