"""What people do with the page, and what they see."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIDE = 128  # of the model's images


def build_image(width: int = SIDE, height: int = SIDE, seed: int = 0) -> Image.Image:
    """Return an image whose pixels all differ from their neighbours."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def drop_image(page: Any, image: Image.Image, name: str) -> None:
    """Drop an image's file on the dialog that is open, and wait until it is one more of the mix."""
    anchors = page.locator(".anchor")
    count = anchors.count()
    page.locator("dialog").evaluate(
        """(dialog, [text, name]) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], name, { type: "image/png" }));
            for (const kind of ["dragenter", "dragover", "drop"]) {
                dialog.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
            }
        }""",
        [base64.b64encode(encode(image)).decode(), name],
    )
    anchors.nth(count).wait_for()
    assert page.locator("#drop-veil.shown").count() == 0


def add_image(page: Any, image: Image.Image, name: str = "noise.png") -> Any:
    """Give the page an image as a file, and return the picture of the gallery."""
    with page.expect_file_chooser() as chooser:
        page.click("#attach")
    chooser.value.set_files([{"name": name, "mimeType": "image/png", "buffer": encode(image)}])
    page.locator(".card", has=page.get_by_role("heading", name=name)).locator(".picture[data-item]").wait_for()
    return page.locator(".card").first.locator(".picture")


def wait_for_card(page: Any, title: str) -> list[Image.Image]:
    """Wait until the card with a title is drawn, and return its images."""
    card = page.locator(".card", has=page.get_by_role("heading", name=title, exact=True)).first
    card.locator(".picture[data-item]").first.wait_for()
    return read_images(card)


def read_images(card: Any) -> list[Image.Image]:
    """Return the images of a card, with all their pixels."""
    found = card.locator(".picture-open img").evaluate_all(
        """images => Promise.all(images.map(async (image) => {
            await image.decode();
            const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
            const text = Array.from(pixels, (byte) => String.fromCharCode(byte)).join("");
            return [canvas.width, canvas.height, btoa(text)];
        }))"""
    )
    return [Image.frombytes("RGBA", (w, h), base64.b64decode(text)).convert("RGB") for w, h, text in found]


def open_tool(picture: Any, name: str) -> None:
    """Open a tool for a picture of the gallery: by its button, or by its menu."""
    page = picture.page
    button = picture.get_by_role("button", name=name)
    if button.count():
        button.click()
    else:
        picture.get_by_role("button", name="More actions").click()
        page.get_by_role("menuitem", name=name).click()
    page.locator("dialog .tool-layout").wait_for()


def drag(page: Any, start: tuple[float, float], end: tuple[float, float], steps: int = 8) -> None:
    """Move the pressed mouse from one point of the window to another."""
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=steps)
    page.mouse.up()


def touch_line(page: Any, points: list[tuple[float, float]], second: tuple[float, float] | None = None) -> None:
    """Move a finger along points of the window. second: where another finger comes down before the first one is up."""
    session = page.context.new_cdp_session(page)

    def send(kind: str, fingers: list[tuple[float, float]]) -> None:
        touches = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(fingers)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

    send("touchStart", points[:1])
    for point in points[1:]:
        send("touchMove", [point])
    if second is not None:
        send("touchStart", [points[-1], second])
    send("touchEnd", [])
    session.detach()


def list_violations(page: Any, **context: Any) -> list[tuple[str, list[str]]]:
    """Return what axe finds to be inaccessible: the rules, and the elements that break them."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    found = axe.run(page, **context).response["violations"]
    return [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found]
