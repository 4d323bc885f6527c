"""How good a policy is on held-out pairs, and whether it beats plain DPO (docs/maths.md)."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.profile import Estimate
from core.results import Comparison, Evaluation
from core.spec import KlSpec
from objectives import build_divergence, segment_sum, streamed_divergence
from worker.training.batches import PairBatch, collate, micro_batches
from worker.training.forward import hidden_states, score_tokens
from worker.training.lanes import in_lanes, lanes_of
from worker.training.model import Policy
from worker.training.reference import FORWARD_TOKENS
from worker.training.states import ReferenceStates, states_missing
from worker.training.tokenize import TokenizedPair

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Scored = Callable[[PairBatch, Tensor], Tensor]

ECE_BINS = 15
BOOTSTRAP = 10_000
_BISECTIONS = 200
_CELLS = 1 << 24
# Below this many test prompts no difference is called: the bootstrap is not to be trusted there.
MIN_PROMPTS = 10
_Z975 = 1.959963984540054
_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)


@dataclass(frozen=True)
class Measured:
    """What a policy does on N pairs: log-ratios, token counts and token divergence sums, (N,)."""

    chosen: Floats
    rejected: Floats
    chosen_tokens: Floats
    rejected_tokens: Floats
    kl_sum: Floats
    group: Ints

    @property
    def margins(self) -> Floats:
        """Margin m = rho(y+) - rho(y-)."""
        return self.chosen - self.rejected

    @property
    def normalized_margins(self) -> Floats:
        """Margin of the log-ratios per token."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens

    @property
    def drift(self) -> float:
        """Mean of KL(policy || reference) over all response tokens, nats."""
        return float(self.kl_sum.sum() / (self.chosen_tokens + self.rejected_tokens).sum())

    @property
    def is_finite(self) -> bool:
        """Whether every number is finite."""
        return bool(np.isfinite(self.margins).all() and np.isfinite(self.kl_sum).all())


@dataclass(frozen=True)
class TrialScore:
    """Calibrated log-loss of a trial on validation, cross-fitted; `losses` (N,) are the pairs'."""

    losses: Floats
    log_loss: float
    standard_error: float
    accuracy: float
    drift: float
    chosen_displacement: float


@torch.no_grad()
def measure(
    policy: Policy,
    pairs: Sequence[TokenizedPair],
    *,
    reference: ReferenceStates | None = None,
    scored: Scored | None = None,
    progress: Callable[[int, int], None],
) -> Measured:
    """Score pairs under the policy and under the reference, token distributions included.

    Both see the same batches, so an untrained policy has margins of exactly 0. `reference` are the
    stored states of these pairs; without them the base is run again. `scored` is `scored_batch` of
    this policy where something wraps it.

    Raises:
        RunAborted: all weights are trained and there are no stored states (`out_of_memory`).
    """
    if policy.is_full and reference is None:
        raise states_missing("drift on held-out pairs is measured from")
    # Switching to the reference and back, and what wraps a policy, are for one batch at a time.
    lanes = lanes_of(policy) if reference is not None and scored is None else 1
    score = partial(scored_batch, policy) if scored is None else scored
    n = len(pairs)
    out = np.zeros((3, n))
    done = 0

    def one(group: Sequence[int]) -> Tensor:
        batch = collate(pairs, group, form=policy.form, device=policy.device)
        if reference is not None:
            base = reference.of(batch)
        else:
            with policy.as_reference():
                base = hidden_states(policy, batch, embeddings=False).states
        return score(batch, base).double().cpu()

    groups = micro_batches(pairs, range(n), max_tokens=FORWARD_TOKENS, form=policy.form)
    with closing(in_lanes(groups, one, lanes=lanes)) as results:
        for group, found in zip(groups, results, strict=True):
            out[:, list(group)] = found.numpy()
            done += len(group)
            progress(done, n)
    return Measured(
        chosen=out[0],
        rejected=out[1],
        chosen_tokens=np.array([float(len(p.chosen)) for p in pairs]),
        rejected_tokens=np.array([float(len(p.rejected)) for p in pairs]),
        kl_sum=out[2],
        group=pair_groups(pairs),
    )


def scored_batch(policy: Policy, batch: PairBatch, base: Tensor) -> Tensor:
    """Log-ratios of chosen and rejected answers, and summed KL(policy || reference), (3, B).

    `base` (N, H) are the reference's hidden states.
    """
    kl = streamed_divergence(KlSpec(), build_divergence(KlSpec(), head=None))
    expected = score_tokens(policy.reference_head or policy.head, base, batch.labels)
    states = hidden_states(policy, batch, embeddings=False).states
    scores = score_tokens(
        policy.head,
        states,
        batch.labels,
        reference_states=base,
        reference_head=policy.reference_head,
        divergence=kl,
    )
    assert scores.divergence is not None
    ratios = segment_sum(scores.log_prob - expected.log_prob, batch.row, 2 * batch.pairs)
    kl_sum = segment_sum(scores.divergence, batch.row % batch.pairs, batch.pairs)
    return torch.stack([ratios[: batch.pairs], ratios[batch.pairs :], kl_sum])


def pair_groups(pairs: Sequence[TokenizedPair]) -> Ints:
    """Number of each pair's prompt, in order of first appearance, (N,)."""
    groups: dict[str, int] = {}
    return np.array([groups.setdefault(p.group_id, len(groups)) for p in pairs])


def preference_losses(margins: Floats, temperature: float | Floats) -> Floats:
    """Per-pair -log sigma(b m), (N,); one b for all pairs, or one for each."""
    return np.logaddexp(0.0, -temperature * margins)


def fit_temperature(margins: Floats) -> float:
    """The b >= 0 that minimises mean[-(1-e) log sigma(b m) - e log sigma(-b m)], e = 1/(N+2).

    Convex in b. The smoothing is Platt's (1999): without it margins that all have the right sign
    would have no finite minimum. Margins that carry nothing give 0, i.e. a loss of ln 2.
    """
    spread = float(np.abs(margins).mean()) if margins.size else 0.0
    if spread == 0.0:
        return 0.0
    scaled = margins / spread
    smoothing = 1.0 / (margins.size + 2)

    def slope(b: float) -> float:
        right = 0.5 * (1.0 - np.tanh(0.5 * b * scaled))
        return float(np.mean(scaled * (smoothing - right)))

    if slope(0.0) >= 0.0:
        return 0.0
    low, high = 0.0, 1.0
    while slope(high) < 0.0:
        low, high = high, 2.0 * high
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if slope(middle) < 0.0 else (low, middle)
    return 0.5 * (low + high) / spread


def accuracy(margins: Floats) -> float:
    """Share of positive margins; a tie counts one half."""
    return float(np.mean(rights(margins)))


def calibration_error(margins: Floats, temperature: float | Floats) -> float:
    """Expected calibration error of sigma(b |m|) over 15 equal bins of confidence in [1/2, 1].

    One b for all pairs, or one for each, (N,).
    """
    confidence = 0.5 * (1.0 + np.tanh(0.5 * temperature * np.abs(margins)))
    index = np.minimum(((confidence - 0.5) * 2 * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    gap = np.bincount(index, weights=rights(margins) - confidence, minlength=ECE_BINS)
    return float(np.abs(gap).sum() / margins.size)


def trial_score(measured: Measured) -> TrialScore:
    """Score a trial on validation: temperature fitted on half of the prompts, used on the others.

    The standard error is that of a mean over prompts (clustered). With pairs of one prompt only,
    both halves are the whole.
    """
    margins, group = measured.margins, measured.group
    losses = preference_losses(margins, cross_fitted_temperatures(measured))
    return TrialScore(
        losses=losses,
        log_loss=float(losses.mean()),
        standard_error=clustered_standard_error(losses, group),
        accuracy=accuracy(margins),
        drift=measured.drift,
        chosen_displacement=float(measured.chosen.mean()),
    )


def cross_fitted_temperatures(measured: Measured) -> Floats:
    """Temperatures of pairs that are fitted on the other half of the prompts, (N,).

    With pairs of one prompt only, both halves are the whole.
    """
    margins, fold = measured.margins, measured.group % 2
    temperatures = np.zeros_like(margins)
    for side in (0, 1):
        fitted_on = margins[fold != side]
        temperatures[fold == side] = fit_temperature(fitted_on if fitted_on.size else margins)
    return temperatures


def evaluation(test: Measured, *, temperature: float | Floats) -> Evaluation:
    """Quality at a temperature that was fitted on other pairs; of several their mean is told."""
    return Evaluation(
        log_loss=float(preference_losses(test.margins, temperature).mean()),
        temperature=float(np.mean(temperature)),
        accuracy=accuracy(test.margins),
        accuracy_length_normalized=accuracy(test.normalized_margins),
        calibration_error=calibration_error(test.margins, temperature),
        drift=test.drift,
        chosen_displacement=float(test.chosen.mean()),
        pairs=int(test.margins.size),
        prompts=int(np.unique(test.group).size),
    )


def clustered_standard_error(values: Floats, group: Ints) -> float:
    """Standard error of the mean of values whose clusters (prompts) are independent.

    sqrt(G/(G-1) Σ_g (Σ_{i in g} (v_i - mean))²) / N (Cameron & Miller 2015); 0 for one cluster.
    """
    _, index = np.unique(group, return_inverse=True)
    sums = np.bincount(index, weights=values - values.mean())
    clusters = sums.size
    if clusters < 2:
        return 0.0
    return float(np.sqrt(clusters / (clusters - 1) * np.square(sums).sum()) / values.size)


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t.

    A table up to 8 degrees, from there Cornish and Fisher's expansion (Abramowitz & Stegun
    26.7.5), which is right to 1e-3.
    """
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z, v = _Z975, float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def bootstrap_mean(
    values: Floats, group: Ints, *, seed: int, resamples: int = BOOTSTRAP
) -> Estimate:
    """Mean with its percentile interval over resamples of whole prompts; see `bootstrap_ratio`."""
    return bootstrap_ratio(values, np.ones_like(values), group, seed=seed, resamples=resamples)


def bootstrap_ratio(
    values: Floats, weights: Floats, group: Ints, *, seed: int, resamples: int = BOOTSTRAP
) -> Estimate:
    """Σ values / Σ weights with its percentile interval, widened for few prompts.

    Whole prompts are drawn, and the ratio is taken anew of each draw.

    Percentiles of G prompts are too near the mean: their spread lacks sqrt(G/(G-1)) and they know
    no t distribution. Both ends move out by t_{G-1, 0.975} / 1.96 * sqrt(G/(G-1)) (Hesterberg
    2015). One prompt has no spread: its interval is the value, which says nothing.
    """
    _, index = np.unique(group, return_inverse=True)
    sums = np.bincount(index, weights=values)
    counts = np.bincount(index, weights=weights)
    clusters = sums.size
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // clusters)
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.multinomial(
            clusters, np.full(clusters, 1.0 / clusters), size=min(rows, resamples - start)
        ).astype(np.float64)
        means.append((drawn @ sums) / (drawn @ counts))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    value = float(values.sum() / weights.sum())
    widening = 1.0
    if clusters > 1:
        widening = t_quantile(clusters - 1) / _Z975 * math.sqrt(clusters / (clusters - 1))
    return Estimate(
        value=value,
        low=value - widening * max(0.0, value - float(low)),
        high=value + widening * max(0.0, float(high) - value),
    )


def compare(
    run: Measured,
    baseline: Measured,
    *,
    run_temperature: float,
    baseline_temperature: float,
    label: str,
    baseline_label: str,
    seed: int,
) -> Comparison:
    """Compare two policies on the same test pairs, run - baseline; log-loss decides the verdict.

    With fewer than 10 test prompts the verdict is always "no significant difference".
    """
    losses = preference_losses(run.margins, run_temperature)
    losses = losses - preference_losses(baseline.margins, baseline_temperature)
    gained = rights(run.margins) - rights(baseline.margins)
    log_loss = bootstrap_mean(losses, run.group, seed=seed)
    drift = run.drift - baseline.drift
    prompts = int(np.unique(run.group).size)
    reason = ""
    if prompts < MIN_PROMPTS or log_loss.low <= 0.0 <= log_loss.high:
        verdict = "no significant difference"
        sentence = f"There is no significant difference between {label} and {baseline_label}"
        if prompts < MIN_PROMPTS:
            reason = f" Fewer than {MIN_PROMPTS} test prompts are too few to call a difference."
    else:
        verdict = "better" if log_loss.high < 0.0 else "worse"
        sentence = f"{label} is {verdict} than {baseline_label}"
    return Comparison.model_validate(
        {
            "log_loss": log_loss,
            "accuracy": bootstrap_mean(gained, run.group, seed=seed),
            "drift": drift,
            "verdict": verdict,
            "sentence": f"{sentence} on {run.margins.size} test pairs of {prompts} prompts: "
            f"log-loss {log_loss.value:+.4f} [{log_loss.low:+.4f}, {log_loss.high:+.4f}], "
            f"drift {drift:+.4f} nats a token.{reason} "
            "One training run each; the interval covers test prompts, not seeds.",
        }
    )


def baseline_diverged(baseline_label: str, *, why: str) -> Comparison:
    """The comparison with a plain DPO that has no usable weights."""
    return Comparison(
        log_loss=None,
        accuracy=None,
        drift=None,
        verdict="baseline diverged",
        sentence=f"There is nothing to compare with: {baseline_label} diverged ({why}).",
    )


def same_objective() -> Comparison:
    """The comparison of plain DPO with itself."""
    zero = Estimate(value=0.0, low=0.0, high=0.0)
    return Comparison(
        log_loss=zero,
        accuracy=zero,
        drift=0.0,
        verdict="same objective",
        sentence="The run is plain DPO, which is its own baseline.",
    )


def rights(margins: Floats) -> Floats:
    """1 of a positive margin, 1/2 of a tie, else 0, (N,)."""
    return (margins > 0).astype(np.float64) + 0.5 * (margins == 0)
