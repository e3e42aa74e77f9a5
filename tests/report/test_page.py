"""The report in a real browser: what a person does with it by mouse, finger and keys, on a desk and on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from labelpenet.models.cascade import LabelPEnet
from labelpenet.report import write_report
from tests.report.test_html import Network, make_run, measured, photographs

KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    data = photographs(folder / "train", 4)
    run = make_run(folder / "run", 4, data, measured(classification_mAP=0.876))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LabelPEnet, "from_run", lambda run, device: Network())
        return write_report(run, None, data, images=2)


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    browser.set_window_size(1280, 800)
    browser.get(report.as_uri())
    return browser


def is_open(page: Any) -> bool:
    return page.execute_script("return document.getElementById('enlarged').open")


def press(page: Any, key: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).send_keys(KEYS[key]).perform()


def active(page: Any) -> str:
    return page.execute_script("return document.activeElement.getAttribute('aria-label') || ''")


def test_a_picture_is_enlarged_and_closed_by_click_and_by_keys_and_the_focus_returns(page: Any) -> None:
    small = page.find_elements("css selector", "button.zoom")[1]
    source = small.find_element("css selector", "img").get_attribute("src")
    small.click()
    assert is_open(page)
    large = page.find_element("css selector", "#enlarged img")
    assert large.get_attribute("src") == source and large.size["height"] > 600
    large.click()
    assert not is_open(page)
    press(page, "Enter")  # the focus is back on the picture
    assert is_open(page)
    press(page, "Escape")
    assert not is_open(page)
    name = active(page)
    press(page, "Tab")
    assert name.startswith("Enlarge: proposals") and active(page).startswith("Enlarge: attention map")
    assert not is_open(page)  # passing over a picture does not enlarge it
    press(page, "Enter")
    page.find_element("css selector", "#enlarged button").click()
    assert not is_open(page)
    assert [one for one in page.get_log("browser") if one["level"] == "SEVERE"] == []


def test_on_a_phone_a_tap_closes_and_wide_tables_say_that_they_scroll(page: Any) -> None:
    def hint() -> str:
        return page.execute_script(
            "return getComputedStyle(document.querySelector('#results .scroll'), '::before').content"
        )

    assert hint() == "none"
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page.refresh()
        assert "scroll sideways" in hint()
        assert page.execute_script("return document.documentElement.scrollWidth") == 390  # the page itself stays
        small = page.find_element("css selector", "button.zoom")
        page.execute_script("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", small)
        for opened in (True, False):
            point = {"x": 150, "y": 400}
            page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
            page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            page.execute_async_script("setTimeout(arguments[0], 50)")
            assert is_open(page) == opened
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
