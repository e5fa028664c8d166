"""The page as people use it, in Chromium, with a server that draws with the shipped model."""

import io
import json
import zipfile

from PIL import Image, ImageChops

from tests.serving.browser.helpers import add_image, build_image, open_tool


def test_a_prompt_gives_four_images_with_previews_and_the_seeds_count_up(visit):
    visit.open(steps=6, prior_steps=2, candidates=1)
    # They are there for moments
    visit.page.evaluate(
        """() => {
          const seen = (window.seen = { previews: 0, progress: 0 });
          const look = () => {
            seen.previews = Math.max(seen.previews, document.querySelectorAll("img.preview").length);
            seen.progress += document.querySelectorAll("[role=progressbar][aria-valuenow]").length;
          };
          new MutationObserver(look).observe(document.body, { subtree: true, childList: true, attributes: true });
        }"""
    )
    visit.page.get_by_label("Prompt", exact=True).fill("a cat")
    visit.page.get_by_role("button", name="Draw", exact=True).click()
    visit.wait_for_pictures(4)
    seen = visit.page.evaluate("seen")
    assert seen["previews"] >= 4 and seen["progress"] > 0
    items = visit.read_items()
    seeds = sorted(item["record"]["seed"] for item in items)
    assert seeds == list(range(seeds[0], seeds[0] + 4))
    assert {(item["prompt"], item["record"]["num_inference_steps"]) for item in items} == {("a cat", 6)}
    assert visit.page.locator(".card-status").is_hidden()


def test_variations_chain_show_their_path_and_survive_a_reload(visit):
    visit.draw("red apple")
    visit.page.get_by_role("button", name="Variations: red apple, 2 of 4").click()
    visit.wait_for_pictures(8)
    visit.page.get_by_role("button", name="Variations: Variations of red apple, 1 of 4").click()
    visit.wait_for_pictures(12)
    # Oldest first: the apple, its variation, then what was drawn from that
    assert visit.page.locator(".card").first.locator(".path li").count() == 2
    visit.pictures.nth(5).get_by_role("button", name="Star", exact=False).click()
    visit.page.locator('.star[aria-pressed="true"]').wait_for()
    before = [visit.pictures.nth(index).get_attribute("data-item") for index in range(12)]
    visit.open()
    visit.wait_for_pictures(12)
    assert [visit.pictures.nth(index).get_attribute("data-item") for index in range(12)] == before
    assert visit.page.locator(".card").first.locator(".path li").count() == 2
    # The star is kept, and finds its card
    visit.page.get_by_role("button", name="Starred only").click()
    visit.page.locator("#toast", has_text="Starred only").wait_for()
    assert visit.page.locator('.star[aria-pressed="true"]').count() == 1
    # The large view leads up and down the tree
    visit.page.get_by_role("button", name="Starred only").click()
    visit.wait_for_pictures(12)
    visit.pictures.nth(9).locator(".picture-open").click()
    dialog = visit.page.get_by_role("dialog")
    dialog.get_by_role("heading", name="Drawn from it").wait_for()
    dialog.locator(".children button").first.click()
    dialog.get_by_role("heading", name="Variations of red apple").wait_for()
    assert dialog.locator(".path li").count() == 1
    # Its keys are for the image that it shows
    visit.page.keyboard.press("f")
    dialog.locator('.star[aria-pressed="true"]').wait_for()
    assert {item["id"] for item in visit.read_items() if item["starred"]} == {before[4], before[5]}


def test_one_drawing_or_all_are_cancelled(visit):
    visit.open(steps=100)
    for prompt in ("a cat", "rocket", "red apple"):
        visit.page.get_by_label("Prompt", exact=True).fill(prompt)
        visit.page.keyboard.press("Enter")
    # Four images draw at a time: the others know their place
    visit.page.get_by_text("Waiting for its turn").first.wait_for()
    visit.page.locator(".card", has_text="rocket").get_by_role("button", name="Cancel").click()
    visit.page.locator(".card", has_text="rocket").wait_for(state="detached")
    assert visit.page.locator(".card").count() == 2
    visit.page.get_by_role("button", name="Cancel all").click()
    visit.page.locator(".card").first.wait_for(state="detached")
    visit.page.get_by_role("heading", name="What shall we draw?").wait_for()
    assert visit.read_items() == []


def test_a_dropped_image_brings_its_settings_back(visit, tmp_path):
    chosen = {
        "steps": 3,
        "prior_steps": 2,
        "negative_prompt": "a dog",
        "size": "64x128",
        "prior_sampler": "dpmsolver++",
    }
    visit.open(**chosen, seed=41)
    visit.draw("a cat")
    with visit.page.expect_download() as download:
        visit.pictures.nth(1).locator(".picture-open").focus()
        visit.page.keyboard.press("d")
    assert download.value.suggested_filename == "a-cat-42.png"
    path = tmp_path / "cat.png"
    download.value.save_as(path)
    # In another browser, that has drawn nothing
    visit.page.goto(f"{visit.address}ready")
    visit.page.evaluate(
        """async () => {
          localStorage.clear();
          const gone = indexedDB.deleteDatabase("t2i");
          await new Promise((resolve) => (gone.onsuccess = resolve));
        }"""
    )
    visit.open()
    visit.page.evaluate(
        """(bytes) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "cat.png", { type: "image/png" }));
          document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        list(path.read_bytes()),
    )
    visit.wait_for_pictures(1)
    visit.page.locator("#toast", has_text="Its words, settings and seed are set").wait_for()
    assert visit.page.get_by_label("Prompt", exact=True).input_value() == "a cat"
    kept = json.loads(visit.page.evaluate("localStorage.getItem('t2i.settings')"))
    assert {name: kept[name] for name in ("seed", *chosen)} == {"seed": 42, **chosen}
    # The same words and seed draw the same image
    visit.page.keyboard.press("s")
    visit.page.get_by_label("Images at once").fill("1")
    visit.page.get_by_role("button", name="Draw", exact=True).click()
    visit.wait_for_pictures(2)
    with visit.page.expect_download() as download:
        visit.pictures.nth(0).locator(".picture-open").focus()
        visit.page.keyboard.press("d")
    again, first = Image.open(download.value.path()), Image.open(path)
    assert max(high for _, high in ImageChops.difference(again, first).getextrema()) <= 1


def test_a_lost_server_is_said_calmly_and_drawing_goes_on_when_it_is_back(visit):
    visit.context.set_offline(True)
    visit.page.get_by_label("Prompt", exact=True).fill("a cat")
    visit.page.keyboard.press("Enter")
    visit.page.get_by_role("status").filter(has_text="The server does not answer").wait_for()
    assert visit.page.get_by_label("Prompt", exact=True).input_value() == "a cat"
    visit.context.set_offline(False)
    visit.wait_for_pictures(4)
    assert visit.page.locator("#banner").is_hidden()
    # The browser itself logs requests that failed
    visit.errors = [error for error in visit.errors if "ERR_INTERNET_DISCONNECTED" not in error]


def test_unknown_words_are_underlined_and_bad_settings_are_explained(visit):
    visit.page.get_by_label("Prompt", exact=True).fill("a cat with a zeppelin and a rockett")
    visit.page.locator("mark", has_text="rockett").wait_for()
    assert visit.page.locator("mark").all_inner_texts() == ["zeppelin", "rockett"]
    assert "it knows: rocket." in visit.page.locator("#prompt-note").inner_text()
    visit.open(size="40x4000")
    visit.page.get_by_label("Prompt", exact=True).fill("a cat")
    visit.page.keyboard.press("Enter")
    visit.page.locator(".card.failed").wait_for()
    assert "must be a multiple of 32, got 40" in visit.page.locator(".card .status-text").inner_text()
    visit.errors = [error for error in visit.errors if "status of 400" not in error]


def test_images_are_exported_in_one_file_with_their_tree(visit):
    visit.draw("a cat")
    visit.page.get_by_role("button", name="Variations: a cat, 1 of 4").click()
    visit.wait_for_pictures(8)
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="Export images").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        tree = json.loads(archive.read("images.json"))
        assert sorted(archive.namelist()) == sorted(["images.json", *(image["file"] for image in tree)])
        for image in tree:
            with Image.open(io.BytesIO(archive.read(image["file"]))) as found:
                assert json.loads(found.text["t2i"])["seed"] == image["record"]["seed"]
    parents = {parent for image in tree for parent in image["drawn_from"]}
    assert len(tree) == 8 and len(parents) == 1 and parents <= {image["file"] for image in tree}


def test_the_keyboard_alone_draws_moves_and_opens(visit):
    page = visit.page
    page.keyboard.press("/")
    page.keyboard.type("a cat")
    page.keyboard.press("Enter")
    visit.wait_for_pictures(4)
    visit.pictures.nth(0).locator(".picture-open").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("f")
    page.locator('.star[aria-pressed="true"]').wait_for()
    page.keyboard.press("Enter")
    page.get_by_role("dialog").get_by_role("heading", name="a cat").wait_for()
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    # The focus is where it was
    assert page.evaluate("document.activeElement.closest('.picture').dataset.item") == visit.pictures.nth(
        1
    ).get_attribute("data-item")
    page.keyboard.press("p")
    code = page.get_by_role("dialog").locator("pre")
    assert 'prompt="a cat"' in code.inner_text()
    page.get_by_role("dialog").get_by_role("radio", name="curl").check()
    assert code.inner_text().startswith("curl 'http://127.0.0.1")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.get_by_role("dialog").get_by_role("heading", name="Keyboard").wait_for()


def test_a_removed_image_comes_back_and_the_focus_stays_near(visit):
    page = visit.page
    visit.draw("a cat")
    names = [star.get_attribute("aria-label") for star in page.locator(".star").all()]
    assert names == [f"Star: a cat, {number} of 4" for number in range(1, 5)]
    before = [visit.pictures.nth(index).get_attribute("data-item") for index in range(4)]
    find_focus = "document.activeElement.closest('.picture')?.dataset.item"
    visit.pictures.nth(1).locator(".picture-open").focus()
    page.keyboard.press("f")
    page.locator('.star[aria-pressed="true"]').wait_for()
    page.keyboard.press("Delete")
    page.get_by_role("button", name="Undo").wait_for()
    assert page.evaluate(find_focus) == before[2]
    assert sorted(item["id"] for item in visit.read_items()) == sorted(set(before) - {before[1]})
    page.keyboard.press("Control+z")
    page.locator("#toast", has_text="Brought back").wait_for()
    assert [visit.pictures.nth(index).get_attribute("data-item") for index in range(4)] == before
    assert page.evaluate(find_focus) == before[1]
    assert {item["id"]: item["starred"] for item in visit.read_items()} == {key: key == before[1] for key in before}
    # A whole card, by the button of the note
    page.get_by_role("button", name="Remove these images").click()
    page.locator(".card").wait_for(state="detached")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.get_by_role("button", name="Undo").click()
    visit.wait_for_pictures(4)
    visit.open()
    visit.wait_for_pictures(4)
    assert [visit.pictures.nth(index).get_attribute("data-item") for index in range(4)] == before


def test_escape_closes_a_menu_and_shortcuts_can_be_turned_off(visit):
    page = visit.page
    add_image(page, build_image())
    visit.open(steps=100)
    page.get_by_label("Prompt", exact=True).fill("a cat")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Cancel", exact=True).wait_for()
    visit.pictures.nth(0).get_by_role("button", name="More actions").click()
    page.keyboard.press("Escape")
    page.locator("[role=menu]").wait_for(state="detached")
    assert page.locator(".card.drawing").count() == 1
    page.keyboard.press("Escape")
    page.locator(".card.drawing").wait_for(state="detached")
    page.get_by_role("button", name="Keyboard shortcuts").click()
    page.get_by_role("checkbox").uncheck()
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    page.keyboard.press("s")
    page.keyboard.press("?")
    assert page.locator("dialog").count() == 0 and page.locator("#settings").is_hidden()


def test_an_ingredient_leaves_the_prompt_and_settings_as_they_are(visit):
    visit.draw("a cat")
    page = visit.page
    with page.expect_download() as download:
        visit.pictures.nth(0).locator(".picture-open").focus()
        page.keyboard.press("d")
    kept = page.evaluate("localStorage.getItem('t2i.settings')")
    page.get_by_label("Prompt", exact=True).fill("a dog")
    open_tool(visit.pictures.nth(0), "Mix")
    page.get_by_role("button", name="Add images").click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Open a file").click()
    chooser.value.set_files(download.value.path())
    page.locator(".anchor").nth(1).wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value() == "a dog"
    assert page.evaluate("localStorage.getItem('t2i.settings')") == kept


def test_older_images_are_shown_once_however_often_they_are_asked_for(visit):
    visit.page.evaluate(
        """async () => {
          const open = indexedDB.open("t2i");
          await new Promise((resolve) => (open.onsuccess = resolve));
          const canvas = Object.assign(document.createElement("canvas"), { width: 8, height: 8 });
          const blob = await new Promise((resolve) => canvas.toBlob(resolve));
          const file = { blob, width: 8, height: 8, prompt: "old", starred: false, record: null };
          const drawing = { title: "old", layout: "grid", requests: [{ route: null, fields: { n: 1 } }] };
          const transaction = open.result.transaction(["items", "cards"], "readwrite");
          for (let number = 1; number <= 20; number++) {
            const about = { id: `${number}`, created: number, parents: [] };
            transaction.objectStore("items").put({ ...about, ...file, card: about.id, request: 0, place: 0 });
            transaction.objectStore("cards").put({ ...about, ...drawing, items: [about.id] });
          }
          await new Promise((resolve) => (transaction.oncomplete = resolve));
          open.result.close();
        }"""
    )
    visit.open()
    visit.wait_for_pictures(12)
    more = visit.page.get_by_role("button", name="Show older images")
    more.wait_for()
    more.evaluate("(button) => [button.click(), button.click()]")
    visit.wait_for_pictures(20)
    more.wait_for(state="hidden")
    shown = visit.pictures.evaluate_all("(all) => all.map((picture) => picture.dataset.item)")
    assert shown == [str(number) for number in range(20, 0, -1)]


def test_what_the_server_notes_is_under_the_card(visit):
    visit.draw("a cat and " * 60 + "a dog")
    note = visit.page.locator(".card-notes li")
    said = note.inner_text()
    assert "cut" in said and said.endswith(".")
    visit.open()
    note.wait_for()
    assert note.inner_text() == said


def test_a_busy_server_is_asked_again_and_then_the_person(visit):
    page = visit.page
    answers = [{"retry-after": "2"}, {"retry-after": "1000"}]
    body = json.dumps({"error": {"message": "the queue is full", "code": "queue_full"}})

    def refuse(route):
        if not answers:
            return route.fallback()
        headers = {"content-type": "application/json", **answers.pop(0)}
        return route.fulfill(status=429, headers=headers, body=body)

    page.route("**/v1/images/generations", refuse)
    page.get_by_label("Prompt", exact=True).fill("a cat")
    page.keyboard.press("Enter")
    page.get_by_text("The server is busy. Asking again in 2 s").wait_for()
    page.locator(".card.failed", has_text="busy for 5 minutes").wait_for()
    page.get_by_role("button", name="Try again").click()
    visit.wait_for_pictures(4)
    visit.errors = [error for error in visit.errors if "status of 429" not in error]
