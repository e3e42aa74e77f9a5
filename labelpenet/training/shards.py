"""A run applied to a million photographs: independent shards, or batches for an engine such as Ray."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labelpenet import config
from labelpenet.data.dataset import TaggedImage
from labelpenet.data.files import digest
from labelpenet.formats.parts import Part
from labelpenet.instances import Instances
from labelpenet.training.predict import Predictor

CHUNK = 256  # photographs whose proposals are computed together, for modules that need them


def predict_shard(
    predictor: Predictor,
    images: Sequence[TaggedImage],
    module: int,
    folder: Path,
    shard: tuple[int, int],
    *,
    keep: Callable[[TaggedImage, Instances], Instances] = lambda image, found: found,
    choices: dict[str, Any] | None = None,
    cache: Path | None = None,
) -> tuple[Part, list[str]]:
    """Predicts one shard of the photographs into ``FOLDER/part-I-of-N.jsonl``; goes on where a killed process stopped.

    Args:
        predictor: the run, in one process.
        images: all photographs, in the same order for every shard.
        shard: (i, n), 1 <= i <= n.
        keep, cache: as `predict_images` takes them.
        choices: what else decides the result (a smallest score, say); the same for all shards.

    Returns:
        The part, and the ids of the photographs that could not be read this time.

    Raises:
        InputError: see `Part`; the module is not trained.
    """
    network = predictor.network
    network.require(module)
    # what a run has no weights for is random, in each process anew
    random = tuple(f"{name}." for name in getattr(network, "untrained", ()))
    state = network.state_dict().items()
    weights = digest(value.cpu().numpy().tobytes() for name, value in state if not name.startswith(random))
    listed = digest(f"{image.id}\n{file_size(image.path)}".encode() for image in images)
    recipe = digest([json.dumps(config.to_dict(network.recipe)).encode()])
    facts = {"weights": weights, "recipe": recipe, "module": module, "list": listed, **(choices or {})}
    if predictor.tagged:
        facts["tags"] = digest(repr((image.id, image.tags)).encode() for image in images)
    skipped: list[str] = []
    with Part(folder, shard, facts, images, predictor.network.classes) as part:
        left = part.left()
        for start in range(0, len(left), CHUNK):
            chunk = left[start : start + CHUNK]
            bad: list[str] = []
            for image, found in predictor.run(chunk, module, bad, predictor.proposals(chunk, module, cache)):
                part.add(image, keep(image, found))
            for image in chunk:
                if image.id in bad:
                    part.add(image, None)
            skipped += bad
        part.finish()
    return part, skipped


def file_size(path: Path) -> int:
    """The bytes of a file, -1 where it is not there: cheap for a million, and other photographs have other ones."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


class BatchPredictor:
    """A run as a callable over batches of columns, as Ray Data's ``map_batches`` wants it.

    Called with ``{"path": (B,) paths of photographs}`` it returns a row for each instance: ``path, category, score, x,
    y, w, h`` (pixels) and ``counts`` (compressed RLE). A photograph that cannot be read gives one row with ``error``
    set; in all others ``error`` is empty.

    Args:
        run: run folder.
        module: which module predicts.
        min_score: instances below are left out.
        device: as for ``labelpenet predict``.
    """

    def __init__(self, run: str, module: int = 4, min_score: float = 0.05, device: str = "auto"):
        self.predictor = Predictor(Path(run), device)
        self.predictor.network.require(module)
        self.module, self.min_score = module, min_score

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = [TaggedImage(str(path), Path(path), ()) for path in batch["path"]]
        rows = [row for answer in self.predictor.find(images, self.module) for row in self._rows(*answer)]
        kinds = {"path": object, "category": object, "counts": object, "error": object}
        names = ("path", "category", "score", "x", "y", "w", "h", "counts", "error")
        return {name: np.array([row[name] for row in rows], kinds.get(name, np.float32)) for name in names}

    def _rows(self, image: TaggedImage, found: Instances | None, note: str) -> list[dict[str, Any]]:
        path, classes = image.id, self.predictor.network.classes
        if found is None:
            empty = {"category": "", "score": 0.0, "x": 0.0, "y": 0.0, "w": 0.0, "h": 0.0, "counts": ""}
            return [{"path": path, **empty, "error": note.removeprefix("skipped: ")}]
        found = found[found.weights >= self.min_score]
        rows = []
        for row in found.to_coco(0, range(len(classes))):
            box, counts = dict(zip("xywh", row["bbox"], strict=True)), (row.get("segmentation") or {}).get("counts", "")
            name = classes[row["category_id"]]
            rows.append({"path": path, "category": name, "score": row["score"], **box, "counts": counts, "error": ""})
        return rows
