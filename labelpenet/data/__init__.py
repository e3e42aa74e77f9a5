"""Where images and tags come from: VOC, COCO, folders, Label Studio and generated scenes; and proposals for them."""

from labelpenet.data.dataset import AnnotatedImages, TaggedImage, TaggedImages, Truth
from labelpenet.data.images import read_image
from labelpenet.data.recognise import open_annotated, open_tagged, training_split
from labelpenet.data.scenes import write_scenes

__all__ = [
    "AnnotatedImages",
    "TaggedImage",
    "TaggedImages",
    "Truth",
    "open_annotated",
    "open_tagged",
    "read_image",
    "training_split",
    "write_scenes",
]
