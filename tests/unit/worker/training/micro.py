"""Micro models with tiny-lm's tokenizer and random pairs: what every test here trains on."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from core.run_spec import FinalRunSpec, LoraSpec
from objectives import Geometry, HybridObjective, build_objective, fit_geometry
from worker.training.checkpoint import SavedState
from worker.training.loop import train
from worker.training.model import Policy, load_policy
from worker.training.reference import ReferenceTable, compute_reference
from worker.training.resolve import TrainPlan
from worker.training.run import RunOutcome, TrainingRun
from worker.training.states import ReferenceStates
from worker.training.step import TrainingData
from worker.training.store import ReferenceStore
from worker.training.tokenize import TokenizedPair

TINY_LM = Path(__file__).parents[4] / "examples" / "models" / "tiny-lm"
VOCABULARY = 2048


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY_LM, local_files_only=True)


def write_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def micro_policy(folder: Path, **options: Any) -> Policy:
    return load_policy(
        folder,
        lora=LoraSpec(r=4, alpha=8),
        device=torch.device("cpu"),
        options=FinalRunSpec(**options),
    )


def random_pairs(count: int, *, seed: int = 0) -> tuple[TokenizedPair, ...]:
    """Pairs of different lengths; two pairs share each prompt."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        n = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(2, VOCABULARY, (n,), generator=generator).tolist())

    pairs: list[TokenizedPair] = []
    for number in range(count):
        prompt = pairs[-1].prompt if number % 2 else tokens(3, 9)
        pairs.append(
            TokenizedPair(
                id=f"pair{number}", group_id=f"prompt{number // 2}", prompt=prompt,
                chosen=tokens(2, 9), rejected=tokens(2, 9), weight=1.0,
            )
        )  # fmt: skip
    return tuple(pairs)


def stored_states(
    policy: Policy, pairs: tuple[TokenizedPair, ...], folder: Path
) -> ReferenceStates:
    """The reference's hidden states through a store on disk."""
    store = ReferenceStore(folder, max_bytes=1 << 30, states_bytes=1 << 30)
    found = store.get(policy, pairs, key="0" * 64, states=True, progress=ignore_progress)
    assert found.states is not None
    return found.states


def ignore_progress(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


class Recorder:
    """Hooks that record metrics and stop the run before step `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.points: dict[int, dict[str, float]] = {}
        self.stop_at = stop_at
        self.step = 0

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.points[step] = values

    def stepped(self, step: int, total: int) -> None:
        assert step <= total
        self.step = step

    def stopping(self) -> bool:
        return self.stop_at is not None and self.step >= self.stop_at

    def raise_if_stopped(self) -> None:
        if self.stopping():
            raise InterruptedError("stopped by the test")


class MemoryStore:
    """A resume store that keeps the last point in memory."""

    def __init__(self, *, every_step: bool = False) -> None:
        self.saved: SavedState | None = None
        self.every_step = every_step

    def save(self, state: SavedState) -> None:
        self.saved = state

    def load(self) -> SavedState | None:
        return self.saved

    def is_due(self) -> bool:
        return self.every_step


def micro_plan(**plan: Any) -> TrainPlan:
    """A plan of six steps; keyword arguments stand above it."""
    values: dict[str, Any] = {
        "learning_rate": 5e-3, "total_steps": 6, "warmup_steps": 1, "schedule": "linear",
        "batch_size": 5, "weight_decay": 0.01, "max_grad_norm": 1.0, "seed": 3,
    }  # fmt: skip
    return TrainPlan(**(values | plan))


class Bench:
    """A policy with pairs, their reference and the geometry."""

    def __init__(self, policy: Policy, pairs: tuple[TokenizedPair, ...]) -> None:
        self.policy = policy
        self.pairs = pairs
        self.table: ReferenceTable = compute_reference(policy, pairs, progress=ignore_progress)
        self.geometry: Geometry = fit_geometry(self.table.embeddings, seed=0)

    def train(self, spec: Any, *, hooks: Recorder, store: MemoryStore | None = None,
              states: ReferenceStates | None = None, **plan: Any) -> RunOutcome:  # fmt: skip
        return train(
            self.policy,
            self.objective(spec),
            self.data(states),
            plan=micro_plan(**plan),
            weights_learning_rate=0.05,
            hooks=hooks,
            store=store,
        )

    def run(self, spec: Any, *, states: ReferenceStates | None = None, **plan: Any) -> TrainingRun:
        return TrainingRun(
            self.policy,
            self.objective(spec),
            self.data(states),
            plan=micro_plan(**plan),
            weights_learning_rate=0.05,
        )

    def objective(self, spec: Any) -> HybridObjective:
        return build_objective(spec, geometry=self.geometry, head=self.policy.head.weight)

    def data(self, states: ReferenceStates | None = None) -> TrainingData:
        return TrainingData(
            pairs=self.pairs,
            chosen_log_prob=self.table.chosen_log_prob,
            rejected_log_prob=self.table.rejected_log_prob,
            frozen_embeddings=self.table.embeddings,
            reference_states=states,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.policy.adapter().items()}
