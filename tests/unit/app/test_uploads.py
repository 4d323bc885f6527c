"""What killed uploads leave behind is removed, and nothing else."""

import os
import time
from pathlib import Path

from app.uploads import STALE_S, remove_stale_parts


def test_only_old_parts_are_removed(tmp_path: Path) -> None:
    old, young, whole = (tmp_path / n for n in (".ds_a.part", ".ds_b.part", "ds_c"))
    for path in (old, young, whole):
        path.write_bytes(b"x")
    long_ago = time.time() - STALE_S - 60
    for path in (old, whole):
        os.utime(path, (long_ago, long_ago))
    assert remove_stale_parts(tmp_path) == [old]
    assert sorted(tmp_path.iterdir()) == [young, whole]


def test_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert remove_stale_parts(tmp_path / "uploads") == []
