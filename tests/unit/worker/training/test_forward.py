from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from core.spec import DivergenceName, DivergenceSpec
from objectives import build_divergence, per_pair_mean, streamed_divergence
from tests.unit.worker.training.micro import (
    Bench,
    micro_policy,
    random_pairs,
    stored_states,
)
from worker.training.batches import DataOrder, Form, collate, micro_batches, permutation
from worker.training.forward import hidden_states, score_tokens
from worker.training.model import Policy

CPU = torch.device("cpu")


@pytest.fixture(params=["llama_folder", "gpt2_folder"])
def policy(request: pytest.FixtureRequest) -> Policy:
    policy = micro_policy(request.getfixturevalue(request.param))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.adapter().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def test_log_probs_and_embeddings_equal_one_sequence_at_a_time(policy: Policy) -> None:
    pairs = random_pairs(7)
    batch = collate(pairs, [6, 0, 3, 2], form=policy.form, device=CPU)
    with torch.no_grad():
        hidden = hidden_states(policy, batch, embeddings=True)
        scores = score_tokens(policy.head, hidden.states, batch.labels, entropy=True)
        chosen, rejected = scores.sequence_log_probs(batch)
        assert hidden.embeddings is not None
        for i, pair in enumerate(pairs[j] for j in (6, 0, 3, 2)):
            for answer, total, pooled in (
                (pair.chosen, chosen[i], hidden.embeddings.chosen[i]),
                (pair.rejected, rejected[i], hidden.embeddings.rejected[i]),
            ):
                tokens = torch.tensor([[*pair.prompt, *answer]])
                out = policy.model(input_ids=tokens, output_hidden_states=True)
                log_p = out.logits[0].log_softmax(-1)
                start = len(pair.prompt)
                expected = sum(float(log_p[start + t - 1, token]) for t, token in enumerate(answer))
                assert float(total) == pytest.approx(expected, abs=2e-4)
                torch.testing.assert_close(
                    pooled, out.hidden_states[-1][0, start:].mean(0), rtol=1e-4, atol=1e-5
                )
            torch.testing.assert_close(
                hidden.embeddings.prompt[i],
                out.hidden_states[-1][0, : len(pair.prompt)].mean(0),
                rtol=1e-4,
                atol=1e-5,
            )


def test_adapter_off_is_the_reference(policy: Policy) -> None:
    batch = collate(random_pairs(4), range(4), form=policy.form, device=CPU)
    with torch.no_grad():
        on = hidden_states(policy, batch, embeddings=False).states
        with policy.as_reference():
            off = hidden_states(policy, batch, embeddings=False).states
        assert not torch.allclose(on, off)
        policy.reset_adapter(0)
        fresh = hidden_states(policy, batch, embeddings=False).states
    assert torch.equal(fresh, off)


@pytest.mark.parametrize("name", DivergenceName)
def test_scores_and_gradients_are_those_of_whole_logits(
    policy: Policy, name: DivergenceName
) -> None:
    batch = collate(random_pairs(4), range(4), form=policy.form, device=CPU)
    spec = TypeAdapter(DivergenceSpec).validate_python({"type": name.value})
    divergence = build_divergence(spec, head=policy.head.weight)
    with torch.no_grad(), policy.as_reference():
        base = hidden_states(policy, batch, embeddings=False).states

    def gradients(total: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(total, list(policy.adapter().values())))

    scores = score_tokens(
        policy.head,
        hidden_states(policy, batch, embeddings=False).states,
        batch.labels,
        reference_states=base,
        divergence=streamed_divergence(spec, divergence),
    )
    ours = scores.log_prob.sum() + scores.pair_divergence(batch).sum()
    log_p = policy.head(hidden_states(policy, batch, embeddings=False).states).log_softmax(-1)
    values = divergence(log_p, policy.head(base).log_softmax(-1))
    labels = log_p.gather(1, batch.labels[:, None])
    whole = labels.sum() + per_pair_mean(values, batch.row % batch.pairs, batch.pairs).sum()
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(ours), gradients(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_reference_states_are_those_of_the_base_in_every_batch(
    policy: Policy, tmp_path: Path
) -> None:
    pairs = random_pairs(13)
    stored = stored_states(policy, pairs, tmp_path)
    for index in ([3], [5, 0, 12], list(range(13))):
        batch = collate(pairs, index, form=policy.form, device=CPU)
        with torch.no_grad(), policy.as_reference():
            fresh = hidden_states(policy, batch, embeddings=False).states
        torch.testing.assert_close(stored.of(batch), fresh, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("max_tokens", [1, 40, 96, 10_000])
def test_micro_batches_hold_every_pair_once_within_the_limit(form: Form, max_tokens: int) -> None:
    pairs = random_pairs(30)
    index = [*range(30), 7, 7]
    groups = micro_batches(pairs, index, max_tokens=max_tokens, form=form)
    assert sorted(i for group in groups for i in group) == sorted(index)
    for group in groups:
        batch = collate(pairs, group, form=form, device=CPU)
        assert len(group) == 1 or batch.input_ids.numel() <= max_tokens


def test_packed_rows_are_filled_evenly_and_not_padded() -> None:
    pairs = random_pairs(60)
    groups = micro_batches(pairs, range(60), max_tokens=160, form=Form.SHARED)
    batches = [collate(pairs, group, form=Form.SHARED, device=CPU) for group in groups]
    sizes = [batch.input_ids.shape[1] for batch in batches]
    assert sum(sizes) == sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    assert max(sizes) - min(sizes) <= max(pairs[i].length for i in range(60))
    assert len(groups) <= -(-sum(sizes) // 160) + 1


def test_data_order_is_every_epochs_permutation_cut_into_steps() -> None:
    order = DataOrder(10, batch_size=4, seed=11)
    seen = [i for step in range(5) for i in order.pairs_of(step)]
    assert seen[:10] == permutation(10, seed=11, epoch=0)
    assert seen[10:] == permutation(10, seed=11, epoch=1)
    assert seen[:10] != seen[10:]
    fresh = DataOrder(10, batch_size=4, seed=11)
    assert fresh.pairs_of(3) == seen[12:16]
    assert fresh.position(3) == (1, 2)


def test_the_reference_table_is_what_the_model_says(bench: Bench, llama_folder: Path) -> None:
    pair = bench.pairs[3]
    tokens = torch.tensor([[*pair.prompt, *pair.rejected]])
    with torch.no_grad(), bench.policy.as_reference():
        log_p = bench.policy.model(input_ids=tokens).logits[0].log_softmax(-1)
    start = len(pair.prompt)
    expected = sum(float(log_p[start + t - 1, token]) for t, token in enumerate(pair.rejected))
    assert float(bench.table.rejected_log_prob[3]) == pytest.approx(expected, abs=2e-4)
    features = bench.table.features(bench.pairs)
    assert features.group.tolist() == [i // 2 for i in range(12)]
    assert features.rejected_tokens[3] == len(pair.rejected)
    assert bool((bench.table.entropy > 0).all())
    assert bool((bench.table.entropy <= 1).all())
