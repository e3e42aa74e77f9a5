"""What comes out, in the form that other tools take: predictions.json, COCO, VOC, YOLO, Label Studio, supervision."""

from labelpenet.export.coco import export_coco
from labelpenet.export.files import Exported
from labelpenet.export.formats import Format, export
from labelpenet.export.label_studio import export_label_studio
from labelpenet.export.predictions import Predictions, read_predictions, write_predictions
from labelpenet.export.supervision import from_supervision, to_supervision
from labelpenet.export.voc import export_voc, export_voc_submission
from labelpenet.export.yolo import export_yolo

__all__ = [
    "Exported",
    "Format",
    "Predictions",
    "export",
    "export_coco",
    "export_label_studio",
    "export_voc",
    "export_voc_submission",
    "export_yolo",
    "from_supervision",
    "read_predictions",
    "to_supervision",
    "write_predictions",
]
