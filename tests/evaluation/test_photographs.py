"""`evaluate` on COCO's own annotation of real photographs against pycocotools on the file itself."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from labelpenet.data.dataset import Truth
from labelpenet.evaluation import evaluate
from labelpenet.instances import Instances

ANNOTATION = Path(__file__).parents[2] / "../shared/data/coco-mini/instances.json"


@pytest.mark.photographs
@pytest.mark.skipif(not ANNOTATION.exists(), reason="needs the photographs beside the project")
def test_coco_mini():
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(ANNOTATION))
    rng = np.random.default_rng(0)
    categories = sorted(coco.getCatIds())
    truths: dict[str, Truth] = {}
    predictions: dict[str, Instances] = {}
    rows: list[dict] = []
    for image in coco.loadImgs(sorted(coco.getImgIds())):
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        size = (image["height"], image["width"])
        objects = Instances.from_coco(annotations, size, categories)
        if objects.masks is None:
            objects = Instances.empty(size, with_masks=True)
        crowd = torch.tensor([bool(row["iscrowd"]) for row in annotations])
        truths[str(image["id"])] = Truth(objects, torch.zeros(len(crowd), dtype=torch.bool), crowd)
        # Two shifted copies of most objects, one in five of them under another name.
        chosen = np.flatnonzero(rng.random(2 * len(objects)) < 0.7) % max(len(objects), 1)
        found = objects[torch.from_numpy(rng.permutation(chosen))]
        shifts = [int(shift) for shift in rng.integers(-6, 7, len(found))]
        masks = [mask.roll(shift, 1) for mask, shift in zip(found.masks, shifts, strict=True)]  # type: ignore[arg-type]
        boxes = found.boxes + torch.tensor(shifts)[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
        renamed = torch.from_numpy(rng.random(len(found)) < 0.2)
        labels = torch.where(renamed, (found.labels + 1) % len(categories), found.labels)
        scores = torch.from_numpy(rng.random(len(found))).float()
        prediction = Instances(boxes, labels, scores, size, torch.stack(masks) if masks else found.masks)
        predictions[str(image["id"])] = prediction
        rows += prediction.to_coco(image["id"], categories)
    result = evaluate(predictions, truths, [str(category) for category in categories], "coco")
    for kind, part, keys in (("bbox", "box", ("mAP", "AP50", "AP75")), ("segm", "mask", ("AP", "mAP@0.5", "mAP@0.75"))):
        with contextlib.redirect_stdout(io.StringIO()):
            own = [{**row, "id": i} for i, row in enumerate(json.loads(json.dumps(rows)), 1)]
            if kind == "bbox":
                own = [{key: value for key, value in row.items() if key != "segmentation"} for row in own]
            measured = COCOeval(coco, coco.loadRes(own), kind)
            measured.evaluate()
            measured.accumulate()
            measured.summarize()
        assert [result[part][key] for key in keys] == pytest.approx(measured.stats[:3], abs=1e-9)
        assert 0.1 < measured.stats[0] < 0.9
