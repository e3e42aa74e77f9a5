"""The figures of results.json: what was measured before stays as long as it is true, and goes with a word."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labelpenet.data.dataset import Truth
from labelpenet.data.files import write_json
from labelpenet.instances import Instances
from labelpenet.training.measure import hash_truths, with_earlier


def results(*numbers: str, split: str = "val", made_from: str = "a") -> dict:
    figures = {number: {"box": {"mAP": int(number) / 10}} for number in numbers}
    return {"split": split, "protocol": "voc12", "made_from": made_from, "train": figures, "val": figures}


def test_what_was_measured_before_in_the_same_way_is_kept(tmp_path, caplog):
    path = tmp_path / "results.json"
    assert with_earlier(results("4"), path) == results("4")
    write_json(path, {**results("1", "2"), "classification_mAP": 0.5, "uncalibrated": {"val": {}}})
    found = with_earlier({**results("2"), "val": {"2": {"box": {"mAP": 0.9}}}}, path)
    assert list(found["train"]) == ["1", "2"] and found["classification_mAP"] == 0.5 and "uncalibrated" in found
    assert found["val"] == {"1": {"box": {"mAP": 0.1}}, "2": {"box": {"mAP": 0.9}}}
    assert not caplog.records


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (results("4", made_from="b"), "figures of module 1 on split val, protocol voc12 (measured with other weights"),
        (results("1", "4", split="test"), "figures of module 1, module 4 on split val, protocol voc12"),
    ],
)
def test_what_is_true_no_longer_is_dropped_with_a_note(tmp_path, caplog, now, words):
    write_json(tmp_path / "results.json", results("1", "4"))
    assert with_earlier(now, tmp_path / "results.json") == now
    assert words in caplog.text and len(caplog.records) == 1


def test_measuring_all_modules_again_and_damaged_results(tmp_path, caplog):
    path = tmp_path / "results.json"
    write_json(path, results("1", "4"))
    now = results("1", "4", made_from="b")
    assert with_earlier(now, path) == now and not caplog.records
    for damaged in ("{", "[]", '{"val": 3}'):
        path.write_text(damaged)
        assert with_earlier(now, path) == now
    assert caplog.text.count("is damaged") == 3


def test_the_hash_of_the_truth_knows_every_part_of_it():
    none, box, mask = torch.zeros(1, dtype=torch.bool), torch.tensor([[0.0, 0, 2, 2]]), torch.ones(1, 4, 4) > 0

    def truth(box=box, label=0, mask=mask, **more) -> dict[str, Truth]:
        instances = Instances(box, torch.tensor([label]), torch.ones(1), (4, 4), mask)
        return {"a": Truth(instances, **{"difficult": none, "crowd": none, **more})}

    others = [
        {}, truth(box + 1), truth(label=1), truth(mask=~mask), truth(mask=None), truth(difficult=~none),
        truth(crowd=~none), truth(complete=False), truth(semantic=np.zeros((4, 4), np.uint8)),
        {"b": truth()["a"]},
    ]  # fmt: skip
    hashes = {hash_truths("key", (one, {})) for one in (truth(), *others)}
    assert len(hashes) == 1 + len(others) and hash_truths("key", (truth(), {})) in hashes
    assert not {hash_truths("key", ({}, truth())), hash_truths("other", (truth(), {}))} & hashes
