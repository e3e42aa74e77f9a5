"""What a run found, to look at: overlays on photographs, loss curves, and the report as one HTML file."""

from labelpenet.report.html import write_report

__all__ = ["write_report"]
