"""What the frozen reference says about pairs: one pass, and the hash of all that it depends on."""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from objectives import PairEmbeddings, per_pair_mean
from selection.features import ReferenceFeatures
from worker.ingest.files import file_sha256
from worker.training.batches import PairBatch, collate, micro_batches
from worker.training.forward import hidden_states, score_tokens
from worker.training.lanes import in_lanes, lanes_of
from worker.training.model import Policy
from worker.training.tokenize import TokenizedPair

TOKEN_SAMPLE = 4096
FORWARD_TOKENS = 4_096
FORMAT = "kdpo-reference-4"
_TOKENIZER_FILES = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"),
        *("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    }
)

Progress = Callable[[int, int], None]
TakeStates = Callable[[PairBatch, Tensor], None]


@dataclass(frozen=True)
class ReferenceTable:
    """What the reference says about N pairs, on the CPU, float32, in the order of the pairs.

    Embeddings (N, H), log-probs (N,) summed over response tokens, `entropy` (N,) mean next-token
    entropy over response tokens divided by log V, `token_log_probs` (M,) an even sample of tokens,
    `token_pair` (M,) int64 the pairs that they are from.
    """

    prompt_embedding: Tensor
    chosen_embedding: Tensor
    rejected_embedding: Tensor
    chosen_log_prob: Tensor
    rejected_log_prob: Tensor
    entropy: Tensor
    token_log_probs: Tensor
    token_pair: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def embeddings(self) -> PairEmbeddings:
        """Pooled embeddings under the reference."""
        return PairEmbeddings(self.prompt_embedding, self.chosen_embedding, self.rejected_embedding)

    def features(self, pairs: Sequence[TokenizedPair]) -> ReferenceFeatures:
        """Return what selection measures.

        Raises:
            InvalidInput: fewer than two prompts, or numbers that are not finite.
        """
        groups: dict[str, int] = {}
        group = torch.tensor([groups.setdefault(p.group_id, len(groups)) for p in pairs])
        return ReferenceFeatures(
            prompt_embedding=self.prompt_embedding,
            chosen_embedding=self.chosen_embedding,
            rejected_embedding=self.rejected_embedding,
            chosen_log_prob=self.chosen_log_prob,
            rejected_log_prob=self.rejected_log_prob,
            chosen_tokens=torch.tensor([float(len(p.chosen)) for p in pairs]),
            rejected_tokens=torch.tensor([float(len(p.rejected)) for p in pairs]),
            token_log_probs=self.token_log_probs,
            token_group=group[self.token_pair],
            entropy=self.entropy,
            group=group,
        )


def model_sha256(folder: Path) -> str:
    """Hash of a model's weights and configuration, by content."""
    names = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")
    return _combined([folder / "config.json", *names])


def tokenizer_sha256(folder: Path) -> str:
    """Hash of a tokenizer's files, by content."""
    return _combined(sorted(p for p in folder.iterdir() if p.name in _TOKENIZER_FILES))


def model_hashes(folder: Path) -> dict[str, str]:
    """Hashes of a model's weights and of its tokenizer, under the names that manifests use."""
    return {
        "model_sha256": model_sha256(folder),
        "tokenizer_sha256": tokenizer_sha256(folder),
    }


def tokens_sha256(pairs: Sequence[TokenizedPair]) -> str:
    """Hash of the token ids of pairs, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr((pair.prompt, pair.chosen, pair.rejected)).encode())
    return digest.hexdigest()


def reference_key(*, model: str, tokenizer: str, tokens: str, precision: str, form: str) -> str:
    """Name of a reference pass: a hash of all that its numbers depend on, and of nothing else.

    `model`, `tokenizer` and `tokens` are hashes of content, `precision` is the type that the base
    computes in, `form` says how batches are laid out and attended to.
    """
    about = (FORMAT, model, tokenizer, tokens, precision, form, f"{FORWARD_TOKENS} tokens a batch")
    return hashlib.sha256(repr(about).encode()).hexdigest()


@torch.no_grad()
def compute_reference(
    policy: Policy,
    pairs: Sequence[TokenizedPair],
    *,
    progress: Progress,
    take_states: TakeStates | None = None,
) -> ReferenceTable:
    """Run the frozen model over all pairs once, in the batches of `evaluate.measure`.

    There an untrained policy has exactly the states that `take_states` is given batch by batch,
    in the order of the batch's labels. `progress(pairs done, pairs in all)` may raise to stop.
    """
    n, width = len(pairs), policy.hidden_size
    out = {
        **{f"{name}_embedding": torch.zeros(n, width) for name in ("prompt", "chosen", "rejected")},
        **{name: torch.zeros(n) for name in ("chosen_log_prob", "rejected_log_prob", "entropy")},
    }
    responses = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    stride = max(1, math.ceil(responses / TOKEN_SAMPLE))
    sampled: list[Tensor] = []
    sampled_from: list[Tensor] = []
    done, seen = 0, 0
    groups = micro_batches(pairs, range(n), max_tokens=FORWARD_TOKENS, form=policy.form)
    one = partial(_pass_batch, policy, pairs, keep=take_states is not None)
    with (
        policy.as_reference(),
        closing(in_lanes(groups, one, lanes=lanes_of(policy))) as passes,
    ):
        for passed in passes:
            batch, rows = passed.batch, list(passed.batch.order)
            if take_states is not None:
                assert passed.states is not None
                take_states(batch, passed.states)
            for name, value in passed.values.items():
                out[name][rows] = value
            # Every stride-th response token of the whole pass, wherever batches end.
            evenly = slice(-seen % stride, None, stride)
            sampled.append(passed.log_prob[evenly])
            sampled_from.append(torch.tensor(rows)[(batch.row % batch.pairs)[evenly].cpu()])
            seen += passed.log_prob.shape[0]
            done += batch.pairs
            progress(done, n)
    return ReferenceTable(
        **out, token_log_probs=torch.cat(sampled), token_pair=torch.cat(sampled_from)
    )


@dataclass(frozen=True)
class _Passed:
    """What one batch gives: rows of the table by name, and (N,) log-probs of response tokens."""

    batch: PairBatch
    states: Tensor | None
    log_prob: Tensor
    values: dict[str, Tensor]


def _pass_batch(
    policy: Policy, pairs: Sequence[TokenizedPair], group: Sequence[int], *, keep: bool
) -> _Passed:
    """Run the model, as it stands, over one batch; `keep` the hidden states."""
    batch = collate(pairs, group, form=policy.form, device=policy.device)
    hidden = hidden_states(policy, batch, embeddings=True)
    scores = score_tokens(policy.head, hidden.states, batch.labels, entropy=True)
    assert hidden.embeddings is not None
    assert scores.entropy is not None
    chosen, rejected = scores.sequence_log_probs(batch)
    entropy = per_pair_mean(scores.entropy, batch.row % batch.pairs, batch.pairs)
    values = {
        "prompt_embedding": hidden.embeddings.prompt,
        "chosen_embedding": hidden.embeddings.chosen,
        "rejected_embedding": hidden.embeddings.rejected,
        "chosen_log_prob": chosen,
        "rejected_log_prob": rejected,
        "entropy": entropy / math.log(policy.head.out_features),
    }
    return _Passed(
        batch=batch,
        states=hidden.states if keep else None,
        log_prob=scores.log_prob.float().cpu(),
        values={name: value.float().cpu() for name, value in values.items()},
    )


def _combined(files: Sequence[Path]) -> str:
    lines = [f"{path.name} {file_sha256(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
