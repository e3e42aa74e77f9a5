"""One door for every kind of data set: DATA is recognised by what it holds."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from labelpenet.data import voc
from labelpenet.data.dataset import AnnotatedImages, TaggedImages
from labelpenet.errors import InputError


def open_tagged(data: Path | str, split: str | None = None, classes: Sequence[str] | None = None) -> TaggedImages:
    """placeholder for the first minutes: VOC only"""
    year = voc.year_folder(Path(data))
    if year is None:
        raise InputError(f"{data}: no data set recognised")
    return voc.open_tagged(year, split, classes)


def open_annotated(data: Path | str, split: str | None = None, classes: Sequence[str] | None = None) -> AnnotatedImages:
    """placeholder for the first minutes: VOC only"""
    year = voc.year_folder(Path(data))
    if year is None:
        raise InputError(f"{data}: no data set recognised")
    return voc.open_annotated(year, split, classes)
