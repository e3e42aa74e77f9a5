"""A look at a run's labels in the browser, the doubtful photographs first, and what the person said of each."""

from labelpenet.review.doubt import rank
from labelpenet.review.server import serve

__all__ = ["rank", "serve"]
