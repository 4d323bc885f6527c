"""All settings: one frozen tree, read from `KDPO_*` variables once, passed on as an argument."""

from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core.hosts import parse_host_rule

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
MIB = 1024 * 1024


class Mode(StrEnum):
    """`embedded`: SQLite and a file broker in one folder; `full`: Postgres and Redis."""

    EMBEDDED = "embedded"
    FULL = "full"


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ApiSettings(_Group):
    """Where the API listens and what it accepts."""

    host: str = "127.0.0.1"
    port: int = Field(default=8321, ge=0, le=65535)
    public_url: str | None = None
    max_upload_bytes: int = Field(default=2048 * MIB, gt=0)
    max_body_bytes: int = Field(default=MIB, gt=0, description="bodies other than uploads")
    wait_default_s: float = Field(default=30.0, ge=0)
    wait_max_s: float = Field(default=120.0, ge=0)
    stream_poll_s: float = Field(
        default=0.5, gt=0, le=10, description="how often followed jobs are looked at"
    )
    stream_ping_s: float = Field(default=15.0, gt=0, description="silence before a ping")
    max_streams: int = Field(default=20, ge=1, description="open event streams of one API key")


class DbSettings(_Group):
    """Database; without a URL an SQLite file in the data folder."""

    url: SecretStr | None = None
    pool_size: int = Field(default=10, ge=1)


class BrokerSettings(_Group):
    """Celery's broker; without a URL files in the data folder."""

    url: SecretStr | None = None
    key_prefix: str = "kdpo:"


class ModelSettings(_Group):
    """Which base models may be named."""

    dirs: Annotated[tuple[Path, ...], NoDecode] = ()
    allow_local_paths: bool | None = Field(
        default=None, description="any local path; default: only in embedded mode"
    )
    hub_enabled: bool = True
    hub_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("*",), description="glob patterns of hub ids that may be named"
    )
    push_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="glob patterns of hub ids that checkpoints may be pushed to"
    )
    hub_timeout_s: float = Field(default=10.0, gt=0)
    hub_token: SecretStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _split(cls, values: object) -> object:
        if isinstance(values, dict):
            for name, separator in (("dirs", ":"), ("hub_allow", ","), ("push_allow", ",")):
                if isinstance(values.get(name), str):
                    values = {**values, name: tuple(p for p in values[name].split(separator) if p)}
        return values


class DataLimits(_Group):
    """Limits of one uploaded dataset (sizes in bytes)."""

    max_line_bytes: int = Field(default=MIB, gt=0)
    max_decompressed_bytes: int = Field(default=8192 * MIB, gt=0)
    max_ratio: float = Field(default=200.0, gt=1)
    max_rows: int = Field(default=5_000_000, gt=0)
    max_depth: int = Field(default=32, gt=0)
    max_errors: int = Field(default=100_000, gt=0)
    examples_per_code: int = Field(default=20, gt=0)
    min_pairs: int = Field(default=10, ge=3)
    min_prompts: int = Field(default=3, ge=3)
    parser_memory_bytes: int = Field(default=2048 * MIB, gt=0)
    parser_cpu_s: int = Field(default=3600, gt=0)


class SourceSettings(_Group):
    """Where datasets may be fetched from; without entries only from the hub."""

    hub_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("*",), description="glob patterns of hub datasets that may be named"
    )
    secrets: dict[str, SecretStr] = Field(
        default={}, description="hub tokens by the name that a request may use"
    )
    https_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="host, *.host, host:port, host=network; see core/hosts.py"
    )
    ca_file: Path | None = Field(default=None, description="more certificate authorities, PEM")
    paths: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(), description="folders on the server whose files may be named"
    )
    max_bytes: int = Field(default=2048 * MIB, gt=0, description="of all files of one dataset")
    timeout_s: float = Field(default=30.0, gt=0, description="for each answer")
    deadline_s: float = Field(default=3600.0, gt=0, description="for all files of one dataset")

    @model_validator(mode="before")
    @classmethod
    def _split(cls, values: object) -> object:
        if isinstance(values, dict):
            for name, separator in (("hub_allow", ","), ("https_hosts", ","), ("paths", ":")):
                if isinstance(values.get(name), str):
                    parts = (part.strip() for part in values[name].split(separator))
                    values = {**values, name: tuple(part for part in parts if part)}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        for text in self.https_hosts:
            parse_host_rule(text)
        for path in self.paths:
            if not path.expanduser().is_absolute():
                raise ValueError(f"received the folder {path}, expected an absolute path")
        return self


class WorkerSettings(_Group):
    """Leases and loops of the job protocol (seconds)."""

    lease_s: float = Field(default=60.0, gt=0)
    heartbeat_s: float = Field(default=10.0, gt=0)
    self_fence_s: float = Field(default=45.0, gt=0)
    reap_s: float = Field(default=10.0, gt=0)
    sweep_s: float = Field(default=10.0, gt=0)
    kill_grace_s: float = Field(default=20.0, gt=0)
    max_losses: int = Field(default=5, ge=1)
    max_retries: int = Field(default=2, ge=0)
    backoff_s: float = Field(default=2.0, ge=0)
    quarantine_s: float = Field(
        default=600.0, ge=0, description="without jobs for a worker that lost its last three"
    )
    spare_runner: bool = Field(
        default=True, description="keep a process with torch for the next job that runs models"
    )

    @model_validator(mode="after")
    def _order(self) -> Self:
        if not self.heartbeat_s < self.self_fence_s < self.lease_s:
            raise ValueError(
                f"heartbeat_s {self.heartbeat_s} < self_fence_s {self.self_fence_s} < lease_s "
                f"{self.lease_s} must hold, or two attempts could run at once"
            )
        return self


class TrainingSettings(_Group):
    """What the machine gives to one training process."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    num_threads: int | None = Field(default=None, ge=1)
    checkpoint_every_s: float = Field(default=300.0, ge=0)
    reference_states_bytes: int = Field(
        default=1024 * MIB, ge=0, description="of one split; beyond, the base runs at every step"
    )
    reference_store_bytes: int = Field(
        default=20_480 * MIB, ge=0, description="of all references on disk; the unused go first"
    )
    progress_every_s: float = Field(default=1.0, gt=0)
    num_processes: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        default="auto", description="of a final run; auto: as many as there are GPUs, 1 on a CPU"
    )
    sharding: Literal["none", "fsdp2"] = Field(
        default="none", description="fsdp2: each process of a final run keeps a part of the weights"
    )
    trackers: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="that final runs report to, e.g. tensorboard, mlflow, wandb"
    )

    @model_validator(mode="before")
    @classmethod
    def _split(cls, values: object) -> object:
        if isinstance(values, dict) and isinstance(values.get("trackers"), str):
            names = values["trackers"].strip("[]").replace('"', "").split(",")
            values = {**values, "trackers": tuple(n.strip() for n in names if n.strip())}
        return values


class FileSettings(_Group):
    """Files, and uploads that come in parts."""

    max_part_bytes: int = Field(default=64 * MIB, gt=0)
    upload_expires_s: float = Field(default=86_400.0, ge=60, description="of unfinished uploads")


class DownloadSettings(_Group):
    """Signed links; without a secret one is made in the data folder."""

    secret: SecretStr | None = None
    max_link_s: int = Field(default=7 * 86_400, ge=1)
    checkpoint_days: float | None = Field(
        default=None, ge=3, description="until checkpoints that are neither best, last nor pinned "
        "expire; without it they stay",
    )  # fmt: skip


class WebhookSettings(_Group):
    """Where webhooks may point to; without entries nowhere."""

    hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="host, *.host, host:port, host=network; see core/hosts.py"
    )
    allow_http: bool = Field(default=False, description="plain http to the hosts that are listed")
    ca_file: Path | None = Field(default=None, description="more certificate authorities, PEM")
    timeout_s: float = Field(default=10.0, gt=0, le=60, description="of one delivery")
    max_per_owner: int = Field(default=20, ge=1)
    keep_days: float = Field(default=30.0, gt=0, description="of the log of deliveries")

    @model_validator(mode="before")
    @classmethod
    def _split(cls, values: object) -> object:
        if isinstance(values, dict) and isinstance(values.get("hosts"), str):
            parts = (part.strip() for part in values["hosts"].split(","))
            values = {**values, "hosts": tuple(part for part in parts if part)}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        for text in self.hosts:
            parse_host_rule(text)
        return self


class AuthSettings(_Group):
    """Bearer keys; switching them off is refused beyond loopback."""

    required: bool = True
    requests_per_minute: int = Field(
        default=6000, ge=1, description="of a key without a rate of its own"
    )
    audit_days: float = Field(default=365.0, gt=0, description="that the audit log is kept")


class Settings(BaseSettings):
    """The whole configuration of a process."""

    model_config = SettingsConfigDict(
        env_prefix="KDPO_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    mode: Mode = Mode.EMBEDDED
    environment: str = Field(default="live", pattern=r"^[a-z]{1,12}$")
    data_dir: Path = Path("kdpo-data")
    log_level: str = "INFO"
    api: ApiSettings = ApiSettings()
    auth: AuthSettings = AuthSettings()
    db: DbSettings = DbSettings()
    broker: BrokerSettings = BrokerSettings()
    models: ModelSettings = ModelSettings()
    data: DataLimits = DataLimits()
    sources: SourceSettings = SourceSettings()
    worker: WorkerSettings = WorkerSettings()
    training: TrainingSettings = TrainingSettings()
    files: FileSettings = FileSettings()
    downloads: DownloadSettings = DownloadSettings()
    webhooks: WebhookSettings = WebhookSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode is Mode.FULL:
            missing = [
                name
                for name, value in (
                    ("KDPO_DB__URL", self.db.url),
                    ("KDPO_BROKER__URL", self.broker.url),
                )
                if value is None
            ]
            if missing:
                raise ValueError(
                    f"mode `full` needs {' and '.join(missing)}; set them, or use mode `embedded`"
                )
        if not self.auth.required and self.api.host not in LOOPBACK_HOSTS:
            raise ValueError(
                f"auth is off and api.host is {self.api.host!r}: refusing to listen beyond "
                "loopback without API keys; set KDPO_AUTH__REQUIRED=true"
            )
        return self

    @property
    def root(self) -> Path:
        """The data folder as an absolute path."""
        return self.data_dir.expanduser().absolute()

    @cached_property
    def database_url(self) -> str:
        """SQLAlchemy URL of the main database."""
        if self.db.url is None:
            return f"sqlite:///{self.root / 'kdpo.db'}"
        url = self.db.url.get_secret_value()
        for bare in ("postgres://", "postgresql://"):
            if url.startswith(bare):
                return "postgresql+psycopg://" + url.removeprefix(bare)
        return url

    @cached_property
    def broker_url(self) -> str:
        """URL of Celery's broker."""
        return (
            "filesystem://localhost//"
            if self.broker.url is None
            else self.broker.url.get_secret_value()
        )

    @property
    def broker_dir(self) -> Path:
        """Folder of the file broker."""
        return self.root / "broker"

    @property
    def artifact_dir(self) -> Path:
        """Folder of everything that is too large for the database."""
        return self.root / "artifacts"

    @property
    def reference_dir(self) -> Path:
        """Folder of what reference models say about data; all of it can be computed again."""
        return self.artifact_dir / "reference"

    @property
    def attention_dir(self) -> Path:
        """Folder of which attention was fastest for a model; all of it can be timed again."""
        return self.artifact_dir / "attention"

    @property
    def upload_dir(self) -> Path:
        """Folder of uploads that are not validated yet."""
        return self.root / "uploads"

    @property
    def file_dir(self) -> Path:
        """Folder of files of `/v1/files`, each under its id."""
        return self.root / "files"

    @property
    def part_dir(self) -> Path:
        """Folder of uploads that come in parts, a folder for each."""
        return self.file_dir / "parts"

    @property
    def model_dirs(self) -> tuple[Path, ...]:
        """Folders whose sub-folders may be named as base models."""
        return (self.root / "models", *(d.expanduser().absolute() for d in self.models.dirs))

    @property
    def local_paths_allowed(self) -> bool:
        """Whether a request may name a base model by its path on the server."""
        if self.models.allow_local_paths is None:
            return self.mode is Mode.EMBEDDED
        return self.models.allow_local_paths
