"""Embeddings by a frozen encoder, for kernel terms that do not look at the policy."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel

from core.errors import FailureCode, RunAborted
from objectives import PairEmbeddings
from worker.ingest.canonical import CanonicalRow, Message
from worker.training.tokenize import load_tokenizer, positions_of

BATCH = 32
MAX_TOKENS = 512

Progress = Callable[[int, int], None]


@torch.no_grad()
def encode_rows(
    folder: Path, rows: Sequence[CanonicalRow], *, device: torch.device, progress: Progress
) -> PairEmbeddings:
    """Mean last hidden state of prompts and answers under the encoder, (N, H) float32 on the CPU.

    Texts are cut to the encoder's positions. `progress(texts done, texts in all)` may raise.

    Raises:
        RunAborted: the folder holds no encoder that can be used (`model_not_found`).
    """
    tokenizer = load_tokenizer(folder)
    try:
        model = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunAborted(
            f"the encoder in {folder} cannot be loaded: {str(error).splitlines()[0]}",
            failure=FailureCode.MODEL_NOT_FOUND,
            hint="an encoder's folder needs config.json, *.safetensors and the tokenizer's files",
        ) from error
    model.to(device).eval()
    limit = min(MAX_TOKENS, positions_of(model.config) or MAX_TOKENS)
    parts = [
        [_text(getattr(row, name)) for row in rows] for name in ("prompt", "chosen", "rejected")
    ]
    texts = [text for part in parts for text in part]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    pooled: list[Tensor | None] = [None] * len(texts)
    for start in range(0, len(order), BATCH):
        index = order[start : start + BATCH]
        ids = [tokenizer.encode(texts[i], truncation=True, max_length=limit) or [0] for i in index]
        lengths = torch.tensor([len(row) for row in ids], device=device)
        tokens = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in ids], batch_first=True
        ).to(device)
        mask = (torch.arange(tokens.shape[1], device=device) < lengths[:, None]).long()
        states = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        means = torch.bmm(mask[:, None, :].float(), states).squeeze(1) / lengths[:, None]
        for i, mean in zip(index, means.cpu(), strict=True):
            pooled[i] = mean
        progress(start + len(index), len(texts))
    table = torch.stack([p for p in pooled if p is not None])
    prompt, chosen, rejected = table.split(len(rows))
    return PairEmbeddings(prompt, chosen, rejected)


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(message.content for message in messages)
