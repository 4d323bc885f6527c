"""Data files of a hub repository at one commit."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, cast

import yaml
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils.tqdm import disable_progress_bars

from core.errors import InvalidInput, KdpoError, StorageFull, Unavailable
from core.hub import NETWORK_ERRORS
from core.settings import MIB, Settings
from core.sources import HuggingFaceSource, check_source, token_of
from worker.ingest.sources.assembly import Checksum, Sink
from worker.ingest.sources.hub_files import choose_files

CARD = "README.md"
_MAX_CARD_BYTES = 8 * MIB
_MAX_FILES = 9_000
_MAX_LISTED = 100_000
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """One file at one commit: of large files the SHA-256 is known, of others git's own hash."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str


@dataclass(frozen=True)
class HubPin:
    """What a source was resolved to; every attempt at the job reads exactly this."""

    commit: str
    config: str
    split: str
    files: tuple[HubFile, ...]
    ignored: tuple[str, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "HubPin":
        """Return the pin that was stored with `dataclasses.asdict`."""
        return cls(
            commit=data["commit"],
            config=data["config"],
            split=data["split"],
            files=tuple(HubFile(**file) for file in data["files"]),
            ignored=tuple(data["ignored"]),
        )


def pin(source: HuggingFaceSource, settings: Settings) -> HubPin:
    """Resolve a source: the commit that its revision names now, and the files of its split.

    Raises:
        NotPermitted: the server does not take it from the hub.
        InvalidInput: `source_not_found`, `source_gated`, `source_ambiguous`, `source_unreadable`,
            `too_many_members`, `unknown_secret`.
        Unavailable: `source_unreachable`.
    """
    check_source(source, settings)
    token = token_of(source, settings) or False
    api = HfApi(token=token)
    try:
        info = api.dataset_info(
            source.repo_id, revision=source.revision, timeout=settings.models.hub_timeout_s
        )
        commit = str(info.sha)
        if not _COMMIT.fullmatch(commit):
            raise _unreachable(source, f"it named {commit[:60]!r} as a commit")
        files = _listed(api, source, commit)
        card = _card(source, commit, files, token)
    except NETWORK_ERRORS as error:
        raise _error_of(source, error) from error
    except HFValidationError as error:
        raise _not_found(source) from error
    chosen = choose_files(list(files), card, config=source.config, split=source.split)
    if len(chosen.files) > _MAX_FILES:
        raise InvalidInput(
            f"the split has {len(chosen.files)} files, at most {_MAX_FILES} are read",
            code="too_many_members",
            param="source.split",
            hint="take a smaller split, or revision refs/convert/parquet",
        )
    return HubPin(
        commit=commit,
        config=chosen.config,
        split=chosen.split,
        files=tuple(_file(files[path]) for path in chosen.files),
        ignored=chosen.ignored,
    )


def _listed(api: HfApi, source: HuggingFaceSource, commit: str) -> dict[str, RepoFile]:
    """Return the files of a commit by path.

    Raises:
        InvalidInput: `too_many_members`: the listing does not end within the limit.
    """
    files: dict[str, RepoFile] = {}
    tree = api.list_repo_tree(source.repo_id, recursive=True, revision=commit, repo_type="dataset")
    for number, entry in enumerate(tree, start=1):
        if number > _MAX_LISTED:
            raise InvalidInput(
                f"the repository has more than {_MAX_LISTED} files and folders, at most so many "
                "are listed",
                code="too_many_members",
                param="source.repo_id",
                hint="take revision refs/convert/parquet, or download the files and upload them",
            )
        if isinstance(entry, RepoFile):
            files[entry.path] = entry
    return files


def _file(entry: RepoFile) -> HubFile:
    sha256 = None if entry.lfs is None else entry.lfs.sha256
    return HubFile(entry.path, entry.size, sha256, entry.blob_id)


def _card(
    source: HuggingFaceSource, commit: str, files: Mapping[str, RepoFile], token: str | bool
) -> dict[str, Any]:
    """Return the metadata at the top of the README."""
    if CARD not in files:
        return {}
    if files[CARD].size > _MAX_CARD_BYTES:
        raise _bad_card(f"is larger than {_MAX_CARD_BYTES} bytes")
    with TemporaryDirectory() as folder:
        path = Path(folder) / CARD
        with path.open("wb") as file:
            _get(source, commit, CARD, file, offset=0, size=files[CARD].size, token=token)
        try:
            return _metadata(path.read_text(encoding="utf-8-sig"))
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise _bad_card("begins with metadata that is no YAML, or none to read") from error


def _metadata(card: str) -> dict[str, Any]:
    """Return the metadata of a card, {} where it has none."""
    block = REGEX_YAML_BLOCK.search(card)
    data = None if block is None else yaml.load(block[2], Loader=_CardLoader)  # noqa: S506 - a safe one
    if not isinstance(data, dict | None):
        raise ValueError(f"expected a mapping, received a {type(data).__name__}")
    return data or {}


class _CardLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Reads no merge keys (`<<`): a card of some lines could grow to any size by them."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys", node.start_mark)
        super().flatten_mapping(node)


def _get(
    source: HuggingFaceSource, commit: str, path: str, file: BinaryIO, *,
    offset: int, size: int, token: str | bool,
) -> None:  # fmt: skip
    disable_progress_bars()  # a bar is not a line of a log
    http_get(
        hf_hub_url(source.repo_id, path, repo_type="dataset", revision=commit),
        file,
        resume_size=offset,
        headers=build_hf_headers(token=token),
        expected_size=size,
    )


class HubRemote:
    """One file of a pin."""

    def __init__(
        self, source: HuggingFaceSource, commit: str, file: HubFile, settings: Settings
    ) -> None:
        self._source = source
        self._commit = commit
        self._file = file
        self._settings = settings

    @property
    def size(self) -> int:
        """Its size."""
        return self._file.size

    @property
    def checksum(self) -> Checksum:
        """The SHA-256 of a large file, the hash of git of another one."""
        if self._file.sha256 is not None:
            return Checksum("sha256", self._file.sha256)
        return Checksum("sha1", self._file.git_sha1, prefix=f"blob {self.size}\0".encode())

    def copy(self, sink: Sink, *, offset: int) -> None:
        """Write the file from `offset` on.

        Raises:
            NotPermitted: the hub was switched off since the job was made.
            InvalidInput: the repository is gone or closed.
            Unavailable: `source_unreachable`.
        """
        check_source(self._source, self._settings)
        token = token_of(self._source, self._settings) or False
        target = cast("BinaryIO", _Target(sink, offset))
        try:
            _get(
                self._source, self._commit, self._file.path, target,
                offset=offset, size=self.size, token=token,
            )  # fmt: skip
        except StorageFull:
            raise
        except NETWORK_ERRORS as error:
            raise _error_of(self._source, error) from error


class _Target(io.RawIOBase):
    """A sink as the file that `http_get` writes to; it cuts only back to the beginning."""

    def __init__(self, sink: Sink, offset: int) -> None:
        self._sink = sink
        self._at = offset

    def write(self, data: Any) -> int:
        self._sink.write(data)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        if (offset, whence) != (0, 0):
            raise io.UnsupportedOperation(f"seek to {offset} from {whence}")
        self._at = 0
        return 0

    def truncate(self, size: int | None = None) -> int:
        if size is not None:
            raise io.UnsupportedOperation(f"truncate to {size}")
        self._sink.restart()
        return 0


def _error_of(source: HuggingFaceSource, error: Exception) -> KdpoError:
    """Return what went wrong between us and the hub; a repository that is closed looks absent."""
    if isinstance(error, GatedRepoError):
        return InvalidInput(
            f"dataset {source.repo_id!r} is gated, and "
            + ("the token may not read it" if source.token_secret else "no token was named"),
            code="source_gated",
            param="source.token_secret",
            hint="accept the terms on the dataset's page, and name a token_secret that may read it",
        )
    if isinstance(error, RevisionNotFoundError):
        return InvalidInput(
            f"dataset {source.repo_id!r} has no revision {source.revision!r}",
            code="source_not_found",
            param="source.revision",
            hint="name a branch, a tag or a commit of the repository",
        )
    if isinstance(error, RepositoryNotFoundError | EntryNotFoundError):
        return _not_found(source)
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code in (401, 403):
            return _not_found(source)
        return _unreachable(source, f"it answered {error.response.status_code}")
    return _unreachable(source, type(error).__name__)


def _not_found(source: HuggingFaceSource) -> InvalidInput:
    seen = "" if source.token_secret is None else " that this token may see"
    return InvalidInput(
        f"the hub has no dataset {source.repo_id!r}{seen}",
        code="source_not_found",
        param="source.repo_id",
        hint="check the name; a private dataset needs a token_secret",
    )


def _unreachable(source: HuggingFaceSource, why: str) -> Unavailable:
    return Unavailable(
        f"the hub did not give {source.repo_id}: {why}",
        code="source_unreachable",
        param="source",
        hint="what has arrived is kept; the next attempt goes on from there",
    )


def _bad_card(why: str) -> InvalidInput:
    return InvalidInput(
        f"the repository's {CARD} {why}",
        code="source_unreadable",
        param="source",
        hint="download the files and upload them, or take revision refs/convert/parquet",
    )
