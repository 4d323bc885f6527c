"""What a process needs to train with others, as files: JSON and safetensors, nothing pickled."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.run_spec import TrainSpec
from core.spec import ObjectiveSpec
from objectives import Geometry, HybridObjective, PairEmbeddings, build_objective
from worker.training.checkpoint import SavedState, read_point, write_point
from worker.training.model import Policy, load_policy
from worker.training.resolve import TrainPlan
from worker.training.states import ReferenceStates, map_states
from worker.training.step import TrainingData
from worker.training.tokenize import TokenizedPair

_JOB, _TENSORS, _POINT = "job.json", "tensors.safetensors", "point"
_TRAIN, _VALIDATION = "train", "validation"
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16)}
_EMBEDDINGS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class HeldOut:
    """Pairs to score a run on, with the reference's states if they are kept."""

    pairs: tuple[TokenizedPair, ...]
    states: ReferenceStates | None


@dataclass(frozen=True)
class RankJob:
    """A final run as every process of it sees it."""

    model: Path
    spec: TrainSpec
    objective: ObjectiveSpec
    geometry: Geometry | None
    data: TrainingData
    plan: TrainPlan
    weights_learning_rate: float
    held_out: HeldOut | None
    device: str
    sharded: bool
    threads: int
    choices: Path | None = None

    def policy(self, device: torch.device) -> Policy:
        """Load the model as the first process has it."""
        return load_policy(
            self.model,
            lora=self.spec.lora,
            device=device,
            options=self.spec,
            choices=self.choices,
        )

    def build_objective(self, policy: Policy) -> HybridObjective:
        """Build the objective against the reference's output layer."""
        head = policy.reference_head or policy.head
        return build_objective(self.objective, geometry=self.geometry, head=head.weight)

    def write(self, folder: Path, saved: SavedState | None) -> None:
        """Write the job, and the point from which it goes on.

        Raises:
            StorageFull: the disk has no room.
        """
        folder.mkdir(parents=True)
        tensors = {
            "chosen_log_prob": self.data.chosen_log_prob,
            "rejected_log_prob": self.data.rejected_log_prob,
        }
        frozen = self.data.frozen_embeddings
        if frozen is not None:
            parts = (frozen.prompt, frozen.chosen, frozen.rejected)
            tensors |= {f"frozen.{n}": t for n, t in zip(_EMBEDDINGS, parts, strict=True)}
        if self.geometry is not None:
            tensors |= {f"geometry.{n}": t for n, t in self.geometry.tensors().items()}
        job: dict[str, Any] = {
            "model": str(self.model),
            "spec": self.spec.model_dump(mode="json", exclude_unset=True),
            "objective": self.objective.model_dump(mode="json"),
            "plan": self.plan.as_dict(),
            "weights_learning_rate": self.weights_learning_rate,
            "device": self.device,
            "sharded": self.sharded,
            "threads": self.threads,
            "choices": None if self.choices is None else str(self.choices),
            _TRAIN: _split_to_json(self.data.pairs),
            _VALIDATION: None if self.held_out is None else _split_to_json(self.held_out.pairs),
            "states": {},
        }
        states = {_TRAIN: self.data.reference_states}
        if self.held_out is not None:
            states[_VALIDATION] = self.held_out.states
        for split, kept in states.items():
            if kept is not None:
                tensors |= _hand_over(kept, folder / split, name=split)
                job["states"][split] = str(kept.dtype).removeprefix("torch.")
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, folder / _TENSORS)
        (folder / _JOB).write_bytes(orjson.dumps(job))
        if saved is not None:
            write_point(saved, folder / _POINT, attempt=0, scope=_TRAIN, identity={})

    @classmethod
    def read(cls, folder: Path) -> tuple["RankJob", SavedState | None]:
        """Read back what `write` has written."""
        job = orjson.loads((folder / _JOB).read_bytes())
        tensors = load_file(folder / _TENSORS)
        spec = TrainSpec.model_validate(job["spec"])

        def states(split: str) -> ReferenceStates | None:
            if split not in job["states"]:
                return None
            lengths = tensors[f"{split}.lengths"].numpy()
            return map_states(
                folder / split,
                starts=tensors[f"{split}.starts"].numpy(),
                lengths=lengths,
                width=int(tensors[f"{split}.width"]),
                dtype=_DTYPES[job["states"][split]],
            )

        geometry = {
            n.removeprefix("geometry."): t for n, t in tensors.items() if n.startswith("geometry.")
        }
        frozen = [tensors.get(f"frozen.{name}") for name in _EMBEDDINGS]
        held_out = job[_VALIDATION]
        found = cls(
            model=Path(job["model"]),
            spec=spec,
            objective=ObjectiveSpec.model_validate(job["objective"]),
            geometry=Geometry.from_tensors(geometry) if geometry else None,
            data=TrainingData(
                pairs=_split_from_json(job[_TRAIN]),
                chosen_log_prob=tensors["chosen_log_prob"],
                rejected_log_prob=tensors["rejected_log_prob"],
                frozen_embeddings=PairEmbeddings(*(t for t in frozen if t is not None))
                if frozen[0] is not None
                else None,
                reference_states=states(_TRAIN),
            ),
            plan=TrainPlan(**job["plan"]),
            weights_learning_rate=job["weights_learning_rate"],
            held_out=None
            if held_out is None
            else HeldOut(_split_from_json(held_out), states(_VALIDATION)),
            device=job["device"],
            sharded=job["sharded"],
            threads=job["threads"],
            choices=None if job["choices"] is None else Path(job["choices"]),
        )
        point = folder / _POINT
        saved = read_point(point, sha256=None, identity={}) if point.exists() else None
        return found, saved


def _hand_over(states: ReferenceStates, path: Path, *, name: str) -> dict[str, Tensor]:
    """Give the file a second name, which keeps it when the store drops its entry."""
    try:
        os.link(states.path, path)
    except OSError:  # the entry was dropped meanwhile, or there are no links to where this is
        # The mapping outlives the name.
        with path.open("wb") as file:
            file.write(states.mapped.data)
    return {
        f"{name}.starts": torch.from_numpy(states.starts.copy()),
        f"{name}.lengths": torch.from_numpy(states.lengths.copy()),
        f"{name}.width": torch.tensor(states.mapped.shape[1] // states.dtype.itemsize),
    }


def _split_to_json(pairs: Sequence[TokenizedPair]) -> list[dict[str, Any]]:
    return [asdict(pair) for pair in pairs]


def _split_from_json(rows: list[dict[str, Any]]) -> tuple[TokenizedPair, ...]:
    texts = ("prompt", "chosen", "rejected")
    return tuple(
        TokenizedPair(**(row | {name: tuple(row[name]) for name in texts})) for row in rows
    )
