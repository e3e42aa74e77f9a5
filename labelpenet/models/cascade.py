"""`LabelPEnet`: one stem and four modules in order.

Shape letters: ``N`` photographs, ``H, W`` one of them, ``R`` proposals, ``C`` foreground classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import nms

from labelpenet import config
from labelpenet.calibration.calibrate import Trace, select_instances
from labelpenet.calibration.excitation import layer_without_rule
from labelpenet.config import MODULES, Recipe, StudentRecipe
from labelpenet.data import run_folder
from labelpenet.data.files import read_tensors
from labelpenet.data.images import Photograph, as_pixels, several
from labelpenet.data.proposals import propose
from labelpenet.data.transforms import Batch, View, divisible, resize_image, scaled_size, stack
from labelpenet.errors import DamagedError, InputError
from labelpenet.instances import Instances
from labelpenet.models.backbones import Backbone
from labelpenet.models.build import build_backbone
from labelpenet.models.classification import Classification
from labelpenet.models.detection import Detection
from labelpenet.models.layers import evaluating
from labelpenet.models.segmentation import Segmentation
from labelpenet.models.tags import weigh
from labelpenet.models.weights import check_weights

Tags = tuple[int, ...] | None
"""The classes that a photograph shows, None where they are not known."""


class Network(nn.Module):
    """What answers for photographs: the cascade, or a student."""

    recipe: Recipe | StudentRecipe

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def require(self, number: int) -> None:
        """Raises InputError unless module ``number`` exists and has been trained."""
        raise NotImplementedError

    @overload
    def predict(self, image: Photograph, module: int = 4, proposals: Tensor | None = None) -> Instances: ...

    @overload
    def predict(self, image: list[Photograph] | tuple[Photograph, ...], module: int = 4) -> list[Instances]: ...

    def predict(
        self,
        image: Photograph | list[Photograph] | tuple[Photograph, ...],
        module: int = 4,
        proposals: Tensor | None = None,
    ) -> Instances | list[Instances]:
        """The instances of a photograph, or of each of several, whose tags are not known.

        Args:
            image: an image file, (H, W, 3) uint8 RGB, a PIL image, or a list of them; a folder stands for the list of
                its image files in order of name (`data.images.find_images`).
            module: which of the four predicts; a student stands for module 4 alone, and needs no proposals.
            proposals: (R, 4) in pixels of the photograph; computed if the module needs them and they are not given.

        Returns:
            `Instances` on the CPU, best first: scores in [0, 1] as weights, those of modules 2 to 4 less where the
            photograph as a whole does not seem to show the class (`modules.1.tag_power`); masks for every module. A
            list of them for a list or a folder.

        Raises:
            InputError: a file cannot be read; no such module.
        """
        self.require(module)
        images = several(image)
        if images is not None:
            if proposals is not None:
                raise InputError("proposals are those of one photograph; give those of several to predict_batch")
            return [self.predict(one, module) for one in images]
        return self.predict_pixels(as_pixels(cast(Photograph, image)), module, proposals)

    def predict_pixels(
        self, pixels: np.ndarray, module: int = 4, proposals: Tensor | None = None, tags: Tags = None
    ) -> Instances:
        """As `predict`, for a photograph (H, W, 3) uint8 RGB; where its ``tags`` are known, of these classes alone, by
        the choices for labels."""
        own = None if proposals is None else [torch.as_tensor(proposals)]
        return self.predict_batch([pixels], module, own, None if tags is None else [tags])[0]

    def predict_batch(
        self,
        images: Sequence[np.ndarray],
        module: int = 4,
        proposals: Sequence[Tensor] | None = None,
        tags: Sequence[Tags] | None = None,
    ) -> list[Instances]:
        """As `predict_pixels`, for photographs that go through the network together (a student's one by one)."""
        raise NotImplementedError

    def input_size(self, pixels: np.ndarray) -> tuple[int, int]:
        """(h, w) to which a photograph (H, W, 3) is scaled and padded for an answer."""
        images, multiple = self.recipe.images, divisible(self.device)
        height, width = scaled_size(pixels.shape, images.test_side, images.longest)
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple


class LabelPEnet(Network):
    """The cascade: a shared stem and the modules `classification`, `detection`, `refinement` and `segmentation`.

    Args:
        backbone: what `build_backbone` returned.
        classes: names of the C foreground classes.
        recipe: every choice.
    """

    recipe: Recipe
    _mean: Tensor
    _std: Tensor

    def __init__(self, backbone: Backbone, classes: Sequence[str], recipe: Recipe):
        super().__init__()
        self.classes, self.recipe, self.backbone_name = tuple(classes), recipe, backbone.name
        c = len(self.classes)
        one, two, three, four = recipe.modules
        self.stem = cast(nn.Sequential, backbone.stem.module)
        self._fine = len(cast(nn.Sequential, backbone.fine.module))
        self.classification = Classification(backbone, c, one)
        self.detection = Detection(backbone, c, two)
        self.refinement = Segmentation(backbone, c, three)
        self.segmentation = Segmentation(backbone, c, four)
        self._check_attention(backbone)
        self.to(memory_format=torch.channels_last)
        self.register_buffer("_mean", torch.tensor(backbone.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std", torch.tensor(backbone.std).view(1, 3, 1, 1) * 255, persistent=False)
        self.untrained: tuple[str, ...] = ()  # modules that are random still: not trained, not loaded
        self.normalisation = {"mean": list(backbone.mean), "std": list(backbone.std)}
        self.eval()

    def _check_attention(self, backbone: Backbone) -> None:
        for module in (self.classification, self.detection):
            if module.settings.attention == "excitation" and (missing := layer_without_rule(module.head)) is not None:
                raise InputError(
                    f"{backbone.name}: excitation backprop cannot pass its {missing}; choose "
                    "--set modules.*.attention=gradient"
                )

    def module(self, number: int) -> Classification | Detection | Segmentation:
        """Module 1 to 4; `InputError` for another number."""
        if number not in range(1, len(MODULES) + 1):
            raise InputError(f"no module {number}; choose 1, 2, 3 or 4")
        return getattr(self, MODULES[number - 1])

    def require(self, number: int) -> None:
        """Raises InputError unless module ``number`` exists and has been trained."""
        self.module(number)
        if MODULES[number - 1] in self.untrained:
            raise InputError(f"module {number} is not trained in this run yet; train on with --resume or ask another")

    # -- views and the stem ------------------------------------------------------------------------------------------

    def view(self, image: np.ndarray, side: int | None = None, flip: bool = False) -> View:
        """The photograph (H, W, 3) uint8 RGB with its shorter side scaled to ``side`` (the recipe's if None)."""
        height, width = image.shape[:2]
        images = self.recipe.images
        h, w = scaled_size(image.shape, images.test_side if side is None else side, images.longest)
        image = resize_image(image, (h, w))
        if flip:
            image = image[:, ::-1]
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(self.device)
        return View((pixels.float() - self._mean) / self._std, (w / width, h / height), flip)

    def stem_maps(self, *views: View) -> tuple[Tensor, Tensor]:
        """The shared stem's map (N, D, h, w) of views, and its last one of stride 8 (N, K, h', w'); without gradients
        where the stem is frozen."""
        frozen = not any(p.requires_grad for p in self.stem.parameters())
        with torch.no_grad() if frozen else contextlib.nullcontext():
            fine = self.stem[: self._fine](stack(views).contiguous(memory_format=torch.channels_last))
            return self.stem[self._fine :](fine), fine

    def batch(
        self,
        images: Sequence[np.ndarray],
        tags: Sequence[Tags] | None = None,
        proposals: Sequence[Tensor] | None = None,
        features: Sequence[Tensor] | None = None,
    ) -> Batch:
        """Photographs as the modules see them at inference.

        Args:
            images: (H, W, 3) uint8 RGB each.
            tags: the classes of each; None where they are not known.
            proposals: (R, 4) of each in its own pixels, for module 1.
            features: (R, D) module 1's RoI features of each, where they are known.
        """
        views = [self.view(image) for image in images]
        known = [None] * len(images) if tags is None else tags
        stem, fine = self.stem_maps(*views)
        return Batch(views, stem, images, known, proposals or (), features, fine)

    def proposals(self, image: np.ndarray) -> Tensor:
        """Selective-search proposals (R, 4) of a photograph, computed now, as the recipe wants them."""
        return self.select(propose(image, self.recipe.proposals), image.shape[:2])

    def select(self, boxes: Tensor | np.ndarray, size: tuple[int, ...]) -> Tensor:
        """Of precomputed proposals (R, 4) those that the recipe keeps, and the whole image as the first."""
        choice, boxes = self.recipe.proposals, boxes if isinstance(boxes, Tensor) else torch.tensor(boxes)
        height, width = size[:2]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        boxes = boxes[area >= choice.min_area * height * width][: choice.limit]
        whole = boxes.new_tensor([[0, 0, width, height]])
        return torch.cat([whole, boxes[(boxes != whole).any(1)]])

    # -- what the modules learn and infer ----------------------------------------------------------------------------

    def losses(
        self,
        images: Sequence[np.ndarray],
        targets: Sequence[Instances],
        module: int = 4,
        proposals: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The named losses of a module on a batch, each a mean; their sum is to be minimised.

        Args:
            images: N photographs, (H, W, 3) uint8 RGB, of any sizes.
            targets: the instances of each in pixels of its photograph. Module 1 reads their labels alone, module 2
                needs no masks, and an empty one teaches none. To modules 2 to 4 one of weight 0 is neither object nor
                background.
            module: which one learns.
            proposals: (R, 4) of each photograph; computed if the module needs them and they are not given.

        Raises:
            InputError: no such module, or targets of a class or of a photograph's size that is not there.
        """
        learner = self.module(module)
        for image, target in zip(images, targets, strict=True):
            if tuple(target.image_size) != image.shape[:2]:
                raise InputError(f"targets on {target.image_size} pixels (H, W) for a photograph of {image.shape[:2]}")
            if len(target) and int(target.labels.max()) >= len(self.classes):
                raise InputError(
                    f"a target of class {int(target.labels.max())}, but there are {len(self.classes)}, from 0"
                )
        batch = self.batch(
            images, [tuple(one.labels.unique().tolist()) for one in targets], self._proposed(images, module, proposals)
        )
        seen = [view.instances(target) for view, target in zip(batch.views, targets, strict=True)]
        return learner.losses(batch, seen)

    @torch.no_grad()
    def infer(self, number: int, batch: Batch) -> list[tuple[Instances, Trace]]:
        """What module ``number`` passes on for training images: instances of their tags only, and the maps behind."""
        return self._instances(number, batch, self.module(number).settings.label)

    @torch.no_grad()
    def predict_batch(
        self,
        images: Sequence[np.ndarray],
        module: int = 4,
        proposals: Sequence[Tensor] | None = None,
        tags: Sequence[Tags] | None = None,
    ) -> list[Instances]:
        """As `predict`, for photographs that go through the network together; where their tags are known, as `infer`
        labels training photographs."""
        self.require(module)
        if tags is not None and None in tags:  # those are answered by other choices, so each goes by itself
            boxes = [None] * len(images) if proposals is None else [[one] for one in proposals]
            each = zip(images, boxes, tags, strict=True)
            return [self.predict_batch([one], module, own, None if tag is None else [tag])[0] for one, own, tag in each]
        settings = self.module(module).settings
        with evaluating(self):
            batch = self.batch(images, tags, self._proposed(images, module, proposals))
            traced = self._instances(module, batch, settings.predict if tags is None else settings.label)
            found = [one for one, _ in traced]
            if tags is None and module > 1:
                found = self._weighed(found, batch)
        return [one[one.weights.argsort(descending=True, stable=True)] for one in found]

    def _weighed(self, found: list[Instances], batch: Batch) -> list[Instances]:
        """The instances of each photograph, believed as far as it looks like one of their class (`models.tags`)."""
        power = self.classification.settings.tag_power
        if not power or MODULES[0] in self.untrained:
            return found
        shown = torch.stack([self.classification.tags(one) for one in self.classification.whole(batch)]).cpu()
        pairs = zip(found, shown, strict=True)
        return [one.weighted(weigh(one.weights, one.labels, own, power)) for one, own in pairs]

    def _instances(self, number: int, batch: Batch, settings: config.Calibration) -> list[tuple[Instances, Trace]]:
        module: Any = self.module(number)
        found = module.infer(batch, settings)
        if not settings.vote:
            return found
        voted = self.vote(number, [one for one, _ in found], batch)
        return [select_instances(one, trace, settings) for one, (_, trace) in zip(voted, found, strict=True)]

    def vote(self, number: int, found: Sequence[Instances], batch: Batch) -> list[Instances]:
        """The instances of module ``number``, weighted by what modules 1 and 2, as far as they came before, think too.

        A weight becomes the geometric mean of itself and the probabilities that those modules give to the instance's
        class in its final box: module 1 by the softmax of its logits over the classes, module 2 by its scores. They
        learnt from other targets than the later ones and so make other errors. Modules without weights abstain. Not in
        the paper.

        Args:
            found: the instances of each photograph, in its pixels, on the CPU.
            batch: the photographs.

        Returns:
            The same instances in the same order, weights in [0, 1].
        """
        voters = [voter for voter in (1, 2) if voter < number and MODULES[voter - 1] not in self.untrained]
        counts = [len(one) for one in found]
        if not sum(counts) or not voters:
            return list(found)
        boxes, labels = [one.boxes for one in found], torch.cat([one.labels for one in found]).to(self.device)
        opinions = []
        if 1 in voters:
            features = self.classification.features(replace(batch, proposals=boxes, features=None))
            logits, _ = self.classification(torch.cat(features))
            opinions.append(_of_class(logits[:, 1:].softmax(1), labels))
        if 2 in voters:
            seen = [view.boxes(own) for view, own in zip(batch.views, boxes, strict=True)]
            opinions.append(_of_class(torch.cat(self.detection.probabilities(batch, seen)), labels))
        others = torch.stack(opinions).float().cpu()
        together = torch.cat([torch.cat([one.weights for one in found])[None].float(), others])
        weights = together.clamp(min=1e-6).log().mean(0).exp()
        weights = torch.where(together[0] == 0, 0.0, weights).split(counts)  # what is doubtful stays so
        return [one.weighted(own) for one, own in zip(found, weights, strict=True)]

    @torch.no_grad()
    def rank_proposals(
        self, image: np.ndarray, proposals: Tensor, features: Tensor | None = None
    ) -> tuple[Instances, Tensor]:
        """Module 1 by itself, uncalibrated: proposals (R, 4) ranked by ``x^c w``, after NMS; boxes without masks.

        A proposal's weight is its share of the class's positive score, times the image's probability of the class.

        Returns:
            At most 20 boxes a class, and the image's class probabilities (C,).
        """
        module = self.classification
        batch = self.batch([image], None, [proposals]) if features is None else None
        x_c, x_p = module(module.features(batch)[0] if batch is not None else features)
        probabilities = module.image_probabilities(x_c, x_p)
        scores = module.scores(x_c, x_p)
        scores = scores - scores.amin(0).clamp(max=0)
        share = (scores / scores.sum(0).clamp(min=1e-6) * probabilities).clamp(0, 1).cpu()
        parts = [Instances.empty((image.shape[0], image.shape[1]))]
        for label in range(len(self.classes)):
            kept = nms(proposals, share[:, label], 0.3)[:20]
            labels = torch.full((len(kept),), label)
            parts.append(Instances(proposals[kept], labels, share[kept, label], parts[0].image_size))
        return Instances.cat(parts), probabilities

    def _proposed(
        self, images: Sequence[np.ndarray], module: int, proposals: Sequence[Tensor] | None
    ) -> Sequence[Tensor] | None:
        if proposals is not None or not self.module(module).needs_proposals:
            return proposals
        return [self.proposals(image) for image in images]

    # -- runs --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_run(cls, run: str | Path, device: str | torch.device = "cpu", recipe: Recipe | None = None) -> LabelPEnet:
        """The trained cascade of a run folder, ready to `predict`.

        Args:
            recipe: choices to use instead of those that the run was trained with.

        Raises:
            InputError: no run folder, one of a student, an unfinished run without any trained module, or damaged
                weights.
        """
        run = Path(run)
        facts = read_cascade(run)
        network = cls.from_facts(facts, recipe)
        loaded = [part for part in ("stem", *MODULES) if network.load_part(run, part)]
        if len(loaded) < 2:
            raise InputError(f"{run}: holds no trained module yet; finish it with labelpenet train ... --resume")
        if "stem" not in loaded:
            raise InputError(f"{run_folder.weights(run, 'stem')}: gone; labelpenet train ... --resume restores it")
        network.untrained = tuple(name for name in MODULES if name not in loaded)
        return network.to(device)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], recipe: Recipe | None = None) -> LabelPEnet:
        """The cascade that ``run.json`` describes, without its weights; with another recipe if given."""
        backbone = build_backbone(facts["backbone"], pretrained=False)
        backbone.mean, backbone.std = tuple(facts["normalisation"]["mean"]), tuple(facts["normalisation"]["std"])
        return cls(backbone, facts["classes"], recipe or config.from_dict(facts["recipe"]))

    def load_part(self, run: Path, part: str) -> bool:
        """Loads ``RUN/weights/PART.safetensors`` into the stem or a module; False if it does not exist.

        Raises:
            InputError: the file is damaged or belongs to another configuration.
        """
        path = run_folder.weights(run, part)
        if not path.is_file():
            return False
        module = getattr(self, part)
        try:
            # version 0.1 called the branch of the proposal weights by another name
            state = {key.replace("weigher.", "proposal_weights."): value for key, value in read_tensors(path).items()}
            check_weights(module, state, path)
            module.load_state_dict(state)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise DamagedError(f"{path}: {error}; labelpenet train ... --resume restores it") from error
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            raise InputError(f"{path}: does not fit this run ({line}); delete it and train with --resume") from error
        return True


def read_run(run: Path) -> dict[str, Any]:
    """The facts of a run folder: classes, backbone, recipe, normalisation.

    Raises:
        InputError: not a run folder.
    """
    facts = run_folder.read_facts(run)
    if not {"classes", "backbone", "recipe", "normalisation"} <= set(facts):
        raise InputError(f"{run_folder.facts(run)}: damaged (entries are missing); train again into a new folder")
    return facts


def read_cascade(run: Path) -> dict[str, Any]:
    """As `read_run`, but an `InputError` also where the folder holds a student."""
    facts = read_run(run)
    if "kind" in facts:
        raise InputError(
            f"{run}: holds a {facts['kind']}, but this needs the modules of a cascade; give a run of labelpenet train "
            "(labelpenet.load in Python takes both)"
        )
    return facts


def _of_class(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Of (N, C) those of the class indices (N,)."""
    return probabilities.gather(1, labels[:, None])[:, 0]
