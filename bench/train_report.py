"""From measured rows of `bench.train` to a table in docs/benchmarks.md, goals and one JSON line."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import ROOT, goal_table, publish_block, worst
from bench.train_job import TRIAL_STEPS, TRIALS

CELLS = ROOT / "bench" / "results" / "train-cells.jsonl"
SUMMARY = ROOT / "bench" / "results" / "train.json"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- train: begin -->", "<!-- train: end -->"
EQUAL_STEPS = 10
"""Steps over which losses are compared; the first is the reference's own, ln 2."""

Row = dict[str, Any]
Key = tuple[str, str]


class Table:
    """Rows in a file, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.rows: list[Row] = [json.loads(line) for line in text.splitlines()]

    def append(self, row: Row) -> None:
        """Keep a row."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)

    def has(self, **fields: object) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(k) == v for k, v in fields.items()) for row in self.rows)

    def trials(self, model: str, data: str) -> int:
        """How many trials of a study are measured."""
        return len(_trials(self.rows).get((model, data), []))

    @property
    def environment(self) -> Row | None:
        """Where the newest rows were measured."""
        found = [row["environment"] for row in self.rows if "environment" in row]
        return found[-1] if found else None


@dataclass(frozen=True)
class Speed:
    """All rounds of one model and one data set."""

    rounds: list[Row]

    def seconds(self, name: str) -> list[float]:
        """Steady turns of all rounds: without the first of each, which warms up."""
        return [t for row in self.rounds for t in row["seconds"][name][1:]]

    def pairs_a_second(self, name: str) -> float:
        """Pairs over seconds of all steady steps."""
        times = self.seconds(name)
        return float(self.rounds[0]["pairs_a_step"] * len(times) / sum(times))

    def times_faster(self, name: str) -> float:
        """Median over turns of the other's time over ours on the same pairs."""
        pairs = zip(self.seconds(name), self.seconds("kdpo"), strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def memory(self, name: str, *, whole: bool = False) -> float:
        """Peak bytes of the training phase above the loaded model, or all of the process."""
        found = (row["memory"][name] for row in self.rounds)
        return statistics.median(m["peak"] - (0 if whole else m["loaded"]) for m in found)

    def tokens(self, name: str) -> float:
        """Tokens of a forward over a step's pairs, padding included."""
        return statistics.mean(row["tokens_a_step"][name] for row in self.rounds)

    def one_off(self, name: str) -> float:
        """Seconds before the first step that a reference pass takes."""
        return float(statistics.median(row["one_off_s"][name] for row in self.rounds))

    def deviation(self) -> float:
        """Largest relative difference between our losses and those of either of TRL's."""
        return max(
            abs(ours - theirs) / abs(theirs)
            for row in self.rounds
            for name, losses in row["losses"].items()
            if name != "kdpo"
            for ours, theirs in list(zip(row["losses"]["kdpo"], losses, strict=True))[:EQUAL_STEPS]
        )


def _speeds(rows: list[Row], kind: str) -> dict[Key, Speed]:
    found: dict[Key, Speed] = {}
    for row in rows:
        if row.get("kind") == kind:
            found.setdefault((row["model"], row["data"]), Speed([])).rounds.append(row)
    return found


def _trials(rows: list[Row]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        if row.get("kind") == "trial":
            found.setdefault((row["model"], row["data"]), []).append(row)
    return found


@dataclass(frozen=True)
class Study:
    """The trials of one model and one data set; a resumed one has several set-ups, one counts."""

    setup: Row
    trials: list[Row]

    @property
    def whole(self) -> bool:
        """Whether all trials are measured."""
        return len(self.trials) == TRIALS

    def seconds(self, name: str) -> float:
        """Loading, passes before the first trial, and all trials."""
        return float(
            self.setup["about"][name]["setup_s"] + sum(t["seconds"][name] for t in self.trials)
        )

    def times_faster(self) -> float:
        """Their time over ours."""
        return self.seconds("optuna + trl") / self.seconds("kdpo")


def _studies(rows: list[Row]) -> dict[Key, Study]:
    setups: dict[Key, Row] = {}
    for row in rows:
        if row.get("kind") == "setup":
            setups.setdefault((row["model"], row["data"]), row)
    return {key: Study(setups[key], trials) for key, trials in _trials(rows).items()}


def _told(key: Key) -> str:
    return "{} on {}".format(*key)


def goals(rows: list[Row]) -> list[Row]:
    """The goals over the rows of a CPU; trials only where all of them are measured."""
    speeds, studies = _speeds(rows, "speed"), _studies(rows)

    def over(
        value: Callable[[Speed], float], keep: Callable[[Key], bool] = lambda key: True
    ) -> dict[Key, float]:
        return {key: value(speed) for key, speed in speeds.items() if keep(key)}

    def of_hh(key: Key) -> bool:
        return key[1] == "hh-harmless"

    return [
        worst(
            "pairs/s on hh-harmless, kdpo / TRL's defaults", ">= 3",
            over(lambda s: s.times_faster("trl"), of_hh), told=_told,
        ),
        worst(
            "pairs/s on hh-harmless, kdpo / TRL with precomputed reference", ">= 2",
            over(lambda s: s.times_faster("trl precomputed"), of_hh), told=_told,
        ),
        worst(
            f"{TRIALS} trials of {TRIAL_STEPS} steps, Optuna around TRL / kdpo", ">= 6",
            {key: study.times_faster() for key, study in studies.items() if study.whole},
            told=_told,
        ),
        worst(
            "peak memory of training above the loaded model, kdpo / TRL's defaults", "<= 0.6",
            over(lambda s: s.memory("kdpo") / s.memory("trl")), told=_told,
        ),
        worst(
            f"losses of the first {EQUAL_STEPS} steps, relative difference", "<= 0.0001",
            over(lambda s: s.deviation()), told=_told,
        ),
    ]  # fmt: skip


def speed_table(rows: list[Row], kind: str = "speed") -> str:
    """Pairs a second and memory of every contender."""
    lines = [
        "| model | data | contender | pairs/s | kdpo is faster by | tokens a step "
        "| reference pass, s | MB above the loaded model | MB in all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, data), speed in sorted(_speeds(rows, kind).items()):
        for name in speed.rounds[0]["seconds"]:
            faster = "" if name == "kdpo" else f"{speed.times_faster(name):.2f}×"
            one_off = speed.one_off(name)
            extra, whole = speed.memory(name), speed.memory(name, whole=True)
            lines.append(
                f"| {model} | {data} | {name} | {speed.pairs_a_second(name):.2f} | {faster} "
                f"| {speed.tokens(name):,.0f} "
                f"| {f'{one_off:.1f}' if one_off else '–'} | {extra / 1e6:,.0f} "
                f"| {whole / 1e6:,.0f} |"
            )
    return "\n".join(lines)


def trial_table(rows: list[Row]) -> str:
    """Seconds of whole searches."""
    lines = [
        "| model | data | trials | kdpo, s | of it before the first trial "
        "| Optuna around TRL, s | kdpo is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, data), study in sorted(_studies(rows).items()):
        lines.append(
            f"| {model} | {data} | {len(study.trials)} of {TRIALS} | {study.seconds('kdpo'):.0f} "
            f"| {study.setup['about']['kdpo']['setup_s']:.1f} "
            f"| {study.seconds('optuna + trl'):.0f} | {study.times_faster():.2f}× |"
        )
    return "\n".join(lines)


def gpu_table(rows: list[Row]) -> str:
    """Tokens a second, and the arithmetic that the job needs over what the GPU can do.

    Needed: 2 FLOPs a weight for the forward and 2 for the gradient to the activations (the weights
    are frozen), layers over prompt and both answers once, the output layer over the answers.
    """
    lines = [
        "| model | data | device | contender | tokens/s | of the matrix-multiply limit |",
        "|---|---|---|---|---|---|",
    ]
    for (model, data), speed in sorted(_speeds(rows, "gpu").items()):
        row = speed.rounds[0]
        sizes = row["sizes"]
        asked, answered = sizes["prompt_tokens"], sizes["answer_tokens"]
        needed = 4 * (
            sizes["matmul_parameters"] * (asked + answered) + sizes["head_parameters"] * answered
        )
        for name in row["seconds"]:
            pairs = speed.pairs_a_second(name)
            share = pairs * needed / row["matmul_flops"]
            lines.append(
                f"| {model} | {data} | {row['device']} | {name} "
                f"| {pairs * (2 * asked + answered):,.0f} | {100 * share:.1f} % |"
            )
    return "\n".join(lines)


def _block(table: Table) -> str:
    where = table.environment
    if where is None:
        return "\n\n".join([BEGIN, "Nothing is measured yet.", END])
    parts = [
        f"Measured on {where['cpu']}, {where['threads']} threads of {where['cores']} cores, torch "
        f"{where['torch']}, transformers {where['transformers']}, peft {where['peft']}, trl "
        f"{where['trl']}, optuna {where['optuna']}, Python {where['python']}, float32.",
        goal_table(goals(table.rows)),
        speed_table(table.rows),
        trial_table(table.rows),
    ]
    if _speeds(table.rows, "gpu"):
        parts.append(gpu_table(table.rows))
    return "\n\n".join([BEGIN, *parts, END])


def report(table: Table, *, now: list[Row], publish: bool) -> None:
    """Print the tables; the kept one also goes to the page and the summary.

    The last printed line is the summary; `now` are the goals over what this run has measured.
    """
    if now:
        print("measured now, not kept:")
        print(speed_table(now))
        print(goal_table([goal for goal in goals(now) if goal["measured"] is not None]))
    found = goals(table.rows)
    block = _block(table)
    print(block)
    if publish and table.environment is not None:
        publish_block(PAGE, block)
        SUMMARY.write_text(
            json.dumps({"environment": table.environment, "goals": found}, indent=1) + "\n",
            encoding="utf-8",
        )
    seen = [goal for goal in goals(now) if goal["measured"] is not None]
    print(json.dumps({"goals": found, "now": seen}))
