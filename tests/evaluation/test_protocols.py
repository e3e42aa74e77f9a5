"""`evaluate` against the plain-loop reference and against pycocotools used by hand."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from labelpenet.data.dataset import Truth
from labelpenet.errors import InputError
from labelpenet.evaluation import evaluate
from labelpenet.instances import Instances

from . import reference
from .scenes import SIZE, random_set

CLASSES = ["cat", "dog", "cow", "emu"]  # scenes hold three of them: the last never has ground truth

seeds = st.integers(0, 10**6)


def expected(values):
    return {name: pytest.approx(value) for name, value in zip(CLASSES, values, strict=False) if value is not None}


@pytest.mark.parametrize("protocol", ["voc07", "voc12"])
@given(seeds, st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_number_is_that_of_the_loops(protocol, seed, crowds):
    predictions, truths = random_set(seed, crowds=crowds)
    result = evaluate(predictions, truths, CLASSES, protocol)
    labels = range(len(CLASSES))
    if "box" in result:
        box = result["box"]
        assert box["per_class"] == expected(
            [reference.class_ap(predictions, truths, k, 0.5, protocol, "box") for k in labels]
        )
        assert box["CorLoc_per_class"] == expected([reference.class_corloc(predictions, truths, k) for k in labels])
        assert box["mAP"] == pytest.approx(np.mean(list(box["per_class"].values()) or [0]))
        assert box["CorLoc"] == pytest.approx(np.mean(list(box["CorLoc_per_class"].values())))
    else:
        assert not any((~truth.crowd).any() for truth in truths.values())
    if "mask" in result:
        mask = result["mask"]
        for threshold, key in ((0.25, "per_class@0.25"), (0.5, "per_class"), (0.75, "per_class@0.75")):
            aps = [reference.class_ap(predictions, truths, k, threshold, "voc12", "mask") for k in labels]
            assert mask[key] == expected(aps)
            assert mask[f"mAP@{threshold}"] == pytest.approx(np.mean(list(mask[key].values()) or [0]))
        assert mask["ABO_per_class"] == expected([reference.class_abo(predictions, truths, k) for k in labels])
    ious = reference.semantic_ious(predictions, truths, len(CLASSES))
    names = ["background", *CLASSES]
    assert result["semantic"]["per_class"] == {
        name: pytest.approx(value) for name, value in zip(names, ious, strict=True) if value is not None
    }
    assert result["semantic"]["mIoU"] == pytest.approx(np.mean([value for value in ious if value is not None]))


def coco_by_hand(predictions, truths, kind):
    """COCO's own road: annotation and results as files would hold them, then COCOeval."""
    images: list[dict] = []
    annotations: list[dict] = []
    results: list[dict] = []
    for number, (name, truth) in enumerate(truths.items(), 1):
        images.append({"id": number, "height": SIZE[0], "width": SIZE[1]})
        rows = truth.instances.to_coco(number, [1, 2, 3])
        for row, crowd, mask in zip(rows, truth.crowd.tolist(), truth.instances.masks, strict=True):
            annotations.append({**row, "id": len(annotations) + 1, "iscrowd": int(crowd), "area": float(mask.sum())})
        if name in predictions:
            results += predictions[name].to_coco(number, [1, 2, 3])
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
        coco.createIndex()
        if kind == "bbox":
            results = [{k: v for k, v in row.items() if k != "segmentation"} for row in results]
        measured = COCOeval(coco, coco.loadRes(results), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return measured


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_coco_numbers_are_those_of_pycocotools(seed):
    predictions, truths = random_set(seed, images=8, crowds=True)
    truths = {name: replace(t, difficult=torch.zeros_like(t.difficult)) for name, t in truths.items()}
    if not sum(len(p) for p in predictions.values()) or all(t.crowd.all() for t in truths.values()):
        return
    result = evaluate(predictions, truths, CLASSES, "coco")
    boxes = coco_by_hand(predictions, truths, "bbox").stats
    masks = coco_by_hand(predictions, truths, "segm").stats
    keys = ("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    for position, (key, mask_key) in enumerate(zip(keys, ("AP", "mAP@0.5", "mAP@0.75", *keys[3:]), strict=True)):
        assert result["box"].get(key, -1) == pytest.approx(boxes[position])
        assert result["mask"].get(mask_key, -1) == pytest.approx(masks[position])


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_voc_area_is_what_pycocotools_approximates_where_the_protocols_coincide(seed):
    """No difficult, no crowd, one object a class and image: then both match alike, at every threshold.

    pycocotools samples the curve at 101 recalls, so the two areas differ by at most the step of a recall, 0.01.
    """
    rng = np.random.default_rng(seed)
    predictions, truths = random_set(seed, images=8)
    for name, truth in list(truths.items()):
        first = np.unique(truth.instances.labels.numpy(), return_index=True)[1]
        nothing = torch.zeros(len(first), dtype=torch.bool)
        truths[name] = Truth(truth.instances[torch.from_numpy(first)], nothing, nothing, truth.semantic)
        if name in predictions:
            one = predictions[name]  # equal scores are ordered differently across images of pycocotools
            one.weights = torch.from_numpy(rng.random(len(one))).float()
    if not sum(len(p) for p in predictions.values()) or not sum(len(t.instances) for t in truths.values()):
        return
    voc, coco = evaluate(predictions, truths, CLASSES, "voc12"), evaluate(predictions, truths, CLASSES, "coco")
    for threshold in (0.25, 0.5, 0.75):
        assert voc["mask"][f"mAP@{threshold}"] == pytest.approx(coco["mask"][f"mAP@{threshold}"], abs=0.011)
    assert voc["box"]["mAP"] == pytest.approx(coco["box"]["AP50"], abs=0.011)
    assert voc["box"]["CorLoc"] == coco["box"]["CorLoc"]
    assert voc["mask"]["ABO"] == coco["mask"]["ABO"]


def truth(boxes, labels, difficult=None, crowd=None, masks=None, semantic=None):
    n = len(labels)
    instances = Instances(
        torch.tensor(boxes, dtype=torch.float).reshape(n, 4), torch.tensor(labels), torch.ones(n), SIZE, masks
    )
    flags = [torch.tensor(flag or [False] * n, dtype=torch.bool) for flag in (difficult, crowd)]
    return Truth(instances, flags[0], flags[1], semantic)


def found(boxes, labels, scores):
    n = len(labels)
    boxes = torch.tensor(boxes, dtype=torch.float).reshape(n, 4)
    return Instances(boxes, torch.tensor(labels, dtype=torch.long), torch.tensor(scores), SIZE)


BOX = [0, 0, 4, 4]


def test_second_detection_of_an_object_is_wrong():
    result = evaluate(
        {"a": found([BOX, BOX], [0, 0], [0.5, 0.9])}, {"a": truth([BOX, [8, 8, 12, 12]], [0, 0])}, ["cat"]
    )
    assert result["box"]["mAP"] == pytest.approx(0.5)


def test_an_overlap_of_exactly_one_half_is_a_hit():
    prediction = {"a": found([[0, 0, 4, 2]], [0], [0.5])}
    result = evaluate(prediction, {"a": truth([BOX], [0])}, ["cat"])
    assert result["box"]["mAP"] == result["box"]["CorLoc"] == 1.0


def test_detection_of_a_difficult_object_neither_counts_nor_penalises():
    truths = {"a": truth([BOX, [8, 8, 12, 12]], [0, 0], difficult=[True, False])}
    both = found([BOX, [8, 8, 12, 12]], [0, 0], [0.9, 0.5])
    assert evaluate({"a": both}, truths, ["cat"])["box"]["mAP"] == 1.0
    only_difficult = evaluate({"a": both[:1]}, truths, ["cat"])["box"]
    assert only_difficult["mAP"] == 0.0
    assert only_difficult["CorLoc"] == 1.0  # CorLoc counts difficult objects


def test_class_with_difficult_objects_alone_has_no_ap_but_a_corloc():
    truths = {"a": truth([BOX, BOX], [0, 1], difficult=[True, False])}
    box = evaluate({"a": found([BOX, BOX], [0, 1], [0.9, 0.9])}, truths, ["cat", "dog"])["box"]
    assert box["per_class"] == {"dog": 1.0}
    assert box["CorLoc_per_class"] == {"cat": 1.0, "dog": 1.0}


def test_crowd_absorbs_detections_and_is_no_object():
    truths = {"a": truth([BOX, [8, 8, 12, 12]], [0, 0], crowd=[True, False])}
    prediction = found([BOX, BOX, [8, 8, 12, 12]], [0, 0, 0], [0.9, 0.8, 0.1])
    for protocol in ("voc07", "voc12", "coco"):
        box = evaluate({"a": prediction}, truths, ["cat"], protocol)["box"]
        assert box["mAP"] == pytest.approx(1.0)
        assert box["CorLoc"] == 0.0  # the best box lies on the crowd


def test_no_prediction_at_all_is_zero_and_not_an_error():
    _, truths = random_set(1)
    for protocol in ("voc07", "voc12", "coco"):
        result = evaluate({}, truths, CLASSES, protocol)
        assert (
            result["box"]["mAP"] == result["box"]["CorLoc"] == result["mask"]["mAP@0.5"] == result["mask"]["ABO"] == 0
        )
        assert 0 < result["semantic"]["per_class"]["background"] < 1


def test_perfect_predictions_are_one_everywhere():
    _, truths = random_set(3)
    predictions = {name: item.instances for name, item in truths.items()}
    for protocol in ("voc07", "voc12", "coco"):
        result = evaluate(predictions, truths, CLASSES, protocol)
        keys = [("box", "mAP"), ("box", "CorLoc"), ("mask", "mAP@0.25"), ("mask", "mAP@0.75"), ("mask", "ABO")]
        assert [result[part][key] for part, key in keys] == pytest.approx([1.0] * 5)


def test_parts_without_ground_truth_are_absent():
    only_boxes = {"a": truth([BOX], [0])}
    prediction = {"a": found([BOX], [0], [0.5])}
    assert set(evaluate(prediction, only_boxes, ["cat"])) == {"box"}
    masks = torch.ones(1, *SIZE, dtype=torch.bool)
    with_masks = {"a": truth([BOX], [0], masks=masks), "b": truth([BOX], [0])}
    assert set(evaluate(prediction, with_masks, ["cat"])) == {"box"}  # the prediction holds boxes only
    segmented = {"a": Instances.cat([with_masks["a"].instances])}
    assert set(evaluate(segmented, with_masks, ["cat"])) == {"box", "mask"}
    assert evaluate(segmented, with_masks, ["cat"])["mask"]["ABO"] == 1.0  # image b has no masks, and does not count
    assert evaluate({}, {}, ["cat"]) == {}


@pytest.mark.parametrize("protocol", ["voc07", "voc12", "coco"])
def test_boxes_without_masks_are_no_false_masks(protocol):
    masks = torch.zeros(1, *SIZE, dtype=torch.bool)
    masks[:, :4, :4] = True
    true = truth([BOX], [0], masks=masks)
    right, boxes = true.instances.weighted(torch.tensor([0.5])), found([BOX], [0], [0.9])
    negative = Truth(Instances.empty(SIZE, with_masks=True), torch.zeros(0).bool(), torch.zeros(0).bool())
    alone = evaluate({"a": right}, {"a": true}, ["cat"], protocol)["mask"]
    assert alone["mAP@0.5"] == pytest.approx(1)
    with_negative = evaluate({"a": right, "b": boxes}, {"a": true, "b": negative}, ["cat"], protocol)["mask"]
    assert with_negative["mAP@0.5"] == pytest.approx(1), "nobody said where its pixels are"
    missed = evaluate({"a": right, "b": boxes}, {"a": true, "b": true}, ["cat"], protocol)["mask"]
    assert missed["mAP@0.5"] == pytest.approx(0.5, abs=0.01), "the object's mask is missed"
    unknown = evaluate({"a": right, "b": right}, {"a": true, "b": truth([BOX], [0])}, ["cat"], protocol)["mask"]
    assert unknown == alone, "an image without true masks does not count"


def test_a_class_called_background_is_not_the_background():
    predictions, truths = random_set(1)
    usual, other = (evaluate(predictions, truths, [first, *CLASSES[1:]])["semantic"] for first in ("cat", "background"))
    assert list(usual["per_class"])[:2] == ["background", "cat"]
    assert list(other["per_class"])[:2] == ["no class", "background"]
    assert list(usual["per_class"].values()) == list(other["per_class"].values()) and usual["mIoU"] == other["mIoU"]


def test_semantic_painting_order_and_ignored_pixels():
    semantic = np.zeros(SIZE, dtype=np.uint8)
    semantic[:, :8], semantic[:, 8:] = 1, 255
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, :, :8] = True  # cat, sure
    masks[1] = True  # dog everywhere, unsure: painted first, so hidden by the cat, and elsewhere ignored
    prediction = Instances(
        torch.tensor([[0.0, 0, 8, 12], [0, 0, 16, 12]]), torch.tensor([0, 1]), torch.tensor([0.9, 0.1]), SIZE, masks
    )
    item = Truth(Instances.empty(SIZE), torch.zeros(0).bool(), torch.zeros(0).bool(), semantic)
    assert evaluate({"a": prediction}, {"a": item}, ["cat", "dog"])["semantic"] == {
        "mIoU": 1.0,
        "per_class": {"cat": 1.0},
    }


def test_the_result_is_plain_json():
    predictions, truths = random_set(5)
    for protocol in ("voc07", "voc12", "coco"):
        result = evaluate(predictions, truths, CLASSES, protocol)
        assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("transform", ["more", "shuffle"])
def test_numbers_do_not_depend_on_other_images_or_on_the_order_of_images(transform):
    predictions, truths = random_set(7)
    for k, item in enumerate(predictions.values()):
        item.weights = torch.from_numpy(np.random.default_rng(k).random(len(item))).float()
    before = evaluate(predictions, truths, CLASSES)
    if transform == "more":
        predictions["elsewhere"] = next(iter(predictions.values()))
    else:
        truths = dict(reversed(truths.items()))
    assert evaluate(predictions, truths, CLASSES) == before


def test_what_cannot_be_measured_is_an_input_error():
    predictions, truths = random_set(7)
    with pytest.raises(InputError, match="unknown protocol voc"):
        evaluate(predictions, truths, CLASSES, "voc")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"none of the .* check the data set and the split"):
        evaluate({"stranger": Instances.empty(SIZE)}, truths, CLASSES)
    with pytest.raises(InputError, match="image0: the prediction is for 10 x 20 pixels, but the image has 16 x 12"):
        evaluate({"image0": Instances.empty((20, 10))}, truths, CLASSES)
    with pytest.raises(InputError, match="image0: a predicted class index"):
        evaluate({"image0": found([BOX], [4], [0.5])}, truths, CLASSES)
    with pytest.raises(InputError, match=r"image0: .*NaN"):
        evaluate({"image0": found([BOX], [0], [float("nan")])}, truths, CLASSES)


def test_truth_masks_agree_with_their_encoding():
    """The transposed run lengths that the measures use give the overlaps of COCO's own encoding."""
    from pycocotools import mask as rle

    from labelpenet.evaluation.masks import mask_iou
    from labelpenet.evaluation.records import run_lengths

    predictions, truths = random_set(11)
    name = max(predictions, key=lambda key: len(predictions[key]) * len(truths[key].instances))
    a, b = predictions[name].masks, truths[name].instances.masks
    encoded = [rle.encode(np.asfortranarray(one.numpy().transpose(1, 2, 0).astype(np.uint8))) for one in (a, b)]
    official = rle.iou(*encoded, [0] * len(b))
    np.testing.assert_array_equal(mask_iou(run_lengths(a), run_lengths(b)), official)
    assert (rle.area(run_lengths(a)) == a.sum((1, 2)).numpy()).all()
