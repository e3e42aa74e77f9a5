"""The review page in a real browser, by clicks and keys; hostile names stay text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labelpenet.formats.review import Reviewed, read_review
from labelpenet.review.server import Review, Server
from tests.report.test_html import make_run, photographs

HOSTILE = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>")
KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    data = photographs(tmp_path / "photos", 5)
    run = make_run(tmp_path / "run", 4, data)
    images = data.tagged.__class__(HOSTILE, data.tagged.images)
    with Server(Review.open(run, images, run / "review.json")) as one:
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield one
        one.shutdown()


@pytest.fixture
def page(browser: Any, server: Server) -> Any:
    browser.set_window_size(1280, 800)
    browser.get("about:blank")  # another # alone would load nothing
    browser.get(server.address)
    shows(browser, 1)
    return browser


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "the page did not do it"
        time.sleep(0.02)


def shows(page: Any, number: int) -> None:
    """Waits until the photograph of this number is on the page, decoded."""
    script = (
        "const one = document.getElementById('photograph');"
        "return document.getElementById('number').value == arguments[0] && one.complete && one.naturalWidth > 1"
    )
    wait(lambda: page.execute_script(script, str(number)))


def text(page: Any, selector: str) -> str:
    return page.find_element("css selector", selector).text


def press(page: Any, keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).send_keys(KEYS.get(keys, keys)).perform()


def click(page: Any, key: str) -> None:
    page.find_element("css selector", f"[data-key='{key}']").click()


def said(server: Server) -> dict[str, Reviewed]:
    """What the file says, by the first letter of the photograph's name: 4 is the most doubtful, 0 the least."""
    review = server.review
    if not review.path.exists():
        return {}
    return {name[0]: one for name, one in read_review(review.path, review.all, review.classes)[0].items()}


def test_by_keys_accept_correct_reject_drop_and_undo(page: Any, server: Server) -> None:
    assert text(page, "#name") == "4 <b>&" and text(page, "#tags") == HOSTILE[0]
    press(page, "a")
    wait(lambda: "4" in said(server))
    shows(page, 2)
    press(page, "1")  # the object of photograph 3, of class 2, becomes one of class 1
    wait(lambda: "3" in said(server))
    assert said(server)["3"].status == "open"
    press(page, "a")
    shows(page, 3)
    press(page, "x")
    press(page, "r")
    shows(page, 4)
    press(page, "d")
    shows(page, 5)
    press(page, "x")
    press(page, "a")
    wait(lambda: said(server).get("0") is not None and said(server)["0"].status == "accepted")
    found = said(server)
    assert {name: one.status for name, one in found.items()} == {
        "4": "accepted", "3": "accepted", "2": "rejected", "1": "dropped", "0": "accepted"
    }  # fmt: skip
    assert [row["category_id"] for row in found["3"].rows] == [1] and [
        one["category_id"] for one in found["4"].rows
    ] == [1]
    assert not found["0"].rows and text(page, "#counts") == "3 accepted, 1 rejected, 1 dropped, 0 open"
    press(page, "n")
    wait(lambda: "every photograph has been judged" in text(page, "#message"))
    press(page, "left")
    shows(page, 4)
    press(page, "u")
    wait(lambda: "1" not in said(server))
    assert text(page, "#status") == "open"


def test_by_clicks_the_same(page: Any, server: Server) -> None:
    from selenium.webdriver.support.select import Select

    click(page, "ArrowRight")
    shows(page, 2)
    page.find_element("css selector", "#outlines path").click()
    Select(page.find_element("id", "class")).select_by_visible_text(HOSTILE[0])
    wait(lambda: "3" in said(server) and said(server)["3"].rows[0]["category_id"] == 1)
    assert text(page, "#objects li span") == HOSTILE[0]
    click(page, "x")
    wait(lambda: not said(server)["3"].rows)
    assert "rejected" in text(page, "#objects li")
    click(page, "x")
    wait(lambda: "3" not in said(server))  # as the run has it, class included
    click(page, "a")
    shows(page, 3)
    click(page, "d")
    shows(page, 4)
    wait(lambda: "2" in said(server))
    assert (said(server)["3"].status, said(server)["2"].status) == ("accepted", "dropped")
    number = page.find_element("id", "number")
    number.send_keys("\ue0031\n")  # backspace, 1, enter
    shows(page, 1)
    press(page, "h")
    assert not page.find_element("id", "outlines").is_displayed()


def test_nothing_is_said_of_a_photograph_that_is_not_shown_yet_nor_by_a_key_held_down(
    page: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, pressed = Review.picture, threading.Event()
    monkeypatch.setattr(
        Review, "picture", lambda review, index: (index < 2 or pressed.wait(60)) and picture(review, index)
    )
    press(page, "right")  # is there already; the one after it is not
    shows(page, 2)
    press(page, "Aaa1x")  # the first of them, in spite of Caps Lock
    wait(lambda: page.execute_script("return document.querySelector('.loading') !== null"))
    pressed.set()
    shows(page, 3)
    wait(lambda: page.execute_script("return document.querySelector('.loading') === null"))
    page.execute_script(
        "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'd', repeat: true, bubbles: true}))"
    )
    press(page, "h")
    wait(lambda: "3" in said(server))
    assert {name: one.status for name, one in said(server).items()} == {"3": "accepted"}
    assert said(server)["3"].rows[0]["category_id"] == 2 and text(page, "#name") == "2 <b>&"


def test_keys_in_a_field_are_no_verdicts(page: Any, server: Server) -> None:
    page.find_element("id", "number").send_keys("a")
    page.find_element("id", "class").send_keys("d")
    press(page, "h")
    assert not said(server) and text(page, "#status") == "open"


def test_names_of_files_and_classes_are_never_markup(page: Any, server: Server) -> None:
    press(page, "a")
    shows(page, 2)
    assert text(page, "#name") == "3 <b>&" and text(page, "#tags") == HOSTILE[1]
    options = [one.get_attribute("textContent") for one in page.find_elements("css selector", "#class option")]
    assert options == list(HOSTILE)
    assert (
        len(page.find_elements("css selector", "script")) == 1 and len(page.find_elements("css selector", "img")) == 1
    )
    assert len(page.find_elements("css selector", "b")) == 1  # the name of the run
    assert [one for one in page.get_log("browser") if one["level"] == "SEVERE"] == []


def test_what_cannot_be_saved_is_said_and_taken_back(page: Any, server: Server) -> None:
    server.review.path.write_text("mine")
    press(page, "a")
    wait(lambda: "not saved" in text(page, "#message"))
    shows(page, 1)
    assert text(page, "#status") == "open" and "another program" in text(page, "#message")
    page.get_log("browser")


def test_without_the_token_the_page_says_what_to_do(browser: Any, server: Server) -> None:
    browser.get("about:blank")
    browser.get(server.address.partition("#")[0])
    wait(lambda: "labelpenet review" in text(browser, "#message"))
    assert not browser.find_element("css selector", "main").is_displayed()
    browser.get_log("browser")


def test_a_phone_shows_everything_without_scrolling_sideways(page: Any) -> None:
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.refresh()
        shows(page, 1)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        click(page, "a")
        shows(page, 2)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
