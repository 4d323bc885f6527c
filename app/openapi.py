"""The OpenAPI document: errors are problems everywhere."""

from typing import Any

from fastapi import FastAPI

from app.dataset_sources import DatasetFromSource
from app.errors import PROBLEM_TYPE, Problem
from core.run_spec import DatasetPolicy

_REF = "#/components/schemas/{model}"

# A declared `4XX` keeps FastAPI from documenting its own validation error, which never leaves us.
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status, description in (("4XX", "The request is at fault"), ("5XX", "The server is"))
}


class KdpoApi(FastAPI):
    """FastAPI whose document has the schemas that endpoints refer to by hand."""

    def openapi(self) -> dict[str, Any]:
        """Return the document; made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for model in (Problem, DatasetPolicy, DatasetFromSource):
                schema = model.model_json_schema(ref_template=_REF)
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
        return self.openapi_schema or {}
