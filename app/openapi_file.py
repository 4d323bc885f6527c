"""`python -m app.openapi_file docs/openapi.json`: the OpenAPI document as a file, for diffs."""

import json
import sys
from pathlib import Path

from app.main import create_app
from core.settings import Settings


def document_text() -> str:
    """Return the document with sorted keys, so that a change of order is none."""
    document = create_app(Settings()).openapi()
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document_text(), encoding="utf-8")
