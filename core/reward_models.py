"""What a folder must be to judge answers: a sequence classifier with one output."""

import json
from pathlib import Path

from core.errors import InvalidInput

ARCHITECTURE = "ForSequenceClassification"
_LABELS_BY_DEFAULT = 2  # of transformers


def check_reward_model(folder: Path) -> None:
    """Check by its `config.json` that a checked model folder holds a reward model.

    Of any other model transformers would make a head anew, at random.

    Raises:
        InvalidInput: code `model_not_reward_model`.
    """
    config = json.loads((folder / "config.json").read_bytes())
    architecture = str((config.get("architectures") or ["model without an architecture"])[0])
    labels = config.get("id2label")
    outputs = len(labels) if labels is not None else config.get("num_labels", _LABELS_BY_DEFAULT)
    if architecture.endswith(ARCHITECTURE) and outputs == 1:
        return
    raise InvalidInput(
        f"the reward model is a {architecture} with {outputs} outputs, expected a {ARCHITECTURE} "
        "with one",
        code="model_not_reward_model",
        param="reward_model",
        hint="name a reward model, such as Skywork/Skywork-Reward-V2-Qwen3-0.6B",
    )
