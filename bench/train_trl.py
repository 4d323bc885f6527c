"""TRL's DPOTrainer as a contender of `bench.train`: its defaults, but for what makes the same job.

Set because the job says so: LoRA, learning rate, constant schedule, maximal length, the number of
steps, two accumulated batches of TRL's default 8 pairs (16 pairs a step), float32 on a CPU. Set to
TRL's advantage: no checkpoints, no progress bars. `OrderedTrainer` takes the pairs in our order.
"""

import time
from collections.abc import Iterator, Sized
from multiprocessing.connection import Connection
from typing import Any

import datasets
import optuna
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

from bench.train_job import (
    BETAS,
    LEARNING_RATES,
    MAX_LENGTH,
    TRIAL_STEPS,
    TRIALS,
    Gauge,
    Job,
    Turns,
    chunked,
    read_pairs,
    serve,
    set_threads,
)
from core.run_spec import LoraSpec
from worker.training.model import Policy
from worker.training.tokenize import load_tokenizer

PER_DEVICE = 8
"""TRL's default of `per_device_train_batch_size`."""


class InOrder(Sampler[int]):
    """Rows in a given order."""

    def __init__(self, order: list[int]) -> None:
        self._order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


class OrderedTrainer(DPOTrainer):
    """DPOTrainer with our order of the data, which notes losses and the time of its precompute."""

    order: list[int]
    micro_losses: list[Tensor]
    tokens = 0
    precompute_s = 0.0

    def _get_train_sampler(self, train_dataset: Sized | None = None) -> Sampler[int]:
        return InOrder(self.order)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        started = time.perf_counter()
        found = super()._precompute_ref_logps(dataset, name, batch_size)
        self.precompute_s = time.perf_counter() - started
        return found

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.tokens += inputs["input_ids"].numel()
        self.micro_losses.append(loss.detach())
        return loss


class StepTurns(TrainerCallback):
    """Ends a turn every `turn_steps` optimizer steps."""

    def __init__(self, turns: Turns, turn_steps: int) -> None:
        self._turns = turns
        self._turn_steps = turn_steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self._turn_steps == 0:
            self._turns.done()


def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def config(
    job: Job, *, steps: int, learning_rate: float, beta: float, precompute: bool
) -> DPOConfig:
    on_cpu = job.device == "cpu"
    return DPOConfig(
        output_dir=str(job.scratch / "trl"),
        max_steps=steps,
        max_length=MAX_LENGTH,
        gradient_accumulation_steps=job.batch_size // PER_DEVICE,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        beta=beta,
        precompute_ref_log_probs=precompute,
        seed=job.seed,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def load_model(job: Job) -> PreTrainedModel:
    dtype = torch.float32 if job.device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype)
    model.to(job.device)
    return model


def load_rows(job: Job) -> Dataset:
    """The rows from a file, so that TRL's caches of tokenised rows and references can hit."""
    cache = str(job.scratch / "datasets-cache")
    return load_dataset("json", data_files=str(job.messages), split="train", cache_dir=cache)


def build_trainer(
    job: Job,
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DPOConfig,
) -> OrderedTrainer:
    """A trainer whose adapter starts where ours does."""
    lora = LoraSpec()
    trainer = OrderedTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    if args.per_device_train_batch_size != PER_DEVICE:
        raise RuntimeError(
            f"TRL's default batch is {args.per_device_train_batch_size}, not {PER_DEVICE}"
        )
    Policy(trainer.model, tokenizer, torch.device(job.device)).reset_adapter(job.seed)
    trainer.order = [i for step in job.order(len(rows)) for i in step]
    trainer.micro_losses = []
    trainer.remove_callback(PrinterCallback)
    return trainer


def check_tokens(job: Job, trainer: DPOTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that both sides train on the same tokens."""
    ours = read_pairs(job, tokenizer)
    theirs = trainer.train_dataset
    if len(ours) != len(theirs):
        raise RuntimeError(f"TRL keeps {len(theirs)} rows of {job.data}, kdpo {len(ours)}")
    for mine, row in zip(ours, theirs, strict=True):
        ids = (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        if (mine.prompt, mine.chosen, mine.rejected) != tuple(map(tuple, ids)):
            raise RuntimeError(f"TRL and kdpo tokenise row {mine.id} of {job.data} differently")


def speed(job: Job, pipe: Connection) -> None:
    _speed(job, pipe, precompute=False)


def speed_precomputed(job: Job, pipe: Connection) -> None:
    _speed(job, pipe, precompute=True)


def _speed(job: Job, pipe: Connection, *, precompute: bool) -> None:
    set_threads()
    quiet()
    turns = Turns(pipe, device=job.device)
    tokenizer = load_tokenizer(job.folder)
    model = load_model(job)
    gauge = Gauge(model, device=job.device)
    args = config(
        job, steps=job.steps, learning_rate=job.learning_rate, beta=0.1, precompute=precompute
    )
    trainer = build_trainer(job, model, load_rows(job), tokenizer, args)
    check_tokens(job, trainer, tokenizer)
    trainer.add_callback(StepTurns(turns, job.turn_steps))
    turns.ready({"one_off_s": trainer.precompute_s})
    gauge.start()
    trainer.train()
    memory = gauge.read()
    micro = [float(loss) for loss in trainer.micro_losses]
    losses = list(chunked(micro, args.gradient_accumulation_steps))
    turns.end({"memory": memory, "losses": losses, "tokens_a_step": trainer.tokens / job.steps})


def trials(job: Job, pipe: Connection) -> None:
    """Optuna around DPOTrainer: every trial makes model and trainer anew, and is plain DPO."""
    set_threads()
    quiet()
    turns = Turns(pipe, device=job.device)
    started = time.perf_counter()
    tokenizer = load_tokenizer(job.folder)
    rows = load_rows(job)

    def objective(trial: optuna.Trial) -> float:
        args = config(
            job,
            steps=TRIAL_STEPS,
            learning_rate=job.learning_rate
            * trial.suggest_float("learning_rate_factor", *LEARNING_RATES, log=True),
            beta=trial.suggest_float("beta", *BETAS, log=True),
            precompute=True,
        )
        trainer = build_trainer(job, load_model(job), rows, tokenizer, args)
        return float(trainer.train().training_loss)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=job.seed))
    turns.ready({"setup_s": time.perf_counter() - started})
    study.optimize(
        objective, n_trials=TRIALS - job.first, callbacks=[lambda study, trial: turns.done()]
    )
    turns.end({})


if __name__ == "__main__":
    serve({"speed": speed, "speed_precomputed": speed_precomputed, "trials": trials})
