"""The comparisons of `bench.kernel_term` with γ = 0, and what they give over cases."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from bench.kernel_cases import FUNCTIONS, PLAIN, SCALES, VARIANTS
from bench.kernel_stats import (
    Case,
    Difference,
    Floats,
    against,
    alone,
    at_end,
    over_datasets,
    over_prompts,
    together,
)
from core.profile import Estimate

Compare = Callable[[Case], Difference]


@dataclass(frozen=True)
class Effect:
    """A variant minus γ = 0: log-loss over prompts and over datasets, accuracy over datasets.

    `drift` is the geometric mean of the drift compared at over that of γ = 0 at its end;
    `better` of the `cases` have a smaller log-loss; each of the `sources` has `seeds` at least.
    """

    prompts: Estimate
    datasets: Estimate
    accuracy: Estimate
    drift: float
    better: int
    cases: int
    sources: tuple[str, ...]
    seeds: int

    @property
    def beats(self) -> bool:
        """Whether the interval over datasets is below 0."""
        return self.datasets.high < 0.0


def losses(difference: Difference) -> Floats:
    """What is compared of log-loss, (N,)."""
    return difference.losses


def right(difference: Difference) -> Floats:
    """What is compared of accuracy, (N,)."""
    return difference.right


@dataclass(frozen=True)
class Comparison:
    """A difference to γ = 0, and what a case needs for it: runs, and what a function says.

    Runs are needed at all scales, or where not `scaled` at the end.
    """

    compare: Compare
    needs: tuple[str, ...]
    function: str | None = None
    scaled: bool = True

    def of(self, cases: Sequence[Case]) -> tuple[list[Case], list[Difference]]:
        """The cases that have what it needs, and their differences."""
        points = len(SCALES) if self.scaled else 1
        found = [
            case
            for case in cases
            if all(len(case.runs.get(name, ())) >= points for name in self.needs)
            and (self.function is None or self.function in case.log_odds)
        ]
        return found, [self.compare(case) for case in found]


def effect(cases: Sequence[Case], comparison: Comparison) -> Effect | None:
    """What a comparison gives over the cases that have it; None where there is none."""
    having, found = comparison.of(cases)
    if not having:
        return None
    return Effect(
        prompts=over_prompts(having, found, losses),
        datasets=over_datasets(having, found, losses),
        accuracy=over_datasets(having, found, right),
        drift=math.exp(
            fmean(
                math.log(f.drift / c.runs[PLAIN][-1].drift)
                for c, f in zip(having, found, strict=True)
            )
        ),
        better=sum(float(difference.losses.mean()) < 0.0 for difference in found),
        cases=len(having),
        sources=tuple(sorted({case.data for case in having})),
        seeds=min(Counter(case.data for case in having).values()),
    )


CONTROLS = tuple(name for name, variant in VARIANTS.items() if variant.source == "by lot")


def _trained(*, scaled: bool) -> dict[str, Comparison]:
    compare = against if scaled else at_end
    return {
        name: Comparison(partial(compare, variant=name, plain=PLAIN), (name, PLAIN), scaled=scaled)
        for name in VARIANTS
        if name != PLAIN
    }


TRAINED, AT_END = _trained(scaled=True), _trained(scaled=False)
BESIDE: dict[str, Comparison] = {
    **{
        f"γ = 0, and {name} f beside it": Comparison(
            partial(together, variant=PLAIN, function=name, plain=PLAIN),
            (PLAIN,),
            function=name,
            scaled=False,
        )
        for name in FUNCTIONS
    },
    "f as offset, and that f beside it": Comparison(
        partial(together, variant="f as offset", function="reference", plain=PLAIN),
        ("f as offset", PLAIN),
        function="reference",
    ),
    **{
        f"{name} f alone": Comparison(
            partial(alone, function=name, plain=PLAIN), (PLAIN,), function=name, scaled=False
        )
        for name in FUNCTIONS
    },
}
"""At prediction only: these are no policies."""


def effects(cases: Sequence[Case], of: Mapping[str, Comparison]) -> dict[str, Effect]:
    """All comparisons of a group that some case has, by name."""
    found = {name: effect(cases, comparison) for name, comparison in of.items()}
    return {name: each for name, each in found.items() if each is not None}
