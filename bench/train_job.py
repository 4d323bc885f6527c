"""What contenders of `bench.train` share: the job, whose turn it is, and how memory is read.

Every contender runs in a process of its own. It works between the word to go and its word that a
turn is done, and waits otherwise, so that contenders alternate and their peaks do not mix.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bench.report import ROOT
from core.run_spec import DatasetPolicy
from core.settings import DataLimits
from worker.ingest.canonical import CanonicalRow, Message, read_canonical
from worker.ingest.pipeline import CANONICAL_NAME, ingest
from worker.training.batches import DataOrder
from worker.training.tokenize import TokenizedPair, tokenize_rows

MAX_LENGTH = 512
TRIALS = 28
TRIAL_STEPS = 20
LEARNING_RATES = (0.3, 1.0)
"""Range of a trial's learning rate, as a factor on the job's."""
BETAS = (0.05, 0.5)
DATA = {
    "hh-harmless": ROOT / "examples" / "data" / "hh-harmless-raw-50.jsonl",
    "truthfulqa": ROOT / "examples" / "data" / "truthfulqa-600.jsonl.gz",
}


@dataclass(frozen=True)
class Job:
    """The same work for every contender; `first` is the trial at which a stopped run goes on."""

    model: str
    data: str
    folder: Path
    rows: Path
    messages: Path
    scratch: Path
    steps: int
    learning_rate: float
    seed: int
    batch_size: int = 16
    device: str = "cpu"
    turn_steps: int = 1
    first: int = 0

    def order(self, num_pairs: int) -> list[list[int]]:
        """Which pairs each step takes."""
        if self.batch_size > num_pairs:
            raise RuntimeError(f"{self.batch_size} pairs a step asked for of {num_pairs} in all")
        order = DataOrder(num_pairs, batch_size=self.batch_size, seed=self.seed)
        return [order.pairs_of(step) for step in range(self.steps)]


def prepare_rows(name: str, folder: Path) -> tuple[Path, Path]:
    """Canonical rows of a data set, all splits, and the same as TRL's conversational JSON lines."""
    source, folder = DATA[name], folder / name
    ingest(
        source,
        out_dir=folder,
        dataset_id="bench",
        policy=DatasetPolicy(),
        limits=DataLimits(),
        on_progress=lambda done, total: None,
    )
    rows, messages = folder / CANONICAL_NAME, folder / "messages.jsonl"
    with messages.open("w", encoding="utf-8") as file:
        for row in read_canonical(rows):
            file.write(json.dumps(_conversation(row)) + "\n")
    return rows, messages


def _conversation(row: CanonicalRow) -> dict[str, list[dict[str, str]]]:
    def turns(messages: tuple[Message, ...]) -> list[dict[str, str]]:
        return [{"role": m.role.value, "content": m.content} for m in messages]

    return {
        "prompt": turns(row.prompt),
        "chosen": turns(row.chosen),
        "rejected": turns(row.rejected),
    }


def read_pairs(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenizedPair, ...]:
    """The job's pairs; none is cut, so that both sides' rules of cutting do not matter."""
    split = tokenize_rows(read_canonical(job.rows), tokenizer=tokenizer, max_length=MAX_LENGTH)
    if split.warnings():
        raise RuntimeError(f"{job.data} does not fit {MAX_LENGTH} tokens: {split.warnings()}")
    return split.pairs


def make_qwen(folder: Path, *, tokenizer: Path) -> Path:
    """A random model of the shape of Qwen2.5-0.5B, in bfloat16."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32_768,
        tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def serve(functions: dict[str, Callable[[Job, Connection], None]]) -> None:
    """Main of a contender's process; its arguments are a function's name and the pipe's number."""
    name, descriptor = sys.argv[1:]
    pipe = Connection(int(descriptor))
    functions[name](pipe.recv(), pipe)


def set_threads() -> int:
    """As many threads as a worker of the product takes."""
    threads = min(len(os.sched_getaffinity(0)), 8)
    torch.set_num_threads(threads)
    return threads


class Turns:
    """A contender's end of its pipe."""

    def __init__(self, pipe: Connection, *, device: str) -> None:
        self._pipe = pipe
        self._device = device
        self._started = 0.0

    def ready(self, about: dict[str, Any]) -> None:
        """Say that the first turn can begin, and wait for it."""
        self._pipe.send(about)
        self._wait()

    def done(self) -> None:
        """Say how long the turn took, and wait for the next."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._pipe.send(time.perf_counter() - self._started)
        self._wait()

    def end(self, result: dict[str, Any]) -> None:
        """Hand over what is left to say."""
        self._pipe.send(result)

    def _wait(self) -> None:
        self._pipe.recv()
        self._started = time.perf_counter()


class Gauge:
    """Memory of the training phase: resident set on a CPU, allocated bytes on a GPU.

    `loaded` is read when the model is loaded and two tokens have gone forward and backward, so
    that the libraries' code and threads are in it; `peak` over the training alone. What other
    phases have freed is given back to the system before each.
    """

    def __init__(self, model: PreTrainedModel, *, device: str) -> None:
        self._cuda = device == "cuda"
        tokens = torch.tensor([[2, 3]], device=device)
        states = model.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=states).logits.float().sum().backward()
        model.zero_grad(set_to_none=True)
        del states
        self.loaded = self._now()

    def start(self) -> None:
        """Forget the peaks of phases before."""
        self._now()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> dict[str, int]:
        """Bytes after loading, and the peak since `start`."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        return {"loaded": self.loaded, "peak": peak}

    def _now(self) -> int:
        gc.collect()
        if self._cuda:
            return torch.cuda.memory_allocated()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark runs on Linux")


def chunked(values: list[float], size: int) -> Iterator[float]:
    """Means of consecutive groups."""
    for start in range(0, len(values), size):
        group = values[start : start + size]
        yield sum(group) / len(group)
