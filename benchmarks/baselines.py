"""What needs no cascade, measured as the cascade is: the mark that a run has to leave behind.

    python benchmarks/baselines.py runs/voc-animals VOCdevkit/VOC2012 --json baselines.json

In the setting of a run (classes, stem, size of the images, tags only):

- **class activation map**: a linear classifier on the globally pooled last feature map, trained on the tags. A class's
  map is that map weighted by the class's weights, added over the image's size and half of it, and divided by its
  maximum; above a threshold, its largest component is the mask, and the mask's tight box the box. With dense CRF
  (settings ``modules.1.label``), the threshold is its own.
- **whole image**: one box, and mask, for each class.
- **module 1, top proposals**: the run's module 1 before calibration.

The first two score a class by the classifier's probability; of training images the tags are known, as in the cascade.
The last feature map is that of module 1's RoI head, applied to the whole image at the stem's stride. A run whose module
1 keeps it frozen (recipe ``best``, before forward-backward learning) has the pretrained one there.

Each threshold is the best on 150 training photographs that have masks: annotation that is used for nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelpenet.calibration.calibrate import segment, to_instances, working_canvas
from labelpenet.config import Calibration
from labelpenet.data import AnnotatedImages, Truth, read_image
from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import write_json
from labelpenet.data.proposals import compute_proposals
from labelpenet.engine.distributed import map_images
from labelpenet.errors import InputError
from labelpenet.evaluation import box_iou, cascade_table, classification_ap, evaluate, mask_iou
from labelpenet.evaluation.records import run_lengths
from labelpenet.formats import open_annotated
from labelpenet.instances import Instances
from labelpenet.models.cascade import read_run
from labelpenet.models.classification import Classification
from labelpenet.progress import Progress
from labelpenet.training.features import RoIFeatures
from labelpenet.training.inferred import Inferred
from labelpenet.training.measure import rank_images
from labelpenet.training.predict import Predictor

THRESHOLDS = {
    "class activation map": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
    "class activation map, CRF": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
}
CHOOSING = 150
WEIGHT_DECAY = 0.1
SCALES = (1.0, 0.5)


def last_layers(module: Classification) -> nn.Sequential:
    """What leads from the stem's map to the last feature map, at the stem's stride: strides are undone by dilation."""
    layers = [copy.deepcopy(module.tail)]
    for layer in module.head:
        if isinstance(layer, (nn.AdaptiveAvgPool2d, nn.Flatten)):
            break
        layers.append(copy.deepcopy(layer))
    whole, dilation = nn.Sequential(*layers), 1
    for layer in whole.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            spread = dilation * int(layer.dilation[0])
            layer.dilation = (spread, spread)
            layer.padding = (spread * (layer.kernel_size[0] // 2), spread * (layer.kernel_size[1] // 2))
            dilation *= int(layer.stride[0])
            layer.stride = (1, 1)
    return whole


def train_classifier(features: Tensor, present: Tensor, weight_decay: float = WEIGHT_DECAY) -> nn.Linear:
    """A linear classifier: mean binary cross-entropy over the images, and L2; convex, hence without a seed.

    Args:
        features: (I, D); present: (I, C) 0 or 1.
    """
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-6)
    scaled = (features - mean) / spread
    weight = torch.zeros(present.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(present.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        logits = F.linear(scaled, weight, bias)
        value = F.binary_cross_entropy_with_logits(logits, present) * present.shape[1]
        value = value + weight_decay * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)  # type: ignore[arg-type]
    classifier = nn.Linear(features.shape[1], present.shape[1]).requires_grad_(False)
    slopes = weight.detach() / spread
    classifier.weight.copy_(slopes)
    classifier.bias.copy_(bias.detach() - slopes @ mean)
    return classifier


def activation_maps(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Class activation maps (K, h, w) in [0, 1], each divided by its maximum.

    Args:
        features: of each scale (D, h, w), the largest first; the maps of all scales are added.
        weights: (K, D).
    """
    size = features[0].shape[1:]
    each = [torch.einsum("kd,dhw->khw", weights, one)[None] for one in features]
    maps = sum(F.interpolate(one, size=size, mode="bilinear", align_corners=False)[0] for one in each)
    assert isinstance(maps, Tensor)
    maps = maps.clamp(min=0)
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-6)


def cut(image: np.ndarray, maps: Tensor, labels: Tensor, weights: Tensor, settings: Calibration) -> Instances:
    """One instance for each activation map, after the CRF or (no iterations) where it exceeds the background.

    Args:
        image: (H, W, 3); maps: (K, h, w) in [0, 1]; labels, weights: (K,).
    """
    size = (image.shape[0], image.shape[1])
    if not len(maps):
        return Instances.empty(size, with_masks=True)
    canvas, _ = working_canvas(image, settings.side)
    confidence = F.interpolate(maps[None], size=canvas.shape[:2], mode="bilinear", align_corners=False)[0]
    whole = torch.tensor([[0.0, 0.0, size[1], size[0]]]).expand(len(maps), 4)
    return to_instances(segment(canvas, confidence, settings), whole, labels, weights, size, settings)


def whole_image(size: tuple[int, int], labels: Tensor, weights: Tensor) -> Instances:
    """The image of (H, W) as one instance for each label."""
    boxes = torch.tensor([[0.0, 0.0, size[1], size[0]]]).repeat(len(labels), 1)
    return Instances(boxes, labels, weights, size, torch.ones(len(labels), *size, dtype=torch.bool))


class Activation:
    """The class activation maps of a run's backbone.

    Attributes:
        classifier: None until `train`.
    """

    def __init__(self, predictor: Predictor):
        self.predictor = predictor
        self.network = predictor.cascade
        self.layers = last_layers(self.network.classification)
        self.classifier: nn.Linear | None = None

    def features(self, pixels: np.ndarray, scale: float = 1.0) -> Tensor:
        """The last feature map (D, h, w) of a photograph (H, W, 3), float32 on the CPU."""
        side = round(scale * (self.network.recipe.images.test_side or min(pixels.shape[:2])))
        with torch.no_grad(), self.predictor.fabric.autocast():
            found = self.layers(self.network.stem_maps(self.network.view(pixels, side))[0])
        return found[0].float().cpu()

    def train(self, images: Sequence[TaggedImage]) -> None:
        """Trains the classifier on the images' tags."""

        def pool(image: TaggedImage) -> Tensor:
            return self.features(read_image(image.path)).mean((1, 2))

        pooled = list(self.each(images, "pooled features", pool))
        present = torch.zeros(len(images), len(self.network.classes))
        for row, image in zip(present, images, strict=True):
            row[list(image.tags)] = 1
        self.classifier = train_classifier(torch.stack(pooled), present)

    def look(self, image: TaggedImage, tags: tuple[int, ...] | None) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        """The photograph, maps (K, h, w) and labels (K,) of its tags (None: of all classes), probabilities (C,)."""
        assert self.classifier is not None
        pixels = read_image(image.path)
        features = [self.features(pixels, scale) for scale in SCALES]
        probabilities = self.classifier(features[0].mean((1, 2))).sigmoid()
        labels = torch.tensor(range(len(probabilities)) if tags is None else tags, dtype=torch.long)
        return pixels, activation_maps(features, self.classifier.weight[labels]), labels, probabilities

    def each(self, images: Sequence[TaggedImage], name: str, function: Callable[[TaggedImage], Any]) -> Iterator[Any]:
        """``function`` of every image, in order, several at a time on a CPU, with progress."""
        with (
            Progress(name, len(images), 0) as progress,
            contextlib.closing(map_images(function, images, self.network.device)) as results,
        ):
            for done, result in enumerate(results):
                progress.show(done + 1, {})
                yield result


def variants(network: Any, thresholds: Mapping[str, float], tagged: bool) -> dict[str, Calibration]:
    """The settings of `cut` by name; classes compete for pixels where they are known to be there."""
    base = replace(
        network.recipe.modules[0].label, box="mask", min_component=1.0, compete="instances" if tagged else "background"
    )
    return {
        name: replace(base, threshold=threshold, iterations=base.iterations if name.endswith("CRF") else 0)
        for name, threshold in thresholds.items()
    }


def choose_thresholds(
    activation: Activation, data: AnnotatedImages, truths: Mapping[str, Truth]
) -> dict[str, tuple[float, list[float]]]:
    """For each variant the best threshold, by CorLoc plus mean mask IoU of the tags' instances (means over classes).

    Returns:
        The threshold, and that sum for each of `THRESHOLDS`.
    """
    images = [image for image in data.tagged.images if image.id in truths and image.tags]
    images = [image for image in images if truths[image.id].instances.masks is not None]
    random.Random(1).shuffle(images)

    def attempt(image: TaggedImage) -> list[tuple[str, int, int, float]]:
        pixels, maps, labels, _ = activation.look(image, image.tags)
        rows = []
        for name, values in THRESHOLDS.items():
            for index, value in enumerate(values):
                settings = variants(activation.network, {name: value}, True)[name]
                found = cut(pixels, maps, labels, torch.ones(len(labels)), settings)
                for label, quality in zip(labels.tolist(), qualities(found, truths[image.id].instances), strict=True):
                    rows.append((name, index, label, quality))
        return rows

    tables = {name: np.zeros((len(values), len(data.tagged.classes), 2)) for name, values in THRESHOLDS.items()}
    for rows in activation.each(images[:CHOOSING], "thresholds", attempt):
        for name, index, label, quality in rows:
            tables[name][index, label] += (quality, 1)
    chosen = {}
    for name, table in tables.items():
        seen = table[0, :, 1] > 0
        value = (table[:, seen, 0] / table[:, seen, 1]).mean(1)
        chosen[name] = (THRESHOLDS[name][int(value.argmax())], value.round(4).tolist())
    return chosen


def qualities(found: Instances, truth: Instances) -> list[float]:
    """For each instance 1 if its box is right, plus the best IoU of its mask with an object of its class."""
    assert found.masks is not None and truth.masks is not None
    same = (found.labels[:, None] == truth.labels[None]).numpy()
    boxes = np.where(same, box_iou(found.boxes.numpy(), truth.boxes.numpy()), 0).max(1, initial=0.0)
    masks = np.where(same, mask_iou(run_lengths(found.masks), run_lengths(truth.masks)), 0).max(1, initial=0.0)
    return ((boxes >= 0.5) + masks).tolist()


def baselines(
    activation: Activation, images: Sequence[TaggedImage], thresholds: Mapping[str, float], tagged: bool
) -> tuple[dict[str, Inferred], np.ndarray]:
    """What each variant and the whole image find, by image id; and the images' class probabilities (I, C).

    Args:
        tagged: whether the images' tags are known. If not, every class whose probability reaches the score that the
            cascade's own predictions need has an instance.
    """
    settings = variants(activation.network, thresholds, tagged)
    least = activation.network.recipe.modules[3].predict.min_score
    classes = len(activation.network.classes)

    def attempt(image: TaggedImage) -> tuple[dict[str, list[dict[str, Any]]], tuple[int, int], np.ndarray]:
        pixels, maps, labels, probabilities = activation.look(image, image.tags if tagged else None)
        size = (pixels.shape[0], pixels.shape[1])
        if not tagged:
            likely = probabilities >= least
            maps, labels = maps[likely], labels[likely]
        weights = probabilities[labels]
        found = {name: cut(pixels, maps, labels, weights, one) for name, one in settings.items()}
        found["whole image"] = whole_image(size, labels, weights)
        rows = {name: one.to_coco(image.id, range(1, classes + 1)) for name, one in found.items()}
        return rows, size, probabilities.numpy()

    rows: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in (*settings, "whole image")}
    sizes, everything = {}, []
    name = "training images" if tagged else "held-out images"
    for image, (own, size, probabilities) in zip(images, activation.each(images, name, attempt), strict=True):
        sizes[image.id] = size
        everything.append(probabilities)
        for variant, one in own.items():
            rows[variant][image.id] = one
    return {name: Inferred(one, sizes, classes) for name, one in rows.items()}, np.array(everything)


def measure_baselines(
    run: Path, data: Path, split: str, train_split: str, device: str, cache: Path | None
) -> dict[str, Any]:
    """Trains, chooses, predicts and measures: results by baseline for ``train`` and ``val``, and what was chosen.

    Raises:
        InputError: no run, or data that cannot be used.
    """
    predictor, classes = Predictor(run, device), read_run(run)["classes"]
    train, held_out = (open_annotated(data, one, classes) for one in (train_split, split))
    train_truths, truths = train.readable_truths()[0], held_out.readable_truths()[0]
    activation = Activation(predictor)
    activation.train(train.tagged.images)
    chosen = choose_thresholds(activation, train, train_truths)
    thresholds = {name: threshold for name, (threshold, _) in chosen.items()}
    results: dict[str, Any] = {"split": split, "protocol": "voc12", "thresholds": chosen, "train": {}, "val": {}}
    for key, source, truth in (("train", train, train_truths), ("val", held_out, truths)):
        images = source.tagged.images
        found, probabilities = baselines(activation, images, thresholds, key == "train")
        boxes = compute_proposals(images, predictor.cascade.recipe.proposals, cache, progress=True)
        features = RoIFeatures(run, predictor.cascade, boxes, predictor.fabric) if key == "train" else None
        ranked, _ = rank_images(predictor, images, boxes, features)
        for name, one in {**found, "module 1, top proposals": ranked}.items():
            results[key][name] = evaluate(one, truth, classes, "voc12")
    tags = np.array([[label in image.tags for label in range(len(classes))] for image in held_out.tagged.images])
    results["classification_mAP"] = float(np.nanmean(classification_ap(probabilities, tags)))
    return results


def main() -> int:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--cache", type=Path, help="folder of the proposals' cache")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="where the results go")
    one = parser.parse_args()
    try:
        results = measure_baselines(one.run, one.data, one.split, one.train_split, one.device, one.cache)
        if one.json:
            write_json(one.json, results, indent=1)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(cascade_table(results["train"], results["val"]).render("markdown"))
    print(f"the classifier's mAP over images: {100 * results['classification_mAP']:.1f}")
    for name, (threshold, values) in results["thresholds"].items():
        tried = ", ".join(f"{t}: {value:.3f}" for t, value in zip(THRESHOLDS[name], values, strict=True))
        print(f"threshold of {name}: {threshold} (CorLoc + mask IoU on training images: {tried})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
