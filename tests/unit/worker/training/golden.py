"""The golden trajectory: what a few steps on the shipped model and data must always give.

A change of numbers here is a change of what users' runs do. `make golden` writes the file anew;
the commit that does so says why the numbers moved.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from core.run_spec import DatasetPolicy, LoraSpec
from core.settings import DataLimits
from core.spec import (
    DivergenceName,
    KernelName,
    KernelTerm,
    LinkTerm,
    MixtureKernelSpec,
    ObjectiveSpec,
    PenaltyTerm,
)
from tests.unit.worker.training.micro import TINY_LM, Bench, Recorder, ignore_progress
from worker.ingest.canonical import read_canonical
from worker.ingest.pipeline import CANONICAL_NAME, ingest
from worker.training.model import load_policy
from worker.training.tokenize import tokenize_rows

FILE = Path(__file__).with_name("golden.json")
DATA = TINY_LM.parents[1] / "data" / "truthfulqa-600.jsonl.gz"
STEPS = 3
PAIRS = 12
KEPT = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")
PENALTY: TypeAdapter[PenaltyTerm] = TypeAdapter(PenaltyTerm)


def objectives() -> dict[str, ObjectiveSpec]:
    """Every divergence, every kernel, the mixture and a link, each at least once."""
    kernels = [*KernelName] * 2
    pairs = {
        f"{kernel.value}-{divergence.value}": ObjectiveSpec(
            kernel_term=KernelTerm.model_validate({"kernel": kernel.value, "gamma": 0.3}),
            divergence_term=PENALTY.validate_python({"divergence": divergence.value, "alpha": 2.0}),
        )
        for kernel, divergence in zip(kernels, DivergenceName, strict=False)
    }
    return {
        "dpo": ObjectiveSpec(),
        **pairs,
        "hmk": ObjectiveSpec(kernel_term=KernelTerm(kernel=MixtureKernelSpec())),
        "link": ObjectiveSpec(
            divergence_term=LinkTerm.model_validate({"divergence": "jensen_shannon"})
        ),
    }


def compute(folder: Path) -> dict[str, Any]:
    """Metrics of every step, and the length of what the adapter has become."""
    ingest(
        DATA,
        out_dir=folder,
        dataset_id="golden",
        policy=DatasetPolicy(),
        limits=DataLimits(),
        on_progress=ignore_progress,
    )
    policy = load_policy(TINY_LM, lora=LoraSpec(), device=torch.device("cpu"))
    rows = [*read_canonical(folder / CANONICAL_NAME, "train")][:PAIRS]
    pairs = tokenize_rows(rows, tokenizer=policy.tokenizer, max_length=256).pairs
    bench = Bench(policy, pairs)
    found: dict[str, Any] = {}
    for name, spec in objectives().items():
        recorder = Recorder()
        bench.train(
            spec, hooks=recorder, total_steps=STEPS, batch_size=4, learning_rate=2e-3,
            weight_decay=0.0,
        )  # fmt: skip
        norm = torch.stack([p.norm() for p in bench.weights().values()]).norm()
        found[name] = {
            "steps": [{key: point[key] for key in KEPT} for point in recorder.points.values()],
            "adapter_norm": float(norm),
        }
    return found


def main() -> None:
    """Write the file anew."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(compute(Path(folder)), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
