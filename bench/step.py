"""One training step with each divergence penalty beside one of plain DPO, in the same engine.

`make bench-step` runs it: tiny-lm, and a random 32M-parameter Llama with a vocabulary of 32,000, on
the shipped TruthfulQA pairs, 16 pairs a step; objectives take turns, step by step medians. The
reference's hidden states are stored before, as in a search; that pass is reported beside. Beside
them plain DPO with all threads on one batch at a time, as it is without lanes.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pydantic import TypeAdapter
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.report import ROOT, goal_table, publish_block, worst
from core.run_spec import DatasetPolicy, LoraSpec
from core.settings import DataLimits
from core.spec import DivergenceName, ObjectiveSpec, PenaltyTerm
from objectives import build_objective
from worker.ingest.canonical import read_canonical
from worker.ingest.pipeline import CANONICAL_NAME, ingest
from worker.training import step
from worker.training.loop import train
from worker.training.model import Policy, load_policy
from worker.training.resolve import TrainPlan
from worker.training.step import TrainingData
from worker.training.store import ReferenceStore
from worker.training.tokenize import TokenizedPair, tokenize_rows

SUMMARY = ROOT / "bench" / "results" / "step.json"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- step: begin -->", "<!-- step: end -->"
TINY = ROOT / "examples" / "models" / "tiny-lm"
PAIRS = ROOT / "examples" / "data" / "truthfulqa-600.jsonl.gz"
TARGET = 1.35
PLAIN, WITHOUT_LANES = "dpo", "dpo, all threads on one batch"
PENALTY: TypeAdapter[PenaltyTerm] = TypeAdapter(PenaltyTerm)


class Stopwatch:
    """Hooks that note when each step ended."""

    def __init__(self) -> None:
        self.ended = [time.perf_counter()]

    def metrics(self, step: int, values: dict[str, float]) -> None:
        assert all(value == value for value in values.values()), f"NaN at step {step}"

    def stepped(self, step: int, total: int) -> None:
        self.ended.append(time.perf_counter())

    def stopping(self) -> bool:
        return False

    def raise_if_stopped(self) -> None:
        raise AssertionError("never asked to stop")

    def steps(self) -> list[float]:
        """Seconds of each step but the first, which warms up."""
        times = [b - a for a, b in zip(self.ended, self.ended[1:], strict=False)]
        return times[1:]


def make_llama(folder: Path) -> Path:
    """A random Llama of about 32M parameters with a vocabulary of 32,000."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=448, intermediate_size=1280, num_hidden_layers=7,
        num_attention_heads=7, num_key_value_heads=7, max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def load_pairs(policy: Policy, folder: Path) -> tuple[TokenizedPair, ...]:
    ingest(
        PAIRS,
        out_dir=folder,
        dataset_id="bench",
        policy=DatasetPolicy(),
        limits=DataLimits(),
        on_progress=lambda done, total: None,
    )
    rows = read_canonical(folder / CANONICAL_NAME, "train")
    return tokenize_rows(rows, tokenizer=policy.tokenizer, max_length=512).pairs


def objectives() -> dict[str, ObjectiveSpec]:
    penalties = {
        name.value: ObjectiveSpec(
            divergence_term=PENALTY.validate_python({"divergence": name.value, "alpha": 1.0})
        )
        for name in DivergenceName
    }
    return {PLAIN: ObjectiveSpec(), WITHOUT_LANES: ObjectiveSpec(), **penalties}


def without_lanes() -> AbstractContextManager[object]:
    """A context in which steps have one lane."""
    return patch.object(step, "lanes_of", lambda policy: 1)


def measure(folder: Path, *, rounds: int, steps: int, scratch: Path) -> dict[str, Any]:
    """Seconds of a step by objective; objectives alternate in every round."""
    policy = load_policy(folder, lora=LoraSpec(), device=torch.device("cpu"))
    pairs = load_pairs(policy, scratch)
    started = time.perf_counter()
    store = ReferenceStore(scratch / "reference", max_bytes=1 << 34, states_bytes=1 << 32)
    stored = store.get(
        policy, pairs, key=folder.name, states=True, progress=lambda done, total: None
    )
    seconds_stored = time.perf_counter() - started
    plan = TrainPlan(
        learning_rate=1e-4, total_steps=steps + 1, warmup_steps=0, schedule="constant",
        batch_size=16, weight_decay=0.0, max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    data = TrainingData(
        pairs=pairs, chosen_log_prob=stored.table.chosen_log_prob,
        rejected_log_prob=stored.table.rejected_log_prob, reference_states=stored.states,
    )  # fmt: skip
    seconds: dict[str, list[list[float]]] = {name: [] for name in objectives()}
    for number in range(rounds):
        for name, spec in objectives().items():
            watch = Stopwatch()
            objective = build_objective(spec, geometry=None, head=policy.head.weight)
            with without_lanes() if name == WITHOUT_LANES else nullcontext():
                train(policy, objective, data, plan=plan, weights_learning_rate=0.0, hooks=watch)
            seconds[name].append(watch.steps())
            print(f"{folder.name} round {number + 1}/{rounds} {name}", flush=True)
    return {
        "parameters": sum(p.numel() for p in policy.causal.parameters()),
        "tokens_per_step": 2 * 16 * statistics.mean(p.length for p in pairs),
        "reference_s": seconds_stored,
        "reference_states_bytes": 0 if stored.states is None else stored.states.nbytes,
        "seconds": seconds,
    }


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Median over steps of step time over plain DPO's on the same pairs in the same round."""
    plain = found["seconds"][PLAIN]
    return {
        name: statistics.median(
            ours / theirs
            for mine, base in zip(rounds, plain, strict=True)
            for ours, theirs in zip(mine, base, strict=True)
        )
        for name, rounds in found["seconds"].items()
        if name != PLAIN
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"tiny-lm": TINY, "llama-32m": make_llama(Path(scratch) / "llama-32m")}
        for name, folder in folders.items():
            found[name] = measure(
                folder, rounds=options.rounds, steps=options.steps, scratch=Path(scratch) / "data"
            )
    goals = [
        worst(
            f"training step with a penalty / plain DPO, {name}", f"<= {TARGET}",
            {key: value for key, value in ratios(result).items() if key != WITHOUT_LANES},
            digits=4,
        )
        for name, result in found.items()
    ]  # fmt: skip
    environment = {
        "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "machine": platform.machine(),
    }  # fmt: skip
    SUMMARY.write_text(
        json.dumps({"environment": environment, "goals": goals, "models": found}, indent=1) + "\n"
    )
    lines = ["| model | objective | ms a step | over plain DPO |", "|---|---|---|---|"]
    for model, result in found.items():
        values = ratios(result)
        for name, rounds in result["seconds"].items():
            median = statistics.median(t for part in rounds for t in part)
            lines.append(f"| {model} | {name} | {1e3 * median:.0f} | {values.get(name, 1.0):.2f} |")
    table = "\n".join(lines)
    publish_block(PAGE, "\n\n".join([BEGIN, goal_table(goals), table, END]))
    print(table)
    print(goal_table(goals))
    print(json.dumps({"goals": goals}))


if __name__ == "__main__":
    main()
