"""What a run found, to look at: overlays on photographs, loss curves, and the report as one HTML file."""

from labelpenet.report.html import write_report
from labelpenet.visualize import draw_boxes, draw_instances, draw_map, draw_mask, write_overlay

__all__ = ["draw_boxes", "draw_instances", "draw_map", "draw_mask", "write_overlay", "write_report"]
