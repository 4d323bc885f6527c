"""What every job with a model works on: the resident model, the tokenised splits, the reference."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

from core.hub import fetch
from core.lifecycle import Phase
from core.modelref import ModelRef
from core.run_spec import TrainSpec
from core.spec import ObjectiveSpec, PenaltyTerm
from models.dataset import Dataset
from models.repositories.datasets import DatasetRepository
from objectives import HybridObjective, build_objective
from worker.context import JobContext
from worker.ingest.canonical import CanonicalRow, Split
from worker.jobs.kernel_inputs import KernelInputs
from worker.jobs.rows import canonical_path, check_canonical
from worker.jobs.runs import RunRequest, splits_with_states, weights_learning_rate
from worker.jobs.scopes import Reporter, ScopeHooks, ScopeStore, Span
from worker.jobs.splits import LoadedSplit, SplitLoader
from worker.training.checkpoint import Identity
from worker.training.distributed import resolve_processes, score, train_ranked
from worker.training.evaluate import Measured, measure
from worker.training.export import versions
from worker.training.loop import train
from worker.training.model import Policy, load_policy
from worker.training.rank_job import HeldOut, RankJob
from worker.training.reference import (
    ReferenceTable,
    model_hashes,
    reference_key,
    tokens_sha256,
)
from worker.training.resolve import TrainPlan, apply_threads, resolve_device, resolve_plan
from worker.training.run import RunHooks, RunOutcome, TrainingRun
from worker.training.states import ReferenceStates
from worker.training.step import TrainingData
from worker.training.store import Reference, ReferenceStore
from worker.training.token_report import Limit
from worker.training.tokenize import TokenizedPair
from worker.training.trainer import Leave, train_final

# Of a run's part of the progress bar: passes before its first step, where any are needed.
_PASSES_SHARE = 0.1
SEEDS_APART = 1_000_003
"""Between the seeds of a trial and of its repetition."""


class Workbench:
    """One model and one dataset, loaded once per attempt; trials and runs share them."""

    def __init__(
        self,
        context: JobContext,
        *,
        policy: Policy,
        model: ModelRef,
        folder: Path,
        dataset: Dataset,
        spec: TrainSpec,
        encoder: ModelRef | None,
        threads: int,
    ) -> None:
        self.context = context
        self.policy = policy
        self.model = model
        self.dataset = dataset
        self.spec = spec
        self.seed = context.job.seed
        self.threads = threads
        self._folder = folder
        limit = Limit(spec.max_length, policy.max_positions)
        self.max_length = limit.tokens
        path = canonical_path(context, dataset)
        self._loader = SplitLoader(path, policy.tokenizer, model.name, limit)
        self.loaded: dict[Split, LoadedSplit] = {}
        self.rows: dict[Split, tuple[CanonicalRow, ...]] = {}
        self.pairs: dict[Split, tuple[TokenizedPair, ...]] = {}
        self.warnings: list[str] = []
        self._with_states = splits_with_states(context.job)
        self._store = ReferenceStore(
            context.settings.reference_dir,
            max_bytes=context.settings.training.reference_store_bytes,
            states_bytes=context.settings.training.reference_states_bytes,
        )
        self._references: dict[tuple[Split, bool], Reference] = {}
        self._kernels = KernelInputs(
            context.settings, encoder=encoder, seed=self.seed, device=policy.device
        )

    @cached_property
    def processes(self) -> int:
        """How many processes a final run has.

        Raises:
            RunAborted: this machine has not what the settings ask for (`dependency_error`).
        """
        return resolve_processes(self.context.settings.training, self.policy.device)

    def load_split(self, split: Split) -> None:
        """Read and tokenise a split.

        Raises:
            RunAborted: nothing of it is left (`dataset_invalid`).
        """
        self._keep(split, self._loader.whole(split))

    def load_sample(self, split: Split, *, limit: int) -> None:
        """Read and tokenise of a split what a recommendation measures: `limit` pairs at most.

        Raises:
            RunAborted: nothing of it is left (`dataset_invalid`).
        """
        self._keep(split, self._loader.sample(split, limit=limit, seed=self.seed))

    def _keep(self, split: Split, loaded: LoadedSplit) -> None:
        self.loaded[split] = loaded
        self.rows[split] = loaded.rows
        self.pairs[split] = loaded.pairs
        self.warnings += loaded.warnings

    def reference(self, span: Span) -> ReferenceTable:
        """What the reference says about the training split, computed once per data and model."""
        states = Split.TRAIN in self._with_states
        return self._stored(Split.TRAIN, span, states=states).table

    def reference_of(self, pairs: Sequence[TokenizedPair], span: Span) -> ReferenceTable:
        """What the reference says about some pairs; for a whole split that is `reference`."""
        return self._store.get(
            self.policy,
            pairs,
            key=self._key(pairs),
            states=False,
            progress=Reporter(self.context, "pairs", span),
        ).table

    def reference_states(self, split: Split, span: Span) -> ReferenceStates | None:
        """The reference's hidden states on a split, or None when they would take too much."""
        return self._stored(split, span, states=True).states

    def _stored(self, split: Split, span: Span, *, states: bool) -> Reference:
        if (split, states) not in self._references:
            self._references[split, states] = self._store.get(
                self.policy,
                self.pairs[split],
                key=self._key(self.pairs[split]),
                states=states,
                progress=Reporter(self.context, "pairs", span),
            )
        return self._references[split, states]

    def plan(self, request: RunRequest) -> TrainPlan:
        """Resolve a run's length and rates."""
        return resolve_plan(
            self.spec,
            num_pairs=len(self.pairs[Split.TRAIN]),
            hidden_size=self.policy.hidden_size,
            seed=(self.seed + SEEDS_APART * request.repeat) % 2**31,
            learning_rate=request.learning_rate,
            stop_after=request.stop_after,
            watched=request.is_final,
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate that the job asks for, `auto` resolved."""
        return resolve_plan(
            self.spec, num_pairs=len(self.pairs[Split.TRAIN]),
            hidden_size=self.policy.hidden_size, seed=self.seed,
        ).learning_rate  # fmt: skip

    def store(self, request: RunRequest) -> ScopeStore:
        """Where the run keeps its resume points."""
        return ScopeStore(
            self.context, scope=request.scope, identity=self._identity(request),
            adopts=request.adopts,
        )  # fmt: skip

    def train(
        self,
        request: RunRequest,
        *,
        span: Span,
        leave: Leave = "best",
        hooks: RunHooks | None = None,
    ) -> RunOutcome:
        """Train, or go on with, or just restore a run; the policy is left with its weights.

        Final runs are left with the weights that were the best on validation, or with the last.
        `hooks` are those of the scope where none are given.
        """
        passes = Span(span.start, span.at(_PASSES_SHARE))
        if hooks is None:
            hooks = ScopeHooks(self.context, request.scope, Span(passes.end, span.end))
        plan, rate = self.plan(request), weights_learning_rate(request.objective)
        objective, data = self._inputs(request.objective, passes)
        if not request.is_final:
            return train(
                self.policy,
                objective,
                data,
                plan=plan,
                weights_learning_rate=rate,
                hooks=hooks,
                store=self.store(request),
            )
        folder = self.context.attempt_dir / "trainer" / request.scope
        trackers = self.context.settings.training.trackers
        held_out = self._held_out(passes) if plan.eval_steps is not None else None
        if self.processes > 1:
            return train_ranked(
                self._rank_job(request.objective, plan, rate, data, held_out),
                self.policy,
                size=self.processes,
                hooks=hooks,
                folder=folder,
                store=self.store(request),
                trackers=trackers,
                leave=leave,
            )
        return train_final(
            TrainingRun(self.policy, objective, data, plan=plan, weights_learning_rate=rate),
            hooks=hooks,
            folder=folder,
            store=self.store(request),
            validate=None if held_out is None else partial(score, self.policy, held_out),
            trackers=trackers,
            leave=leave,
        )

    def prepare(self, span: Span) -> None:
        """Run the passes that trials need, so that none of them is charged with those."""
        self.reference(span.part(0, 3))
        if Split.TRAIN in self._with_states:
            self.reference_states(Split.TRAIN, span.part(1, 3))
        self.reference_states(Split.VALIDATION, span.part(2, 3))

    def time_steps(self, request: RunRequest, hooks: RunHooks) -> None:
        """Take the steps of a request and keep nothing of them; `hooks` sees them pass."""
        objective, data = self._inputs(request.objective, Span(0.0, 0.0))
        rate = weights_learning_rate(request.objective)
        train(
            self.policy, objective, data, plan=self.plan(request), weights_learning_rate=rate,
            hooks=hooks,
        )  # fmt: skip

    def _held_out(self, span: Span) -> HeldOut:
        states = self.reference_states(Split.VALIDATION, span)
        return HeldOut(self.pairs[Split.VALIDATION], states)

    def _rank_job(
        self,
        objective: ObjectiveSpec,
        plan: TrainPlan,
        rate: float,
        data: TrainingData,
        held_out: HeldOut | None,
    ) -> RankJob:
        settings = self.context.settings
        return RankJob(
            model=self._folder,
            spec=self.spec,
            objective=objective,
            geometry=self._kernels.geometry(objective.kernel_term),
            data=data,
            plan=plan,
            weights_learning_rate=rate,
            held_out=held_out,
            device=self.policy.device.type,
            sharded=settings.training.sharding == "fsdp2",
            threads=max(1, self.threads // self.processes),
            choices=settings.attention_dir,
        )

    def _inputs(self, spec: ObjectiveSpec, passes: Span) -> tuple[HybridObjective, TrainingData]:
        table = self.reference(passes.part(0, 3))
        frozen, geometry = None, None
        if spec.kernel_term is not None:
            frozen, geometry = self._kernels.of(
                spec.kernel_term, reference=lambda: table.embeddings,
                rows=self.rows[Split.TRAIN],
                progress=Reporter(self.context, "texts", passes.part(1, 3)),
            )  # fmt: skip
        head = self.policy.reference_head or self.policy.head
        data = TrainingData(
            pairs=self.pairs[Split.TRAIN],
            chosen_log_prob=table.chosen_log_prob,
            rejected_log_prob=table.rejected_log_prob,
            frozen_embeddings=frozen,
            reference_states=self.reference_states(Split.TRAIN, passes.part(2, 3))
            if isinstance(spec.divergence_term, PenaltyTerm)
            else None,
        )
        return build_objective(spec, geometry=geometry, head=head.weight), data

    def measure(
        self, split: Split, *, span: Span, progress: Callable[[int, int], None] | None = None
    ) -> Measured:
        """Measure the policy as it is on a split; `progress` stands in for the job's own."""
        return measure(
            self.policy,
            self.pairs[split],
            reference=self.reference_states(split, span),
            progress=progress or Reporter(self.context, "pairs", span),
        )

    @cached_property
    def _of_model(self) -> dict[str, str]:
        return model_hashes(self._folder)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hashes of everything that is read."""
        return {
            "dataset_sha256": str(self.dataset.canonical_sha256),
            **self._of_model,
            "tokens_sha256": tokens_sha256(self.pairs[Split.TRAIN]),
        }

    @cached_property
    def reference_key(self) -> str:
        """Name of the reference pass over the training split."""
        return self._key(self.pairs[Split.TRAIN])

    def _key(self, pairs: Sequence[TokenizedPair]) -> str:
        return reference_key(
            model=self._of_model["model_sha256"],
            tokenizer=self._of_model["tokenizer_sha256"],
            tokens=tokens_sha256(pairs),
            precision=self.policy.precision,
            # Attention in packed rows rounds in its own way, so it is part of the layout.
            form=str(self.policy.attention or self.policy.form),
        )

    def _identity(self, request: RunRequest) -> Identity:
        """Everything that must be the same for a run to go on exactly, to wherever it goes."""
        plan, encoder = self.plan(request).as_dict(), self._kernels.encoder
        del plan["stop_after"]
        return {
            **self.hashes,
            "reference": self.reference_key,
            "objective": request.objective.model_dump_json(),
            **{f"plan.{name}": value for name, value in plan.items()},
            "adaptation": self.spec.adaptation,
            "lora": None if self.policy.is_full else self.spec.lora.model_dump_json(),
            "gradient_checkpointing": self.spec.gradient_checkpointing,
            "processes": self.processes if request.is_final else 1,
            "sharding": self.context.settings.training.sharding if request.is_final else "none",
            "encoder": None if encoder is None else encoder.model_dump_json(),
            "reference_states_bytes": self.context.settings.training.reference_states_bytes,
            "threads": self.threads,
            "device": self.policy.device.type,
            **{f"version.{name}": number for name, number in versions().items()},
        }


def open_workbench(
    context: JobContext,
    *,
    spec: TrainSpec,
    splits: tuple[Split, ...],
    encoder: ModelRef | None = None,
) -> Workbench:
    """Fetch and load the model, check and tokenise the data.

    Raises:
        RunAborted: model or data cannot be used.
        InvalidInput: the model's folder is gone or not usable.
        Unavailable: the hub does not answer.
    """
    threads = apply_threads(context.settings.training)
    model = ModelRef.model_validate(context.job.spec["model"])
    with context.database.reading() as session:
        dataset = DatasetRepository(session).load(str(context.job.dataset_id))
    check_canonical(canonical_path(context, dataset), dataset)
    if model.source == "hub" or (encoder is not None and encoder.source == "hub"):
        context.phase(Phase.DOWNLOADING_MODEL)
    folder = fetch(model, context.settings)
    context.raise_if_stopped()
    policy = load_policy(
        folder,
        lora=spec.lora,
        device=resolve_device(context.settings.training),
        options=spec,
        choices=context.settings.attention_dir,
    )
    bench = Workbench(
        context,
        policy=policy,
        model=model,
        folder=folder,
        dataset=dataset,
        spec=spec,
        encoder=encoder,
        threads=threads,
    )
    for split in splits:
        bench.load_split(split)
    return bench
