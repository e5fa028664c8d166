"""The files of the page for people: a fixed list, read once, with the headers that browsers obey."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
# The page loads from its own server alone, runs no script of its markup, and stands in no frame of another page.
# Images that it draws are blobs; data: is the icon.
CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


@dataclass(frozen=True)
class PageFile:
    """A file of the page, and the headers of its response."""

    content: bytes = field(repr=False)
    headers: dict[str, str]


def read_page_files(folder: Path = FOLDER) -> dict[str, PageFile]:
    """Return the files of the page by their path in the folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if media_type := MEDIA_TYPES.get(path.suffix):
            content = path.read_bytes()
            headers = {
                "content-type": media_type,
                # Browsers ask each time whether a file has changed, so that no page mixes modules of two versions
                "cache-control": "no-cache",
                "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
                "content-security-policy": CONTENT_POLICY,
                "x-content-type-options": "nosniff",
                "referrer-policy": "no-referrer",
                "cross-origin-opener-policy": "same-origin",
            }
            files[path.relative_to(folder).as_posix()] = PageFile(content, headers)
    return files


def build_page_routes() -> list[Route]:
    """Return the routes of the page: / and its files under /page/."""
    files = read_page_files()

    async def send_file(request: Request) -> Response:
        """Send a file of the list, or say that the browser's own copy is right."""
        file = files.get(request.path_params.get("name", "index.html"))
        if file is None:
            raise HTTPException(404)
        if file.headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=file.headers)
        return Response(file.content, headers=file.headers)

    return [Route("/", send_file), Route("/page/{name:path}", send_file)]
