"""Training against TRL's DPOTrainer: pairs a second, memory, 28 short trials, equal losses.

`make bench-train` times a few steps of every contender (minutes) and reports the kept table;
`FULL=1` measures what the table lacks (hours; one JSON line each, so that it can be stopped and
goes on). Contenders are processes of their own that take turns, step by step or trial by trial.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench import train_report
from bench.report import ROOT
from bench.step import make_llama
from bench.train_job import DATA, TRIAL_STEPS, TRIALS, Job, make_qwen, prepare_rows, set_threads
from bench.train_report import CELLS, Row, Table
from worker.training.resolve import auto_learning_rate

TINY = ROOT / "examples" / "models" / "tiny-lm"
MODELS = ("tiny-lm", "llama-32m")
GPU_MODEL = "qwen-0.5b"
CONTENDERS = {
    "kdpo": ("bench.train_ours", "speed"),
    "trl": ("bench.train_trl", "speed"),
    "trl precomputed": ("bench.train_trl", "speed_precomputed"),
}
STUDIES = {"kdpo": ("bench.train_ours", "trials"), "optuna + trl": ("bench.train_trl", "trials")}
FULL = {"tiny-lm": (3, 13), "llama-32m": (1, 10)}
"""Rounds, and steps in each."""
SHORT_STEPS = {
    ("tiny-lm", "hh-harmless"): 5,
    ("tiny-lm", "truthfulqa"): 5,
    ("llama-32m", "hh-harmless"): 2,
}
GPU_STEPS, GPU_TURN, GPU_PAIRS = 60, 10, 48
QUIET = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore",
    # A process that waits for its turn must not spin.
    "OMP_WAIT_POLICY": "PASSIVE",
}  # fmt: skip


@dataclass
class Contender:
    """The parent's end of a contender; `about` is what it said when it was ready."""

    name: str
    process: subprocess.Popen[bytes]
    pipe: Connection
    about: dict[str, Any]

    def turn(self) -> float:
        """Let it work until its turn is done; seconds."""
        self.pipe.send(None)
        return float(self.receive())

    def finish(self) -> dict[str, Any]:
        """Let it go past its last turn; what it has left to say."""
        self.pipe.send(None)
        result: dict[str, Any] = self.receive()
        self.process.wait()
        return result

    def receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError as error:
            raise RuntimeError(
                f"{self.name} ended early, exit code {self.process.wait()}; see what it printed"
            ) from error


@contextmanager
def contenders(targets: dict[str, tuple[str, str]], job: Job) -> Iterator[list[Contender]]:
    """Fresh processes, made ready one after another; ended with the block."""
    running: list[Contender] = []
    try:
        for name, (module, function) in targets.items():
            ours, theirs = multiprocessing.Pipe()
            process = subprocess.Popen(
                [sys.executable, "-m", module, function, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], env=os.environ | QUIET, cwd=ROOT,
            )  # fmt: skip
            theirs.close()
            contender = Contender(name, process, ours, {})
            running.append(contender)
            ours.send(replace(job, scratch=job.scratch / name.replace(" ", "-")))
            contender.about = contender.receive()
        yield running
    finally:
        for contender in running:
            contender.pipe.close()
            contender.process.terminate()
            contender.process.wait()


def rotated(running: list[Contender], by: int) -> list[Contender]:
    """Everyone is first, second and last in turn."""
    by %= len(running)
    return running[by:] + running[:by]


def measure_speed(job: Job, *, number: int, kind: str) -> Row:
    """One round: every contender runs the same steps, turn by turn."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    load = os.getloadavg()[0]
    with contenders(CONTENDERS, job) as running:
        for turn in range(job.steps // job.turn_steps):
            for contender in rotated(running, turn):
                seconds[contender.name].append(round(contender.turn() / job.turn_steps, 5))
            told = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
            print(f"{job.model} {job.data} round {number + 1} turn {turn + 1}: {told}", flush=True)
        results = {c.name: c.finish() for c in running}
        about = {c.name: c.about for c in running}
    return {
        "kind": kind, "model": job.model, "data": job.data, "round": number, "load": load,
        "pairs_a_step": job.batch_size, "sizes": about["kdpo"]["sizes"], "seconds": seconds,
        "one_off_s": {name: value["one_off_s"] for name, value in about.items()},
        **{
            field: {name: result[field] for name, result in results.items()}
            for field in ("memory", "losses", "tokens_a_step")
        },
    }  # fmt: skip


def measure_trials(job: Job) -> Iterator[Row]:
    """The trials from `job.first` on, one of each side in turn; first of all what comes before."""
    at = {"model": job.model, "data": job.data}
    with contenders(STUDIES, job) as running:
        yield {"kind": "setup", **at, "about": {c.name: c.about for c in running}}
        for number in range(job.first, TRIALS):
            load = os.getloadavg()[0]
            order = rotated(running, number)
            seconds = {c.name: round(c.turn(), 4) for c in order}
            told = ", ".join(f"{c.name} {seconds[c.name]:.1f} s" for c in running)
            print(f"{job.model} {job.data} trial {number + 1}/{TRIALS}: {told}", flush=True)
            yield {"kind": "trial", **at, "number": number, "load": load, "seconds": seconds}
        for contender in running:
            contender.finish()


def environment() -> dict[str, Any]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    packages = ("torch", "transformers", "peft", "trl", "optuna", "datasets")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": set_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


class Workshop:
    """Models and data in a folder that is gone afterwards; made when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[str, Path] = {"tiny-lm": TINY}
        self._data: dict[str, tuple[Path, Path]] = {}
        self._jobs = 0

    def job(self, model: str, data: str, *, steps: int, seed: int = 0) -> Job:
        """A job on a CPU."""
        if model not in self._models:
            make = {"llama-32m": make_llama, GPU_MODEL: lambda f: make_qwen(f, tokenizer=TINY)}
            self._models[model] = make[model](self._folder / model)
        if data not in self._data:
            self._data[data] = prepare_rows(data, self._folder / "data")
        rows, messages = self._data[data]
        width = json.loads((self._models[model] / "config.json").read_text())["hidden_size"]
        self._jobs += 1
        return Job(
            model=model, data=data, folder=self._models[model], rows=rows, messages=messages,
            scratch=self._folder / f"job-{self._jobs}", steps=steps, seed=seed,
            learning_rate=auto_learning_rate(width),
        )  # fmt: skip


def fill(
    shop: Workshop, table: Table, *, models: list[str], data: list[str], studies: list[str]
) -> None:
    """Measure what the table lacks; trials of the models in `studies`."""
    table.append({"environment": environment()})
    for model in models:
        rounds, steps = FULL[model]
        for name in data:
            for number in range(rounds):
                if not table.has(kind="speed", model=model, data=name, round=number):
                    job = shop.job(model, name, steps=steps, seed=number)
                    table.append(measure_speed(job, number=number, kind="speed"))
    for model in studies:
        for name in data:
            done = table.trials(model, name)
            if done < TRIALS:
                job = replace(shop.job(model, name, steps=TRIAL_STEPS), first=done)
                for row in measure_trials(job):
                    table.append(row)
    fill_gpu(shop, table)


def fill_gpu(shop: Workshop, table: Table) -> None:
    """The same on a GPU with a model of 0.5B parameters in bfloat16."""
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU's cells are not measured", flush=True)
        return
    for name in DATA:
        if table.has(kind="gpu", model=GPU_MODEL, data=name, round=0):
            continue
        job = replace(
            shop.job(GPU_MODEL, name, steps=GPU_STEPS),
            batch_size=GPU_PAIRS, turn_steps=GPU_TURN, device="cuda",
        )  # fmt: skip
        row = measure_speed(job, number=0, kind="gpu")
        limit = matmul_flops()
        table.append({**row, "device": torch.cuda.get_device_name(), "matmul_flops": limit})


def matmul_flops(size: int = 8192, repeats: int = 20) -> float:
    """What the GPU reaches in a product of two square bfloat16 matrices, FLOP/s."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(2 * size**3 / statistics.median(times[repeats // 4 :]))


def short(shop: Workshop, *, models: list[str], data: list[str]) -> list[Row]:
    """A few steps of everyone, which are printed and not kept."""
    return [
        measure_speed(shop.job(model, name, steps=steps), number=0, kind="speed")
        for (model, name), steps in SHORT_STEPS.items()
        if model in models and name in data
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="measure what the table lacks")
    parser.add_argument("--table", type=Path, default=CELLS, help="where rows are kept")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--studies", nargs="*", choices=MODELS, default=list(MODELS), help="models for 28 trials"
    )
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    options = parser.parse_args()
    table = Table(options.table)
    now: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        shop = Workshop(Path(scratch))
        if options.full:
            fill(shop, table, models=options.models, data=options.data, studies=options.studies)
        else:
            now = short(shop, models=options.models, data=options.data)
    train_report.report(table, now=now, publish=options.table == CELLS)


if __name__ == "__main__":
    main()
