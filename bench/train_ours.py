"""kdpo as a contender of `bench.train`: steps as a search trial runs them, and 28 trials."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import optuna
import torch
from pydantic import TypeAdapter

from bench.train_job import (
    BETAS,
    LEARNING_RATES,
    TRIAL_STEPS,
    TRIALS,
    Gauge,
    Job,
    Turns,
    read_pairs,
    serve,
    set_threads,
)
from core.lifecycle import EndedBy
from core.run_spec import LoraSpec
from core.spec import BASE_KERNELS, DivergenceName, KernelTerm, ObjectiveSpec, PenaltyTerm
from objectives import Geometry, build_objective, fit_geometry
from worker.training.batches import computed_tokens
from worker.training.loop import train
from worker.training.model import Policy, load_policy
from worker.training.resolve import TrainPlan
from worker.training.step import TrainingData
from worker.training.store import ReferenceStore
from worker.training.tokenize import TokenizedPair

STATES_BYTES = 1 << 32
KERNEL: TypeAdapter[KernelTerm] = TypeAdapter(KernelTerm)
PENALTY: TypeAdapter[PenaltyTerm] = TypeAdapter(PenaltyTerm)
OBJECTIVES = [(kernel, divergence) for kernel in BASE_KERNELS for divergence in DivergenceName]


@dataclass
class Hooks:
    """Notes losses, and ends a turn every `turn_steps` steps where turns are steps."""

    on_turn: Callable[[], None] | None = None
    turn_steps: int = 1
    losses: list[float] = field(default_factory=list)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.losses.append(values["loss"])

    def stepped(self, step: int, total: int) -> None:
        if self.on_turn is not None and step % self.turn_steps == 0:
            self.on_turn()

    def stopping(self) -> bool:
        return False

    def raise_if_stopped(self) -> None:
        raise AssertionError("never asked to stop")


def plan(job: Job, *, steps: int, learning_rate: float) -> TrainPlan:
    return TrainPlan(
        learning_rate=learning_rate, total_steps=steps, warmup_steps=0, schedule="constant",
        batch_size=job.batch_size, weight_decay=0.0, max_grad_norm=1.0, seed=job.seed,
    )  # fmt: skip


def reference(
    job: Job, policy: Policy, pairs: Sequence[TokenizedPair], *, for_kernels: bool
) -> tuple[TrainingData, Geometry | None]:
    """The one pass of the frozen base; for kernels with hidden states and their frame."""
    store = ReferenceStore(
        job.scratch / "reference", max_bytes=2 * STATES_BYTES, states_bytes=STATES_BYTES
    )
    found = store.get(
        policy, pairs, key="bench", states=for_kernels, progress=lambda done, total: None
    )
    data = TrainingData(
        pairs=pairs,
        chosen_log_prob=found.table.chosen_log_prob,
        rejected_log_prob=found.table.rejected_log_prob,
        reference_states=found.states,
    )
    return data, fit_geometry(found.table.embeddings, seed=job.seed) if for_kernels else None


def speed(job: Job, pipe: Connection) -> None:
    """Plain DPO for `job.steps` steps."""
    set_threads()
    turns = Turns(pipe, device=job.device)
    policy = load_policy(job.folder, lora=LoraSpec(), device=torch.device(job.device))
    gauge = Gauge(policy.causal, device=job.device)
    pairs = read_pairs(job, policy.tokenizer)
    started = time.perf_counter()
    data, _ = reference(job, policy, pairs, for_kernels=False)
    one_off = time.perf_counter() - started
    objective = build_objective(ObjectiveSpec(), geometry=None, head=policy.head.weight)
    turns.ready({"one_off_s": one_off, "sizes": _sizes(policy, pairs)})
    gauge.start()
    hooks = Hooks(on_turn=turns.done, turn_steps=job.turn_steps)
    outcome = train(
        policy, objective, data, weights_learning_rate=0.0, hooks=hooks,
        plan=plan(job, steps=job.steps, learning_rate=job.learning_rate),
    )  # fmt: skip
    _check_whole(outcome.ended_by, outcome.message)
    memory = gauge.read()
    taken = [computed_tokens(pairs[i], policy.form) for s in job.order(len(pairs)) for i in s]
    turns.end({"memory": memory, "losses": hooks.losses, "tokens_a_step": sum(taken) / job.steps})


def trials(job: Job, pipe: Connection) -> None:
    """The 28 kernel-divergence pairs, one short run each, from one resident base."""
    set_threads()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    turns = Turns(pipe, device=job.device)
    started = time.perf_counter()
    policy = load_policy(job.folder, lora=LoraSpec(), device=torch.device(job.device))
    loaded = time.perf_counter()
    pairs = read_pairs(job, policy.tokenizer)
    data, geometry = reference(job, policy, pairs, for_kernels=True)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=job.seed))
    now = time.perf_counter()
    turns.ready({"setup_s": now - started, "one_off_s": now - loaded})
    for number in range(job.first, TRIALS):
        study.enqueue_trial({"objective": number})
        trial = study.ask()
        kernel, divergence = OBJECTIVES[trial.suggest_int("objective", 0, TRIALS - 1)]
        spec = ObjectiveSpec(
            beta=trial.suggest_float("beta", *BETAS, log=True),
            kernel_term=KERNEL.validate_python({"kernel": kernel.value}),
            divergence_term=PENALTY.validate_python({"divergence": divergence.value}),
        )
        factor = trial.suggest_float("learning_rate_factor", *LEARNING_RATES, log=True)
        hooks = Hooks()
        outcome = train(
            policy, build_objective(spec, geometry=geometry, head=policy.head.weight), data,
            plan=plan(job, steps=TRIAL_STEPS, learning_rate=factor * job.learning_rate),
            weights_learning_rate=0.0, hooks=hooks,
        )  # fmt: skip
        _check_whole(outcome.ended_by, outcome.message)
        study.tell(trial, sum(hooks.losses) / len(hooks.losses))
        turns.done()
    turns.end({})


def _check_whole(ended_by: EndedBy, message: str) -> None:
    if ended_by is not EndedBy.BUDGET:
        raise RuntimeError(f"the run ended early ({ended_by.value}): {message}")


def _sizes(policy: Policy, pairs: Sequence[TokenizedPair]) -> dict[str, Any]:
    """Parameters and mean tokens of a pair, for tokens/s and arithmetic."""
    head = policy.head.weight.numel()
    of_layers = sum(
        p.numel()
        for n, p in policy.causal.named_parameters()
        if p.ndim == 2 and ".layers." in n and not p.requires_grad
    )
    return {
        "parameters": sum(p.numel() for p in policy.causal.parameters()),
        "matmul_parameters": of_layers,
        "head_parameters": head,
        "prompt_tokens": sum(len(p.prompt) for p in pairs) / len(pairs),
        "answer_tokens": sum(len(p.chosen) + len(p.rejected) for p in pairs) / len(pairs),
        "pairs": len(pairs),
    }


if __name__ == "__main__":
    serve({"speed": speed, "trials": trials})
