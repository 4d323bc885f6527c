"""One dataset and seed of `bench.selection`: its pairs, what the reference says, short runs."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from bench.report import ROOT
from core.lifecycle import EndedBy
from core.profile import DatasetProfile
from core.run_spec import DatasetPolicy, SplitPolicy, TrainSpec
from core.settings import DataLimits
from core.spec import BASE_KERNELS, DivergenceName, KernelTerm, ObjectiveSpec, PenaltyTerm
from objectives import Geometry, build_objective, fit_geometry
from selection.features import ReferenceFeatures
from selection.profile import MAX_PAIRS, profile_dataset, sampled_rows
from selection.recommender import recommend
from worker.ingest.canonical import Split, read_canonical
from worker.ingest.pipeline import CANONICAL_NAME, ingest
from worker.training.evaluate import Measured, TrialScore, measure, pair_groups, trial_score
from worker.training.loop import train
from worker.training.model import Policy
from worker.training.resolve import TrainPlan, resolve_plan
from worker.training.states import ReferenceStates
from worker.training.step import TrainingData
from worker.training.store import ReferenceStore
from worker.training.tokenize import TokenizedPair, TokenizedSplit, tokenize_rows

PLAIN = "dpo"
BETA, GAMMA, ALPHA = 0.1, 0.1, 0.6
VALIDATION_PAIRS = 150
HELD_OUT = {"validation": 0.25, "test": 0.05}
BUDGET: dict[str, Any] = {
    "model": "tiny-lm", "steps": 20, "batch_size": 16, "learning_rate": "auto, constant",
    "max_length": 512, "validation_pairs": VALIDATION_PAIRS, "held_out": HELD_OUT,
    "beta": BETA, "gamma": GAMMA, "alpha": ALPHA,
}  # fmt: skip
"""What every run has; rows of another budget are not looked at."""
RUNGS = (3, 8)
"""Steps after which a run is scored on its way."""
SHUFFLED_PAIRS = 400
_STATES_BYTES = 1 << 32
_KERNEL: TypeAdapter[KernelTerm] = TypeAdapter(KernelTerm)
_PENALTY: TypeAdapter[PenaltyTerm] = TypeAdapter(PenaltyTerm)
_METRICS = (
    "selection/features.py",
    "selection/profile.py",
    "selection/metrics/*.py",
    "objectives/geometry.py",
    "objectives/mixture.py",
    "objectives/kernels/*.py",
)
_RECOMMENDER = (
    "selection/parts.py",
    "selection/prior.py",
    "selection/recommender.py",
    "core/profile.py",
)


def pair_name(kernel: str, divergence: str) -> str:
    """How a kernel–divergence pair is called in the table."""
    return f"{kernel} × {divergence}"


PAIRS = tuple(pair_name(k.value, d.value) for k in BASE_KERNELS for d in DivergenceName)


def objectives() -> dict[str, ObjectiveSpec]:
    """Plain DPO and the 28 pairs, all of the same strengths: what differs is the pair."""
    found = {PLAIN: ObjectiveSpec(beta=BETA)}
    for kernel in BASE_KERNELS:
        for divergence in DivergenceName:
            found[pair_name(kernel.value, divergence.value)] = ObjectiveSpec(
                beta=BETA,
                kernel_term=_KERNEL.validate_python({"kernel": kernel.value, "gamma": GAMMA}),
                divergence_term=_PENALTY.validate_python(
                    {"divergence": divergence.value, "alpha": ALPHA}
                ),
            )
    return found


def metrics_version() -> str:
    """Hash of the code that measures a dataset: rows of another version are measured anew."""
    return _hash_of(_METRICS)


def recommender_version() -> str:
    """Hash of the code between features and a recommendation."""
    return _hash_of(_METRICS + _RECOMMENDER)


def _hash_of(patterns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class _Rungs:
    """Hooks of a run that nobody stops; it is scored at its rungs."""

    def __init__(self, score: Callable[[], TrialScore | None], rungs: Sequence[int]) -> None:
        self._score = score
        self._rungs = rungs
        self.found: dict[str, dict[str, float]] = {}

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def stepped(self, step: int, total: int) -> None:
        if step in self._rungs and (score := self._score()) is not None:
            self.found[str(step)] = _figures(score)

    def stopping(self) -> bool:
        return False

    def raise_if_stopped(self) -> None:
        raise AssertionError("never asked to stop")


def _figures(score: TrialScore) -> dict[str, float]:
    return {"log_loss": score.log_loss, "accuracy": score.accuracy, "drift": score.drift}


@dataclass(frozen=True)
class OpenCase:
    """Pairs, their reference and the resident policy; runs follow one another in it."""

    policy: Policy
    seed: int
    data: TrainingData
    validation: tuple[TokenizedPair, ...]
    validation_states: ReferenceStates
    geometry: Geometry
    plan: TrainPlan
    features: ReferenceFeatures
    validation_features: ReferenceFeatures
    about: dict[str, Any]

    def profile(self) -> DatasetProfile:
        """All metrics, of the pairs that a recommendation job of this seed measures."""
        rows = sampled_rows([p.group_id for p in self.data.pairs], limit=MAX_PAIRS, seed=self.seed)
        whole = (self.features.pairs, self.features.prompts)
        return profile_dataset(self.features.take(rows), seed=self.seed, drawn_from=whole)

    def run(self, objective: ObjectiveSpec, *, at: Sequence[int] = RUNGS) -> dict[str, Any]:
        """Train from the reference's weights and score on validation, and on the way at steps `at`.

        A run that meets NaN has no losses; `ended_by` says so.
        """
        started = time.perf_counter()
        rungs = _Rungs(self.score, at)
        outcome = train(
            self.policy,
            build_objective(objective, geometry=self.geometry, head=self.policy.head.weight),
            self.data, plan=self.plan, weights_learning_rate=0.0, hooks=rungs,
        )  # fmt: skip
        row: dict[str, Any] = {"ended_by": outcome.ended_by.value, "losses": None}
        if outcome.ended_by is EndedBy.BUDGET:
            score = self.score()
            if score is None:
                row["ended_by"] = EndedBy.NAN.value
            else:
                row["losses"] = [round(float(loss), 5) for loss in score.losses]
                row |= _figures(score)
        return {**row, "rungs": rungs.found, "seconds": time.perf_counter() - started}

    def score(self) -> TrialScore | None:
        """The policy as it stands, on validation; None where it gives no finite numbers."""
        measured = self.measured()
        return trial_score(measured) if measured.is_finite else None

    def measured(self, number: int | None = None) -> Measured:
        """The policy as it stands, on the first so many validation pairs, or on all."""
        return measure(
            self.policy, self.validation[:number], reference=self.validation_states,
            progress=lambda done, total: None,
        )  # fmt: skip

    def shuffles(self, number: int) -> dict[str, int]:
        """How often the recommender claims something when labels are drawn by lot (`claims`)."""
        found: Counter[str] = Counter()
        for draw in range(number):
            generator = torch.Generator().manual_seed(draw)
            profile = profile_dataset(
                by_lot(self.features, generator), seed=draw, max_pairs=SHUFFLED_PAIRS
            )
            found.update({name: int(value) for name, value in claims(profile).items()})
        return dict(found)


def claims(profile: DatasetProfile) -> dict[str, bool]:
    """What the recommender says with confidence of a profile.

    `claims` is any of its claims that what comes first leads what comes next; `predicts`, that it
    calls a kernel better than chance, is no claim about the ranking.
    """
    said = recommend(profile)
    leads = {
        "separated": said.separated,
        "kernel_separated": said.kernel_choice.lead.separated,
        "divergence_separated": said.divergence_choice.lead.separated,
        "kernels_separated": said.kernels_separated,
    }
    predicts = any(kernel.kpa.low > 0.5 for kernel in profile.kernels)
    return {**leads, "claims": any(leads.values()), "predicts": predicts}


def by_lot(features: ReferenceFeatures, generator: torch.Generator) -> ReferenceFeatures:
    """The same pairs, with chosen and rejected exchanged in each with probability ½."""
    swap = torch.rand(features.pairs, generator=generator) < 0.5

    def exchange(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        where = swap.reshape(-1, *[1] * (a.ndim - 1))
        return torch.where(where, b, a), torch.where(where, a, b)

    embeddings = exchange(features.chosen_embedding, features.rejected_embedding)
    log_probs = exchange(features.chosen_log_prob, features.rejected_log_prob)
    tokens = exchange(features.chosen_tokens, features.rejected_tokens)
    return replace(
        features,
        chosen_embedding=embeddings[0], rejected_embedding=embeddings[1],
        chosen_log_prob=log_probs[0], rejected_log_prob=log_probs[1],
        chosen_tokens=tokens[0], rejected_tokens=tokens[1],
    )  # fmt: skip


def _tokenized(
    policy: Policy, source: Path, scratch: Path, split: SplitPolicy
) -> dict[Split, TokenizedSplit]:
    """Training and validation pairs of a file."""
    result = ingest(
        source, out_dir=scratch, dataset_id="bench", policy=DatasetPolicy(split=split),
        limits=DataLimits(), on_progress=lambda done, total: None,
    )  # fmt: skip
    if result.failure is not None:
        raise RuntimeError(f"{source} cannot be used: {result.failure.message}")
    return {
        name: tokenize_rows(
            read_canonical(scratch / CANONICAL_NAME, name),
            tokenizer=policy.tokenizer, max_length=BUDGET["max_length"],
        )
        for name in (Split.TRAIN, Split.VALIDATION)
    }  # fmt: skip


def open_case(
    policy: Policy,
    source: Path,
    *,
    seed: int,
    scratch: Path,
    steps: int = BUDGET["steps"],
    validation_pairs: int = VALIDATION_PAIRS,
    train_pairs: int | None = None,
    held_out: Mapping[str, float] = HELD_OUT,
    longest: int | None = None,
) -> OpenCase:
    """Read a file, split it by the seed, and run the reference over it once.

    Of training pairs the first `train_pairs` are taken, or all; pairs of more than `longest`
    tokens are left out of both splits.

    Raises:
        RuntimeError: the file cannot become a dataset.
    """
    started = time.perf_counter()
    split = _tokenized(policy, source, scratch, SplitPolicy(seed=seed, **held_out))
    short = {
        name: [p for p in part.pairs if longest is None or p.length <= longest]
        for name, part in split.items()
    }
    pairs = tuple(short[Split.TRAIN][:train_pairs])
    validation = tuple(short[Split.VALIDATION][:validation_pairs])
    store = ReferenceStore(
        scratch / "reference", max_bytes=2 * _STATES_BYTES, states_bytes=_STATES_BYTES
    )
    found, apart = (
        store.get(policy, part, key=name, states=True, progress=lambda done, total: None)
        for name, part in (("train", pairs), ("validation", validation))
    )
    if found.states is None or apart.states is None:
        raise RuntimeError(f"the states of {source} pass {_STATES_BYTES} bytes; take fewer pairs")
    plan = resolve_plan(
        TrainSpec(
            max_steps=steps, n_epochs=50, batch_size=BUDGET["batch_size"],
            schedule="constant",
        ),
        num_pairs=len(pairs), hidden_size=policy.hidden_size, seed=seed,
    )  # fmt: skip
    return OpenCase(
        policy=policy, seed=seed,
        data=TrainingData(
            pairs=pairs, chosen_log_prob=found.table.chosen_log_prob,
            rejected_log_prob=found.table.rejected_log_prob, reference_states=found.states,
        ),
        validation=validation, validation_states=apart.states,
        geometry=fit_geometry(found.table.embeddings, seed=seed), plan=plan,
        features=found.table.features(pairs),
        validation_features=apart.table.features(validation),
        about={
            "plan": plan.as_dict(), "train_pairs": len(pairs),
            "tokens_a_pair": math.fsum(p.length for p in pairs) / len(pairs),
            "warnings": [w for part in split.values() for w in part.warnings()],
            "group": pair_groups(validation).tolist(),
            "open_s": time.perf_counter() - started,
        },
    )  # fmt: skip
