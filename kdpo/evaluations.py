"""Calls about evaluations: how good a checkpoint is on held-out pairs, and against its base."""

from collections.abc import Mapping
from typing import Literal

from kdpo.calls import HasPolicy, call, listing
from kdpo.flows import Flow, Items
from kdpo.resources import got, id_of, paged, posted, without_none
from kdpo.sending import Policy
from kdpo.types import Checkpoint, Dataset, Evaluation, EvaluationSample

Split = Literal["validation", "test"]


class EvaluationCalls:
    """`client.evaluations`: what was measured of checkpoints."""

    @call
    def get(self: HasPolicy, evaluation: str | Evaluation) -> Flow[Evaluation]:
        """Return an evaluation as it is now."""
        return get_evaluation(id_of(evaluation), self._policy)

    @listing
    def list(
        self: HasPolicy, *, checkpoint: str | Checkpoint | None = None, limit: int | None = None
    ) -> Items[Evaluation]:
        """Iterate over evaluations, newest first, page by page as you go."""
        named = None if checkpoint is None else id_of(checkpoint)
        return paged(Evaluation, "/v1/evaluations", self._policy, limit=limit, checkpoint_id=named)

    @listing
    def samples(
        self: HasPolicy, evaluation: str | Evaluation, *, limit: int | None = None
    ) -> Items[EvaluationSample]:
        """Iterate over the answers of base and checkpoint, with the rewards of both."""
        path = f"/v1/evaluations/{id_of(evaluation)}/samples"
        return paged(EvaluationSample, path, self._policy, limit=limit)


def get_evaluation(evaluation_id: str, policy: Policy) -> Flow[Evaluation]:
    """Return an evaluation as it is now."""
    return got(Evaluation, f"/v1/evaluations/{evaluation_id}", policy)


def asked_evaluation(
    checkpoint: Checkpoint,
    policy: Policy,
    *,
    dataset: str | Dataset | None,
    split: Split | None,
    reward_model: str | None,
    max_prompts: int | None,
    max_new_tokens: int | None,
    seed: int,
    metadata: Mapping[str, str] | None,
) -> Flow[Evaluation]:
    """Queue an evaluation; what is None is as the server has it."""
    body = without_none(
        {
            "checkpoint_id": checkpoint.id,
            "dataset_id": None if dataset is None else id_of(dataset),
            "split": split,
            "reward_model": reward_model,
            "max_prompts": max_prompts,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "metadata": metadata,
        }
    )
    return posted(Evaluation, "/v1/evaluations", policy, body)
