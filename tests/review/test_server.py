"""The server of the review page: whom it answers, what it saves, and that nothing it is sent breaks the file."""

from __future__ import annotations

import json
import os
import shlex
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from labelpenet.cli import main
from labelpenet.data import TaggedImages, run_folder
from labelpenet.errors import InputError
from labelpenet.formats.review import read_review, write_review
from labelpenet.instances import Instances
from labelpenet.review import server as server_module
from labelpenet.review.server import Review, Server, serve
from tests.report.test_html import CLASSES, found_in, make_run, photographs

COUNT = 5


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, TaggedImages]:
    data = photographs(tmp_path / "photos", COUNT)
    return make_run(tmp_path / "run", 4, data), data.tagged


@pytest.fixture
def server(run: tuple[Path, TaggedImages]) -> Iterator[Server]:
    folder, images = run
    with Server(Review.open(folder, images, folder / "review.json")) as one:
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield one
        one.shutdown()


def ask(
    server: Server, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    sent = {"X-Token": server.token, **{name.replace("_", "-"): value for name, value in headers.items()}}
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, raw, sent)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, dict(answer.getheaders())


def said(server: Server) -> dict[str, Any]:
    review = server.review
    return read_review(review.path, review.all, review.classes)[0]


def test_it_listens_on_loopback_alone_and_the_address_holds_the_token_where_no_log_sees_it(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_port}/#{server.token}" and len(server.token) >= 32


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "[::1", "10.0.0.1"]
)
def test_a_foreign_host_name_is_refused(server: Server, host: str) -> None:
    for path in ("/", "/page.js", "/photographs", "/photographs/0/picture"):
        assert ask(server, path, Host=host)[0] in (400, 403)
    assert ask(server, "/photographs/0", {"status": "accepted", "kept": {}}, Host=host)[0] in (400, 403)
    assert not server.review.path.exists()


def test_this_machines_names_are_answered_also_through_a_tunnels_port(server: Server) -> None:
    for host in ("localhost:9000", "127.0.0.1", "[::1]:80"):
        assert ask(server, "/", Host=host)[0] == 200


def test_nothing_of_the_data_is_told_or_changed_without_the_token(server: Server) -> None:
    for token in ("", "wrong", server.token[:-1], "é"):
        for path in ("/photographs", "/photographs/0", "/photographs/0/picture"):
            status, content, _ = ask(server, path, X_Token=token)
            assert status == 403 and b"cat" not in content
        assert ask(server, "/photographs/0", {"status": "dropped", "kept": {}}, X_Token=token)[0] == 403
    foreign = ask(server, "/photographs/0", {"status": "dropped", "kept": {}}, Origin="http://evil.example")
    assert foreign[0] == 403 and not server.review.path.exists()


def test_every_answer_forbids_what_the_page_does_not_need(server: Server) -> None:
    for path in ("/", "/page.js", "/page.css", "/photographs", "/photographs/0/picture", "/nothing", "/../run.json"):
        status, _, headers = ask(server, path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        assert (status == 404) == (path in ("/nothing", "/../run.json"))
    page = ask(server, "/")[1].decode()
    assert "onclick" not in page and "<style" not in page and page.count("<script") == 1


def test_the_doubtful_come_first_and_only_one_photograph_is_read_at_a_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    overview = json.loads(ask(server, "/photographs")[1])
    doubts = [one["doubt"] for one in overview["photographs"]]
    assert doubts == sorted(doubts, reverse=True) and len(set(doubts)) > 1
    assert overview["classes"] == list(CLASSES) and [one["name"][0] for one in overview["photographs"]] == list("43210")
    assert ask(server, "/photographs/1/picture")[1].startswith(b"\xff\xd8")
    decoded: list[str] = []
    original = Instances.from_coco.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Instances, "from_coco", classmethod(lambda cls, *args: decoded.append("x") or original(cls, *args))
    )
    one = json.loads(ask(server, "/photographs/1")[1])
    assert len(decoded) == 1 and one["tags"] == [1] and one["kept"] == {"0": 1}
    assert one["objects"][0]["path"] == "M10 10 26 10 26 40 10 40Z" and one["width"] == 64


def test_a_verdict_is_in_the_file_at_once_and_the_next_session_goes_on_from_it(
    server: Server, run: tuple[Path, TaggedImages]
) -> None:
    names = [image.id for image, _ in server.review.ranked]
    assert ask(server, "/photographs/0", {"status": "accepted", "kept": {"0": 1}})[0] == 200
    assert ask(server, "/photographs/1", {"status": "rejected", "kept": {"0": 1}})[0] == 200
    assert ask(server, "/photographs/2", {"status": "dropped", "kept": {}})[0] == 200
    assert ask(server, "/photographs/3", {"status": "open", "kept": {}})[0] == 200
    known = said(server)
    assert {name: one.status for name, one in known.items()} == dict(
        zip(names, ("accepted", "rejected", "dropped", "open"), strict=False)
    )
    accepted = known[names[0]].instances(2)
    before = found_in(next(image for image in run[1].images if image.id == names[0]), 4)
    assert accepted.labels.tolist() == [1] and accepted.weights.tolist() == [1]
    assert accepted.masks is not None and before.masks is not None and bool((accepted.masks == before.masks).all())
    assert not known[names[1]].rows and not known[names[3]].rows
    again = Review.open(run[0], run[1], server.review.path)
    assert again.photograph(0)["kept"] == {"0": 1} and again.photograph(3)["kept"] == {}
    assert [again.status(image) for image, _ in again.ranked] == ["accepted", "rejected", "dropped", "open", "open"]
    ask(server, "/photographs/3", {"status": "open", "kept": {"0": server.review.photograph(4)["objects"][0]["label"]}})
    label = server.review.photograph(3)["objects"][0]["label"]
    assert ask(server, "/photographs/3", {"status": "open", "kept": {"0": label}})[0] == 200  # undone: as never touched
    assert names[3] not in said(server) and names[0] in said(server)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, {"status": "accepted"}, {"status": "sold", "kept": {}},
        {"status": None, "kept": {}}, {"status": ["open"], "kept": {}}, {"status": "accepted", "kept": []},
        {"status": "accepted", "kept": {"1": 0}}, {"status": "accepted", "kept": {"-1": 0}},
        {"status": "accepted", "kept": {"0": 2}}, {"status": "accepted", "kept": {"0": -1}},
        {"status": "accepted", "kept": {"0": True}}, {"status": "accepted", "kept": {"0": "cat"}},
        {"status": "accepted", "kept": {"x": 0}},
    ],
)  # fmt: skip
def test_what_is_no_verdict_is_refused_and_changes_nothing(server: Server, body: Any) -> None:
    assert ask(server, "/photographs/0", body)[0] == 400
    assert not server.review.path.exists() and server.review.overview()["photographs"][0]["status"] == "open"


def test_places_that_do_not_exist_and_bodies_without_end_are_refused(server: Server) -> None:
    good = {"status": "accepted", "kept": {}}
    for place in ("5", "-1", "x", "²", "1e3", "0/picture", "9" * 5000):
        assert ask(server, f"/photographs/{place if place.isascii() else '%C2%B2'}", good)[0] in (404, 414)
    for length in (str(2**40), "9" * 5000, "²", "-1"):
        assert ask(server, "/photographs/0", b"x" * 100, Content_Length=length)[0] == 413
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as raw:
        raw.sendall(b"GET http://[ HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert raw.recv(99).split()[1] == b"403"
    assert ask(server, "/photographs/0", good, method="PUT")[0] == 501


def test_a_file_that_another_program_has_changed_is_not_overwritten(server: Server) -> None:
    good = {"status": "dropped", "kept": {}}
    assert ask(server, "/photographs/0", good)[0] == 200
    before = server.review.path.stat()
    server.review.path.write_text("mine")
    os.utime(server.review.path, ns=(before.st_atime_ns, before.st_mtime_ns))  # it may come within a tick of the clock
    status, content, _ = ask(server, "/photographs/1", good)
    assert status == 409 and b"another program" in content and server.review.path.read_text() == "mine"
    assert server.review.overview()["photographs"][1]["status"] == "open"


def test_of_two_reviews_that_save_at_once_none_loses_a_verdict(
    run: tuple[Path, TaggedImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, images = run
    path = folder / "review.json"
    first, second = (Review.open(folder, images, path) for _ in range(2))
    ends: list[Exception | None] = []

    def judge() -> None:
        try:
            second.judge(1, "dropped", {})
            ends.append(None)
        except InputError as error:
            ends.append(error)

    other = threading.Thread(target=judge)

    def written_slowly(*arguments: Any) -> Path:
        if not other.ident:
            other.start()
            other.join(0.5)  # has looked at the file by then, if nothing keeps it from that
        return write_review(*arguments)

    monkeypatch.setattr(server_module, "write_review", written_slowly)
    first.judge(0, "dropped", {})
    other.join()
    saved = read_review(path, first.all, first.classes)[0]
    assert set(saved) == {first.ranked[0][0].id} and "another program" in str(ends[0])


def test_a_photograph_that_cannot_be_read_can_be_dropped(server: Server) -> None:
    image = server.review.ranked[0][0]
    image.path.write_bytes(b"no image")
    status, content, _ = ask(server, "/photographs/0/picture")
    assert status == 409 and image.path.name.encode() in content
    assert ask(server, "/photographs/0", {"status": "dropped", "kept": {}})[0] == 200


def test_large_photographs_are_sent_no_larger_than_a_screen(server: Server) -> None:
    import io

    Image.new("RGB", (3200, 40)).save(server.review.ranked[0][0].path)
    assert Image.open(io.BytesIO(ask(server, "/photographs/0/picture")[1])).size == (1600, 20)


def test_a_review_of_the_labels_of_an_earlier_module_is_not_gone_on_with(
    run: tuple[Path, TaggedImages], tmp_path: Path
) -> None:
    folder, images = run
    path, last = tmp_path / "review.json", run_folder.instances(folder, "module4")
    labels = last.read_text()
    last.unlink()
    earlier = Review.open(folder, images, path)
    earlier.judge(0, "accepted", {0: 1})
    assert Review.open(folder, images, path).status(earlier.ranked[0][0]) == "accepted"
    last.write_text(labels)
    with pytest.raises(InputError, match="was begun on other labels"):
        Review.open(folder, images, path)


def test_a_window_that_is_behind_undoes_nothing(server: Server) -> None:
    first, second = (json.loads(ask(server, "/photographs/0")[1])["revision"] for _ in range(2))
    status, body, _ = ask(server, "/photographs/0", {"status": "accepted", "kept": {"0": 1}, "revision": first})
    assert status == 200
    status, words, _ = ask(server, "/photographs/0", {"status": "rejected", "kept": {}, "revision": second})
    assert status == 409 and b"in another window" in words
    assert [one.status for one in said(server).values()] == ["accepted"]
    later = {"status": "dropped", "kept": {}, "revision": json.loads(body)["revision"]}
    assert ask(server, "/photographs/0", later)[0] == 200


def test_a_review_is_not_gone_on_with_where_masks_are_others_in_the_same_boxes(
    run: tuple[Path, TaggedImages], tmp_path: Path
) -> None:
    folder, images = run
    path, last = tmp_path / "review.json", run_folder.instances(folder, "module4")
    review = Review.open(folder, images, path)
    review.judge(0, "accepted", {0: 1})
    content = json.loads(last.read_text())
    for row in content["annotations"]:
        full = rle.encode(np.ones(row["segmentation"]["size"], np.uint8, order="F"))
        row["segmentation"] = {**full, "counts": full["counts"].decode()}
    last.write_text(json.dumps(content))
    with pytest.raises(InputError, match="was begun on other labels"):
        Review.open(folder, images, path)


def test_a_doubtful_label_is_shown_and_accepted_as_a_box_without_a_mask(
    run: tuple[Path, TaggedImages], tmp_path: Path
) -> None:
    folder, images = run
    path, last = tmp_path / "review.json", run_folder.instances(folder, "module4")
    content = json.loads(last.read_text())
    content.pop("checksum", None)
    sure = Review.open(folder, images, path).photograph(0)["objects"][0]
    for row in content["annotations"]:
        row["score"] = 0.0
    last.write_text(json.dumps(content))
    review = Review.open(folder, images, path)
    image = review.ranked[0][0]
    shown, found = review.photograph(0)["objects"][0], review.found[image.id]
    x1, y1, x2, y2 = found.boxes[0].tolist()
    assert not sure["box"] and shown["box"] and shown["path"] == f"M{x1} {y1}H{x2}V{y2}H{x1}Z"
    review.judge(0, "accepted", {0: found.labels.tolist()[0]})
    (true,) = (
        one.instances(len(images.classes)) for one in read_review(path, images.images, images.classes)[0].values()
    )
    assert true.masks is None and true.boxes.tolist() == found.boxes[:1].tolist() and true.weights.tolist() == [1]
    assert Review.open(folder, images, path).status(image) == "accepted", "it can be gone on with"


def test_a_file_of_another_data_set_or_kind_is_not_taken_over(run: tuple[Path, TaggedImages], tmp_path: Path) -> None:
    folder, images = run
    path = tmp_path / "review.json"
    other = Review.open(folder, images, path)
    other.judge(0, "accepted", {0: 0})
    fewer = TaggedImages(images.classes, images.images[:-1])
    with pytest.raises(InputError, match="choose another --out"):
        Review.open(folder, fewer, path)
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(InputError, match="review page"):
        Review.open(folder, images, path)


def test_the_next_command_can_be_copied_whatever_the_file_is_called(
    run: tuple[Path, TaggedImages], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts: list[Any] = []

    def interrupted(server: Server) -> None:
        for status in verdicts:
            server.review.judge(0, status, {})
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    serve(*run, tmp_path / "my review.json", 0)
    assert "next: " not in capsys.readouterr().out  # there is no such file
    verdicts.append("dropped")
    serve(*run, tmp_path / "my review.json", 0)
    command = shlex.split(capsys.readouterr().out.split("next: ")[1])
    assert command[-2:] == ["--corrected", str(tmp_path / "my review.json")]


def test_the_command_refuses_in_one_line_what_it_cannot_review(
    run: tuple[Path, TaggedImages], tmp_path: Path, capsys: pytest.CaptureFixture[str], server: Server
) -> None:
    folder, _ = run
    data = tmp_path / "tagged"
    data.mkdir()
    (data / "a.png").write_bytes((tmp_path / "photos" / "0 <b>&.png").read_bytes())
    (data / "tags.json").write_text(json.dumps({"a.png": list(CLASSES)}))
    with pytest.raises(SystemExit) as stop:
        main(["review", str(folder), str(data)])
    assert stop.value.code == 2 and "none of these photographs" in capsys.readouterr().err
    with pytest.raises(InputError, match="choose another --port"):
        Server(server.review, server.server_port)
