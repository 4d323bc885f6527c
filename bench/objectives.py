"""Time, memory and error of streamed divergences beside whole logits and TRL's chunked ones.

`make bench-objectives` reports the table kept in bench/results; `FULL=1` measures the cells that
the table lacks (one JSON line each, so that it can be stopped and goes on). Each measurement runs
in a process of its own, forked from one that has everything imported, on one thread; forms
alternate. Extra memory is the peak resident set (VmHWM, reset before the call) minus the resident
set before it. The work: label log-probability and D of N tokens, and the gradient to the states.
"""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from core.spec import (
    BhattacharyyaSpec,
    DivergenceSpec,
    FDivergenceSpec,
    FJeffreys,
    FPearsonChi2,
    FTotalVariation,
    HellingerSpec,
    JensenShannonSpec,
    KlSpec,
    RenyiSpec,
    WassersteinSpec,
)
from objectives import (
    Divergence,
    Head,
    build_divergence,
    stream_scores,
    streamed_divergence,
    token_log_probs,
)

CELLS = Path(__file__).parent / "results" / "objectives-cells.jsonl"
WIDTH = 256
DIVERGENCES: dict[str, DivergenceSpec] = {
    "kl": KlSpec(),
    "jensen_shannon": JensenShannonSpec(),
    "forward_kl": FDivergenceSpec(),
    "hellinger": HellingerSpec(),
    "renyi": RenyiSpec(order=2.0),
    "bhattacharyya": BhattacharyyaSpec(),
    "wasserstein": WassersteinSpec(),
    "total_variation": FDivergenceSpec(f=FTotalVariation()),
    "pearson_chi2": FDivergenceSpec(f=FPearsonChi2()),
    "jeffreys": FDivergenceSpec(f=FJeffreys()),
}
TRL_BETA = {"forward_kl": 0.0, "kl": 1.0, "jensen_shannon": 0.5}
SIZES = (
    (512, 2_000),
    (2048, 2_000),
    (8192, 2_000),
    (512, 32_000),
    (256, 150_000),
    (512, 150_000),
    (4096, 150_000),
    (8192, 32_000),
    (8192, 150_000),
)
TRL_SIZES = ((2048, 32_000), (2048, 150_000))
"""Further cells of the divergences that TRL has too."""
WHOLE_LOGITS_LIMIT = 90_000_000
"""Tokens × vocabulary up to which whole logits are run: their peak is 40 to 90 bytes for each."""
TRL_LIMIT = 400_000_000
REPEATED_LIMIT = 90_000_000
ERROR_TOKENS = 48


@dataclass(frozen=True)
class Inputs:
    states: Tensor
    reference: Tensor
    labels: Tensor
    weight: Tensor
    upstream: Tensor


def make_inputs(tokens: int, vocabulary: int) -> Inputs:
    """Logits of standard deviation 3, a drift with token KL near 0.05."""
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, WIDTH, generator=rng)
    return Inputs(
        states=states.requires_grad_(),
        reference=states.detach() + 0.1 * torch.randn(tokens, WIDTH, generator=rng),
        labels=torch.randint(vocabulary, (tokens,), generator=rng),
        weight=torch.randn(vocabulary, WIDTH, generator=rng) * (3.0 / WIDTH**0.5),
        upstream=torch.rand(tokens, generator=rng) + 0.5,
    )


def streamed(x: Inputs, name: str, exact: Divergence) -> tuple[Tensor, Tensor]:
    scores = stream_scores(
        x.states,
        x.labels,
        Head(x.weight),
        divergence=streamed_divergence(DIVERGENCES[name], exact),
        reference_states=x.reference,
    )
    assert scores.divergence is not None
    return scores.divergence, scores.log_prob


def whole(x: Inputs, _name: str, exact: Divergence) -> tuple[Tensor, Tensor]:
    logits = x.states @ x.weight.T
    with torch.no_grad():
        log_q = (x.reference @ x.weight.T).log_softmax(-1)
    return exact(logits.log_softmax(-1), log_q), token_log_probs(logits, x.labels)


def trl(x: Inputs, name: str, _exact: Divergence) -> tuple[Tensor, None]:
    divergence, _ = ChunkedDivergenceFunction.apply(
        x.states, x.weight, None, x.reference, x.weight, None, TRL_BETA[name]
    )
    return divergence, None


FORMS: dict[str, Callable[[Inputs, str, Divergence], tuple[Tensor, Tensor | None]]] = {
    "streamed": streamed,
    "whole": whole,
    "trl": trl,
}


def run(form: str, x: Inputs, name: str, exact: Divergence) -> tuple[Tensor, Tensor]:
    """D (N,), and the gradient of Σ upstream (D + log p) to the states."""
    divergence, log_prob = FORMS[form](x, name, exact)
    total = x.upstream * divergence if log_prob is None else x.upstream * (divergence + log_prob)
    (gradient,) = torch.autograd.grad(total.sum(), x.states)
    return divergence.detach(), gradient


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark runs on Linux")


def measure(form: str, name: str, tokens: int, vocabulary: int) -> dict[str, float]:
    """Seconds and extra bytes of one call, after a small one that warms the code up."""
    x = make_inputs(tokens, vocabulary)
    exact = build_divergence(DIVERGENCES[name], head=x.weight)
    small = make_inputs(2, vocabulary)
    if form != "trl":
        run(form, small, name, exact)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    run(form, x, name, exact)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": float(resident("VmHWM") - before)}


def error(form: str, name: str, tokens: int, vocabulary: int) -> dict[str, float]:
    """Largest relative error of D and that of the gradient's norm, against whole float64 logits."""
    x = make_inputs(min(tokens, ERROR_TOKENS), vocabulary)
    wide = Inputs(
        states=x.states.detach().double().requires_grad_(),
        reference=x.reference.double(),
        labels=x.labels,
        weight=x.weight.double(),
        upstream=x.upstream.double(),
    )
    spec = DIVERGENCES[name]
    truth, slope = run("whole", wide, name, build_divergence(spec, head=wide.weight))
    value, gradient = run(form, x, name, build_divergence(spec, head=x.weight))
    return {
        "value": float(((value - truth).abs() / truth).max()),
        "gradient": float((gradient - slope).norm() / slope.norm()),
    }


def forked(
    work: Callable[[str, str, int, int], dict[str, float]], *arguments: object
) -> dict[str, float] | None:
    """Result of `work` in a process of its own; None when that process died (of memory, say)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        status = 1
        try:
            answer = json.dumps(work(*arguments))  # type: ignore[arg-type]
            with os.fdopen(write, "w") as out:
                out.write(answer)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as answer_file:
        answer = answer_file.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else None


@dataclass(frozen=True)
class Cell:
    divergence: str
    tokens: int
    vocabulary: int

    @property
    def elements(self) -> int:
        return self.tokens * self.vocabulary

    def forms(self) -> Iterator[str]:
        yield "streamed"
        if self.elements <= WHOLE_LOGITS_LIMIT:
            yield "whole"
        if self.divergence in TRL_BETA and self.elements <= TRL_LIMIT:
            yield "trl"


def measure_cell(cell: Cell) -> dict[str, object]:
    arguments = (cell.divergence, cell.tokens, cell.vocabulary)
    samples: dict[str, list[dict[str, float]]] = {form: [] for form in cell.forms()}
    load = os.getloadavg()[0]
    for _ in range(3 if cell.elements <= REPEATED_LIMIT else 1):
        for form, taken in samples.items():
            sample = forked(measure, form, *arguments)
            if sample is not None:
                taken.append(sample)
    return {
        **asdict(cell),
        "load": load,
        "seconds": {f: [round(s["seconds"], 4) for s in taken] for f, taken in samples.items()},
        "bytes": {
            f: statistics.median(s["bytes"] for s in taken) for f, taken in samples.items() if taken
        },
        "error": forked(error, "streamed", *arguments),
        "error_whole": forked(error, "whole", *arguments),
    }


def environment() -> dict[str, object]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "width": WIDTH,
        "dtype": "float32",
    }


def read_cells() -> dict[Cell, dict[str, object]]:
    rows: dict[Cell, dict[str, object]] = {}
    if CELLS.exists():
        for line in CELLS.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "environment" not in row:
                rows[Cell(row["divergence"], row["tokens"], row["vocabulary"])] = row
    return rows


def plan() -> Iterator[Cell]:
    """All cells: divergences that TRL has first, then the others; small cells before large ones."""
    others = [name for name in DIVERGENCES if name not in TRL_BETA]
    for names, sizes in ((TRL_BETA, (*SIZES, *TRL_SIZES)), (others, SIZES)):
        for tokens, vocabulary in sizes:
            for name in names:
                yield Cell(name, tokens, vocabulary)


def fill() -> None:
    """Measure what the table lacks."""
    CELLS.parent.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    done = read_cells()
    with CELLS.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"environment": environment()}) + "\n")
        for cell in plan():
            if cell in done:
                continue
            row = measure_cell(cell)
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    fill()
