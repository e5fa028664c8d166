"""The site of the documents: its links lead somewhere, it has a page for each document, and asks no other site."""

import re
from pathlib import Path

from docs.build_site import PAGES, ROOT, build_site

FOREIGN = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^"'\s>]+""")


def test_the_site_builds_strictly_and_asks_no_other_site(tmp_path: Path):
    site = build_site(tmp_path)
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    for path in (path for pattern in PAGES for path in ROOT.glob(pattern) if path.suffix == ".md"):
        page = path.relative_to(ROOT).with_suffix(".html").as_posix().replace("README.html", "index.html")
        assert page in pages, page
    assert [(page, found) for page, text in pages.items() for found in FOREIGN.findall(text)] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)]+", styles) == []
    # The docstrings of the classes, not their names alone
    api = pages["docs/reference/api.html"]
    assert "Text2ImagePipeline" in api and "num_images_per_prompt" in api
