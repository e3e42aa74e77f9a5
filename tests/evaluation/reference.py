"""The VOC development kit's measures as plain loops, written from their definition. Slow; for tests only."""

from __future__ import annotations

import numpy as np


def box_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def mask_iou(a, b):
    union = np.logical_or(a, b).sum()
    return np.logical_and(a, b).sum() / union if union else 0.0


def iou(kind, one, i, other, j):
    if kind == "box":
        return box_iou(one.boxes[i].tolist(), other.boxes[j].tolist())
    return mask_iou(one.masks[i].numpy(), other.masks[j].numpy())


def class_ap(predictions, truths, label, threshold, interpolation, kind):
    """AP of one class; None without ground truth."""
    positives = 0
    for truth in truths.values():
        for j in range(len(truth.instances)):
            if truth.instances.labels[j] == label and not truth.difficult[j] and not truth.crowd[j]:
                positives += 1
    if positives == 0:
        return None
    found = []
    for name in truths:
        if name in predictions:
            for i in range(len(predictions[name])):
                if predictions[name].labels[i] == label:
                    found.append((float(predictions[name].weights[i]), name, i))
    found.sort(key=lambda entry: -entry[0])  # Python's sort is stable
    taken = set()
    tp = fp = 0
    curve = []
    for _, name, i in found:
        truth = truths[name]
        best, best_j = -1.0, None
        for j in range(len(truth.instances)):
            if truth.instances.labels[j] == label:
                overlap = iou(kind, predictions[name], i, truth.instances, j)
                if overlap > best:
                    best, best_j = overlap, j
        if best_j is not None and best >= threshold:
            if truth.difficult[best_j] or truth.crowd[best_j]:
                continue
            if (name, best_j) in taken:
                fp += 1
            else:
                taken.add((name, best_j))
                tp += 1
        else:
            fp += 1
        curve.append((tp / positives, tp / (tp + fp)))
    if interpolation == "voc07":
        total = 0.0
        for k in range(11):
            total += max([p for r, p in curve if r >= k * 0.1], default=0.0)
        return total / 11
    recalls = [0.0] + [r for r, _ in curve] + [1.0]
    precisions = [0.0] + [p for _, p in curve] + [0.0]
    for k in range(len(precisions) - 2, -1, -1):
        precisions[k] = max(precisions[k], precisions[k + 1])
    return sum((recalls[k] - recalls[k - 1]) * precisions[k] for k in range(1, len(recalls)))


def class_corloc(predictions, truths, label):
    images = hits = 0
    for name, truth in truths.items():
        objects = [j for j in range(len(truth.instances)) if truth.instances.labels[j] == label and not truth.crowd[j]]
        if not objects:
            continue
        images += 1
        best, top = -1.0, None
        for i in range(len(predictions.get(name, ()))):
            if predictions[name].labels[i] == label and predictions[name].weights[i] > best:
                best, top = float(predictions[name].weights[i]), i
        if top is not None and any(iou("box", predictions[name], top, truth.instances, j) >= 0.5 for j in objects):
            hits += 1
    return hits / images if images else None


def class_abo(predictions, truths, label):
    overlaps = []
    for name, truth in truths.items():
        for j in range(len(truth.instances)):
            if truth.instances.masks is None or truth.instances.labels[j] != label or truth.crowd[j]:
                continue
            best = 0.0
            for i in range(len(predictions.get(name, ()))):
                if predictions[name].labels[i] == label:
                    best = max(best, iou("mask", predictions[name], i, truth.instances, j))
            overlaps.append(best)
    return float(np.mean(overlaps)) if overlaps else None


def semantic_ious(predictions, truths, classes):
    """IoU by class 0..C over all pixels; None for a class without a true pixel."""
    both, either, true = [0] * (classes + 1), [0] * (classes + 1), [0] * (classes + 1)
    for name, truth in truths.items():
        painted = np.zeros(truth.semantic.shape, dtype=int)
        found = predictions.get(name)
        if found is not None:
            for i in sorted(range(len(found)), key=lambda i: float(found.weights[i])):
                painted[found.masks[i].numpy()] = int(found.labels[i]) + 1
        for guess, value in zip(painted.ravel().tolist(), truth.semantic.ravel().tolist(), strict=True):
            if value == 255:
                continue
            true[value] += 1
            either[value] += 1
            if guess == value:
                both[value] += 1
            else:
                either[guess] += 1
    return [both[k] / either[k] if true[k] else None for k in range(classes + 1)]
