"""Module 1's RoI features of the training images, where stem and RoI head are frozen: computed once, kept as float16.

A file is named after what its features were made from: the photograph's content, its proposals, the settings and the
weights. So no photograph gets the features of another, nor those of other weights, however names and order change.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from labelpenet.data import run_folder
from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import RESUME, hash_file, read_array, write_array
from labelpenet.data.images import read_image
from labelpenet.engine.distributed import map_images, precision_of
from labelpenet.errors import InputError
from labelpenet.models.cascade import LabelPEnet
from labelpenet.models.layers import evaluating
from labelpenet.progress import Progress, log_notes


class RoIFeatures:
    """The kept features of a run.

    Args:
        run: the run folder.
        network: the cascade; its stem and module 1's RoI head must not change any more.
        proposals: (R, 4) boxes by image id.
        fabric: device, precision, processes.
    """

    def __init__(self, run: Path, network: LabelPEnet, proposals: Mapping[str, np.ndarray], fabric: Fabric) -> None:
        self.folder = run_folder.features(run)
        self.network, self.proposals, self.fabric = network, proposals, fabric
        module, recipe = network.classification, network.recipe
        settings = [asdict(recipe.images), asdict(recipe.proposals), recipe.modules[0].pool]
        facts = [network.backbone_name, network.normalisation, precision_of(fabric)]
        made_from = hashlib.blake2b(json.dumps([settings, facts]).encode(), digest_size=16)
        for part in (network.stem, module.tail, module.head):
            for value in part.state_dict().values():
                made_from.update(value.detach().cpu().numpy().tobytes())
        self._made_from = made_from.hexdigest()
        self._paths: dict[str, Path] = {}

    def path(self, image: TaggedImage) -> Path:
        """Where the features of an image are kept."""
        if image.id not in self._paths:
            try:
                content = hash_file(image.path)
            except OSError:
                content = "cannot be read"
            boxes = np.ascontiguousarray(self.proposals[image.id])
            key = hashlib.blake2b(f"{content}{self._made_from}".encode() + boxes.tobytes(), digest_size=16)
            self._paths[image.id] = self.folder / f"{key.hexdigest()}.npy"
        return self._paths[image.id]

    def compute(self, image: TaggedImage) -> tuple[np.ndarray, str]:
        """The features (R, D) float16, now kept, and a note; none of an image that cannot be read."""
        module, note = self.network.classification, ""
        try:
            pixels = read_image(image.path)
            with evaluating(self.network), torch.no_grad(), self.fabric.autocast():
                chosen = self.network.select(self.proposals[image.id], pixels.shape)
                (features,) = module.features(self.network.batch([pixels], proposals=[chosen]))
            found = features.to(torch.float16).cpu().numpy()
        except InputError as error:
            found, note = np.zeros((0, module.classifier.in_features), np.float16), f"skipped: {error}"
        write_array(self.path(image), found, RESUME)
        return found, note

    def compute_all(self, images: Sequence[TaggedImage]) -> None:
        """Computes what is missing or damaged, the processes together, and removes what belongs to no image."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Each process looks only for its own share: what the others have written meanwhile must not shift it.
        share = images[self.fabric.global_rank :: self.fabric.world_size]
        missing = [image for image in share if self._read(image) is None]
        with (
            evaluating(self.network),
            Progress("RoI features", len(missing), 0) as progress,
            contextlib.closing(map_images(self.compute, missing, self.fabric.device)) as results,
        ):
            for _, note in progress.tracked(results):
                if note:
                    progress.say(note)
        if self.fabric.global_rank == 0:
            known = {self.path(image) for image in images}
            for path in self.folder.iterdir():
                if path.suffix == ".npy" and path not in known:
                    path.unlink()
        self.fabric.barrier()

    def known(self, image: TaggedImage) -> Tensor | None:
        """The features (R, D) float32 of an image on the device, computed again where the file is missing or damaged.

        None where the run keeps none, and for an image that could not be read.
        """
        if not self.folder.is_dir():
            return None
        found = self._read(image)
        return self._tensor(self.compute(image)[0] if found is None else found)

    def kept(self, image: TaggedImage) -> Tensor | None:
        """As `known`, but None where there is no whole file."""
        return self._tensor(read_array(self.path(image)))

    def _tensor(self, found: np.ndarray | None) -> Tensor | None:
        return torch.from_numpy(found).float().to(self.fabric.device) if found is not None and len(found) else None

    def _read(self, image: TaggedImage) -> np.ndarray | None:
        path = self.path(image)
        found = read_array(path)
        if found is None and path.is_file():
            log_notes(f"{path} is damaged; the RoI features of {image.id} are computed again")
        return found
