"""A server with the shipped model, and Chromium before it: every request to elsewhere fails the test."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from t2i.pipelines.jobs.planning import ModelSource
from t2i.pipelines.serving.server import ServerSettings, build_api

from t2i.files.known_words import KnownWords
from tests.serving.servers import run_server

ROOT = Path(__file__).resolve().parents[3]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FEW_STEPS = {"steps": 2, "prior_steps": 2, "candidates": 1}
KNOWN = ["a cat", "red apple", "rocket"]
TIMEOUT = 60_000  # milliseconds: the machine may be busy


@pytest.fixture(scope="package")
def address(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server in a thread, with the shipped model, which is told some words that it knows."""
    folder = tmp_path_factory.mktemp("served") / "emoji"
    shutil.copytree(ROOT / "models/emoji", folder)
    KnownWords.collect([{"captions": KNOWN, "keywords": []}]).save(folder / "clip")
    api = build_api(ModelSource(str(folder)), ServerSettings(max_batch=4, max_queue=8))
    with run_server(api, api.limits) as server:
        yield f"http://127.0.0.1:{server.port}/"


# Not for the session: while it is open, no other test of the process could use asyncio
@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page in a window of its own, what it logged, and what it asked of others than its server."""

    def __init__(self, browser: Any, address: str, **options: Any):
        self.address = address
        self.errors: list[str] = []
        self.foreign: list[str] = []
        options = {"viewport": {"width": 1024, "height": 768}, "reduced_motion": "reduce", **options}
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(TIMEOUT)
        self.context.route("**/*", self.check_request)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.goto(f"{self.address}ready")  # for storage of this origin
        self.keep_settings(**FEW_STEPS)

    def check_request(self, route: Any) -> None:
        if route.request.url.startswith(self.address):
            return route.continue_()
        self.foreign.append(route.request.url)
        route.abort()

    def open(self, **settings: Any) -> None:
        """Load the page, with settings that a person made before if some are given; wait until it is ready to draw."""
        if settings:
            self.keep_settings(**settings)
        self.page.goto(self.address)
        self.page.locator("#model-name:not(:empty)").wait_for()

    def keep_settings(self, **settings: Any) -> None:
        self.page.evaluate("(text) => localStorage.setItem('t2i.settings', text)", json.dumps(settings))

    def draw(self, prompt: str) -> None:
        """Draw what a prompt says, and wait for the four images."""
        before = self.pictures.count()
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        self.page.keyboard.press("Enter")
        self.wait_for_pictures(before + 4)

    @property
    def pictures(self) -> Any:
        """The finished images, the newest card first."""
        return self.page.locator(".picture[data-item]")

    def wait_for_pictures(self, count: int) -> None:
        self.pictures.nth(count - 1).wait_for()

    def read_items(self) -> list[dict[str, Any]]:
        """Return what the history keeps of each image but its file."""
        return self.page.evaluate(
            """async () => {
              const open = indexedDB.open("t2i");
              await new Promise((resolve) => (open.onsuccess = resolve));
              const all = open.result.transaction("items").objectStore("items").getAll();
              await new Promise((resolve) => (all.onsuccess = resolve));
              open.result.close();
              return all.result.map(({ blob, ...kept }) => ({ ...kept, bytes: blob.size }));
            }"""
        )


@pytest.fixture
def visit(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A visit to the page. A parameter gives options of the browser's window, such as its size."""
    visit = Visit(browser, address, **getattr(request, "param", {}))
    visit.open()
    yield visit
    visit.context.close()
    assert visit.foreign == []
    assert visit.errors == []
