"""Publishing the weights that a policy holds, with what is known about the run they came from."""

from dataclasses import dataclass

from core.results import Comparison, Evaluation, HeavyTails
from worker.jobs.publish import publish_folder
from worker.jobs.runs import RunRequest
from worker.jobs.workbench import Workbench
from worker.training.export import CardFacts, export_adapter, export_full


@dataclass(frozen=True)
class Publication:
    """One checkpoint: whose weights after which step, and what was measured of them."""

    label: str
    request: RunRequest
    checkpoint_id: str
    step: int
    measured: Evaluation
    comparison: Comparison
    mixture_weights: dict[str, float] | None
    recommendation: str | None = None
    heavy_tails: HeavyTails | None = None


def publish_run(bench: Workbench, publication: Publication) -> None:
    """Export what the policy holds and make it visible; doing it again changes nothing.

    Raises:
        RunAborted: a weight is not finite.
        StorageFull: the disk has no room.
        LeaseLost: another attempt owns the job.
    """
    context, label = bench.context, publication.label
    is_full = bench.policy.is_full
    how: dict[str, object] = {"adaptation": bench.spec.adaptation}
    if not is_full:
        how["lora"] = bench.spec.lora.model_dump(mode="json")
    if bench.spec.quantization is not None:
        how["quantization"] = bench.spec.quantization
    export = export_full if is_full else export_adapter
    sealed = export(
        bench.policy,
        context.attempt_dir / "checkpoints" / label,
        token=f"{context.fence.attempt}-{label}",
        facts=CardFacts(
            label=label,
            base=bench.model,
            objective=publication.request.objective,
            training={
                **bench.plan(publication.request).as_dict(),
                **how,
                "precision": bench.policy.precision,
                "step": publication.step,
            },
            model_sha256=bench.hashes["model_sha256"],
            tokenizer_sha256=bench.hashes["tokenizer_sha256"],
            dataset_sha256=bench.hashes["dataset_sha256"],
            seed=bench.seed,
            evaluation=publication.measured,
            comparison=publication.comparison,
            recommendation=publication.recommendation,
            mixture_weights=publication.mixture_weights,
            heavy_tails=publication.heavy_tails,
        ),
    )
    publish_folder(
        context,
        sealed,
        checkpoint_id=publication.checkpoint_id,
        kind="full" if is_full else "adapter",
        label=label,
        step=publication.step,
        metrics=publication.measured.model_dump(mode="json"),
    )
