"""Final runs of several processes: DDP or FSDP2, started, joined and ended by the first of them.

The runner is process 0: it reports, saves, and is told to stop. The others are its children in its
process group; they read the job from a folder, take their share of every step, and end when their
standard input does. All of them agree on stops and resume points at every step.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from core.errors import FailureCode, RunAborted
from core.lifecycle import EndedBy
from core.settings import TrainingSettings
from objectives import HybridObjective
from worker.training.batches import Form, computed_tokens
from worker.training.checkpoint import ResumeStore, SavedState
from worker.training.evaluate import Scored, TrialScore, measure, trial_score
from worker.training.memory import free_memory
from worker.training.model import Policy
from worker.training.processes import other_processes
from worker.training.rank_job import HeldOut, RankJob
from worker.training.ranks import Ranks
from worker.training.reference import Progress
from worker.training.run import DidNotFit, Ended, RunHooks, RunOutcome, TrainingRun
from worker.training.step import MICRO_TOKENS, PairLoss
from worker.training.trainer import Leave, Validate, drive

log = logging.getLogger("kdpo.training")


def resolve_processes(settings: TrainingSettings, device: torch.device) -> int:
    """How many processes a final run has.

    Raises:
        RunAborted: more are asked for than there are GPUs or than one GPU that is named, or
            sharding over a single process (`dependency_error`).
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    size = settings.num_processes
    if size == "auto":
        size = gpus if device.type == "cuda" and device.index is None else 1
    if settings.sharding != "none" and size == 1:
        raise RunAborted(
            f"KDPO_TRAINING__SHARDING is {settings.sharding!r} and runs have one process here: "
            "there is nothing to share out",
            failure=FailureCode.DEPENDENCY_ERROR,
            hint="set it to `none`, or KDPO_TRAINING__NUM_PROCESSES to more than 1",
        )
    if device.type == "cuda" and device.index is not None and size > 1:
        raise RunAborted(
            f"KDPO_TRAINING__DEVICE is {settings.device!r}, one GPU, and "
            f"KDPO_TRAINING__NUM_PROCESSES is {size}: each process takes a GPU of its own",
            failure=FailureCode.DEPENDENCY_ERROR,
            hint="set the device to `cuda` or `auto`, or the number of processes to 1; "
            "CUDA_VISIBLE_DEVICES chooses the GPUs of several",
        )
    if device.type == "cuda" and size > gpus:
        raise RunAborted(
            f"KDPO_TRAINING__NUM_PROCESSES is {size} and this worker sees {gpus} GPUs",
            failure=FailureCode.DEPENDENCY_ERROR,
            hint="set it to `auto`, or give the worker more GPUs",
        )
    return size


def train_ranked(
    job: RankJob,
    policy: Policy,
    *,
    size: int,
    hooks: RunHooks,
    folder: Path,
    store: ResumeStore,
    trackers: tuple[str, ...] = (),
    leave: Leave = "best",
) -> RunOutcome:
    """Do what `train_final` does with `size` processes; `policy` is left with the weights.

    Where a micro-batch does not fit, all begin again from the last point with half the tokens, as
    long as that can help: sums over pairs do not depend on how they are cut.

    Raises:
        RunAborted: a process ended, or there are fewer pairs in a step than processes.
        Exception: what `hooks.raise_if_stopped` raises, after a point has been saved.
    """
    _check(job, size)
    while True:
        saved = store.load()
        objective = job.build_objective(policy)
        if saved is not None and saved.ended:
            return _left(job, policy, objective, saved, leave=leave)
        try:
            with other_processes(
                job, folder / "ranks", size=size, saved=saved, hooks=hooks
            ) as ranks:
                ended_by, message, reached = _first(
                    job, policy, objective, ranks, saved, hooks=hooks, folder=folder, store=store,
                    trackers=trackers,
                )  # fmt: skip
            break
        except Ended as end:
            tokens = _fewer_tokens(job, policy.form) if isinstance(end, DidNotFit) else None
            if tokens is None:
                # Whichever process it was; where the first was then is of no use to anybody.
                return RunOutcome(
                    steps=0, pairs_seen=0, seconds=0.0, ended_by=end.ended_by, message=str(end)
                )
            # Its text: a record that is kept must not keep the exception.
            log.warning("%s; it goes on from its last point with %d tokens", str(end), tokens)
            job = replace(job, plan=replace(job.plan, micro_tokens=tokens))
        # Outside the handler: the exception's frames hold the tensors that did not fit.
        free_memory(policy.device)
    free_memory(policy.device)
    if ended_by is EndedBy.BUDGET:
        final = store.load()
        if final is None:
            raise RunAborted(
                "the run's last point cannot be read back",
                failure=FailureCode.INTERNAL,
                hint="start the job again; if it happens twice, look at the disk",
            )
        return _left(job, policy, objective, replace(final, seconds=reached.seconds), leave=leave)
    return _left(job, policy, objective, reached, leave=leave, ended_by=ended_by, message=message)


def _first(
    job: RankJob,
    policy: Policy,
    objective: HybridObjective,
    ranks: Ranks,
    saved: SavedState | None,
    *,
    hooks: RunHooks,
    folder: Path,
    store: ResumeStore,
    trackers: tuple[str, ...],
) -> tuple[EndedBy, str, SavedState]:
    """Train as the first process; the state says how far the run came, its weights are stored."""
    resident = policy
    if job.sharded:
        # Sharding takes a model apart for good: the resident one makes room for another.
        nn.Module.to(resident.model, "cpu")
        policy = job.policy(resident.device)
        objective = job.build_objective(policy)
    try:
        run, validate = prepare(job, policy, objective, ranks, saved)
        ended_by, message = drive(
            run, hooks=hooks, folder=folder, store=store, validate=validate, trackers=trackers
        )
        if ended_by is EndedBy.OOM:
            # The others do not know, and wait inside a step.
            raise Ended(ended_by, message)
        return ended_by, message, _where(run)
    finally:
        if job.sharded:
            nn.Module.to(resident.model, resident.device)


def prepare(
    job: RankJob,
    policy: Policy,
    objective: HybridObjective,
    ranks: Ranks,
    saved: SavedState | None,
) -> tuple[TrainingRun, Validate | None]:
    """Make a process's run, at the point that was saved, and what scores it."""
    blocks = frozenset(policy.causal._no_split_modules or ())
    run = TrainingRun(
        policy,
        objective,
        job.data,
        plan=job.plan,
        weights_learning_rate=job.weights_learning_rate,
        ranks=ranks,
        shard=partial(_shard, blocks=blocks, ranks=ranks) if ranks.sharded else None,
    )
    if saved is not None:
        run.restore(saved)
    held_out = job.held_out
    if held_out is None:
        return run, None
    if not ranks.sharded:
        return run, partial(score, policy, held_out)

    def validate(progress: Progress) -> TrialScore:
        # Every process scores all pairs: a sharded model runs in all of them or in none.
        found = score(policy, held_out, progress, scored=run.loss.scored)
        # Only a backward pass lets go of what is outside of blocks by itself.
        assert isinstance(run.loss, FSDPModule)
        run.loss.reshard()
        return found

    return run, validate


def score(
    policy: Policy, held_out: HeldOut, progress: Progress, *, scored: Scored | None = None
) -> TrialScore:
    """Score a policy as it is on held-out pairs, as trials are scored."""
    return trial_score(
        measure(policy, held_out.pairs, reference=held_out.states, scored=scored, progress=progress)
    )


def _check(job: RankJob, size: int) -> None:
    if job.plan.batch_size < size:
        raise RunAborted(
            f"a step has {job.plan.batch_size} pairs and the run {size} processes: each needs one",
            failure=FailureCode.DEPENDENCY_ERROR,
            hint="raise batch_size, or lower KDPO_TRAINING__NUM_PROCESSES",
        )
    if job.sharded and job.spec.quantization is not None:
        raise RunAborted(
            "KDPO_TRAINING__SHARDING `fsdp2` cannot shard weights of 4 bits",
            failure=FailureCode.DEPENDENCY_ERROR,
            hint="set it to `none`, or drop quantization",
        )
    if job.sharded and job.held_out is not None and job.held_out.states is None:
        raise RunAborted(
            "a sharded run is scored with the reference's stored states, and those of the "
            "validation pairs do not fit into KDPO_TRAINING__REFERENCE_STATES_BYTES",
            failure=FailureCode.OUT_OF_MEMORY,
            hint="raise KDPO_TRAINING__REFERENCE_STATES_BYTES, or drop eval_every",
        )


def _fewer_tokens(job: RankJob, form: Form) -> int | None:
    """Half the tokens of the largest micro-batch, or None where that is a pair alone."""
    sizes = sorted(computed_tokens(pair, form) for pair in job.data.pairs)
    budget = job.plan.micro_tokens or MICRO_TOKENS[job.device]
    largest = min(budget, sum(sizes[-job.plan.batch_size :]))
    return None if largest <= sizes[-1] else max(1, largest // 2)


def _where(run: TrainingRun) -> SavedState:
    """How far a run came that ended before its time; nobody asks for its weights."""
    epoch, offset = run.order.position(run.step)
    return SavedState(
        step=run.step, epoch=epoch, offset=offset, seconds=run.seconds(), tensors={},
        window_steps=0, num_tokens=run.num_tokens, watch=run.watch.values(), ended=True,
    )  # fmt: skip


def _left(
    job: RankJob,
    policy: Policy,
    objective: HybridObjective,
    final: SavedState,
    *,
    leave: Leave,
    ended_by: EndedBy = EndedBy.BUDGET,
    message: str = "",
) -> RunOutcome:
    """Leave `policy` with the weights of a run that has ended, and say how."""
    run = TrainingRun(
        policy, objective, job.data, plan=job.plan,
        weights_learning_rate=job.weights_learning_rate,
    )  # fmt: skip
    if ended_by is not EndedBy.BUDGET:
        outcome = run.outcome(ended_by, message)
        seen = final.step * run.order.batch_size
        return replace(outcome, steps=final.step, pairs_seen=seen, seconds=final.seconds)
    run.restore(final)
    if run.watch.best and leave == "best":
        run.put(run.watch.best)
    return replace(run.outcome(ended_by, message), seconds=final.seconds)


def _shard(loss: PairLoss, *, blocks: frozenset[str], ranks: Ranks) -> None:
    """Give each process a part of every block's parameters, and of what is outside of blocks."""
    device = next(loss.parameters()).device
    mesh = init_device_mesh(device.type, (ranks.size,))
    for module in list(loss.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(loss, mesh=mesh)
    register_fsdp_forward_method(loss, "scored")
    loss.is_distributed_loading_by_transformers = True
