"""What makes a model fit: blocks that compute again, a base of 4 bits, memory given back."""

import gc
from functools import partial
from importlib.util import find_spec

import torch
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, PreTrainedModel

from core.errors import FailureCode, RunAborted
from core.run_spec import FinalRunSpec


def checkpoint_layers(model: PreTrainedModel) -> int:
    """Let every block keep its input only and compute the rest again; returns how many there are.

    transformers' own switch acts in training mode only, which would bring dropout with it.

    Raises:
        RunAborted: the architecture does not say what its blocks are (`model_not_found`).
    """
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise RunAborted(
            f"the architecture {model.config.model_type} does not name its blocks, so that "
            "gradient_checkpointing has nothing to act on",
            failure=FailureCode.MODEL_NOT_FOUND,
            hint="drop gradient_checkpointing",
        )
    for block in blocks:
        # Nothing in a block draws random numbers: the model is in evaluation mode.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    return len(blocks)


def quantization_config(
    options: FinalRunSpec, dtype: torch.dtype, device: torch.device
) -> BitsAndBytesConfig | None:
    """How to load the base in 4 bits (NF4, scales quantised too), None for plain weights.

    Raises:
        RunAborted: there is no CUDA device or no bitsandbytes (`dependency_error`).
    """
    if options.quantization is None:
        return None
    missing = []
    if device.type != "cuda":
        missing.append(f"a CUDA device (the worker trains on {device.type})")
    if find_spec("bitsandbytes") is None:
        missing.append("the package bitsandbytes")
    if missing:
        raise RunAborted(
            f"quantization `4bit` needs {' and '.join(missing)}",
            failure=FailureCode.DEPENDENCY_ERROR,
            hint="install it on the worker, or drop quantization",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def free_memory(device: torch.device) -> None:
    """Give back what nobody uses any more: models and their trainers refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
