"""Locks, eviction and leftovers of a folder of entries."""

import fcntl
import os
from pathlib import Path

import pytest

from worker.training import entries
from worker.training.entries import EntryFolder


@pytest.fixture
def folder(tmp_path: Path) -> EntryFolder:
    return EntryFolder(tmp_path / "store")


def never() -> None:
    raise AssertionError("nobody holds the lock")


def add(folder: EntryFolder, key: str, *, size: int, used: int) -> None:
    """Make an entry of `size` bytes that was last used at second `used`."""
    with folder.locked(key, waiting=never) as path:
        (path / "sub").mkdir(parents=True)
        (path / "a").write_bytes(b"x" * (size - 1))
        (path / "sub" / "b").write_bytes(b"x")
    os.utime(path, (used, used))


def names(folder: EntryFolder) -> set[str]:
    return {path.name for path in folder.path.iterdir()}


def test_the_least_recently_used_goes_first_until_the_cap_is_kept(folder: EntryFolder) -> None:
    for key, used in (("newest", 400), ("oldest", 100), ("second", 200), ("third", 300)):
        add(folder, key, size=100, used=used)
    folder.evict(max_bytes=400)
    assert {n for n in names(folder) if "." not in n} == {"newest", "oldest", "second", "third"}
    folder.evict(max_bytes=399)
    assert names(folder) == {
        f"{key}{end}" for key in ("newest", "second", "third") for end in ("", ".lock")
    }
    with folder.locked("second", waiting=never):
        folder.touch("second")
    folder.evict(max_bytes=100)
    assert names(folder) == {"second", "second.lock"}, "what was touched is the newest"
    folder.evict(max_bytes=0)
    assert names(folder) == set()


def test_an_entry_that_somebody_holds_is_passed_over(folder: EntryFolder) -> None:
    add(folder, "held", size=100, used=100)
    add(folder, "free", size=100, used=200)
    with folder.locked("held", waiting=never):
        folder.evict(max_bytes=150)
        assert names(folder) == {"held", "held.lock"}
        folder.evict(max_bytes=0)
        assert (folder.path / "held" / "a").stat().st_size == 99
    folder.evict(max_bytes=0)
    assert names(folder) == set()


def test_waiting_for_a_lock_can_be_stopped(
    folder: EntryFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "POLL_S", 0.001)
    polls = 0

    def stop() -> None:
        nonlocal polls
        polls += 1
        if polls == 3:
            raise InterruptedError("stopped by the test")

    other = EntryFolder(folder.path)
    with other.locked("k", waiting=never):
        with (
            pytest.raises(InterruptedError, match="stopped by the test"),
            folder.locked("k", waiting=stop),
        ):
            raise AssertionError("two hold one lock")
        with folder.locked("another", waiting=never):
            pass
    assert polls == 3
    with folder.locked("k", waiting=never):
        pass


def test_a_lock_whose_name_was_unlinked_excludes_nobody_and_is_taken_again(
    folder: EntryFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and flock of one process another one evicts the entry and unlinks the lock."""
    folder.path.mkdir()
    flock, unlinked = fcntl.flock, []

    def evicted_in_between(handle: int, operation: int) -> None:
        if not unlinked:
            unlinked.append(handle)
            (folder.path / "k.lock").unlink()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", evicted_in_between)
    monkeypatch.setattr(entries, "POLL_S", 0.001)
    with folder.locked("k", waiting=lambda: None):
        assert len(unlinked) == 1
        with (
            pytest.raises(InterruptedError),
            EntryFolder(folder.path).locked("k", waiting=interrupt),
        ):
            raise AssertionError("two hold one lock")


def interrupt() -> None:
    raise InterruptedError


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(folder: EntryFolder) -> None:
    add(folder, "whole", size=10, used=100)
    for key in ("dead", "alive", "replaced"):
        (folder.path / f".tmp-{key}").mkdir()
        (folder.path / f".tmp-{key}" / "states.bin").write_bytes(b"half")
    add(folder, "replaced", size=10, used=100)
    (folder.path / "cancelled.lock").touch()
    with EntryFolder(folder.path).locked("alive", waiting=never):
        folder.remove_leftovers()
        assert names(folder) == {
            *("whole", "whole.lock", "replaced", "replaced.lock"),
            *(".tmp-alive", "alive.lock"),
        }
    folder.remove_leftovers()
    assert names(folder) == {"whole", "whole.lock", "replaced", "replaced.lock"}


def test_what_cannot_be_removed_is_said_and_the_rest_goes_on(
    folder: EntryFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(folder, "stuck", size=100, used=100)
    add(folder, "loose", size=100, used=200)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "stuck":
            raise PermissionError(1, "Operation not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    folder.evict(max_bytes=100)
    assert names(folder) == {"stuck", "stuck.lock"}
    assert "stuck cannot be removed: Operation not permitted" in caplog.text


def test_a_folder_that_is_not_there_is_no_error(folder: EntryFolder) -> None:
    folder.evict(max_bytes=0)
    folder.remove_leftovers()
    assert not folder.path.exists()
