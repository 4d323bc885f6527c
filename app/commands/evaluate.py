"""`kdpo evaluate`: a checkpoint on held-out pairs, and against its base."""

from typing import Annotated

import typer

from app.commands.connect import ApiKey, AsJson, DataDir, Local, Url, connected
from app.commands.show import err, job_bar, out, print_json, table
from kdpo.evaluations import Split
from kdpo.types import Estimate, Evaluation


def evaluate(
    what: Annotated[str, typer.Argument(help="A checkpoint (ckpt_…), or the job that made one.")],
    reward_model: Annotated[
        str | None,
        typer.Option("--reward-model", "-r", help="Compare answers with the base's under it."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Other pairs than those of the training (ds_…).")
    ] = None,
    split: Annotated[Split | None, typer.Option("--split", help="Which pairs of it.")] = None,
    max_prompts: Annotated[
        int | None, typer.Option("--max-prompts", min=1, help="To answer for the win rate.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Of each answer.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the prompts.")] = 0,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0.001, help="Stop waiting after so long (s).")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    local: Local = False,
    data_dir: DataDir = None,
) -> None:
    """Measure a checkpoint on pairs that it was not trained on.

    With a reward model it and its base answer held-out prompts, and the answers are compared.
    """
    with (
        connected(url, api_key, local=local, data_dir=data_dir, works=True) as here,
        job_bar("evaluation") as bar,
    ):
        made = here.client.evaluate(
            what,
            dataset=dataset,
            split=split,
            reward_model=None if reward_model is None else here.model(reward_model),
            max_prompts=max_prompts,
            max_new_tokens=max_new_tokens,
            seed=seed,
            wait=False,
        )
        err().print(f"evaluation {made.id}", style="dim")
        here.client.wait(made, timeout_s=timeout, on_progress=bar.told)
        found = here.client.evaluations.get(made)
    if as_json:
        print_json(found)
    else:
        show_evaluation(found)


def show_evaluation(found: Evaluation) -> None:
    """Print what an evaluation found."""
    console, result = out(), found.result
    if result is None:
        console.print(f"{found.id} is {found.status} and has no result yet")
        return
    rows = [
        (title, f"{value.value:.4f}", _interval(value))
        for title, value in (
            ("accuracy", result.accuracy),
            ("calibrated log-loss", result.log_loss),
            ("drift, nats", result.drift),
        )
    ]
    console.print(table(f"on the {found.split} split", "value", "95 %", rows=rows))
    if result.win_rate is not None:
        console.print(f"\n{result.win_rate.sentence}", soft_wrap=True)


def _interval(value: Estimate) -> str:
    return f"{value.low:.4f} to {value.high:.4f}"
