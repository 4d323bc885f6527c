"""What API and workers agree on about the broker: plain settings of Celery, folders, faults."""

from pathlib import Path

from core.errors import Unavailable
from core.queue import QueueName
from core.settings import Settings


def celery_config(settings: Settings) -> dict[str, object]:
    """Return Celery's settings: early ack, no results, JSON only; the database has the truth."""
    return {
        "broker_url": settings.broker_url,
        "broker_transport_options": _transport_options(settings),
        "broker_connection_retry_on_startup": True,
        "broker_connection_timeout": 5,
        "task_acks_late": False,
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_default_queue": QueueName.CPU.value,
        "task_create_missing_queues": True,
        "worker_prefetch_multiplier": 1,
        # Nothing here inspects or controls workers, and each control name leaves a file for ever.
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "enable_utc": True,
    }


def broker_folders(settings: Settings) -> tuple[Path, Path]:
    """Folders of the file broker: messages and control."""
    return settings.broker_dir / "messages", settings.broker_dir / "control"


def make_broker_folders(settings: Settings) -> None:
    """Make the folders of the file broker, readable by this user only."""
    if settings.broker.url is None:
        settings.root.mkdir(parents=True, exist_ok=True)
        for folder in (settings.broker_dir, *broker_folders(settings)):
            folder.mkdir(mode=0o700, exist_ok=True)


def broker_unavailable(error: Exception) -> Unavailable:
    """What a sender raises when the broker does not answer."""
    return Unavailable(
        f"the broker does not answer ({type(error).__name__})",
        code="broker_unavailable",
        hint="check KDPO_BROKER__URL and that the broker runs",
    )


def _transport_options(settings: Settings) -> dict[str, object]:
    if settings.broker.url is None:
        messages, control = broker_folders(settings)
        return {
            "data_folder_in": str(messages),
            "data_folder_out": str(messages),
            "control_folder": control,
            "polling_interval": 0.1,
        }
    if settings.broker_url.startswith(("redis://", "rediss://", "redis+socket://", "socket://")):
        return {
            "global_keyprefix": settings.broker.key_prefix,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
        }
    return {}
