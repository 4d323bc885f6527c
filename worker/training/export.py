"""Folders to publish: an adapter that plain peft loads, or full weights with it merged in."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig

from core.errors import FailureCode, RunAborted
from core.modelref import ModelRef
from core.results import Comparison, Evaluation, HeavyTails
from core.spec import KernelTerm, LinkTerm, ObjectiveSpec, PenaltyTerm
from worker.ingest.files import file_sha256
from worker.training.folders import SealedFolder, seal_folder, write_json
from worker.training.model import Policy, load_base, peft_warnings_off
from worker.training.tokenize import load_tokenizer

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
TRAINING_CONFIG = "training_config.json"
_ADAPTER_IS = "A LoRA adapter trained on preference pairs by kdpo (DPO-Kernels, arXiv 2501.03271)."
_FULL_IS = (
    "Full weights, all of them trained on preference pairs by kdpo (DPO-Kernels, arXiv 2501.03271) "
    "in float32 and stored as {precision}. The numbers below were measured before that rounding."
)
_ADAPTER_USE = (
    "from peft import AutoPeftModelForCausalLM",
    "from transformers import AutoTokenizer",
    "",
    'model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")',
)
_MERGED_USE = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")',
)
_PACKAGES = ("kdpo", "torch", "transformers", "peft", "safetensors", "optuna")


@dataclass(frozen=True)
class CardFacts:
    """What the model card and the metadata of a checkpoint say."""

    label: str
    base: ModelRef
    objective: ObjectiveSpec
    training: dict[str, Any]
    model_sha256: str
    tokenizer_sha256: str
    dataset_sha256: str
    seed: int
    evaluation: Evaluation
    comparison: Comparison
    recommendation: str | None
    mixture_weights: dict[str, float] | None
    heavy_tails: HeavyTails | None = None


def versions() -> dict[str, str]:
    """Versions of everything that numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def export_adapter(policy: Policy, final: Path, *, token: str, facts: CardFacts) -> SealedFolder:
    """Write adapter, tokenizer, model card, configuration, checksums and manifest to `final`.

    Raises:
        RunAborted: a weight is not finite (`loss_nan`); such a model is never published.
        StorageFull: the disk has no room.
    """
    _refuse_non_finite(policy.adapter())
    about = {
        "format": "kdpo-checkpoint-1",
        "kind": "adapter",
        "label": facts.label,
        **_sources(facts),
        "seed": facts.seed,
        "versions": versions(),
    }

    def write(folder: Path) -> None:
        assert isinstance(policy.model, PeftModel)
        config = policy.model.peft_config["default"]
        assert isinstance(config, LoraConfig)
        assert config.target_modules is not None
        config.base_model_name_or_path = base_name(facts.base)
        config.revision = facts.base.revision
        config.target_modules = sorted(config.target_modules)
        policy.model.save_pretrained(str(folder), save_embedding_layers=False)
        policy.tokenizer.save_pretrained(folder)
        write_json(folder / TRAINING_CONFIG, _training_config(facts))
        (folder / "README.md").write_text(_card(facts), encoding="utf-8")
        _write_sums(folder)

    return seal_folder(final, token=token, manifest_name=MANIFEST, about=about, write=write)


def export_full(policy: Policy, final: Path, *, token: str, facts: CardFacts) -> SealedFolder:
    """Write the weights of a full fine-tuning, tokenizer, card and sums to `final`.

    They are rounded once, from float32 to the base's own precision.

    Raises:
        RunAborted: a weight is not finite (`loss_nan`); such a model is never published.
        StorageFull: the disk has no room.
    """
    assert policy.base is not None
    trained = policy.adapter()
    _refuse_non_finite(trained)
    # A fresh copy: the policy keeps its precision, and the configuration is as the base has it.
    model = load_base(policy.base.folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(trained[name])
    nn.Module.to(model, _own_dtype(policy.base.folder))
    precision = str(model.dtype).removeprefix("torch.")
    about = {
        "format": "kdpo-checkpoint-1",
        "kind": "full",
        "label": facts.label,
        **_sources(facts),
        "seed": facts.seed,
        "versions": versions(),
    }

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        write_json(folder / TRAINING_CONFIG, _training_config(facts))
        full_is = _FULL_IS.format(precision=precision)
        (folder / "README.md").write_text(_as_full_model(_card(facts), full_is), encoding="utf-8")
        _write_sums(folder)

    return seal_folder(final, token=token, manifest_name=MANIFEST, about=about, write=write)


def _own_dtype(base_folder: Path) -> torch.dtype:
    """The precision in which a base is stored."""
    config = AutoConfig.from_pretrained(base_folder, trust_remote_code=False, local_files_only=True)
    return config.dtype or torch.float32


def export_merged(
    base_folder: Path,
    adapter_folder: Path,
    final: Path,
    *,
    token: str,
    about: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> SealedFolder:
    """Merge the adapter of a checkpoint into its base and write the full model to `final`.

    The sum is taken in float32 and rounded once, to `dtype` or the base's own precision.

    Raises:
        RunAborted: the base cannot be loaded, or a weight is not finite.
        StorageFull: the disk has no room.
    """
    base = load_base(base_folder, dtype=torch.float32)
    with peft_warnings_off():
        merged = PeftModel.from_pretrained(base, adapter_folder).merge_and_unload()
    merged.to(dtype or _own_dtype(base_folder))
    _refuse_non_finite(dict(merged.named_parameters()))
    tokenizer = load_tokenizer(adapter_folder)

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / TRAINING_CONFIG).write_bytes((adapter_folder / TRAINING_CONFIG).read_bytes())
        adapter_card = (adapter_folder / "README.md").read_text(encoding="utf-8")
        card = _merged_card(adapter_card, precision=str(merged.dtype).removeprefix("torch."))
        (folder / "README.md").write_text(card, encoding="utf-8")
        _write_sums(folder)

    return seal_folder(
        final,
        token=token,
        manifest_name=MANIFEST,
        about={**about, "kind": "merged", "versions": versions()},
        write=write,
    )


def base_name(base: ModelRef) -> str:
    """What plain transformers is given to load the base: the hub id, or the folder's path."""
    if base.source == "hub":
        assert base.repo_id is not None
        return base.repo_id
    return str(base.path)


def _training_config(facts: CardFacts) -> dict[str, Any]:
    return {
        **_sources(facts),
        "objective": facts.objective.model_dump(mode="json"),
        "training": facts.training,
        "mixture_weights": facts.mixture_weights,
        "seed": facts.seed,
        "versions": versions(),
    }


def _sources(facts: CardFacts) -> dict[str, Any]:
    """What was read: the base by name and by content, the tokenizer's files, the data."""
    return {
        "base_model": facts.base.model_dump(mode="json"),
        "model_sha256": facts.model_sha256,
        "tokenizer_sha256": facts.tokenizer_sha256,
        "dataset_sha256": facts.dataset_sha256,
    }


def _write_sums(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="ascii")


def _refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RunAborted(
                f"{name} holds NaN or infinity; a model with such weights is not published",
                failure=FailureCode.LOSS_NAN,
                hint="lower the learning rate",
            )


def _card(facts: CardFacts) -> str:
    e, c = facts.evaluation, facts.comparison
    objective = facts.objective
    kernel, divergence = objective.kernel_term, objective.divergence_term
    lines = [
        "---",
        # A path of this machine says nothing to the hub, and it refuses the card.
        *([f"base_model: {base_name(facts.base)}"] if facts.base.source == "hub" else []),
        "library_name: peft",
        "pipeline_tag: text-generation",
        f"tags: [kdpo, dpo, {'lora, ' if 'lora' in facts.training else ''}preference-alignment]",
        "---",
        f"# {facts.base.name}, aligned with {objective.label}",
        "",
        _ADAPTER_IS,
        "",
        "| | |",
        "|---|---|",
        f"| Base model | {facts.base.name}, revision {facts.base.revision or 'local folder'} |",
        f"| Data | sha256 `{facts.dataset_sha256}` |",
        f"| Kernel | {_term(kernel)} |",
        f"| Divergence | {_term(divergence)} |",
        f"| beta, label smoothing | {objective.beta:g}, {objective.label_smoothing:g} |",
        f"| Seed | {facts.seed} |",
        f"| Recommendation | {facts.recommendation or 'none was asked for'} |",
    ]
    if facts.mixture_weights is not None:
        weights = ", ".join(f"{name} {w:.3f}" for name, w in facts.mixture_weights.items())
        lines.append(f"| Mixture weights | {weights} |")
    lines += [
        "",
        "## Held-out test pairs",
        "",
        "| measure | value |",
        "|---|---|",
        f"| calibrated log-loss (temperature {e.temperature:.4g}) | {e.log_loss:.4f} |",
        f"| preference accuracy | {e.accuracy:.4f} |",
        f"| length-normalised accuracy | {e.accuracy_length_normalized:.4f} |",
        f"| expected calibration error | {e.calibration_error:.4f} |",
        f"| drift, KL to the base per token | {e.drift:.4f} |",
        f"| log-ratio of chosen answers | {e.chosen_displacement:.4f} |",
        f"| pairs, prompts | {e.pairs}, {e.prompts} |",
        "",
        "Against plain DPO on the same pairs (95 % interval, bootstrap over prompts):",
        c.sentence,
        "",
        *_tails(facts.heavy_tails),
        "## Use",
        "",
        "```python",
        *_ADAPTER_USE,
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
        "```",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {number}" for name, number in versions().items()),
        "",
    ]
    return "\n".join(lines)


def _tails(tails: HeavyTails | None) -> list[str]:
    """The card's section on weight spectra, where they were measured."""
    if tails is None:
        return []
    return ["## Weight spectra", "", tails.sentence, "Alpha alone does not tell quality.", ""]


def _merged_card(adapter_card: str, *, precision: str) -> str:
    """Turn the card of an adapter into that of the full model that it was merged into."""
    merged_is = (
        "Full weights: a LoRA adapter trained on preference pairs by kdpo (DPO-Kernels, arXiv "
        f"2501.03271), merged into its base in float32 and stored as {precision}. The numbers "
        "below were measured with the adapter before merging."
    )
    return _as_full_model(adapter_card, merged_is)


def _as_full_model(adapter_card: str, what_it_is: str) -> str:
    """Turn the card of an adapter into that of a model with weights of its own."""
    card = adapter_card
    for old, new in (
        ("library_name: peft", "library_name: transformers"),
        (_ADAPTER_IS, what_it_is),
        ("\n".join(_ADAPTER_USE), "\n".join(_MERGED_USE)),
    ):
        assert old in card, "the adapter's card verifies, so it is as it was written"
        card = card.replace(old, new)
    return card


def _term(term: KernelTerm | PenaltyTerm | LinkTerm | None) -> str:
    if term is None:
        return "none"
    values = term.model_dump(mode="json", exclude_none=True)
    return f"`{orjson.dumps(values).decode()}`"
