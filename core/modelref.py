"""A base model as a job names it: resolved once by the API, checked again by the worker."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from core.spec import SpecModel


class ModelRef(SpecModel):
    """Which weights exactly: a folder on the server, or a hub repository at one commit."""

    name: str = Field(description="what the user wrote")
    source: Literal["local", "hub"]
    path: Path | None = Field(default=None, description="folder, when local")
    repo_id: str | None = Field(default=None, description="repository, when on the hub")
    revision: str | None = Field(default=None, description="commit hash, when on the hub")
