"""`/docs`: Swagger UI out of the package, so that no page of ours asks another server."""

from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from app.responses import etag_matches
from core.errors import NotFound

router = APIRouter(include_in_schema=False)

# Apache-2.0, as `npm pack swagger-ui-dist@<version>` has it; app/static/swagger-ui/VENDOR.lock.
SWAGGER_VERSION = "5.35.0"
_FOLDER = "static/swagger-ui"
_TYPES = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "start.js": "text/javascript; charset=utf-8",
}
_PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kdpo: API</title>
<link rel="stylesheet" href="docs/{SWAGGER_VERSION}/swagger-ui.css">
<link rel="icon" href="data:,">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/{SWAGGER_VERSION}/swagger-ui-bundle.js"></script>
<script src="docs/{SWAGGER_VERSION}/start.js"></script>
</body>
</html>
"""
# Swagger UI sets styles on elements; scripts come from this server only, and it asks no other.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@router.get("/docs")
def docs_page() -> Response:
    """Return the page that shows the API and sends requests to it."""
    return Response(
        _PAGE,
        media_type="text/html; charset=utf-8",
        headers={
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )


@router.get("/docs/{version}/{name}")
def docs_file(
    request: Request,
    version: Annotated[str, Path(max_length=20)],
    name: Annotated[str, Path(max_length=40)],
) -> Response:
    """Return a file of the page; its address has the version, so that it never changes."""
    kind = _TYPES.get(name)
    if kind is None or version != SWAGGER_VERSION:
        raise NotFound(f"no file {name!r} of version {version!r}", hint="open /docs")
    etag = f'"{SWAGGER_VERSION}-{name}"'
    headers = {
        "ETag": etag,
        "Cache-Control": "public, max-age=86400",
        "X-Content-Type-Options": "nosniff",
    }
    if etag_matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    content = files("app").joinpath(_FOLDER, name).read_bytes()
    return Response(content, headers={**headers, "Content-Type": kind})
