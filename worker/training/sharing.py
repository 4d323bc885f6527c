"""Whether a model can run packed pairs, by which attention, and running them.

No list of architectures decides: when a model is loaded, packed pairs must give the hidden states
that the same pairs give as padded rows. A model that fails keeps the padded form, and the log says
why.
"""

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from worker.ingest.files import atomic_writer, full_disk_as_error
from worker.training.attention import SharedAttention, UnsupportedAttention, register
from worker.training.batches import Form, PairBatch, collate
from worker.training.tokenize import TokenizedPair

log = logging.getLogger("kdpo.training")

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
TIMED = {"cuda"}
"""Kinds of devices on which attentions that work are timed; elsewhere the first one is taken."""

_LOW_PRECISION = 0.1
_SHAREABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})
_PROBE = ((7, 5, 9), (3, 4, 2))
_TIMED = ((1024, 512, 512),) * 16
_REPEATS = 3


@dataclass(frozen=True)
class Sharing:
    """The attention for packed pairs, or None and why there is none."""

    attention: SharedAttention | None
    reason: str


def run_trunk(
    causal: PreTrainedModel, batch: PairBatch, *, attention: SharedAttention | None
) -> Tensor:
    """Last hidden states after the final norm, flattened to (tokens, H), padding included."""
    inputs: dict[str, object] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.segments is None:
        inputs["attention_mask"] = batch.attention_mask
    else:
        inputs["position_ids"] = batch.position_ids
        # A mask of four dimensions is handed on as it is, and here it says nothing.
        inputs["attention_mask"] = batch.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool)
        match attention:
            case SharedAttention.SEGMENTS:
                inputs["segments"] = batch.segments
            case SharedAttention.FLEX:
                inputs["block_mask"] = batch.segments.block_mask()
            case SharedAttention.MASK:
                inputs["attention_mask"] = batch.segments.dense_mask()
            case None:
                raise ValueError(
                    "packed pairs came to a model that cannot attend in packed rows: collate them "
                    "with form=PLAIN"
                )
    states: Tensor = causal.base_model(**inputs).last_hidden_state
    return states.reshape(-1, states.shape[-1])


def choose_attention(
    causal: PreTrainedModel, *, device: torch.device, choices: Path | None = None
) -> Sharing:
    """Pick the fastest attention that gives packed pairs the states of padded ones.

    On a CPU segments are taken where they work, which leave out every masked block; on CUDA what
    works is timed, forward and backward. Under the folder `choices` the winner is kept, so that
    later processes on such a machine choose alike: sums differ in their last digits. The model is
    left set to the choice.
    """
    register()
    config = causal.config.get_text_config()
    original = causal.config._attn_implementation
    refused = _refusal(config)
    if refused:
        return Sharing(None, refused)
    probe = _pairs(_PROBE, config.vocab_size)
    with torch.no_grad():
        plain = collate(probe, range(len(probe)), form=Form.PLAIN, device=device)
        expected = run_trunk(causal, plain, attention=None)[plain.states_at]
    reasons: list[str] = []
    working: list[SharedAttention] = []
    for candidate in _candidates(config, device):
        found = _difference(causal, candidate, probe, expected, device=device)
        if found is None:
            working.append(candidate)
            if device.type not in TIMED:
                break
        else:
            reasons.append(f"{candidate.name.lower()}: {found}")
    if not working:
        causal.set_attn_implementation(original)
        return Sharing(None, "; ".join(reasons))
    kept = None if choices is None else choices / f"{_circumstances(causal, device)}.txt"
    if len(working) > 1 and kept is not None and kept.is_file():
        working.sort(key=lambda a: a.value != kept.read_text())
    elif len(working) > 1:
        seconds = {a: _seconds(causal, a, device=device) for a in working}
        working.sort(key=seconds.__getitem__)
        reasons = [f"{a.name.lower()}: {1e3 * s:.1f} ms" for a, s in seconds.items()]
        if kept is not None:
            with full_disk_as_error(kept.parent):
                kept.parent.mkdir(parents=True, exist_ok=True)
                with atomic_writer(kept) as file:
                    file.write(working[0].value.encode())
    causal.set_attn_implementation(working[0].implementation)
    return Sharing(working[0], "; ".join(reasons))


def _circumstances(causal: PreTrainedModel, device: torch.device) -> str:
    """Name of all that the speed of an attention depends on."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    about = (causal.config.to_json_string(), card, torch.__version__, transformers.__version__)
    return hashlib.sha256("\n".join(about).encode()).hexdigest()


def _refusal(config: PreTrainedConfig) -> str:
    """Why a short probe could not tell that packing is wrong for this model; empty if it can."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - _SHAREABLE_LAYERS:
        return f"it has layers of {', '.join(sorted(kinds - _SHAREABLE_LAYERS))}"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "it attends in chunks"
    return ""


def _window(config: PreTrainedConfig) -> int | None:
    """The window of the layers that have one."""
    window: int | None = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    return None if kinds and "sliding_attention" not in kinds else window


def _candidates(config: PreTrainedConfig, device: torch.device) -> Sequence[SharedAttention]:
    if _window(config) is not None:
        # A given mask is used as it is in every layer, so that windows would be left out.
        return (SharedAttention.SEGMENTS,)
    if device.type == "cpu":
        return (SharedAttention.SEGMENTS, SharedAttention.MASK)
    return tuple(SharedAttention)


def _difference(
    causal: PreTrainedModel,
    candidate: SharedAttention,
    probe: Sequence[TokenizedPair],
    expected: Tensor,
    *,
    device: torch.device,
) -> str | None:
    """None where packed pairs give the expected states, else what went wrong."""
    batch = collate(probe, range(len(probe)), form=Form.SHARED, device=device)
    try:
        causal.set_attn_implementation(candidate.implementation)
        if causal.config._attn_implementation != candidate.implementation:
            return "the model does not let its attention be set"
        with torch.no_grad():
            found = run_trunk(causal, batch, attention=candidate)[batch.states_at]
    except (UnsupportedAttention, TypeError, ValueError, RuntimeError, ImportError) as error:
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    assert batch.segments is not None
    if _window(causal.config.get_text_config()) is not None and not batch.segments.windows:
        return "its layers leave sliding windows to the mask"
    if found.shape != expected.shape:
        return f"hidden states have shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    gap = (found.double() - expected.double()).abs()
    if expected.dtype in TOLERANCE:
        tolerance, share = TOLERANCE[expected.dtype], gap.max() / expected.abs().max()
    else:
        # By each dimension's own spread: a few dimensions are much larger than all others.
        spread = expected.double().std(0).clamp_min(1e-12)
        tolerance, share = _LOW_PRECISION, (gap / spread).mean()
    if not float(share) <= tolerance:
        return f"hidden states differ by a share of {float(share):.1e}, expected {tolerance:.0e}"
    return None


def _seconds(causal: PreTrainedModel, attention: SharedAttention, *, device: torch.device) -> float:
    """Shortest time of a forward and backward over a GPU's micro-batch; infinite if too large."""
    config = causal.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 1024
    scale = min(1.0, longest / 2048)
    sizes = [tuple(max(2, int(scale * n)) for n in pair) for pair in _TIMED]
    pairs = _pairs(sizes, config.vocab_size)
    batch = collate(pairs, range(len(pairs)), form=Form.SHARED, device=device)
    causal.set_attn_implementation(attention.implementation)
    times = []
    try:
        for _ in range(_REPEATS):
            _wait(device)
            started = time.perf_counter()
            states = run_trunk(causal, batch, attention=attention)
            if states.requires_grad:
                states.float().sum().backward()
            _wait(device)
            times.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        causal.zero_grad(set_to_none=True)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pairs(sizes: Sequence[Sequence[int]], vocabulary: int) -> list[TokenizedPair]:
    """Pairs of any tokens, different everywhere."""
    made: list[TokenizedPair] = []
    start = 1
    for prompt, chosen, rejected in sizes:
        ids = [(start + 7 * i) % vocabulary for i in range(prompt + chosen + rejected)]
        made.append(
            TokenizedPair(
                id=f"probe{len(made)}",
                group_id="probe",
                prompt=tuple(ids[:prompt]),
                chosen=tuple(ids[prompt : prompt + chosen]),
                rejected=tuple(ids[prompt + chosen :]),
                weight=1.0,
            )
        )
        start += len(ids)
    return made
