"""Where files of a search lie in the artifact folder: workers write them, the API reads them."""

from pathlib import Path

TRIALS = "trials"
"""Folder of the trials of a job's search."""


def trials_folder(artifact_dir: Path, job_id: str) -> Path:
    """Return the folder of the trials of a job; it is removed some time after the job has ended."""
    return artifact_dir / "jobs" / job_id / TRIALS


def losses_file(folder: Path, number: int, rung: int) -> Path:
    """Return where the losses of all validation pairs are, nats, under a trial at a rung."""
    return folder / f"{number}-{rung}.json"


def groups_file(folder: Path) -> Path:
    """Return where the number of each validation pair's prompt is."""
    return folder / "groups.json"
