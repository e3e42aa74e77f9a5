"""Every layout of the corpus is read as meant, or refused in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from labelpenet import InputError
from labelpenet.formats import open_annotated, open_tagged
from tests.formats.corpus import CAT, DOG, LAYOUTS, REFUSED


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    data = layout.write(tmp_path)
    images = open_tagged(data, layout.split, layout.classes)
    assert {one.id: tuple(images.classes[tag] for tag in one.tags) for one in images.images} == layout.tags
    assert all(one.path.as_posix().endswith(one.id) for one in images.images)
    if not layout.boxes:
        if "beside shapes" not in name:
            with pytest.raises(InputError, match="holds tags but no boxes or masks"):
                open_annotated(data, layout.split, layout.classes)
        return
    annotated = open_annotated(data, layout.split)
    assert annotated.tagged == images
    truths, notes = annotated.readable_truths()
    assert notes == ()
    first, second = (truth.instances for truth in truths.values())
    assert first.labels.tolist() == [0, 1]
    assert first.boxes.flatten().tolist() == pytest.approx([*CAT, *DOG], abs=1e-3)
    assert len(second) == 0
    assert (first.masks is not None) == layout.masks
    if first.masks is not None:
        for mask, (x1, y1, x2, y2) in zip(first.masks, (CAT, DOG), strict=True):
            assert int(mask.sum()) == int(mask[y1:y2, x1:x2].sum()) == (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    write, split, words = REFUSED[name]
    with pytest.raises(InputError) as caught:
        open_tagged(write(tmp_path), split)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert str(caught.value).isprintable()
