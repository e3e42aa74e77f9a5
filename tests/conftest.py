"""What several rooms' tests need."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: as many tests run side by side as there are cores, and so do the processes that they start.
os.environ["OMP_NUM_THREADS"] = "1"

# Nothing by chance: neither what Hypothesis draws nor how fast this machine is at the moment (slow tests may explore).
settings.register_profile("ours", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test and the fixtures made for it draw the same numbers, whatever this process ran before."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium under Selenium; tests that need it are skipped where it is not installed."""
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium or chromedriver is not installed (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--force-prefers-reduced-motion", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    one = selenium.Chrome(options, selenium.ChromeService(driver))
    yield one
    one.quit()
