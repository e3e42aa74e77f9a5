"""Images, tags and truth as the rest of the project knows them; photographs, generated scenes, proposals, files."""

from labelpenet.data.dataset import AnnotatedImages, TaggedImage, TaggedImages, Truth
from labelpenet.data.images import read_image
from labelpenet.data.scenes import write_scenes

__all__ = ["AnnotatedImages", "TaggedImage", "TaggedImages", "Truth", "read_image", "write_scenes"]
