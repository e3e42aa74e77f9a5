"""`LabelPEnet`: one stem, four modules, and what each of them infers for an image.

Shape letters: ``H, W`` the photograph, ``h, w`` the network's input, ``R`` proposals, ``C`` foreground classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import nms

from labelpenet import config
from labelpenet.calibration import Trace, calibrate, project_maps
from labelpenet.calibration.calibrate import distinct, segment, settle, working_canvas
from labelpenet.calibration.excitation import layer_without_rule
from labelpenet.config import MODULES, AttentionCalibration, MaskCalibration, Recipe
from labelpenet.data import run_folder
from labelpenet.data.files import read_tensors
from labelpenet.data.images import as_pixels, find_images
from labelpenet.data.proposals import ProposalSettings, propose
from labelpenet.errors import DamagedError, InputError
from labelpenet.instances import Instances
from labelpenet.models.attention import roi_attention
from labelpenet.models.backbones import Backbone
from labelpenet.models.build import build_backbone
from labelpenet.models.classification import Classification
from labelpenet.models.detection import Candidates, Detector
from labelpenet.models.segmentation import Segmenter
from labelpenet.models.weights import check_weights


@dataclass
class View:
    """A photograph as the network sees it.

    Attributes:
        pixels: (1, 3, h, w) normalised.
        scale: factors (x, y) from the photograph's pixels to the network's.
        flipped: whether it is mirrored left to right.
    """

    pixels: Tensor
    scale: tuple[float, float]
    flipped: bool = False

    def boxes(self, boxes: Tensor) -> Tensor:
        """(R, 4) boxes of the photograph in pixels of the view."""
        scaled = boxes.to(self.pixels.device).float() * self.pixels.new_tensor([*self.scale, *self.scale])
        if not self.flipped:
            return scaled
        width = self.pixels.shape[-1]
        return torch.stack([width - scaled[:, 2], scaled[:, 1], width - scaled[:, 0], scaled[:, 3]], 1)

    def back(self, boxes: Tensor) -> Tensor:
        """The inverse of `boxes`, for a view that is not flipped."""
        return boxes / boxes.new_tensor([*self.scale, *self.scale])

    def instances(self, one: Instances) -> Instances:
        """The photograph's instances in pixels of the view; boxes exact, masks resized to the nearest pixel."""
        height, width = int(self.pixels.shape[-2]), int(self.pixels.shape[-1])
        masks = None
        if one.masks is not None:
            masks = torch.zeros(len(one), height, width, dtype=torch.bool)
            for index, mask in enumerate(one.masks.cpu().numpy()):
                resized = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
                masks[index] = torch.from_numpy(resized.astype(bool))
            masks = masks.flip(-1) if self.flipped else masks
            masks = masks.to(self.pixels.device)
        device = self.pixels.device
        return Instances(self.boxes(one.boxes), one.labels.to(device), one.weights.to(device), (height, width), masks)


Photograph = np.ndarray | Image.Image | str | Path
"""A photograph in whatever form one has it (see `data.images.as_pixels`)."""

Seen = tuple[View, Tensor]
"""A view and the stem's map of it."""


class LabelPEnet(nn.Module):
    """The cascade.

    Args:
        backbone: what `build_backbone` returned.
        classes: names of the C foreground classes.
        recipe: every choice.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, backbone: Backbone, classes: Sequence[str], recipe: Recipe):
        super().__init__()
        self.classes, self.recipe, self.backbone_name = tuple(classes), recipe, backbone.name
        c = len(self.classes)
        self.stem = backbone.stem.module
        one, two, three, four = recipe.modules
        self.classification = Classification(backbone, c, one)
        self.detection = Detector(backbone, c, backbone.region_tail(), two)
        self.refinement = Segmenter(backbone, c, three)
        self.segmentation = Segmenter(backbone, c, four)
        self._check_attention(backbone)
        self.to(memory_format=torch.channels_last)
        self.register_buffer("_mean", torch.tensor(backbone.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std", torch.tensor(backbone.std).view(1, 3, 1, 1) * 255, persistent=False)
        self.untrained: tuple[str, ...] = ()  # modules that a run's folder has no weights for
        self.normalisation = {"mean": list(backbone.mean), "std": list(backbone.std)}
        self.eval()

    def _check_attention(self, backbone: Backbone) -> None:
        one, two, _, _ = self.recipe.modules
        for name, attention in ((one.name, one.attention), (two.name, two.attention)):
            if attention == "excitation":
                missing = layer_without_rule(getattr(self, name).head)
                if missing is not None:
                    raise InputError(
                        f"{backbone.name}: excitation backprop cannot pass its {missing}; choose "
                        "--set modules.*.attention=gradient"
                    )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def module(self, number: int) -> nn.Module:
        """Module 1 to 4."""
        return getattr(self, MODULES[number - 1])

    def require(self, number: int) -> None:
        """Raises InputError unless module ``number`` exists and has been trained."""
        if number not in (1, 2, 3, 4):
            raise InputError(f"no module {number}; choose 1, 2, 3 or 4")
        if MODULES[number - 1] in self.untrained:
            raise InputError(f"module {number} is not trained in this run yet; train on with --resume or ask another")

    # -- views and the stem ------------------------------------------------------------------------------------------

    def view(self, image: np.ndarray, side: int | None = None, flip: bool = False) -> View:
        """The photograph (H, W, 3) uint8 RGB with its shorter side scaled to ``side`` (the recipe's if None)."""
        height, width = image.shape[:2]
        images = self.recipe.images
        side = images.test_side if side is None else side
        factor = 1.0 if side is None else min(side / min(height, width), images.longest / max(height, width))
        size = (max(32, round(width * factor)), max(32, round(height * factor)))
        if size != (width, height):
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR if factor > 0.5 else cv2.INTER_AREA)
        if flip:
            image = image[:, ::-1]
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(self.device)
        return View((pixels.float() - self._mean) / self._std, (size[0] / width, size[1] / height), flip)

    def stem_map(self, view: View) -> Tensor:
        """The shared stem's map of a view; without gradients where the stem is frozen."""
        frozen = not any(p.requires_grad for p in self.stem.parameters())
        with torch.no_grad() if frozen else contextlib.nullcontext():
            return self.stem(view.pixels.contiguous(memory_format=torch.channels_last))

    def see(self, image: np.ndarray) -> Seen:
        """The photograph's view for inference and the stem's map of it."""
        view = self.view(image)
        return view, self.stem_map(view)

    def proposals(self, image: np.ndarray) -> Tensor:
        """Selective-search proposals (R, 4) of a photograph, computed now, as the recipe wants them."""
        return self.select(torch.from_numpy(propose(image, proposal_settings(self.recipe))), image.shape[:2])

    def select(self, boxes: Tensor, size: tuple[int, ...]) -> Tensor:
        """Of precomputed proposals (R, 4) those that the recipe keeps, and the whole image as the first."""
        choice = self.recipe.proposals
        height, width = size[:2]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        boxes = boxes[area >= choice.min_area * height * width][: choice.limit]
        whole = boxes.new_tensor([[0, 0, width, height]])
        return torch.cat([whole, boxes[(boxes != whole).any(1)]])

    # -- what each module infers -------------------------------------------------------------------------------------

    def class_scores(
        self, view: View, proposals: Tensor, features: Tensor | None = None, stem: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Module 1's ``x^c`` (R, C + 1) and ``x^p`` (R, C) for proposals (R, 4) of the photograph.

        Args:
            features: (R, D) RoI features computed before, where the RoI head is frozen.
            stem: the stem's map of the view, where it is known.
        """
        one = self.classification
        if features is None:
            features = one.features(self.stem_map(view) if stem is None else stem, view.boxes(proposals))
        return one(features)

    def infer_classification(
        self,
        image: np.ndarray,
        proposals: Tensor,
        tags: tuple[int, ...] | None,
        features: Tensor | None = None,
        seen: Seen | None = None,
    ) -> tuple[Instances, Trace, Tensor]:
        """Module 1, calibrated: one instance for each tag.

        Without tags every class gets an instance, its weight multiplied by the image's probability of the class.

        Returns:
            The instances, the maps behind them, and the image's class probabilities (C,).
        """
        view, stem = seen or self.see(image)
        x_c, x_p = self.class_scores(view, proposals, features, stem)
        probabilities = self.classification.image_probabilities(x_c, x_p)
        scores = x_c[:, 1:].softmax(1)
        one = self.classification
        regions = view.boxes(proposals)

        def attend(index: Tensor, labels: Tensor) -> Tensor:
            pooled = one.pool(one.tail(stem), regions[index])
            return roi_attention(
                one.head,
                one.classifier,
                pooled,
                labels + 1,
                scores[index, labels],
                self.classification.settings.attention,
            )

        wanted = tuple(range(len(self.classes))) if tags is None else tags
        choice = one.settings.predict if tags is None else one.settings.label
        found, trace = calibrate(
            image,
            proposals.to(scores.device),
            scores,
            wanted,
            attend,
            choice,
        )
        if tags is None:
            found = found.weighted(found.weights * probabilities[found.labels])
        return found, trace, probabilities

    @torch.no_grad()
    def rank_proposals(
        self, image: np.ndarray, proposals: Tensor, tags: tuple[int, ...] | None, features: Tensor | None = None
    ) -> tuple[Instances, Tensor]:
        """Module 1 by itself, uncalibrated: proposals (R, 4) ranked by ``x^c w``, after NMS; boxes without masks.

        A proposal's weight is its share of the class's positive score, times the image's probability of the class.

        Returns:
            At most 20 boxes a class, and the image's class probabilities (C,).
        """
        x_c, x_p = self.class_scores(self.view(image), proposals, features)
        probabilities = self.classification.image_probabilities(x_c, x_p)
        scores = self.classification.scores(x_c, x_p)
        scores = scores - scores.amin(0).clamp(max=0)
        share = (scores / scores.sum(0).clamp(min=1e-6) * probabilities).clamp(0, 1).cpu()
        parts = [Instances.empty((image.shape[0], image.shape[1]))]
        for label in range(len(self.classes)) if tags is None else tags:
            kept = nms(proposals, share[:, label], 0.3)[:20]
            labels = torch.full((len(kept),), label)
            parts.append(Instances(proposals[kept], labels, share[kept, label], parts[0].image_size))
        return Instances.cat(parts), probabilities

    def _candidates(
        self,
        module: Detector,
        image: np.ndarray,
        tags: tuple[int, ...] | None,
        nms: float,
        seen: Seen | None,
    ) -> tuple[View, Tensor, Tensor, Tensor, Candidates]:
        """View, stem map, RoIs (R, 4), pooled RoI features and candidates of a detector."""
        view, stem = seen or self.see(image)
        features = module.features(stem)
        rois, _ = module.propose(features, view.pixels)
        pooled = module.pool(features, rois)
        logits, deltas = module.classify(module.head(pooled))
        size = (int(view.pixels.shape[-2]), int(view.pixels.shape[-1]))
        found = module.candidates(rois, logits, deltas, size, tags, module.settings.score_threshold, nms)
        return view, stem, rois, pooled, found

    def infer_detection(
        self,
        image: np.ndarray,
        tags: tuple[int, ...] | None,
        choice: AttentionCalibration | None = None,
        seen: Seen | None = None,
    ) -> tuple[Instances, Trace]:
        """Module 2, calibrated: several instances for each class."""
        module, settings = self.detection, self.recipe.modules[1]
        choice = choice or settings.label
        view, _, rois, pooled, found = self._candidates(module, image, tags, choice.nms, seen)
        scores = found.scores.new_zeros(len(found.scores), len(self.classes))
        scores[torch.arange(len(scores), device=scores.device), found.labels] = found.scores

        def attend(index: Tensor, labels: Tensor) -> Tensor:
            return roi_attention(
                module.head,
                module.classifier,
                pooled[found.rois[index]],
                labels + 1,
                found.scores[index],
                settings.attention,
            )

        present = tuple(sorted(set(found.labels.tolist())))
        if not present:
            empty = torch.zeros(0, 1, 1)
            size = (image.shape[0], image.shape[1])
            return Instances.empty(size, with_masks=True), Trace(empty, empty, empty, empty)
        return calibrate(
            image,
            view.back(found.boxes),
            scores,
            present,
            attend,
            choice,
            regions=view.back(rois[found.rois]),
        )

    def infer_segmentation(
        self,
        number: int,
        image: np.ndarray,
        tags: tuple[int, ...] | None,
        choice: MaskCalibration | None = None,
        seen: Seen | None = None,
    ) -> tuple[Instances, Trace]:
        """Module 3 or 4: detections, their masks (and those of the detections that they suppressed), dense CRF."""
        module = self.refinement if number == 3 else self.segmentation
        _, _, three, four = self.recipe.modules
        choice = choice or (three if number == 3 else four).label
        view, stem, _, _, found = self._candidates(module, image, tags, choice.nms, seen)
        size = (image.shape[0], image.shape[1])
        canvas, scale = working_canvas(image, choice.side)
        small = (canvas.shape[0], canvas.shape[1])
        kept_scores, kept_labels = found.scores[found.keep], found.labels[found.keep]
        place = _rank_within_class(kept_labels)
        strong = (kept_scores >= choice.min_score) | ((place == 0) if tags is not None else False)
        chosen = torch.where(strong & (place < choice.per_class))[0]
        if not len(chosen):
            empty = torch.zeros(0, *small)
            return Instances.empty(size, with_masks=True), Trace(empty, empty, empty, empty)
        position = torch.full((len(found.keep),), -1, device=chosen.device)
        position[chosen] = torch.arange(len(chosen), device=chosen.device)
        group = position[found.group]
        kept_itself = torch.zeros_like(group, dtype=torch.bool)
        kept_itself[found.keep[chosen]] = True
        belongs = group >= 0  # the best so many, and each kept detection in any case
        members = torch.where(belongs & ((belongs.cumsum(0) <= choice.max_masks) | kept_itself))[0]
        masks = module.masks(module.mask_features(stem), found.boxes[members], found.labels[members])
        boxes = view.back(found.boxes)
        scaled = boxes[members] * boxes.new_tensor([*scale, *scale])
        summed = project_maps(masks, scaled, small, found.scores[members], group[members], len(chosen))
        total = torch.zeros(len(chosen), device=boxes.device).index_add_(0, group[members], found.scores[members])
        confidence = (summed / total.clamp(min=1e-6)[:, None, None]).clamp(0, 1)
        if choice.iterations:
            marginals = segment(canvas, confidence, choice)
        else:
            marginals = confidence
        kept = boxes[found.keep[chosen]]
        instances = settle(marginals, kept, kept_labels[chosen], kept_scores[chosen], size, choice)
        alive = distinct(instances, choice.mask_nms)
        nothing = torch.zeros_like(confidence)
        return instances[alive], Trace(nothing[alive], nothing[alive], confidence[alive], marginals[alive])

    @torch.no_grad()
    def infer(
        self,
        number: int,
        image: np.ndarray,
        proposals: Tensor | None,
        tags: tuple[int, ...] | None,
        features: Tensor | None = None,
        seen: Seen | None = None,
    ) -> tuple[Instances, Trace]:
        """What module ``number`` passes on for a training image: instances of its tags only, and the maps behind.

        Args:
            image: (H, W, 3) uint8 RGB; proposals: (R, 4) in its pixels; tags: the image's classes.
            features: (R, D) RoI features of module 1, where they are known.
            seen: the image's view, not flipped, and the stem's map of it, where they are known (`see`).
        """
        if number == 1:
            if proposals is None:
                proposals = self.proposals(image)
            found, trace, _ = self.infer_classification(image, proposals, tags, features, seen)
            return found, trace
        if number == 2:
            return self.infer_detection(image, tags, seen=seen)
        return self.infer_segmentation(number, image, tags, seen=seen)

    @overload
    def predict(self, image: Photograph, module: int = 4, proposals: Tensor | None = None) -> Instances: ...

    @overload
    def predict(self, image: list[Photograph] | tuple[Photograph, ...], module: int = 4) -> list[Instances]: ...

    @torch.no_grad()
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
            module: which of the four answers.
            proposals: (R, 4) in pixels of the photograph; computed if the module needs them and they are not given.

        Returns:
            `Instances` on the CPU, best first: scores in [0, 1] as weights, masks for every module. A list of them for
            a list or a folder.

        Raises:
            InputError: a file cannot be read; no such module.
        """
        self.require(module)
        if isinstance(image, (str, Path)) and Path(image).is_dir():
            image = [path for _, path in find_images([Path(image)])]
        if isinstance(image, (list, tuple)):
            return [self.predict(one, module) for one in image]
        pixels = as_pixels(image)
        if proposals is None and self.needs_proposals(module):
            proposals = self.proposals(pixels)
        seen = self.see(pixels)
        _, two, three, four = self.recipe.modules
        if module == 1:
            assert proposals is not None
            found, _, _ = self.infer_classification(pixels, proposals, None, seen=seen)
        elif module == 2:
            found, _ = self.infer_detection(pixels, None, two.predict, seen)
        else:
            found, _ = self.infer_segmentation(module, pixels, None, (three if module == 3 else four).predict, seen)
        if module > 1 and self.recipe.modules[module - 1].vote:  # type: ignore[union-attr]
            found = self.vote(module, found, seen)
        found = found.to("cpu")
        return found[found.weights.argsort(descending=True, stable=True)]

    @torch.no_grad()
    def vote(self, number: int, found: Instances, seen: Seen) -> Instances:
        """The instances of module ``number``, weighted by what modules 1 and 2, as far as they came before, think too.

        A weight becomes the geometric mean of itself and the probabilities that those modules give to the instance's
        class in its final box: module 1 by the softmax of its logits over the classes, module 2 by its scores. They
        learnt from other targets than the later ones and so make other errors. Modules without weights abstain. Not in
        the paper.

        Args:
            found: N instances in pixels of the photograph.
            seen: the photograph's view and the stem's map of it (`see`).

        Returns:
            The same instances in the same order, weights (N,) in [0, 1].
        """
        voters = [voter for voter in (1, 2) if voter < number and MODULES[voter - 1] not in self.untrained]
        if not len(found) or not voters:
            return found
        view, stem = seen
        opinions = [found.weights]
        if 1 in voters:
            x_c, _ = self.class_scores(view, found.boxes, stem=stem)
            opinions.append(_of_class(x_c[:, 1:].softmax(1), found.labels))
        if 2 in voters:
            module = self.detection
            logits, _ = module.classify(module.head(module.pool(module.features(stem), view.boxes(found.boxes))))
            opinions.append(_of_class(logits.float().softmax(1)[:, 1:], found.labels))
        together = torch.stack([one.float().clamp(min=1e-6).log() for one in opinions]).mean(0).exp()
        return found.weighted(together)

    def needs_proposals(self, module: int) -> bool:
        """Whether a module works on selective-search proposals."""
        return module == 1

    # -- runs --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_run(cls, run: str | Path, device: str | torch.device = "cpu", recipe: Recipe | None = None) -> LabelPEnet:
        """The trained cascade of a run folder, ready to `predict`.

        Args:
            recipe: choices to use instead of those that the run was trained with.

        Raises:
            InputError: no run folder, an unfinished run without any trained module, or damaged weights.
        """
        run = Path(run)
        facts = read_run(run)
        backbone = build_backbone(facts["backbone"], pretrained=False)
        backbone.mean, backbone.std = tuple(facts["normalisation"]["mean"]), tuple(facts["normalisation"]["std"])
        network = cls(backbone, facts["classes"], recipe or config.from_dict(facts["recipe"]))
        loaded = [part for part in ("stem", *MODULES) if network.load_part(run, part)]
        if len(loaded) < 2:
            raise InputError(f"{run}: holds no trained module yet; finish it with labelpenet train ... --resume")
        if "stem" not in loaded:
            raise InputError(f"{run_folder.weights(run, 'stem')}: gone; labelpenet train ... --resume restores it")
        network.untrained = tuple(name for name in MODULES if name not in loaded)
        return network.to(device)

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
            state = read_tensors(path)
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


def proposal_settings(recipe: Recipe) -> ProposalSettings:
    """The recipe's choice in the words of the proposals' reader."""
    choice = recipe.proposals
    return ProposalSettings(method=choice.method, side=choice.side)  # type: ignore[arg-type]


def _of_class(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Of (N, C) those of the class indices (N,)."""
    return probabilities.gather(1, labels[:, None])[:, 0]


def _rank_within_class(labels: Tensor) -> Tensor:
    """For detections (K,), best first, the number of better ones of the same class."""
    same = labels[:, None] == labels[None]
    return torch.tril(same, diagonal=-1).sum(1)
