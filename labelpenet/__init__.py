"""Label-PEnet: instance segmentation from image tags alone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from labelpenet.errors import InputError

if TYPE_CHECKING:
    from labelpenet.instances import Instances
    from labelpenet.models.cascade import LabelPEnet
    from labelpenet.models.student import Student, load

__version__ = "0.2.0.dev0"
__all__ = ["InputError", "Instances", "LabelPEnet", "Student", "__version__", "load"]


_HOMES = {
    "Instances": "instances",
    "LabelPEnet": "models.cascade",
    "Student": "models.student",
    "load": "models.student",
}


def __getattr__(name: str) -> Any:
    """What needs torch on first use: its import takes seconds, which ``labelpenet --help`` need not wait for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'labelpenet' has no attribute {name!r}")
    return getattr(import_module(f"labelpenet.{_HOMES[name]}"), name)
