"""Final runs of two processes on one machine give what one process gives."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from core.errors import FailureCode, RunAborted
from core.lifecycle import EndedBy
from core.run_spec import LoraSpec, TrainSpec
from core.settings import TrainingSettings
from core.spec import KernelTerm, MixtureKernelSpec, ObjectiveSpec, PenaltyTerm
from tests.unit.worker.training.micro import (
    Bench,
    MemoryStore,
    Recorder,
    micro_plan,
    micro_policy,
    random_pairs,
    stored_states,
)
from worker.training import distributed, processes
from worker.training.batches import Form, collate, computed_tokens
from worker.training.distributed import resolve_processes, score, train_ranked
from worker.training.rank_job import HeldOut, RankJob
from worker.training.ranks import Ranks
from worker.training.run import TrainingRun
from worker.training.states import ReferenceStates
from worker.training.trainer import drive, train_final

HMK = ObjectiveSpec(
    beta=0.5,
    kernel_term=KernelTerm(kernel=MixtureKernelSpec(), gamma=0.3),
    divergence_term=PenaltyTerm.model_validate(
        {"divergence": {"type": "jensen_shannon"}, "alpha": 2.0}
    ),
)
Points = dict[int, dict[str, float]]
ROOT = Path(__file__).parents[4]
LORA = TrainSpec(lora=LoraSpec(r=4, alpha=8))
FULL = TrainSpec(adaptation="full")


@pytest.fixture(autouse=True)
def _no_group_is_left() -> Iterator[None]:
    yield
    assert not dist.is_initialized()


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started."""
    started: list[subprocess.Popen[bytes]] = []
    start = processes._start

    def noted(*arguments: Any) -> subprocess.Popen[bytes]:
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(processes, "_start", noted)
    return started


@pytest.fixture(scope="module")
def full(llama_folder: Path) -> Bench:
    return Bench(micro_policy(llama_folder, adaptation="full"), random_pairs(12))


@pytest.fixture(scope="module")
def states(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> ReferenceStates:
    return stored_states(bench.policy, bench.pairs, tmp_path_factory.mktemp("store"))


def job_of(
    bench: Bench, model: Path, spec: TrainSpec, states: ReferenceStates, **plan: Any
) -> RankJob:
    values = micro_plan(**plan)
    return RankJob(
        model=model,
        spec=spec,
        objective=HMK,
        geometry=bench.geometry,
        data=bench.data(states),
        plan=values,
        weights_learning_rate=0.05,
        held_out=HeldOut(bench.pairs, states) if values.eval_steps is not None else None,
        device="cpu",
        sharded=spec is FULL,
        threads=1,
    )


def alone(bench: Bench, states: ReferenceStates, folder: Path, **plan: Any) -> Recorder:
    hooks = Recorder()
    held_out = HeldOut(bench.pairs, states)
    run = bench.run(HMK, states=states, **plan)
    validate = partial(score, bench.policy, held_out) if run.plan.eval_steps is not None else None
    train_final(run, hooks=hooks, folder=folder, validate=validate)
    return hooks


def assert_close(found: Points, expected: Points) -> None:
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step].keys() == values.keys()
        assert found[step]["loss"] == pytest.approx(values["loss"], rel=1e-5)
        # Margins of a fresh policy are rounding noise, and so is their sign.
        for name in values.keys() - {"rewards/accuracies"}:
            near = pytest.approx(values[name], rel=2e-4, abs=2e-5)
            assert found[step][name] == near, (step, name)


def assert_weights_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Adam turns the last digit of a gradient near 0 into a step, so a few weights may differ."""
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


class Terminates(Recorder):
    """Asks the other process to end, as a signal to the runner's group does."""

    def __init__(self, children: list[subprocess.Popen[bytes]], *, stop_at: int) -> None:
        super().__init__(stop_at)
        self._children = children

    def stepped(self, step: int, total: int) -> None:
        super().stepped(step, total)
        self._children[0].terminate()


class Spy:
    """Notes what the first process trains with, and lets it train."""

    def __init__(self) -> None:
        self.modules: list[object] = []
        self.sharded: list[bool] = []

    def __call__(self, run: TrainingRun, **arguments: Any) -> tuple[EndedBy, str]:
        result = drive(run, **arguments)
        self.modules.append(run.pair_step.module)
        self.sharded += [isinstance(p, DTensor) for p in run.loss.parameters()]
        return result


@pytest.mark.parametrize(
    "adaptation",
    [
        pytest.param("lora", marks=pytest.mark.soak, id="ddp-lora-hmk"),
        pytest.param("full", id="fsdp2-full-hmk"),
    ],
)
def test_two_processes_stopped_and_resumed_give_the_result_of_one(
    bench: Bench,
    full: Bench,
    states: ReferenceStates,
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    children: list[subprocess.Popen[bytes]],
    adaptation: str,
) -> None:
    used, spec = (bench, LORA) if adaptation == "lora" else (full, FULL)
    # Micro-batches of a pair or two, more in one process than in the other.
    plan = {"learning_rate": 1e-3, "eval_steps": 3, "micro_tokens": 30}
    expected = alone(used, states, tmp_path / "one", **plan)
    weights = used.weights()
    job = job_of(used, llama_folder, spec, states, **plan)
    spy = Spy()
    monkeypatch.setattr(distributed, "drive", spy)
    # The first process decides when all stop, whoever else is asked to.
    first, second, store = Terminates(children, stop_at=2), Recorder(), MemoryStore()
    folder = tmp_path / "two"
    with pytest.raises(InterruptedError):
        train_ranked(job, used.policy, size=2, hooks=first, folder=folder, store=store)
    assert store.saved is not None
    assert store.saved.step == 2
    outcome = train_ranked(job, used.policy, size=2, hooks=second, folder=folder, store=store)
    assert sorted(second.points) == [3, 4, 5, 6]
    assert_close({**first.points, **second.points}, expected.points)
    assert_weights_close(used.weights(), weights)
    assert (outcome.ended_by, outcome.steps, outcome.pairs_seen) == (EndedBy.BUDGET, 6, 30)
    assert (outcome.best_step, outcome.mixture_weights is None) == (6, False)
    assert not (folder / "ranks").exists()
    if adaptation == "full":
        assert all(spy.sharded)
    else:
        assert isinstance(spy.modules[0], DistributedDataParallel)
    # The first attempt's was ended where it waited, the second's left the group by itself.
    assert [child.returncode for child in children] == [-signal.SIGKILL, 0]
    again = train_ranked(job, used.policy, size=2, hooks=Recorder(), folder=folder, store=store)
    assert replace(again, seconds=0.0) == replace(outcome, seconds=0.0)


def test_a_process_that_dies_ends_the_run_and_leaves_nothing(
    bench: Bench,
    states: ReferenceStates,
    llama_folder: Path,
    tmp_path: Path,
    children: list[subprocess.Popen[bytes]],
) -> None:
    class Kills(Recorder):
        """Kills the other process after the first step."""

        def stepped(self, step: int, total: int) -> None:
            super().stepped(step, total)
            children[0].kill()

    job = job_of(bench, llama_folder, LORA, states)
    with pytest.raises(RunAborted, match="process 1 of the run ended with status -9"):
        train_ranked(job, bench.policy, size=2, hooks=Kills(), folder=tmp_path, store=MemoryStore())
    assert [child.returncode for child in children] == [-9]
    assert not (tmp_path / "ranks").exists()


def limited(monkeypatch: pytest.MonkeyPatch, *, tokens: int) -> list[list[str]]:
    """Let the other processes run out of memory beyond so many tokens; returns their commands."""
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert command[3] == "worker.training.rank_main"
        small = [sys.executable, "-m", "tests.unit.worker.training.small_rank", str(tokens)]
        commands.append([*small, *command[4:]])
        started: subprocess.Popen[bytes] = popen(commands[-1], cwd=ROOT, **options)
        return started

    monkeypatch.setattr(subprocess, "Popen", start)
    return commands


def test_a_process_without_memory_ends_the_run_at_once_and_says_what_to_do(
    bench: Bench,
    states: ReferenceStates,
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = limited(monkeypatch, tokens=1)
    job = job_of(bench, llama_folder, LORA, states, micro_tokens=1)
    since = time.monotonic()
    outcome = train_ranked(
        job, bench.policy, size=2, hooks=Recorder(), folder=tmp_path, store=MemoryStore()
    )
    assert outcome.ended_by is EndedBy.OOM
    assert outcome.message == (
        "process 1: step 1 ran out of device memory with micro-batches of 1 tokens in each of 2 "
        "processes; set `micro_batch_tokens` lower"
    )
    assert len(commands) == 1, "a pair alone is not tried again"
    assert time.monotonic() - since < 120, "it was not waited for"
    assert not (tmp_path / "ranks").exists()


def test_smaller_micro_batches_are_tried_from_the_last_point(
    bench: Bench,
    states: ReferenceStates,
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = {"learning_rate": 1e-3, "total_steps": 2}
    expected = alone(bench, states, tmp_path / "one", **plan)
    weights = bench.weights()
    longest = max(computed_tokens(pair, bench.policy.form) for pair in bench.pairs)
    commands = limited(monkeypatch, tokens=longest + 8)
    job = job_of(bench, llama_folder, LORA, states, micro_tokens=2 * (longest + 8), **plan)
    hooks = Recorder()
    outcome = train_ranked(
        job, bench.policy, size=2, hooks=hooks, folder=tmp_path / "two", store=MemoryStore()
    )
    assert (outcome.ended_by, outcome.steps) == (EndedBy.BUDGET, 2), outcome.message
    assert len(commands) == 2
    assert_close(hooks.points, expected.points)
    assert_weights_close(bench.weights(), weights)


def test_processes_are_watched_until_the_block_ends() -> None:
    ended = threading.Event()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        with processes.watched([child], ended=ended.set):
            assert not ended.wait(0.3)
            child.kill()
            assert ended.wait(10), "nobody noticed"
        ended.clear()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        with processes.watched([child], ended=ended.set):
            pass
        child.kill()
        assert not ended.wait(0.3), "the end of a run is no loss"


def test_a_run_is_asked_to_stop_while_the_others_start(
    bench: Bench,
    states: ReferenceStates,
    llama_folder: Path,
    tmp_path: Path,
    children: list[subprocess.Popen[bytes]],
) -> None:
    job = job_of(bench, llama_folder, LORA, states)
    with pytest.raises(InterruptedError):
        train_ranked(
            job, bench.policy, size=2, hooks=Recorder(0), folder=tmp_path, store=MemoryStore()
        )
    assert [child.returncode is None for child in children] == [False]


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("sharded", [False, True])
def test_shares_make_up_the_step(form: Form, sharded: bool) -> None:
    pairs = random_pairs(11)
    index = [3, 1, 4, 1, 5, 9, 2, 6, 10, 0, 7]  # the end of an epoch and the start of the next
    groups = [
        Ranks(rank, 3, sharded).micro_batches(pairs, index, max_tokens=45, form=form)
        for rank in range(3)
    ]
    assert sorted(i for share in groups for group in share for i in group) == sorted(index)
    tokens = [sum(computed_tokens(pairs[i], form) for g in share for i in g) for share in groups]
    longest = max(computed_tokens(pairs[i], form) for i in index)
    assert max(tokens) - min(tokens) <= longest
    if sharded:
        assert len({len(share) for share in groups}) == 1
    else:
        assert all(group for share in groups for group in share)


def test_numbers_of_processes() -> None:
    cpu = torch.device("cpu")
    assert resolve_processes(TrainingSettings(), cpu) == 1
    assert resolve_processes(TrainingSettings(num_processes=3), cpu) == 3
    with pytest.raises(RunAborted, match="nothing to share out") as caught:
        resolve_processes(TrainingSettings(sharding="fsdp2"), cpu)
    assert caught.value.failure is FailureCode.DEPENDENCY_ERROR
    with pytest.raises(RunAborted, match=r"'cuda:1', one GPU, and .* is 2") as caught:
        resolve_processes(
            TrainingSettings(device="cuda:1", num_processes=2), torch.device("cuda:1")
        )
    assert caught.value.failure is FailureCode.DEPENDENCY_ERROR
    if not torch.cuda.is_available():
        with pytest.raises(RunAborted, match="sees 0 GPUs"):
            resolve_processes(TrainingSettings(num_processes=2), torch.device("cuda"))


def test_steps_smaller_than_the_group_are_refused(
    bench: Bench, states: ReferenceStates, llama_folder: Path, tmp_path: Path
) -> None:
    job = job_of(bench, llama_folder, LORA, states, batch_size=2)
    with pytest.raises(RunAborted, match="a step has 2 pairs and the run 3 processes"):
        train_ranked(
            job, bench.policy, size=3, hooks=Recorder(), folder=tmp_path, store=MemoryStore()
        )


def test_a_job_comes_back_from_its_files(
    bench: Bench, states: ReferenceStates, llama_folder: Path, tmp_path: Path
) -> None:
    job = job_of(bench, llama_folder, LORA, states, eval_steps=2)
    job.write(tmp_path / "job", None)
    back, saved = RankJob.read(tmp_path / "job")
    assert saved is None
    assert (back.spec, back.objective, back.plan) == (job.spec, job.objective, job.plan)
    assert tuple(back.data.pairs) == bench.pairs
    assert torch.equal(back.data.chosen_log_prob, job.data.chosen_log_prob)
    assert back.geometry is not None
    for name, tensor in bench.geometry.tensors().items():
        assert torch.equal(back.geometry.tensors()[name], tensor), name
    batch = collate(bench.pairs, [4, 2], form=Form.SHARED, device=torch.device("cpu"))
    assert back.data.reference_states is not None
    assert back.held_out is not None
    assert back.held_out.states is not None
    for kept in (back.data.reference_states, back.held_out.states):
        assert torch.equal(kept.of(batch), states.of(batch))


def test_states_that_the_store_has_dropped_are_handed_over(
    bench: Bench, llama_folder: Path, tmp_path: Path
) -> None:
    kept = stored_states(bench.policy, bench.pairs, tmp_path / "store")
    kept.path.unlink()
    job_of(bench, llama_folder, LORA, kept).write(tmp_path / "job", None)
    back = RankJob.read(tmp_path / "job")[0].data.reference_states
    assert back is not None
    assert np.array_equal(back.mapped, kept.mapped)
