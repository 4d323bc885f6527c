"""Held-out prompts, answered by a checkpoint and by its base, and judged by a reward model."""

import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from core.evaluations import WinRate
from core.hub import fetch
from core.lifecycle import Phase
from core.modelref import ModelRef
from core.profile import Estimate
from core.reward_models import check_reward_model
from models.evaluation import AnsweredPrompt
from models.repositories.datasets import DatasetRepository
from models.repositories.evaluations import AnswerRepository
from worker.context import JobContext
from worker.ingest.canonical import CanonicalRow, Split, read_canonical
from worker.jobs.rows import canonical_path, check_canonical
from worker.jobs.scopes import Reporter, Span
from worker.jobs.workbench import Workbench
from worker.training.evaluate import MIN_PROMPTS, Floats, bootstrap_mean, rights
from worker.training.generate import answers, one_row_a_prompt, prompts_to_answer
from worker.training.model import Policy
from worker.training.resolve import apply_threads, resolve_device
from worker.training.reward import load_reward_model

# What is answered at once; a kill costs one batch.
BATCH_PROMPTS = 16
BATCH_TOKENS = 16_384
SCORED_AT_ONCE = 16
MAX_PROMPT_CHARS = 4000


def fetch_judge(context: JobContext) -> Path | None:
    """Return the folder of the job's reward model, checked; None where the job names none.

    Raises:
        InvalidInput: the model is gone, or is no reward model.
        Unavailable: the hub does not answer.
    """
    named = context.job.spec["reward_model"]
    if named is None:
        return None
    ref = ModelRef.model_validate(named)
    if ref.source == "hub":
        context.phase(Phase.DOWNLOADING_MODEL)
    folder = fetch(ref, context.settings)
    check_reward_model(folder)
    context.raise_if_stopped()
    return folder


def answer_prompts(context: JobContext, bench: Workbench, span: Span) -> None:
    """Answer prompts of the job's split by base and checkpoint; goes on behind the last batch."""
    spec, policy = context.job.spec, bench.policy
    rows = drawn(bench.rows[Split(spec["split"])], limit=spec["max_prompts"], seed=bench.seed)
    room = rooms(policy, max_length=bench.max_length, new_tokens=spec["max_new_tokens"])
    ids = prompts_to_answer(policy, rows, max_tokens=room[0])
    with context.database.reading() as session:
        done = AnswerRepository(session).count(context.fence.job_id)
    if room[1] < spec["max_new_tokens"] and not done:
        context.warn(
            f"Answers have at most {room[1]} tokens: half of what the model has positions for."
        )
    report = Reporter(context, "prompts", span)
    with context.step("answer"):
        for start, end in batches(ids, new_tokens=room[1]):
            if end <= done:
                continue
            began = time.monotonic()
            aligned = answers(policy, ids[start:end], new_tokens=room[1])
            with policy.as_reference():
                base = answers(policy, ids[start:end], new_tokens=room[1])
            made = [
                AnsweredPrompt(
                    job_id=context.fence.job_id,
                    number=start + number,
                    pair_id=row.id,
                    prompt=stored_text(row.prompt[-1].content[-MAX_PROMPT_CHARS:]),
                    base=stored_text(ours),
                    aligned=stored_text(theirs),
                )
                for number, (row, ours, theirs) in enumerate(
                    zip(rows[start:end], base, aligned, strict=True), start=1
                )
            ]
            with context.transaction() as session:
                AnswerRepository(session).add(
                    context.fence, made, gpu_seconds=time.monotonic() - began
                )
            report(end, len(rows))


def drawn(rows: Sequence[CanonicalRow], *, limit: int, seed: int) -> list[CanonicalRow]:
    """Return one row of each prompt, in order; of more than `limit` those that a lot picks."""
    firsts = one_row_a_prompt(rows)
    lot = np.random.default_rng(seed).permutation(len(firsts))[:limit]
    return [firsts[index] for index in sorted(lot)]


def rooms(policy: Policy, *, max_length: int, new_tokens: int) -> tuple[int, int]:
    """Return how many tokens a prompt and its answer may have.

    `max_length` limits prompts, as in training. The model's positions limit both together; half of
    them are left to the prompt.
    """
    positions = policy.max_positions
    if positions is None:
        return max_length, new_tokens
    written = min(new_tokens, max(1, positions // 2))
    return max(1, min(max_length, positions - written)), written


def batches(ids: Sequence[list[int]], *, new_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield from where to where prompts are answered at once, the same in every attempt."""
    start, width = 0, 0
    for index, one in enumerate(ids):
        width = max(width, len(one))
        count = index + 1 - start
        if count > 1 and (count > BATCH_PROMPTS or count * (width + new_tokens) > BATCH_TOKENS):
            yield start, index
            start, width = index, len(one)
    if start < len(ids):
        yield start, len(ids)


def stored_text(text: str) -> str:
    """Return a text as databases take it: Postgres knows no NUL."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def judged(context: JobContext, folder: Path, span: Span) -> WinRate:
    """Score all answers with the reward model in a folder, and compare; keeps what is scored.

    Raises:
        InvalidInput: it is no reward model.
        RunAborted: it cannot be loaded, gives no finite reward, or cannot read a prompt.
    """
    done = context.step_result("score")
    if done is not None:
        return WinRate.model_validate(done)
    apply_threads(context.settings.training)
    with context.step("score") as result:
        _score(context, folder, span)
        with context.database.reading() as session:
            answered = AnswerRepository(session).page(context.fence.job_id)
        aligned, base = (
            np.array(rewards, dtype=np.float64)
            for rewards in zip(*((a.aligned_reward, a.base_reward) for a in answered), strict=True)
        )
        found = win_rate(
            aligned - base,
            reward_model=context.job.spec["reward_model"]["name"],
            seed=context.job.seed,
        )
        result |= found.model_dump(mode="json")
    return found


def _score(context: JobContext, folder: Path, span: Span) -> None:
    with context.database.reading() as session:
        answered = AnswerRepository(session).page(context.fence.job_id)
        dataset = DatasetRepository(session).load(str(context.job.dataset_id))
    path = canonical_path(context, dataset)
    check_canonical(path, dataset)
    wanted = {answer.pair_id for answer in answered}
    prompts = {row.id: row.prompt for row in read_canonical(path) if row.id in wanted}
    # What the policy held is garbage by now, and the reward model may need its room.
    gc.collect()
    torch.cuda.empty_cache()
    reward = load_reward_model(folder, device=resolve_device(context.settings.training))
    report = Reporter(context, "answers", span)
    left = [answer for answer in answered if answer.base_reward is None]
    for start in range(0, len(left), SCORED_AT_ONCE):
        began = time.monotonic()
        rewards = [
            (
                one.number,
                reward.reward(prompts[one.pair_id], one.base),
                reward.reward(prompts[one.pair_id], one.aligned),
            )
            for one in left[start : start + SCORED_AT_ONCE]
        ]
        with context.transaction() as session:
            AnswerRepository(session).score(
                context.fence, rewards, gpu_seconds=time.monotonic() - began
            )
        report(len(answered) - len(left) + start + len(rewards), len(answered))


def win_rate(differences: Floats, *, reward_model: str, seed: int) -> WinRate:
    """Compare rewards prompt by prompt; `differences` are r(y) - r(y0), (N,).

    rate = mean of [1 if r(y) > r(y0), 1/2 if equal, else 0] over prompts, which are resampled for
    the interval. With fewer than 10 prompts no difference is called.
    """
    group = np.arange(differences.size)
    rate = share(bootstrap_mean(rights(differences), group, seed=seed))
    is_open = differences.size < MIN_PROMPTS or rate.low <= 0.5 <= rate.high
    called = "better" if rate.low > 0.5 else "worse"
    verdict = "no significant difference" if is_open else called
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return WinRate.model_validate(
        {
            "reward_model": reward_model,
            "prompts": differences.size,
            "wins": wins,
            "ties": differences.size - wins - losses,
            "losses": losses,
            "rate": rate,
            "difference": bootstrap_mean(differences, group, seed=seed),
            "verdict": verdict,
            "sentence": f"Under {reward_model} the checkpoint wins {100 * rate.value:.0f} % "
            f"[{100 * rate.low:.0f}, {100 * rate.high:.0f}] of {differences.size} held-out "
            f"prompts against its base: {verdict}. The interval covers prompts, not the reward "
            "model's errors.",
        }
    )


def share(estimate: Estimate) -> Estimate:
    """Return a share whose interval, widened for few prompts, stays within 0 and 1."""
    return Estimate(value=estimate.value, low=max(0.0, estimate.low), high=min(1.0, estimate.high))
