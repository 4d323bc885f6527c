"""The main job from end to end, over HTTP: real pairs in, an aligned checkpoint and evidence out.

Starts `kdpo serve` on a free loopback port with a folder of its own, does what any client would,
and stops it again. Needs nothing from the network.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parent
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 110)
OPEN = ("validating_files", "queued", "running")


class DemoError(Exception):
    """A part of the demo went wrong; the message says which."""


def main() -> int:
    """Run the demo and return its exit code."""
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    try:
        with service(options) as (client, folder):
            dataset = upload(client, options.data)
            recommendation = recommend(client, dataset["id"], options.model)
            job = fine_tune(client, dataset["id"], options)
            checkpoint = download(client, job, folder)
            answer = generate(checkpoint, options.model, job["result"]["samples"][0]["prompt"])
            report(client, recommendation, job, checkpoint, answer)
    except (DemoError, httpx.HTTPError) as error:
        console.print(f"[red]demo failed:[/red] {error}", highlight=False)
        return 1
    objective = job["result"]["run"]["objective"]
    kernel, divergence = names_of(objective)
    console.print(f"whole demo: {time.monotonic() - started:.0f} s", highlight=False)
    print(f"demo: ok kernel={kernel} divergence={divergence} checkpoint={checkpoint}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=EXAMPLES / "data/truthfulqa-600.jsonl.gz")
    parser.add_argument("--model", default=str(EXAMPLES / "models/tiny-lm"), help="path or hub id")
    parser.add_argument("--shape", default="few", help="of the search: few, lean, usual, wide")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    return parser.parse_args()


@contextlib.contextmanager
def service(options: argparse.Namespace) -> Iterator[tuple[httpx.Client, Path]]:
    """Start the embedded service, yield a client that is logged in, stop it at the end."""
    folder = fresh_folder(options.output.absolute())
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("KDPO_")}
    environment = {**inherited, "KDPO_DATA_DIR": str(folder / "service")}
    kdpo = [sys.executable, "-m", "app"]
    console.rule("1. Start the service (SQLite and a file broker in one folder)")
    subprocess.run([*kdpo, "migrate"], env=environment, check=True, stdout=subprocess.DEVNULL)
    made = subprocess.run(
        [*kdpo, "keys", "create", "--name", "demo"],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path = folder / "service.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*kdpo, "serve", "--port", str(port)],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {made.stdout.strip()}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=180.0) as client:
            wait_until_ready(client, process, log_path)
            console.print(f"listening on {url}, log in {log_path}", highlight=False)
            yield client, folder
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise DemoError(f"the service did not stop within 60 s; see {log_path}") from None


def fresh_folder(folder: Path) -> Path:
    """Make the demo's folder, in place of an earlier demo's but of nothing else."""
    marker = folder / ".kdpo-demo"
    if marker.is_file():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise DemoError(f"{folder} is not empty and no earlier demo made it; name another --output")
    (folder / "service").mkdir(parents=True)
    marker.touch()
    return folder


def wait_until_ready(
    client: httpx.Client, process: subprocess.Popen[bytes], log_path: Path
) -> None:
    """Wait for database, broker and workers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"the service ended with code {process.returncode}; see {log_path}")
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        time.sleep(0.2)
    raise DemoError(f"the service was not ready within 60 s; see {log_path}")


def checked(response: httpx.Response) -> dict[str, Any]:
    """Return the body, or raise with the problem's own words."""
    body: dict[str, Any] = response.json()
    if response.is_error:
        raise DemoError(f"{response.status_code}: {body.get('detail')} {body.get('hint') or ''}")
    return body


def upload(client: httpx.Client, path: Path) -> dict[str, Any]:
    """Post the dataset and show what validation found."""
    console.rule(f"2. Post the dataset: {path.name}")
    with path.open("rb") as file:
        dataset = checked(
            client.post(
                "/v1/datasets", files={"file": (path.name, file)}, headers={"Prefer": "wait=60"}
            )
        )
    found = checked(client.get(f"/v1/datasets/{dataset['id']}/report"))
    counts = ", ".join(f"{name} {count}" for name, count in found["counts"].items())
    console.print(f"{dataset['id']} is {dataset['status']}: {counts}", highlight=False)
    return dataset


def follow(client: httpx.Client, url: str, title: str) -> dict[str, Any]:
    """Poll until the object has ended, with a bar, the phase and the ETA."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
    )
    plain = not console.is_terminal
    said = ""
    with Progress(*columns, console=console, disable=plain) as bars:
        bar = bars.add_task(title, total=1.0, eta="")
        while True:
            current = checked(client.get(url))
            progress = current.get("progress") or {}
            eta = progress.get("eta_seconds")
            phase = current.get("phase") or current["status"]
            count = f"{progress['done']}/{progress['total']} {progress['unit']}" if progress else ""
            left = "" if eta is None else f"ETA {eta:.0f} s"
            bars.update(
                bar, description=f"{title}: {phase}", completed=progress.get("fraction") or 0.0,
                eta=f"{count} {left}",
            )  # fmt: skip
            line = f"{title}: {phase} {100 * (progress.get('fraction') or 0):.0f} %"
            if plain and line != said:
                console.print(f"{line} {count} {left}", highlight=False)
                said = line
            if current["status"] not in OPEN:
                bars.update(bar, completed=1.0, eta="")
                break
            time.sleep(0.5)
    if current["status"] != "succeeded":
        error = current.get("error") or {}
        raise DemoError(f"{title} {current['status']}: {error.get('message')}")
    return current


def recommend(client: httpx.Client, dataset_id: str, model: str) -> dict[str, Any]:
    """Ask for the recommended pair: one pass of the base model, no training."""
    console.rule("3. Ask which kernel and divergence suit these data")
    made = checked(
        client.post("/v1/recommendations", json={"dataset_id": dataset_id, "model": model})
    )
    done = follow(client, f"/v1/recommendations/{made['id']}", "recommendation")
    console.print(done["recommendation"]["summary"], highlight=False)
    return done


def fine_tune(client: httpx.Client, dataset_id: str, options: argparse.Namespace) -> dict[str, Any]:
    """Search over pairs with plain DPO in the race, then train the winner and the baseline."""
    console.rule("4. Search, fine-tune, compare with plain DPO")
    job = checked(
        client.post(
            "/v1/fine_tuning/jobs",
            json={
                "model": options.model,
                "dataset_id": dataset_id,
                "seed": options.seed,
                "suffix": "demo",
                "method": {
                    "type": "auto",
                    "auto": {
                        "search": {"shape": options.shape},
                        "hyperparameters": {"n_epochs": options.epochs},
                    },
                },
            },
        )
    )
    return follow(client, f"/v1/fine_tuning/jobs/{job['id']}", "fine-tuning")


def download(client: httpx.Client, job: dict[str, Any], folder: Path) -> Path:
    """Download the final checkpoint file by file and check every hash."""
    console.rule("5. Download the aligned checkpoint")
    checkpoint_id = job["result"]["run"]["checkpoint_id"]
    target = folder / "checkpoint"
    files = checked(client.get(f"/v1/checkpoints/{checkpoint_id}/files"))["data"]
    for entry in files:
        path = target / entry["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        response = client.get(f"/v1/checkpoints/{checkpoint_id}/files/{entry['path']}")
        if response.is_error:
            raise DemoError(f"{entry['path']}: {response.status_code} {response.text}")
        digest = hashlib.sha256(response.content).hexdigest()
        if digest != entry["sha256"] or response.headers["etag"] != f'"sha256:{digest}"':
            raise DemoError(f"{entry['path']}: its hash is {digest}, expected {entry['sha256']}")
        path.write_bytes(response.content)
    console.print(f"{len(files)} files in {target}, all hashes verified", highlight=False)
    return target


def generate(checkpoint: Path, model: str, prompt: str) -> str:
    """Load the download with plain transformers and peft and answer one prompt."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    aligned = PeftModel.from_pretrained(base, checkpoint).eval()
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = aligned.generate(**inputs, max_new_tokens=40, do_sample=False)
    return str(
        tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    )


def names_of(objective: dict[str, Any]) -> tuple[str, str]:
    """Return the kernel's and the divergence's name of an objective."""
    kernel = (objective["kernel_term"] or {"kernel": {"type": "none"}})["kernel"]["type"]
    divergence = (objective["divergence_term"] or {"divergence": {"type": "kl"}})["divergence"]
    return kernel, divergence["type"]


def report(
    client: httpx.Client,
    recommendation: dict[str, Any],
    job: dict[str, Any],
    checkpoint: Path,
    answer: str,
) -> None:
    """Print the evidence."""
    result = job["result"]
    console.rule("Report")
    ranked = Table(title="Recommended from the data alone (top 5 of all pairs)")
    for column in ("rank", "kernel", "divergence", "score", "95 % interval"):
        ranked.add_column(column)
    for pair in recommendation["ranking"][:5]:
        score = pair["score"]
        ranked.add_row(
            str(pair["rank"]), pair["kernel"], pair["divergence"], f"{score['value']:.3f}",
            f"{score['low']:.3f} … {score['high']:.3f}",
        )  # fmt: skip
    console.print(ranked)
    for name, pair in zip(("first", "runner-up"), recommendation["ranking"], strict=False):
        console.print(
            f"{name}: {pair['kernel']} × {pair['divergence']}: {pair['reason']}", highlight=False
        )

    trials = checked(client.get(f"/v1/studies/{result['search']['study_id']}/trials?limit=100"))
    table = Table(title="Trials (calibrated log-loss on validation, lower is better)")
    for column in ("trial", "kernel", "divergence", "from", "log-loss", "drift", "state"):
        table.add_column(column)
    for trial in sorted(trials["data"], key=lambda row: row["number"]):
        kernel, divergence = names_of(trial["candidate"]["objective"])
        won = " ← winner" if trial["number"] == result["search"]["winner_trial"] else ""
        table.add_row(
            str(trial["number"]), kernel, divergence, trial["origin"],
            "–" if trial["log_loss"] is None else f"{trial['log_loss']:.4f}",
            "–" if trial["drift"] is None else f"{trial['drift']:.4f}",
            f"{trial['status']}{won}",
        )  # fmt: skip
    console.print(table)
    console.print(result["search"]["sentence"], highlight=False)

    versus = Table(title="Winner against plain DPO, same budget, held-out test split")
    for column in ("", "log-loss", "accuracy", "drift", "chosen displacement"):
        versus.add_column(column)
    for name in ("run", "baseline") if result["baseline"] else ("run",):
        kernel, divergence = names_of(result[name]["objective"])
        numbers = result[name]["evaluation"]
        versus.add_row(
            f"{kernel} × {divergence}" if name == "run" else "plain DPO",
            f"{numbers['log_loss']:.4f}", f"{numbers['accuracy']:.3f}",
            f"{numbers['drift']:.4f}", f"{numbers['chosen_displacement']:+.3f}",
        )  # fmt: skip
    console.print(versus)
    console.print(result["comparison"]["sentence"], highlight=False)
    console.print(f"verdict: {result['comparison']['verdict']}", highlight=False)
    console.print(result["heavy_tails"]["sentence"], highlight=False)
    sample = result["samples"][0]
    if answer.strip() != sample["aligned"].strip():
        raise DemoError(
            f"the download answers {answer!r}, the service's aligned model {sample['aligned']!r}"
        )
    side = Table(title=f"Prompt: {sample['prompt']}", expand=True)
    side.add_column("base")
    side.add_column("aligned (from the download, plain transformers + peft)")
    side.add_row(sample["base"], answer)
    console.print(side)
    weights = checkpoint / "adapter_model.safetensors"
    console.print(f"checkpoint: {checkpoint}", highlight=False)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    console.print(f"sha256({weights.name}): {digest}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
