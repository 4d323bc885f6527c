"""What one pass of the reference model over the pairs leaves behind."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from core.errors import InvalidInput


@dataclass(frozen=True)
class ReferenceFeatures:
    """Features of N pairs under the reference, on the CPU, float32 but for `group`.

    Embeddings (N, H); log-probs (N,), summed over response tokens; token counts (N,);
    `token_log_probs` (M,), a sample of response-token log-probs, `token_group` (M,) the prompts
    that they are from; `entropy` (N,), mean next-token entropy over response tokens divided by
    log V; `group` (N,) int64: pairs of one prompt share an id. Raises InvalidInput when the shapes
    do not fit, when a number is not finite, or when there are fewer than two prompts.
    """

    prompt_embedding: Tensor
    chosen_embedding: Tensor
    rejected_embedding: Tensor
    chosen_log_prob: Tensor
    rejected_log_prob: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    token_log_probs: Tensor
    token_group: Tensor
    entropy: Tensor
    group: Tensor

    def __post_init__(self) -> None:
        if self.token_log_probs.numel() == 0:
            raise InvalidInput("token_log_probs is empty; expected at least one token")
        pairs = self.group.shape[0]
        width = self.prompt_embedding.shape[-1]
        for field in fields(self):
            value: Tensor = getattr(self, field.name)
            if field.name.endswith("_embedding"):
                shape: tuple[int, ...] = (pairs, width)
            elif field.name.startswith("token_"):
                shape = (self.token_log_probs.numel(),)
            else:
                shape = (pairs,)
            if tuple(value.shape) != shape:
                raise InvalidInput(
                    f"{field.name} has shape {tuple(value.shape)}, expected {shape}",
                    param=field.name,
                )
            if not bool(torch.isfinite(value).all()):
                raise InvalidInput(
                    f"{field.name} holds NaN or infinity; drop the pairs that the reference cannot "
                    "score",
                    param=field.name,
                )
        if pairs == 0 or self.prompts < 2:
            raise InvalidInput(
                f"metrics need pairs of at least 2 prompts, received {pairs} pairs of one prompt",
                hint="upload more data",
            )

    @property
    def pairs(self) -> int:
        """N, the number of pairs."""
        return self.group.shape[0]

    @property
    def prompts(self) -> int:
        """Number of different prompts."""
        return int(group_index(self.group).max()) + 1

    def take(self, index: Tensor) -> "ReferenceFeatures":
        """Return the pairs at `index`; the token sample stays whole."""
        return ReferenceFeatures(
            prompt_embedding=self.prompt_embedding[index],
            chosen_embedding=self.chosen_embedding[index],
            rejected_embedding=self.rejected_embedding[index],
            chosen_log_prob=self.chosen_log_prob[index],
            rejected_log_prob=self.rejected_log_prob[index],
            chosen_tokens=self.chosen_tokens[index],
            rejected_tokens=self.rejected_tokens[index],
            token_log_probs=self.token_log_probs,
            token_group=self.token_group,
            entropy=self.entropy[index],
            group=self.group[index],
        )


def group_index(group: Tensor) -> Tensor:
    """Return ids renumbered 0, 1, … in their order, (N,) int64."""
    unique: tuple[Tensor, Tensor] = torch.unique(group, return_inverse=True)
    return unique[1]
