"""Label-PEnet: instance segmentation from image tags alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labelpenet.errors import InputError

if TYPE_CHECKING:
    from labelpenet.instances import Instances
    from labelpenet.models.cascade import LabelPEnet
    from labelpenet.models.student import Student, load

__version__ = "0.2.0.dev0"
__all__ = ["InputError", "Instances", "LabelPEnet", "Student", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """What needs torch on first use: its import takes seconds, which ``labelpenet --help`` need not wait for."""
    if name == "Instances":
        from labelpenet.instances import Instances

        return Instances
    if name == "LabelPEnet":
        from labelpenet.models.cascade import LabelPEnet

        return LabelPEnet
    if name in ("Student", "load"):
        from labelpenet.models import student

        return getattr(student, name)
    raise AttributeError(f"module 'labelpenet' has no attribute {name!r}")
