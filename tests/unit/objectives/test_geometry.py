"""The frame is what its equations say, deterministic, and survives degenerate data."""

import math
from dataclasses import replace

import pytest
import torch

from objectives import Geometry, PairEmbeddings, fit_geometry
from objectives.geometry import ledoit_wolf
from tests.unit.objectives.samples import embeddings, points
from tests.unit.objectives.tolerances import close


def pooled(batch: PairEmbeddings) -> torch.Tensor:
    return torch.cat([batch.prompt, batch.chosen, batch.rejected])


def test_prepared_embeddings_are_centred_with_unit_mean_square() -> None:
    batch = embeddings(width=12)
    prepared = fit_geometry(batch, max_dim=5, seed=0).prepare(pooled(batch))
    assert prepared.shape == (120, 5)
    close(prepared.mean(0), torch.zeros(5), dtype=torch.float32)
    close(prepared.square().sum(-1).mean(), 1.0, dtype=torch.float32)


@pytest.mark.parametrize(("pairs", "width"), [(40, 12), (5, 60)])
def test_projection_spans_the_leading_singular_vectors(pairs: int, width: int) -> None:
    """Both branches (covariance, Gram matrix) against an SVD of the centred rows."""
    batch = embeddings(pairs, width)
    projection = fit_geometry(batch, max_dim=4, seed=0).projection.double()
    rows = pooled(batch)
    _, _, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    leading = directions[:4].T
    close(projection.T @ projection, torch.eye(4), dtype=torch.float32)
    close(projection @ projection.T, leading @ leading.T, dtype=torch.float32)
    largest = projection.gather(0, projection.abs().argmax(0, keepdim=True))
    assert float(largest.min()) > 0.0


def test_median_is_over_prompt_response_pairs() -> None:
    batch = embeddings(pairs=5)
    geometry = fit_geometry(batch, seed=0)
    prompt, chosen, rejected = (
        geometry.prepare(e) for e in (batch.prompt, batch.chosen, batch.rejected)
    )
    distances = sorted(
        [
            *(chosen - prompt).square().sum(-1).tolist(),
            *(rejected - prompt).square().sum(-1).tolist(),
        ]
    )
    expected = torch.tensor((distances[4] + distances[5]) / 2)
    close(geometry.median_sq_distance, expected, dtype=torch.float32)


def test_ledoit_wolf_matches_the_sum_over_samples() -> None:
    """The paper's b², written as the sum over samples that the code avoids."""
    x = points(30, 6, 1) * torch.linspace(1, 3, 6, dtype=torch.float64)
    centred = x - x.mean(0)
    sample = centred.T @ centred / 30
    target = sample.trace() / 6 * torch.eye(6, dtype=torch.float64)
    d2 = (sample - target).square().sum()
    b2 = sum((torch.outer(row, row) - sample).square().sum() for row in centred) / 30**2
    shrinkage = min(1.0, float(b2 / d2))
    assert 0.0 < shrinkage < 1.0
    close(ledoit_wolf(x), (1 - shrinkage) * sample + shrinkage * target, dtype=torch.float64)


def test_ledoit_wolf_of_few_samples_is_invertible() -> None:
    covariance = ledoit_wolf(points(3, 10, 0))
    assert float(torch.linalg.eigvalsh(covariance).min()) > 1e-3


def test_precision_inverts_the_covariance_of_prepared_responses() -> None:
    batch = embeddings()
    geometry = fit_geometry(batch, seed=0)
    responses = geometry.prepare(torch.cat([batch.chosen, batch.rejected])).double()
    product = geometry.response_precision.double() @ ledoit_wolf(responses)
    torch.testing.assert_close(product, torch.eye(12).double(), rtol=0, atol=1e-4)


def test_sample_holds_responses_and_depends_on_the_seed_alone() -> None:
    batch = embeddings()
    first, again, other = (fit_geometry(batch, max_landmarks=16, seed=seed) for seed in (1, 1, 2))
    assert first.responses.shape == (16, 12)
    responses = first.prepare(torch.cat([batch.chosen, batch.rejected]))
    nearest = torch.cdist(first.responses.double(), responses.double()).min(-1).values
    assert float(nearest.max()) < 1e-5
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert not torch.equal(first.responses, other.responses)


@pytest.mark.parametrize("value", [0.0, 2.3, -1e4])
def test_constant_embeddings_map_to_zero(value: float) -> None:
    flat = torch.full((4, 8), value)
    geometry = fit_geometry(PairEmbeddings(flat, flat, flat), seed=0)
    assert float(geometry.prepare(flat + 1.0).abs().max()) == 0.0
    assert all(bool(torch.isfinite(tensor).all()) for tensor in geometry.tensors().values())
    assert float(geometry.median_sq_distance) == 1.0


def test_rounding_noise_around_a_constant_is_not_amplified() -> None:
    rng = torch.Generator().manual_seed(0)
    noisy = [100.0 + 1e-5 * torch.randn(6, 8, generator=rng) for _ in range(3)]
    geometry = fit_geometry(PairEmbeddings(*noisy), seed=0)
    assert float(geometry.prepare(noisy[0]).abs().max()) == 0.0


def test_constant_responses_get_an_isotropic_precision() -> None:
    prompt = points(6, 4, 0)
    flat = torch.ones(6, 4, dtype=torch.float64)
    geometry = fit_geometry(PairEmbeddings(prompt, flat, flat), seed=0)
    close(geometry.response_precision, geometry.dim * torch.eye(4), dtype=torch.float32)


@pytest.mark.parametrize(("pairs", "width"), [(1, 8), (2, 100), (3, 2)])
def test_tiny_data_keep_only_directions_that_vary(pairs: int, width: int) -> None:
    batch = embeddings(pairs, width)
    geometry = fit_geometry(batch, seed=0)
    assert geometry.dim == min(3 * pairs - 1, width)
    assert geometry.responses.shape == (2 * pairs, geometry.dim)
    close(
        geometry.prepare(pooled(batch)).square().sum(-1).mean(),
        torch.tensor(1.0),
        dtype=torch.float32,
    )


def test_tensors_round_trip() -> None:
    geometry = fit_geometry(embeddings(), seed=0)
    again = Geometry.from_tensors(geometry.tensors())
    e = embeddings(seed=5).prompt
    assert torch.equal(again.prepare(e), geometry.prepare(e))
    assert (again.width, again.dim) == (12, 12)


def test_to_changes_every_tensor() -> None:
    moved = fit_geometry(embeddings(), seed=0).to("cpu", dtype=torch.float64)
    assert {tensor.dtype for tensor in moved.tensors().values()} == {torch.float64}


def test_from_tensors_names_what_is_wrong() -> None:
    tensors = fit_geometry(embeddings(), seed=0).tensors()
    with pytest.raises(ValueError, match="consists of"):
        Geometry.from_tensors({"mean": tensors["mean"]})
    with pytest.raises(ValueError, match=r"mean of a geometry has shape \(3,\), expected \(12,\)"):
        Geometry.from_tensors(tensors | {"mean": torch.zeros(3)})
    with pytest.raises(ValueError, match="must be matrices"):
        Geometry.from_tensors(tensors | {"responses": torch.zeros(3)})


def test_prepare_works_in_float32_for_bfloat16_embeddings() -> None:
    batch = embeddings()
    geometry = fit_geometry(batch, seed=0)
    low = batch.prompt.bfloat16()
    assert geometry.prepare(low).dtype == torch.float32
    close(geometry.prepare(low), geometry.prepare(low.float()), dtype=torch.float32)


def test_prepare_refuses_another_width() -> None:
    with pytest.raises(ValueError, match="width 5 do not fit a geometry of width 12"):
        fit_geometry(embeddings(), seed=0).prepare(torch.zeros(2, 5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_embeddings_are_refused(bad: float) -> None:
    batch = embeddings()
    broken = batch.chosen.clone()
    broken[3, 2] = bad
    with pytest.raises(ValueError, match="1 of 40 chosen embeddings hold NaN or infinity"):
        fit_geometry(replace(batch, chosen=broken), seed=0)


def test_ragged_or_empty_embeddings_are_refused() -> None:
    batch = embeddings()
    with pytest.raises(ValueError, match=r"rejected embeddings have shape \(39, 12\)"):
        fit_geometry(replace(batch, rejected=batch.rejected[1:]), seed=0)
    empty = torch.zeros(0, 12)
    with pytest.raises(ValueError, match="at least one pair"):
        fit_geometry(PairEmbeddings(empty, empty, empty), seed=0)
    with pytest.raises(ValueError, match="must both be at least 1"):
        fit_geometry(batch, max_dim=0, seed=0)
