"""Uploaded files: what they are for, and the states of an upload in parts."""

from enum import StrEnum


class FilePurpose(StrEnum):
    """What a file is for. Of the first two a dataset is made; the others are kept as they are."""

    FINE_TUNE = "fine-tune"
    PREFERENCE = "preference"
    EVALS = "evals"
    USER_DATA = "user_data"

    @property
    def makes_dataset(self) -> bool:
        """Whether a file of this purpose becomes a dataset."""
        return self in (FilePurpose.FINE_TUNE, FilePurpose.PREFERENCE)


class UploadStatus(StrEnum):
    """States of an upload in parts: OpenAI's."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
