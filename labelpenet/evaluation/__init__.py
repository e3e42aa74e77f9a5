"""Measures as the field computes them: VOC box AP and CorLoc, mask AP^r and ABO, semantic mIoU, COCO AP."""

from labelpenet.evaluation.detection import (
    average_precision,
    box_iou,
    class_average_precisions,
    classification_ap,
    corloc,
    match_boxes,
    match_detections,
    precision_recall,
)
from labelpenet.evaluation.masks import mask_iou, match_masks
from labelpenet.evaluation.protocols import evaluate, uncounted
from labelpenet.evaluation.records import Record, record
from labelpenet.evaluation.tables import Table, beside_paper, cascade_table, paper_table, paper_tables, summary_table

__all__ = [
    "Record",
    "Table",
    "average_precision",
    "beside_paper",
    "box_iou",
    "cascade_table",
    "class_average_precisions",
    "classification_ap",
    "corloc",
    "evaluate",
    "mask_iou",
    "match_boxes",
    "match_detections",
    "match_masks",
    "paper_table",
    "paper_tables",
    "precision_recall",
    "record",
    "summary_table",
    "uncounted",
]
