"""The tools of the page: brush, frame, mix and change, by mouse, finger and keys."""

import re

import numpy as np
import pytest

from tests.serving.browser.helpers import (
    SIDE,
    add_image,
    build_image,
    drag,
    drop_image,
    list_violations,
    open_tool,
    touch_line,
    wait_for_card,
)

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DARK = {"color_scheme": "dark"}


def paint_band(width: int, height: int, middle: float, radius: float) -> np.ndarray:
    """Return the pixels of a brush that went through the whole image at one height, (H, W)."""
    rows = np.abs(np.arange(height) + 0.5 - middle) <= radius
    return np.repeat(rows[:, None], width, axis=1)


def select_band(page, diameter: int = 32) -> np.ndarray:
    """Select a band from beyond the left edge to beyond the right one, and return its pixels."""
    page.get_by_role("slider", name="Size").fill(str(diameter))
    box, board = page.locator(".board-box").bounding_box(), page.locator(".board").bounding_box()
    middle = box["y"] + box["height"] / 2
    drag(page, (board["x"] + 3, middle), (board["x"] + board["width"] - 3, middle))
    return paint_band(SIDE, SIDE, SIDE / 2, diameter / 2)


def draw_with(page, prompt: str, count: int = 1) -> None:
    page.get_by_label("What the whole image shows").fill(prompt)
    page.locator(".tool-count").get_by_label(str(count), exact=True).check()
    page.locator("dialog").get_by_role("button", name="Draw", exact=True).click()


def test_the_brush_draws_what_is_selected_and_keeps_all_other_pixels(visit):
    page, image = visit.page, build_image()
    open_tool(add_image(page, image), "Edit")
    band = select_band(page)
    page.get_by_text("25 % selected").wait_for()
    draw_with(page, "a red circle", count=2)
    drawn = wait_for_card(page, "a red circle")
    assert len(drawn) == 2 and page.locator("dialog").count() == 0
    for found in drawn:
        differs = (np.asarray(found) != np.asarray(image)).any(axis=2)
        assert not differs[~band].any()
        assert differs[band].mean() > 0.9


def test_strokes_are_undone_inverted_and_erased(visit):
    page = visit.page
    open_tool(add_image(page, build_image()), "Edit")
    said = page.locator(".tool-amount")
    draw = page.locator("dialog").get_by_role("button", name="Draw", exact=True)
    assert said.text_content() == "0 % selected" and draw.get_attribute("aria-disabled") == "true"
    select_band(page)
    assert said.text_content() == "25 % selected"
    page.keyboard.press("Control+z")
    assert said.text_content() == "0 % selected"
    page.keyboard.press("Control+Shift+z")
    assert said.text_content() == "25 % selected"
    page.get_by_role("button", name="Invert the selection").click()
    assert said.text_content() == "75 % selected"
    # Erasing through the middle leaves it erased
    page.keyboard.press("e")
    select_band(page, diameter=64)
    assert said.text_content() == "50 % selected"
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Clear the selection").click()
    assert said.text_content() == "0 % selected"
    # In a text, the same keys are the text's
    prompt = page.get_by_label("What the whole image shows")
    prompt.fill("be")
    prompt.press("Control+z")
    assert said.text_content() == "0 % selected"


def test_the_brush_needs_no_pointer(visit):
    page, image = visit.page, build_image()
    picture = add_image(page, image)
    open_tool(picture, "Edit")
    board = page.get_by_role("application", name="Brush over the image")
    assert board.evaluate("board => board === document.activeElement")
    page.get_by_role("slider", name="Size").fill("32")
    # From the middle to the right edge, in steps of half the brush's radius
    board.focus()
    board.press("Space")
    for _ in range(12):
        board.press("ArrowRight")
    board.press("Space")
    said = page.locator(".tool-amount")
    assert 13 <= int(re.match(r"\d+", said.text_content())[0]) <= 15
    board.press("]")
    assert page.get_by_role("slider", name="Size").input_value() == "38"
    # Whole areas by name
    page.get_by_role("button", name="Clear the selection").click()
    page.get_by_text("Select areas by name").click()
    page.get_by_role("button", name="top left").press("Enter")
    assert page.get_by_role("button", name="top left").get_attribute("aria-pressed") == "true"
    assert said.text_content() == "11 % selected"  # 43 x 43 of 128 x 128
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    assert picture.get_by_role("button", name="Edit").evaluate("button => button === document.activeElement")


@pytest.mark.parametrize("visit", [PHONE], indirect=True, ids=["phone"])
def test_a_finger_paints_on_a_phone_and_two_take_the_stroke_back(visit):
    page = visit.page
    open_tool(add_image(page, build_image()), "Edit")
    # Nothing is wider than the screen
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("dialog .view-body").evaluate("body => body.scrollWidth <= body.clientWidth")
    page.get_by_role("slider", name="Size").fill("32")
    box = page.locator(".board-box").bounding_box()
    middle = box["y"] + box["height"] / 2
    line = [(box["x"] - 8, middle), (box["x"] + box["width"] / 2, middle), (box["x"] + box["width"] + 8, middle)]
    touch_line(page, line)
    assert page.locator(".tool-amount").text_content() == "25 % selected"
    touch_line(page, [(x, y + 60) for x, y in line], second=(box["x"] + 20, box["y"] + 20))
    assert page.locator(".tool-amount").text_content() == "25 % selected"


def test_the_frame_gives_the_image_its_size(visit):
    page, image = visit.page, build_image()
    open_tool(add_image(page, image), "Extend")
    page.get_by_role("button", name="Reset").click()
    draw = page.locator("dialog").get_by_role("button", name="Draw", exact=True)
    assert draw.get_attribute("aria-disabled") == "true"
    # By pointer, in steps of 8 pixels; by keys; by numbers
    right = page.get_by_role("slider", name="Right side")
    handle = right.bounding_box()
    zoom = page.locator(".frame-image").bounding_box()["width"] / SIDE
    start = (handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    drag(page, start, (start[0] + 17 * zoom, start[1]))
    assert page.get_by_label("Right", exact=True).input_value() == "16"
    top = page.get_by_role("slider", name="Top side")
    top.press("ArrowUp")
    top.press("Shift+ArrowDown")
    assert top.get_attribute("aria-valuenow") == "7" and page.get_by_label("Top", exact=True).input_value() == "7"
    page.get_by_label("Bottom", exact=True).fill("1")
    page.get_by_label("Bottom", exact=True).press("Tab")
    assert page.locator(".tool-amount").text_content() == "128 × 128 becomes 144 × 136 pixels"
    draw_with(page, "a red circle")
    (drawn,) = wait_for_card(page, "a red circle")
    assert drawn.size == (144, 136)
    kept = drawn.crop((0, 7, SIDE, 7 + SIDE))
    assert kept.tobytes() == image.tobytes()


def test_shapes_and_limits_of_the_frame(visit):
    page = visit.page
    open_tool(add_image(page, build_image()), "Extend")
    page.get_by_role("button", name="16 : 9").click()
    assert (
        page.locator(".tool-amount").text_content() == "128 × 128 becomes 228 × 128 pixels · as long as about 3 images"
    )
    left = page.get_by_label("Left", exact=True)
    left.fill("99999")
    left.press("Tab")
    assert 0 < int(left.input_value()) < 4096
    left.fill("-5")
    left.press("Tab")
    assert left.input_value() == "0"


def test_a_change_is_a_strip_from_the_one_text_to_the_other(visit):
    page = visit.page
    open_tool(add_image(page, build_image()), "Change")
    page.get_by_label("From", exact=True).fill("a red circle")
    draw = page.get_by_role("button", name="Draw the strip")
    assert draw.get_attribute("aria-disabled") == "true"
    page.get_by_label("To", exact=True).fill("a blue square")
    page.get_by_role("slider", name="Images").fill("3")
    draw.click()
    drawn = wait_for_card(page, "From “a red circle” to “a blue square”")
    assert len(drawn) == 3 and len({image.tobytes() for image in drawn}) == 3
    card = page.locator(".card").first
    assert card.locator("figcaption").all_text_contents() == ["0.00", "0.50", "1.00"]
    # Next to nothing of it is drawn by chance, so that nothing is drawn "again"
    assert card.get_by_role("button", name="Draw again").count() == 0
    card.locator(".picture").last.get_by_role("button", name="More actions").click()
    page.get_by_role("menuitem", name="As code").click()
    assert '"direction": "prior", "theta": 1' in page.locator("pre").text_content()


def test_images_and_texts_are_mixed_by_their_shares(visit):
    page = visit.page
    images = [build_image(seed=1), build_image(seed=2)]
    add_image(page, images[0], "first.png")
    open_tool(add_image(page, images[1], "second.png"), "Mix")
    dialog, draw = page.get_by_role("dialog"), page.get_by_role("button", name="Draw", exact=True).last
    assert draw.get_attribute("aria-disabled") == "true"
    dialog.get_by_role("button", name="Add images").click()
    page.locator(".chooser .thumbnail").last.click()  # the oldest
    page.get_by_role("button", name="Use these").click()
    page.locator(".chooser").wait_for(state="detached")
    dialog.get_by_role("button", name="Add a text").click()
    page.keyboard.type("a red circle")
    sliders = dialog.get_by_role("slider")
    for place, value in enumerate((50, 30, 20)):
        sliders.nth(place).fill(str(value))
    assert dialog.locator(".anchor output").all_text_contents() == ["50 %", "30 %", "20 %"]
    assert sliders.nth(2).get_attribute("aria-valuetext") == "20 % of the mix"
    dialog.get_by_role("radio", name="2").check()
    draw.click()
    assert len(wait_for_card(page, "Mix of 3")) == 2
    weights = [item["record"]["weights"] for item in visit.read_items() if item["prompt"] == "Mix of 3"]
    assert weights == [[0.5, 0.3, 0.2]] * 2


def test_a_strip_goes_from_one_image_to_the_other_and_any_place_of_it_can_be_had_as_code(visit):
    page = visit.page
    images = [build_image(seed=1), build_image(seed=2)]
    open_tool(add_image(page, images[0], "first.png"), "Mix")
    drop_image(page, images[1], "second.png")
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("radio", name="A strip").check()
    dialog.get_by_role("slider", name="Images from each to the next").fill("3")
    # The second becomes the first, by key; the focus stays in the list
    dialog.get_by_role("button", name="Move image up").last.press("Enter")
    page.get_by_role("button", name="Draw", exact=True).last.click()
    drawn = wait_for_card(page, "Mix of 2")
    assert len(drawn) == 3 and len({image.tobytes() for image in drawn}) == 3
    card = page.locator(".card").first
    assert card.locator("figcaption").all_text_contents() == ["100 %", "50 % · 50 %", "100 %"]
    items = sorted(
        (item for item in visit.read_items() if item["prompt"] == "Mix of 2"), key=lambda item: item["place"]
    )
    assert [item["record"]["weights"] for item in items] == [[1, 0], [0.5, 0.5], [0, 1]]
    # After a reload too, and without the first place
    card.locator(".picture").first.get_by_role("button", name="More actions").click()
    page.get_by_role("menuitem", name="Remove").click()
    page.get_by_role("button", name="Undo").wait_for()  # the history has forgotten it
    visit.open()
    card = page.locator(".card").first
    assert card.locator("figcaption").all_text_contents() == ["50 % · 50 %", "100 %"]
    card.locator(".picture").first.get_by_role("button", name="More actions").click()
    page.get_by_role("menuitem", name="As code").click()
    assert '"weights": [0.5, 0.5]' in page.locator("pre").text_content()


def test_a_drawing_is_cancelled(visit):
    page = visit.page
    visit.open(steps=100)
    open_tool(add_image(page, build_image()), "Edit")
    select_band(page)
    draw_with(page, "a red circle", count=4)
    page.locator(".card.drawing").get_by_role("button", name="Cancel").click()
    page.locator(".card.drawing").wait_for(state="detached")
    assert page.get_by_role("heading", name="a red circle").count() == 0


@pytest.mark.parametrize("visit", [{}, PHONE | DARK], indirect=True, ids=["desk", "phone in the dark"])
@pytest.mark.parametrize("tool", ["Edit", "Extend", "Mix", "Change"])
def test_tools_have_no_violations_of_accessibility(visit, tool):
    page = visit.page
    open_tool(add_image(page, build_image()), tool)
    assert list_violations(page, context="dialog") == []
