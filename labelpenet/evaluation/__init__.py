"""Measures as the field computes them: VOC box AP and CorLoc, mask AP^r and ABO, semantic mIoU, COCO AP."""

from labelpenet.evaluation.coco import coco_average_precisions
from labelpenet.evaluation.detection import (
    average_precision,
    best_overlaps,
    box_iou,
    class_average_precisions,
    classification_ap,
    corloc,
    match_boxes,
    match_detections,
    precision_recall,
)
from labelpenet.evaluation.masks import average_best_overlap, mask_iou, match_masks
from labelpenet.evaluation.protocols import Protocol, evaluate
from labelpenet.evaluation.records import Record, record
from labelpenet.evaluation.semantic import class_ious, confusion, paint
from labelpenet.evaluation.tables import Table, beside_paper, cascade_table, paper_table, paper_tables, summary_table

__all__ = [
    "Protocol",
    "Record",
    "Table",
    "average_best_overlap",
    "average_precision",
    "beside_paper",
    "best_overlaps",
    "box_iou",
    "cascade_table",
    "class_average_precisions",
    "class_ious",
    "classification_ap",
    "coco_average_precisions",
    "confusion",
    "corloc",
    "evaluate",
    "mask_iou",
    "match_boxes",
    "match_detections",
    "match_masks",
    "paint",
    "paper_table",
    "paper_tables",
    "precision_recall",
    "record",
    "summary_table",
]
