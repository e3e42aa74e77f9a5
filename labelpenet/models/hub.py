"""Networks in folders as the Hugging Face hub knows them: weights as safetensors, a JSON configuration, a model card.

A folder is written and read offline and without the package huggingface_hub; only ``push`` and a name that is no folder
need it (extra ``hub``).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from labelpenet.data import run_folder
from labelpenet.data.files import (
    digest,
    read_json,
    read_tensors,
    read_text,
    write_json,
    write_tensors,
    write_text,
    writing,
)
from labelpenet.errors import InputError, reason
from labelpenet.models.cascade import MODULES, LabelPEnet, read_run
from labelpenet.models.student import KIND, Student, load, read_state
from labelpenet.models.weights import check_finite, check_types
from labelpenet.progress import log_notes

_FILES = ("config.json", "model.safetensors")
_NOTHING = "Not measured."
_OURS = 'library_name: "labelpenet"'
_TAUGHT = {
    "tags": "image tags alone",
    "full": "true boxes and masks",
    "mixed": "image tags and, for some of them, true or corrected boxes and masks",
}
_FACTS = ("kind", "classes", "backbone", "normalisation", "recipe", "network", "seed", "images", "supervision")


def save_pretrained(run: Path | str, folder: Path | str, licence: str = "other", push: str | None = None) -> Path:
    """Writes what a run or student folder holds as ``config.json``, ``model.safetensors`` and ``README.md``.

    Args:
        run: what ``labelpenet train`` or ``distill`` wrote; its ``results.json``, if measured, fills in the card.
        folder: where to; nothing else in it is touched, nor such files of others or a card that was changed. It is
            returned.
        licence: the hub's name of the licence of the weights, such as ``apache-2.0``: yours to choose, within what the
            photographs and the pretrained backbone allow.
        push: name of a repository on the hub, ``you/model``, to upload the folder to.

    Raises:
        InputError: no run folder, the folder holds files of these names that are not ours or a card that somebody has
            changed, or cannot be written, or huggingface_hub is missing or refuses.
    """
    run, folder = Path(run), Path(folder)
    _check_own(folder)
    facts = read_run(run)
    network = load(run)  # refuses what is unfinished or damaged
    state = read_state(run) if isinstance(network, Student) else {
        key: value for key, value in network.state_dict().items() if key.partition(".")[0] not in network.untrained
    }  # fmt: skip
    results = read_json(run_folder.results(run)) if run_folder.results(run).is_file() else {}
    results, notes = run_folder.up_to_date(run, results)
    log_notes(*notes)
    source = facts.get("source") or {}
    about: dict[str, Any] = {"data": Path(str(source["data"])).name} if source.get("data") else {}
    about |= {"teacher": source.get("teacher_supervision", "tags"), "labels_file": source.get("labels")}
    card = model_card({**facts, **about}, results, licence)
    own = {key: facts[key] for key in _FACTS if key in facts} | {"card": digest([card.encode()])}
    with writing(folder, "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        # what a kill leaves may lack weights, never hold another network's: those would answer with these classes
        for name in ("README.md", "model.safetensors"):
            (folder / name).unlink(missing_ok=True)
    # in this order: weights without a configuration would be taken for another's (`_check_own`)
    write_json(folder / "config.json", own, indent=1)
    write_tensors(folder / "model.safetensors", state)
    write_text(folder / "README.md", card)
    if push is not None:
        _upload(folder, push)
    return folder


def _check_own(folder: Path) -> None:
    """`InputError` where a file that `save_pretrained` writes is there and not its own; weights are known by their
    configuration."""
    config, weights, card = folder / "config.json", folder / "model.safetensors", folder / "README.md"
    facts = read_json(config) if config.is_file() else None
    ours = {
        config: facts is None or (isinstance(facts, dict) and {"classes", "backbone"} <= set(facts)),
        weights: config.is_file() or not weights.exists(),
        card: not card.exists() or _OURS in read_text(card),
    }
    for path, own in ours.items():
        if not own:
            raise InputError(f"{path}: is there already and not of a network of ours; choose another folder")
    written = facts.get("card") if facts is not None else None
    if written and card.exists() and digest([read_text(card).encode()]) != written:
        raise InputError(f"{card}: was changed since it was written; move it away, or choose another folder")


def from_pretrained(source: Path | str, device: str = "cpu") -> LabelPEnet | Student:
    """The network of a folder that `save_pretrained` wrote, or of a repository on the hub, ready to `predict`.

    Raises:
        InputError: neither, damaged, or huggingface_hub is missing or refuses.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source))
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}: holds no config.json and model.safetensors; give what save_pretrained wrote")
    facts = read_json(folder / "config.json")
    try:
        state = read_tensors(folder / "model.safetensors")
        check_finite(state, folder / "model.safetensors")
        return (Student.from_facts if facts.get("kind") == KIND else _cascade)(facts, state).to(device)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"{folder}: cannot be read ({reason(error)}); write or download it again") from error


def _cascade(facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> LabelPEnet:
    network, parts = LabelPEnet.from_facts(facts), {key.partition(".")[0] for key in state}
    network.untrained = tuple(name for name in MODULES if name not in parts)
    random = {key: own for key, own in network.state_dict().items() if key.partition(".")[0] in network.untrained}
    check_types(network, state)
    network.load_state_dict({**random, **state})
    return network


def model_card(facts: Mapping[str, Any], results: Mapping[str, Any], licence: str) -> str:
    """The card in Markdown: what it is, classes, data, measured figures, limits, licence."""
    student = facts.get("kind") == KIND
    kind = "Mask R-CNN with a feature pyramid" if student else "Label-PEnet cascade of four modules"
    taught = _TAUGHT.get(str(facts.get("supervision", "tags")), "unknown labels")
    if facts.get("supervision") == "labels":
        teacher = _TAUGHT.get(str(facts.get("teacher", "tags")), "labels that were given")
        taught = (
            "a file of labels" if facts.get("labels_file") else f"the labels of a cascade that learnt from {teacher}"
        )
        taught = taught if student else f"{_TAUGHT['tags']}, and then from labels that were given"
    data = f" of {facts['data']}" if facts.get("data") else ""
    started = facts["backbone"] != "tiny"
    backbone = f"{facts['backbone']}{', from ImageNet weights' * started}"
    sources = f"from the photographs{' and from the ImageNet weights of the backbone' * started}"
    measured = _figures(results)
    seen = "not measured" if measured == _NOTHING else "measured on no other photographs than those above"
    head = {"license": licence, "library_name": "labelpenet", "pipeline_tag": "image-segmentation",
            "tags": ["instance-segmentation", "object-detection", "weakly-supervised"]}  # fmt: skip
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    return f"""---
{front}
---

# {kind}: {", ".join(facts["classes"])}

Finds instances of {len(facts["classes"])} classes: boxes, masks and scores. Trained by
Label-PEnet on {facts.get("images", "?")} photographs{data} from {taught}.
Backbone: {backbone}.

```python
from labelpenet.models.hub import from_pretrained

found = from_pretrained("this folder or repository").predict("photo.jpg")
```

## Measured

{measured}

## Limits

It knows no other classes than these and was {seen}. What is learnt
from tags tends to miss some instances of a group, and to cut off or add parts of an object. Check it on photographs of
your own before you rely on it.

## Licence

{licence}. The weights derive {sources}, whose licences apply too.
"""


def _figures(results: Mapping[str, Any]) -> str:
    rows = []
    for name, one in results.get("val", {}).items():
        parts = {"box mAP@.5": run_folder.box_map_50(one)}
        parts |= {f"mask mAP@{iou}": one.get("mask", {}).get(f"mAP@{iou}") for iou in ("0.5", "0.75")}
        figures = [f"{key} {100 * value:.1f}" for key, value in parts.items() if value is not None]
        rows.append(f"- {'module ' if name.isdigit() else ''}{name}: {', '.join(figures)}")
    if not rows:
        return _NOTHING
    seen = f" ({results['trained_on']} of its photographs were trained on)" if results.get("trained_on") else ""
    return f"Split `{results.get('split')}`{seen}, protocol {results.get('protocol')}, in %:\n\n" + "\n".join(rows)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError("huggingface_hub is not installed; pip install 'labelpenet[hub]'") from error
    return huggingface_hub


def _upload(folder: Path, name: str) -> None:
    hub = _hub()
    try:
        hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, allow_patterns=[*_FILES, "README.md"])
    except Exception as error:  # no network, no permission, a bad name: the package has an exception for each
        raise InputError(f"{name}: cannot be uploaded ({reason(error)}); the folder {folder} is whole") from error


def _download(name: str) -> Path:
    hub = _hub()
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[*_FILES]))
    except Exception as error:  # as above
        raise InputError(f"{name}: no such folder, and no repository that can be read ({reason(error)})") from error
