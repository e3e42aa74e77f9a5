"""The review page on this machine's loopback address: Python's own HTTP server, three static files and a little JSON.

Nothing of the data set is taken for markup: names travel as JSON and the page writes them as text; photographs are
decoded here and sent as JPEG. A request needs this machine's name as its host, so that no foreign page reaches it under
a name of its own (DNS rebinding), and, but for the page itself, the token of this session's address.
"""

from __future__ import annotations

import hmac
import json
import secrets
import shlex
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import cv2

from labelpenet.data.dataset import TaggedImage, TaggedImages
from labelpenet.data.files import hash_file, locked, read_json, writing
from labelpenet.data.images import read_image
from labelpenet.errors import InputError
from labelpenet.formats.polygons import rings
from labelpenet.formats.review import Reviewed, Status, is_review, read_review, write_review
from labelpenet.instances import Instances
from labelpenet.review.doubt import rank_run
from labelpenet.training.inferred import Inferred
from labelpenet.visualize import PALETTE, encode_picture

LOOPBACK = "127.0.0.1"
_HOSTS = {LOOPBACK, "localhost", "::1"}
_FILES = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_BODY_LIMIT = 2**20  # bytes of a verdict: thousands of objects
_SIDE = 1600  # of the picture that is sent, in pixels at most
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass
class Review:
    """The photographs of a review in the order of their doubt, and what was said of them so far.

    Attributes:
        ranked: photographs and doubts, the most doubtful first; all: the same in the order of the data set.
        found: the labels that are looked at.
        path: the file that every verdict is written to.
        reviewed: what was said, by image id.
        revisions: how often something was said of an image since the start, by which a window that is behind is known.
    """

    name: str
    classes: tuple[str, ...]
    ranked: list[tuple[TaggedImage, float]]
    all: tuple[TaggedImage, ...]
    found: Inferred
    path: Path
    reviewed: dict[str, Reviewed] = field(default_factory=dict)
    revisions: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _written: str | None = None  # the hash of the file's content: two changes may come within one tick of its clock

    @classmethod
    def open(cls, run: Path, images: TaggedImages, path: Path) -> Review:
        """Reads a run's labels of the photographs, ranks them, and goes on with the file where it exists; `InputError`
        where no module has labelled the photographs, or the file belongs to something else.
        """
        ranked, found = rank_run(run, images)
        one = cls(run.resolve().name, images.classes, ranked, images.images, found, path)
        if path.exists():
            one.reviewed, notes = read_review(path, images.images, images.classes)
            if notes:  # going on would leave out of the file what cannot be shown
                raise InputError(f"{notes[0]}; review them with their own data and classes, or choose another --out")
            if any(_is_foreign(row, found.rows(name)) for name, said in one.reviewed.items() for row in said.rows):
                raise InputError(f"{path}: was begun on other labels than {run} has now; choose another --out")
            one._written = hash_file(path)
        return one

    def overview(self) -> dict[str, Any]:
        """What the page shows before any photograph."""
        colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in PALETTE]
        photographs = [
            {"name": image.id, "doubt": round(value, 3), "status": self.status(image)} for image, value in self.ranked
        ]
        about = {"run": self.name, "file": str(self.path), "classes": self.classes}
        return {**about, "colours": colours, "photographs": photographs}

    def status(self, image: TaggedImage) -> Status:
        """What was said of a photograph."""
        return self.reviewed[image.id].status if image.id in self.reviewed else "open"

    def photograph(self, index: int) -> dict[str, Any]:
        """Tags and labels of the photograph at a place of the ranking; ``kept`` says which are left, with which class.
        Damaged labels are an `InputError`.
        """
        image = self.ranked[index][0]
        found = self.found[image.id]
        said = self.reviewed.get(image.id)
        if said is None or said.status in ("rejected", "dropped"):
            kept = {str(number): label for number, label in enumerate(found.labels.tolist())}
        else:
            kept = {str(row["instance"]): row["category_id"] - 1 for row in said.rows if "instance" in row}
        height, width = found.image_size
        objects = [
            {"label": label, "score": round(score, 3), "path": _path(found, one), "box": _is_box(found, one)}
            for one, (label, score) in enumerate(zip(found.labels.tolist(), found.weights.tolist(), strict=True))
        ]
        about = {"width": width, "height": height, "tags": image.tags, "status": self.status(image)}
        return {**about, "kept": kept, "objects": objects, "revision": self.revisions[image.id]}

    def picture(self, index: int) -> bytes:
        """The photograph as a JPEG, upright, no larger than a screen; `InputError` where it cannot be read."""
        pixels = read_image(self.ranked[index][0].path)
        factor = _SIDE / max(pixels.shape[:2])
        if factor < 1:
            pixels = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        return encode_picture(pixels)

    def judge(self, index: int, status: Status, kept: dict[int, int], revision: int | None = None) -> None:
        """Notes the status of the photograph at a place of the ranking, and by number the class of each of its labels
        that is right, in memory and in the file.

        Raises:
            InputError: the file cannot be written, another program has written it, or something was said of the
                photograph since ``revision``, where that is given; nothing is noted then.
        """
        image = self.ranked[index][0]
        rows = self.found.rows(image.id)
        chosen = [
            {**_judged(rows[one]), "category_id": label + 1, "instance": one}
            for one, label in sorted(kept.items())
            if status in ("accepted", "open")
        ]
        untouched = kept == {one: row["category_id"] - 1 for one, row in enumerate(rows)}
        with self._lock:
            if revision not in (None, self.revisions[image.id]):
                raise InputError("it was judged in another window meanwhile; look at it again")
            reviewed = {key: one for key, one in self.reviewed.items() if key != image.id}
            if status != "open" or not untouched:
                reviewed[image.id] = Reviewed(status, self.found.size(image.id), chosen)
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Of two reviews at once the second looks at the file when the first has written it. The lock is the
                # folder's, for each write puts another file in the place of the last.
                with locked(self.path.parent, wait=True):
                    if (hash_file(self.path) if self.path.exists() else None) != self._written:
                        raise InputError(
                            f"{self.path}: was changed by another program; end this review and start it again"
                        )
                    write_review(self.path, reviewed, self.all, self.classes)
                    self.reviewed, self._written = reviewed, hash_file(self.path)
            self.revisions[image.id] += 1


def _is_foreign(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether a row of a review is of another instance than that of its number now: a later module has labelled."""
    number = row.get("instance")
    if number is None:
        return False
    if not 0 <= number < len(rows):
        return True
    own = [(one.get("bbox"), one.get("segmentation")) for one in (rows[number], _judged(rows[number]))]
    return (row.get("bbox"), row.get("segmentation")) not in own


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    """The row of an instance as the page shows it: a doubtful one, of score 0, is a box without a mask."""
    return {key: value for key, value in row.items() if key != "segmentation" or row["score"] > 0}


def _is_box(found: Instances, index: int) -> bool:
    return found.masks is None or float(found.weights[index]) == 0


def _path(found: Instances, index: int) -> str:
    """The outline of an instance as an SVG path: its mask's borders, or its box."""
    if found.masks is None or _is_box(found, index):
        x1, y1, x2, y2 = (round(value, 1) for value in found.boxes[index].tolist())
        return f"M{x1} {y1}H{x2}V{y2}H{x1}Z"
    corners = (" ".join(f"{x:g} {y:g}" for x, y in ring) for ring in rings(found.masks[index].numpy()))
    return "".join(f"M{ring}Z" for ring in corners)


class Server(ThreadingHTTPServer):
    """Serves one review on the loopback address.

    Attributes:
        review: what is served; token: what every request for it must carry; address: of the page, token included.
    """

    daemon_threads = True

    def __init__(self, review: Review, port: int = 0) -> None:
        self.review, self.token = review, secrets.token_urlsafe(24)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} of {LOOPBACK} cannot be used ({error}); choose another --port") from error
        # Behind the #, the token is in no log, in no header and in no list of referrers.
        self.address = f"http://{LOOPBACK}:{self.server_port}/#{self.token}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "labelpenet", ""
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if not self._from_here():
            self._answer(403, b"this page is served to this machine alone")
        elif path in _FILES:
            name = Path(__file__).with_name(_FILES[path])
            self._answer(200, name.read_bytes(), f"{_TYPES[name.suffix]}; charset=utf-8")
        elif not self._has_token():
            self._answer(403, b"open the address that labelpenet review has printed")
        else:
            self._guarded(path, None)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 9 or int(length) > _BODY_LIMIT:
            self.close_connection = True
            self._answer(413, b"a verdict of at most a megabyte is expected")
            return
        body = self.rfile.read(int(length))
        if not self._from_here() or not self._has_token():
            self._answer(403, b"open the address that labelpenet review has printed")
        else:
            self._guarded(self.path.split("?")[0], body)

    def _from_here(self) -> bool:
        """Whether host and origin, where there is one, are this machine's; the port may be a tunnel's."""
        origin = self.headers.get("Origin")
        names = [f"//{self.headers.get('Host', '')}", *([origin] if origin else [])]
        try:
            return all(urlsplit(name).hostname in _HOSTS for name in names)
        except ValueError:
            return False

    def _has_token(self) -> bool:
        return hmac.compare_digest(self.headers.get("X-Token", "").encode(), self.server.token.encode())

    def _guarded(self, path: str, body: bytes | None) -> None:
        try:
            self._serve(path, body)
        except InputError as error:
            self._answer(409, str(error).encode())

    def _serve(self, path: str, body: bytes | None) -> None:
        review = self.server.review
        parts = path.strip("/").split("/")
        number = int(parts[1]) if len(parts) > 1 and parts[1].isdecimal() and len(parts[1]) < 10 else -1
        if parts == ["photographs"] and body is None:
            self._json(review.overview())
        elif parts[0] != "photographs" or not 0 <= number < len(review.ranked):
            self._answer(404, b"no such photograph")
        elif len(parts) == 2 and body is None:
            self._json(review.photograph(number))
        elif len(parts) == 3 and parts[2] == "picture" and body is None:
            self._answer(200, review.picture(number), "image/jpeg")
        elif len(parts) == 2 and body is not None:
            verdict = _verdict(body, len(review.found.rows(review.ranked[number][0].id)), len(review.classes))
            if verdict is None:
                self._answer(400, b"a verdict is a status and the classes of the objects that are kept")
            else:
                review.judge(number, *verdict)
                image = review.ranked[number][0]
                self._json({"status": review.status(image), "revision": review.revisions[image.id]})
        else:
            self._answer(404, b"nothing there")

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), "application/json")

    def _answer(self, status: int, content: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Says nothing: the page shows what goes wrong."""


def _verdict(body: bytes, objects: int, classes: int) -> tuple[Any, dict[int, int], int | None] | None:
    """Status, kept classes and the revision that was looked at from the page's JSON; None where it is none."""
    try:
        content = json.loads(body)
        kept = {int(one): label for one, label in content["kept"].items()}
        status, revision = content["status"], content.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    right = all(0 <= one < objects and type(label) is int and 0 <= label < classes for one, label in kept.items())
    right &= isinstance(status, str) and status in get_args(Status) and (revision is None or type(revision) is int)
    return (status, kept, revision) if right else None


def serve(run: Path, images: TaggedImages, path: Path, port: int) -> None:
    """Serves the review of a run's labels of its training photographs until Ctrl-C.

    Every verdict is written to ``path`` at once; an earlier review is gone on with. ``port`` is of the loopback
    address, 0 for any free one. `InputError` as of `Review.open`, and where the port is taken.
    """
    say = partial(print, flush=True)  # or the address would wait in the buffer of a pipe until the end
    if path.exists() and not is_review(read_json(path)):
        raise InputError(f"{path}: is no file of the review page; choose another --out")
    review = Review.open(run, images, path)
    with Server(review, port) as server:
        say(f"{len(review.ranked)} photographs, the most doubtful first; what you say is saved at once in {path}")
        say(f"open {server.address} - Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say(f"\n{path}: {len(review.reviewed)} photographs judged")
            if review.reviewed:
                corrected = shlex.quote(str(path))
                say(f"next: labelpenet train DATA --out NEW_RUN --supervision mixed --corrected {corrected}")
