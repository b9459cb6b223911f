"""The chat page and its files, with headers that let it do nothing but talk to this router."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

WEB_FOLDER = Path(__file__).parent.parent / "web"

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}


async def index(request: web.Request) -> web.StreamResponse:
    return _page("index.html")


async def file(request: web.Request) -> web.StreamResponse:
    return _page(request.match_info["path"])


def _page(name: str) -> web.StreamResponse:
    """A file of the folder; raises HTTPNotFound for anything else, other folders, hidden and unknown kinds included."""
    if "\0" in name:
        raise web.HTTPNotFound
    path = (WEB_FOLDER / name).resolve()
    kind = _TYPES.get(path.suffix)
    if kind is None or not path.is_relative_to(WEB_FOLDER.resolve()) or not _is_file(path):
        raise web.HTTPNotFound
    return web.FileResponse(path, headers=HEADERS | {"content-type": kind})


def _is_file(path: Path) -> bool:
    """A name too long for the system is no file either."""
    try:
        return path.is_file()
    except OSError:
        return False
