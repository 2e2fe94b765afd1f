"""The page that a browser gets at `/`: a few files, and headers that keep everything else out."""

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "page"
_SCRIPT = "text/javascript; charset=utf-8"

# Nothing but this server's own files and API is loaded, asked or run; no page can frame this one.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Another version of this program may have other files.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page.

    Attributes:
        name: in the folder `page` of this package.
        content_type: its media type.
    """

    name: str
    content_type: str

    def read(self) -> bytes:
        """Its bytes."""
        return (_FOLDER / self.name).read_bytes()


FILES = {
    "/": PageFile("index.html", "text/html; charset=utf-8"),
    "/page.css": PageFile("page.css", "text/css; charset=utf-8"),
    "/icon.svg": PageFile("icon.svg", "image/svg+xml"),
} | {
    f"/{name}.js": PageFile(f"{name}.js", _SCRIPT)
    for name in ("page", "theme", "look", "dialogs", "api", "store", "text", "message", "experts")
}
"""The files by the paths of requests. They hold no data, so they need no key."""
