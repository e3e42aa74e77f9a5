"""What goes in and out: data sets by their path, predictions.json, and annotation in the form that other tools take."""

from labelpenet.formats.coco import export_coco, export_coco_results
from labelpenet.formats.export import Format, export
from labelpenet.formats.label_studio import export_label_studio
from labelpenet.formats.labelme import export_labelme
from labelpenet.formats.open import open_annotated, open_tagged, training_split
from labelpenet.formats.predictions import read_predictions, write_predictions
from labelpenet.formats.rows import Predictions
from labelpenet.formats.selection import Exported
from labelpenet.formats.supervision import from_supervision, to_supervision
from labelpenet.formats.voc import export_voc
from labelpenet.formats.voc_submission import export_voc_submission
from labelpenet.formats.yolo import export_yolo

__all__ = [
    "Exported",
    "Format",
    "Predictions",
    "export",
    "export_coco",
    "export_coco_results",
    "export_label_studio",
    "export_labelme",
    "export_voc",
    "export_voc_submission",
    "export_yolo",
    "from_supervision",
    "open_annotated",
    "open_tagged",
    "read_predictions",
    "to_supervision",
    "training_split",
    "write_predictions",
]
