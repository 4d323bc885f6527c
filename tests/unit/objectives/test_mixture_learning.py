"""HMK learns: where one kernel alone carries the preference, the mixture finds it."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from core.spec import (
    BASE_KERNELS,
    KernelName,
    KernelTerm,
    MixtureKernelSpec,
    ObjectiveSpec,
    SpectralKernelSpec,
)
from objectives import (
    Geometry,
    HybridObjective,
    MixtureKernel,
    PairEmbeddings,
    PreferenceBatch,
    build_kernel,
    build_objective,
    fit_geometry,
)
from tests.unit.objectives.samples import embeddings
from tests.unit.objectives.tolerances import close

SEEDS = range(5)
ORDER = (KernelName.RBF, KernelName.POLYNOMIAL, KernelName.SPECTRAL, KernelName.MAHALANOBIS)
every_kernel = pytest.mark.parametrize("carrier", BASE_KERNELS)


@dataclass(frozen=True)
class Data:
    """Pairs that `carrier` orders rightly, every one, and each other kernel exactly half."""

    pairs: PairEmbeddings
    geometry: Geometry
    log_kernels: Tensor


def mixture_spec(eta: float) -> MixtureKernelSpec:
    return MixtureKernelSpec(spectral=SpectralKernelSpec(landmarks=64, rank=8), entropy=eta)


@cache
def carried_by(carrier: KernelName, seed: int) -> Data:
    """All eight ways in which the other three can agree or not, equally often."""
    cloud = embeddings(4000, 6, seed)
    few = PairEmbeddings(cloud.prompt[:200], cloud.chosen[:200], cloud.rejected[:200])
    geometry = fit_geometry(few, seed=seed).to(dtype=torch.float64)
    spec = mixture_spec(0.0)
    members = {name: getattr(spec, name) for name in ORDER}
    prompt, one, other = (geometry.prepare(e) for e in (cloud.prompt, cloud.chosen, cloud.rejected))
    log_kernels = torch.stack(
        [
            torch.stack([kernel.log_k(prompt, one), kernel.log_k(prompt, other)], -1)
            for kernel in (build_kernel(members[name], geometry) for name in ORDER)
        ],
        -1,
    )
    target = ORDER.index(carrier)
    swapped = log_kernels[:, 0, target] < log_kernels[:, 1, target]
    log_kernels = torch.where(swapped[:, None, None], log_kernels.flip(1), log_kernels)
    chosen = torch.where(swapped[:, None], cloud.rejected, cloud.chosen)
    rejected = torch.where(swapped[:, None], cloud.chosen, cloud.rejected)
    agrees = log_kernels[:, 0] > log_kernels[:, 1]
    rest = [i for i in range(4) if i != target]
    ways = (agrees[:, rest].long() * torch.tensor([1, 2, 4])).sum(-1)
    picked = torch.cat([(ways == way).nonzero()[:16, 0] for way in range(8)])
    assert picked.shape == (128,)
    return Data(
        PairEmbeddings(cloud.prompt[picked], chosen[picked], rejected[picked]),
        geometry,
        log_kernels[picked],
    )


def objective_on(data: Data, eta: float) -> HybridObjective:
    term = KernelTerm(kernel=mixture_spec(eta), gamma=4.0)
    return build_objective(ObjectiveSpec(kernel_term=term), geometry=data.geometry, head=None)


def learn(
    objective: HybridObjective, optimizer: torch.optim.Optimizer, data: Data, *, steps: int
) -> list[dict[str, float]]:
    """Train the weights alone, the policy held still; the logged trajectory."""
    zeros = torch.zeros(data.pairs.prompt.shape[0], dtype=torch.float64)
    batch = PreferenceBatch(zeros, zeros, embeddings=data.pairs, token_divergence=None)
    trajectory = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = objective(batch)
        (output.loss.mean() + output.regularizer).backward()
        optimizer.step()
        logged = {name: value for name, value in output.metrics.items() if name.startswith("hmk/")}
        trajectory.append({name: float(value) for name, value in logged.items()})
    return trajectory


def optimizer_of(objective: HybridObjective) -> torch.optim.Optimizer:
    return torch.optim.Adam(objective.parameters(), lr=0.1)


def weights(objective: HybridObjective) -> Tensor:
    assert isinstance(objective.kernel, MixtureKernel)
    return objective.kernel.log_weights().detach().exp()


@every_kernel
@pytest.mark.parametrize("seed", SEEDS)
def test_the_mixture_finds_the_kernel_that_carries_the_preference(
    carrier: KernelName, seed: int
) -> None:
    data = carried_by(carrier, seed)
    target = ORDER.index(carrier)
    agreement = (data.log_kernels[:, 0] > data.log_kernels[:, 1]).double().mean(0)
    assert agreement.tolist() == [1.0 if i == target else 0.5 for i in range(4)]
    objective = objective_on(data, eta=0.01)
    trajectory = learn(objective, optimizer_of(objective), data, steps=100)
    learned = weights(objective)
    assert int(learned.argmax()) == target
    assert float(learned[target]) > 0.5
    first, last = trajectory[0], trajectory[-1]
    assert first == {f"hmk/{name}": 0.5 for name in ("tau_local", "tau_global", *ORDER)}
    assert last[f"hmk/{carrier}"] > 0.6
    for shares in trajectory:
        for one, other in (
            ("tau_local", "tau_global"),
            ("rbf", "polynomial"),
            ("spectral", "mahalanobis"),
        ):
            assert shares[f"hmk/{one}"] > 0.0
            assert shares[f"hmk/{other}"] > 0.0
            assert shares[f"hmk/{one}"] + shares[f"hmk/{other}"] == pytest.approx(1.0)


@every_kernel
def test_the_entropy_bonus_says_how_small_the_other_weights_get(carrier: KernelName) -> None:
    """At the optimum of L - eta H on the simplex, log w_i = -(dL/dw_i) / eta + a constant."""
    eta = 0.2
    data = carried_by(carrier, 0)
    objective = objective_on(data, eta)
    learn(objective, optimizer_of(objective), data, steps=300)
    learned = weights(objective).requires_grad_()
    mixed = (data.log_kernels + learned.log()).logsumexp(-1)
    loss = torch.nn.functional.softplus(-4.0 * (mixed[:, 0] - mixed[:, 1])).mean()
    (slope,) = torch.autograd.grad(loss, learned)
    torch.testing.assert_close(learned.detach(), (-slope / eta).softmax(0), rtol=1e-3, atol=1e-5)
    assert int(learned.argmax()) == ORDER.index(carrier)
    less = objective_on(data, 0.02)
    learn(less, optimizer_of(less), data, steps=300)
    assert float(learned.detach().min()) > 10 * float(weights(less).min())


def test_weights_and_optimizer_go_on_from_a_checkpoint(tmp_path: object) -> None:
    data = carried_by(KernelName.SPECTRAL, 0)
    through = objective_on(data, 0.01)
    expected = learn(through, optimizer_of(through), data, steps=40)
    first = objective_on(data, 0.01)
    optimizer = optimizer_of(first)
    begun = learn(first, optimizer, data, steps=15)
    torch.save([first.state_dict(), optimizer.state_dict()], f"{tmp_path}/checkpoint.pt")
    assert set(first.state_dict()) == {f"kernel.raw_{n}" for n in ("tau", "local", "global")}
    states = torch.load(f"{tmp_path}/checkpoint.pt")
    second = objective_on(data, 0.01)
    resumed = optimizer_of(second)
    second.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert begun + learn(second, resumed, data, steps=25) == expected
    close(weights(second), weights(through), dtype=torch.float64)
