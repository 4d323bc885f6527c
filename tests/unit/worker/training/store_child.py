"""A process that asks a store for a reference: `python -m ... <model> <store> <how> <folder>`.

`leads` begins a pass and goes on when somebody waits for it, `follows` says that it waits, `dies`
kills itself in the middle of the pass. The last line says what was found, as JSON.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from tests.unit.worker.training.micro import micro_policy, random_pairs
from worker.training import reference
from worker.training.store import ReferenceStore

KEY = "c" * 64
PAIRS = 12
TOKENS = 60
PATIENCE_S = 120


def main(model: str, store: str, how: str, folder: str) -> None:
    torch.set_num_threads(1)
    reference.FORWARD_TOKENS = TOKENS
    policy = micro_policy(Path(model))
    passes: list[int] = []
    begun, waiting = Path(folder) / "begun", Path(folder) / "waiting"

    def progress(done: int, total: int) -> None:
        match how:
            case "leads" if 0 < done < total and not begun.exists():
                begun.touch()
                give_up = time.monotonic() + PATIENCE_S
                while not waiting.exists():
                    assert time.monotonic() < give_up, "nobody came to wait"
                    time.sleep(0.02)
            case "follows" if not done:
                waiting.touch()
            case "dies" if 0 < done < total:
                os.kill(os.getpid(), signal.SIGKILL)

    policy.trunk.register_forward_hook(lambda *_: passes.append(1))
    found = ReferenceStore(Path(store), max_bytes=1 << 30, states_bytes=1 << 30).get(
        policy, random_pairs(PAIRS), key=KEY, states=True, progress=progress
    )
    assert found.states is not None
    digest = hashlib.sha256(found.states.mapped.tobytes())
    for tensor in found.table.tensors().values():
        digest.update(tensor.numpy().tobytes())
    sys.stdout.write(json.dumps({"passes": len(passes), "sha256": digest.hexdigest()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
