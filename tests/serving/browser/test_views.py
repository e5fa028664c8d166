"""Every view of the page: without violations of accessibility, and no wider than the window."""

import pytest
from t2i.pipelines.serving.gateway.access import Access, Keys

from tests.serving.browser.conftest import Visit
from tests.serving.browser.helpers import add_image, build_image, list_violations
from tests.serving.servers import build_paint_api, run_server

WINDOWS = {
    "light": {},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
    "wide": {"viewport": {"width": 1920, "height": 1080}},
}
KEY = "k" * 20


def check_view(page, view: str) -> None:
    assert list_violations(page) == [], view
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view


@pytest.fixture
def choose(visit):
    """Choose an action of the first image by its menu, and return the dialog that it opens."""

    def choose(action: str, title: str):
        visit.pictures.nth(0).get_by_role("button", name="More actions", exact=False).click()
        visit.page.get_by_role("menuitem", name=action).click()
        dialog = visit.page.get_by_role("dialog", name=title)
        dialog.wait_for()
        return dialog

    return choose


@pytest.mark.parametrize("visit", WINDOWS.values(), indirect=True, ids=WINDOWS)
def test_every_view_is_accessible_and_no_wider_than_the_window(visit, choose):
    page = visit.page
    check_view(page, "empty")
    visit.draw("a cat")
    check_view(page, "gallery")
    visit.pictures.nth(0).get_by_role("button", name="More actions", exact=False).click()
    check_view(page, "menu")
    page.keyboard.press("Escape")
    visit.pictures.nth(0).locator(".picture-open").click()
    page.get_by_role("dialog").get_by_role("heading", name="Settings").wait_for()
    check_view(page, "large view")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings", exact=True).click()
    check_view(page, "settings")
    page.keyboard.press("Escape")
    for tool in ("Edit", "Mix", "Extend", "Change"):
        choose(tool, tool)
        check_view(page, tool)
        page.keyboard.press("Escape")


@pytest.mark.parametrize("visit", WINDOWS.values(), indirect=True, ids=WINDOWS)
def test_small_dialogs_are_accessible_and_no_wider_than_the_window(visit, choose):
    page = visit.page
    add_image(page, build_image())
    visit.draw("a cat")
    choose("As code", "The same as code")
    check_view(page, "code")
    page.get_by_role("radio", name="curl").check()
    check_view(page, "code of a shell")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Keyboard").wait_for()
    check_view(page, "keyboard")
    page.keyboard.press("Escape")
    choose("Mix", "Mix").get_by_role("button", name="Add images").click()
    page.get_by_role("dialog", name="Add to the mix").locator("img").nth(4).wait_for()
    check_view(page, "chooser")
    page.keyboard.press("Escape")
    page.locator(".chooser").wait_for(state="detached")
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_role("button", name="Remove all").click()
    page.get_by_role("dialog", name="Remove all images?").wait_for()
    check_view(page, "question")


@pytest.mark.parametrize("window", WINDOWS)
def test_a_server_with_keys_asks_for_one_and_code_does_not_show_it(browser, window):
    access = Access(keys=Keys({"ann": KEY}))
    api = build_paint_api(access=access)
    with run_server(api, api.limits) as server:
        visit = Visit(browser, f"http://127.0.0.1:{server.port}/", **WINDOWS[window])
        page = visit.page
        page.goto(visit.address)
        dialog = page.get_by_role("dialog", name="This server asks for a key")
        # One who closes it can come back to it
        dialog.wait_for()
        check_view(page, "key")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Try again").click()
        page.keyboard.type("no key of this server")
        page.keyboard.press("Enter")
        dialog.get_by_role("alert").wait_for()
        check_view(page, "another key")
        dialog.get_by_label("Key", exact=True).fill(KEY)
        dialog.get_by_role("button", name="Use key").click()
        page.locator("#model-name:not(:empty)").wait_for()
        visit.draw("a cat")
        visit.open()  # without a question
        visit.wait_for_pictures(4)
        visit.pictures.nth(0).locator(".picture-open").focus()
        page.keyboard.press("p")
        code = page.get_by_role("dialog").locator("pre")
        assert 'os.environ["T2I_KEY"]' in code.inner_text()
        page.get_by_role("dialog").get_by_role("radio", name="curl").check()
        assert "Bearer $T2I_KEY" in code.inner_text() and KEY not in page.content()
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
        check_view(page, "code with a key")
        visit.context.close()
        assert visit.foreign == []
        assert [error for error in visit.errors if "status of 401" not in error] == []
