"""Label-PEnet: instance segmentation from image tags alone."""

from labelpenet.errors import InputError
from labelpenet.instances import Instances

__version__ = "0.1.0"
__all__ = ["InputError", "Instances", "__version__"]
