"""The reference on disk: computed once, bit for bit, whole or not there."""

import json
import logging
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import StorageFull
from core.run_spec import LoraSpec
from tests.unit.worker.training.micro import (
    Bench,
    ignore_progress,
    micro_policy,
    random_pairs,
    stored_states,
)
from tests.unit.worker.training.store_child import KEY, PAIRS, TOKENS
from worker.training import reference
from worker.training.batches import collate, micro_batches
from worker.training.entries import EntryFolder
from worker.training.forward import hidden_states, score_tokens
from worker.training.model import Policy, load_policy
from worker.training.reference import (
    compute_reference,
    model_sha256,
    reference_key,
    tokenizer_sha256,
    tokens_sha256,
)
from worker.training.store import MANIFEST, STARTS, STATES, TABLE, Reference, ReferenceStore

ROOT = Path(__file__).parents[4]
CPU = torch.device("cpu")
ROOMY = 1 << 30
CHILD_TIMEOUT_S = 240


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FORWARD_TOKENS", TOKENS)


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return tmp_path / "store" / KEY


def ask(
    policy: Policy, folder: Path, *, count: int = PAIRS, **options: Any
) -> tuple[Reference, int]:
    """What a fresh store finds, and how often the trunk was run for it."""
    values: dict[str, Any] = {
        "max_bytes": ROOMY, "states_bytes": ROOMY, "key": KEY, "states": True,
        "progress": ignore_progress,
    }  # fmt: skip
    values |= options
    store = ReferenceStore(
        folder, max_bytes=values.pop("max_bytes"), states_bytes=values.pop("states_bytes")
    )
    with counted_trunk(policy) as calls:
        found = store.get(policy, random_pairs(count), **values)
    return found, len(calls)


@contextmanager
def counted_trunk(policy: Policy) -> Iterator[list[int]]:
    calls: list[int] = []
    hook = policy.trunk.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def groups_of(policy: Policy) -> list[list[int]]:
    return micro_batches(random_pairs(PAIRS), range(PAIRS), max_tokens=TOKENS, form=policy.form)


def all_states(policy: Policy, found: Reference) -> Tensor:
    assert found.states is not None
    return found.states.of(collate(random_pairs(PAIRS), range(PAIRS), form=policy.form, device=CPU))


def assert_equal(policy: Policy, one: Reference, other: Reference) -> None:
    for name, tensor in one.table.tensors().items():
        assert torch.equal(tensor, other.table.tensors()[name]), name
    assert torch.equal(all_states(policy, one), all_states(policy, other))


# ------------------------------------------------------------- what is stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama_folder", "gpt2_folder"])
def test_what_is_read_back_is_bit_for_bit_what_a_direct_pass_says(
    architecture: str, dtype: torch.dtype, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    policy = micro_policy(request.getfixturevalue(architecture))
    policy.model.to(dtype)
    with torch.no_grad():
        for parameter in policy.adapter().values():
            parameter.add_(0.1)
    pairs, groups = random_pairs(PAIRS), groups_of(policy)
    assert len(groups) > 2
    first, passes = ask(policy, tmp_path)
    assert passes == len(groups)
    again, passes = ask(policy, tmp_path)
    assert passes == 0
    assert_equal(policy, first, again)
    assert again.states is not None
    assert again.states.nbytes == (tmp_path / KEY / STATES).stat().st_size
    for group in groups:
        batch = collate(pairs, group, form=policy.form, device=CPU)
        with torch.no_grad(), policy.as_reference():
            states = hidden_states(policy, batch, embeddings=False).states
            chosen, rejected = score_tokens(policy.head, states, batch.labels).sequence_log_probs(
                batch
            )
        assert again.states.of(batch).dtype == dtype
        assert torch.equal(again.states.of(batch), states)
        assert torch.equal(again.table.chosen_log_prob[group], chosen)
        assert torch.equal(again.table.rejected_log_prob[group], rejected)


def test_any_batch_gets_its_answers_in_the_order_of_its_labels(
    bench: Bench, tmp_path: Path
) -> None:
    states = stored_states(bench.policy, bench.pairs, tmp_path)
    alone = {
        i: states.of(collate(bench.pairs, [i], form=bench.policy.form, device=CPU))
        for i in range(PAIRS)
    }
    index = [7, 2, 11, 2]
    batch = collate(bench.pairs, index, form=bench.policy.form, device=CPU)
    chosen = [alone[i][: len(bench.pairs[i].chosen)] for i in index]
    rejected = [alone[i][len(bench.pairs[i].chosen) :] for i in index]
    assert torch.equal(states.of(batch), torch.cat([*chosen, *rejected]))
    assert len({float(rows.sum()) for rows in alone.values()}) == PAIRS


def test_the_token_sample_is_even_over_all_batches(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = compute_reference(bench.policy, bench.pairs, progress=ignore_progress)
    tokens = everything.token_log_probs
    monkeypatch.setattr(reference, "TOKEN_SAMPLE", len(tokens) // 5)
    sample = compute_reference(bench.policy, bench.pairs, progress=ignore_progress)
    stride = -(-len(tokens) // (len(tokens) // 5))
    assert torch.equal(sample.token_log_probs, tokens[::stride])
    assert torch.equal(sample.token_pair, everything.token_pair[::stride])


def test_sampled_tokens_know_their_pairs(bench: Bench) -> None:
    table = compute_reference(bench.policy, bench.pairs, progress=ignore_progress)
    answers = [len(pair.chosen) + len(pair.rejected) for pair in bench.pairs]
    assert torch.bincount(table.token_pair).tolist() == answers
    sums = torch.zeros(PAIRS).index_add(0, table.token_pair, table.token_log_probs)
    torch.testing.assert_close(sums, table.chosen_log_prob + table.rejected_log_prob)


def test_states_go_to_the_file_while_the_pass_runs(bench: Bench, tmp_path: Path) -> None:
    sizes: list[int] = []

    def watch(done: int, total: int) -> None:
        if done < total:
            sizes.append((tmp_path / f".tmp-{KEY}" / STATES).stat().st_size)

    ask(bench.policy, tmp_path, count=80, progress=watch)
    whole = (tmp_path / KEY / STATES).stat().st_size
    assert len(sizes) > 10
    assert sizes == sorted(sizes)
    assert sizes[len(sizes) // 2] > whole / 4
    assert whole - sizes[-1] < whole / 4


def test_states_are_mapped_from_the_file_and_none_of_it_is_copied(
    bench: Bench, tmp_path: Path
) -> None:
    found, _ = ask(bench.policy, tmp_path)
    all_states(bench.policy, found)
    mapping = smaps(tmp_path / KEY / STATES)
    assert mapping["permissions"].startswith("r-"), "nobody can write to it"
    assert (mapping["Anonymous"], mapping["Private_Dirty"]) == ("0", "0")
    assert found.states is not None
    assert not found.states.mapped.flags.writeable


def smaps(file: Path) -> dict[str, str]:
    """What the kernel says about this process's mapping of a file."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    first = next(line for line in lines if line.endswith(f" {file}"))
    found = {"permissions": first.split()[1]}
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "VmFlags":
            break
        found[name] = rest.split()[0]
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gets_its_states_and_is_not_waited_for(llama_folder: Path, tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    policy = load_policy(llama_folder, lora=LoraSpec(r=4, alpha=8), device=cuda)
    pairs = random_pairs(PAIRS)
    states = stored_states(policy, pairs, tmp_path)
    for group in groups_of(policy):
        batch = collate(pairs, group, form=policy.form, device=cuda)
        with torch.no_grad(), policy.as_reference():
            expected = hidden_states(policy, batch, embeddings=False).states
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = states.of(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.device.type == "cuda"
        assert torch.equal(found, expected)


# ------------------------------------------------------- what is asked for counts


def test_states_beyond_the_budget_are_not_kept_and_the_log_says_so(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    needed = sum(len(p.chosen) + len(p.rejected) for p in random_pairs(PAIRS)) * 32 * 4
    with caplog.at_level(logging.INFO, logger="kdpo.training"):
        none, _ = ask(bench.policy, tmp_path, states_bytes=needed - 1)
        assert none.states is None
        assert f"need {needed} bytes, the budget is {needed - 1}: the base is run" in caplog.text
        caplog.clear()
        assert not (tmp_path / KEY / STATES).exists()
        some, passes = ask(bench.policy, tmp_path, states_bytes=needed)
        assert some.states is not None
        assert passes > 0
        assert f"the budget is {needed}: kept" in caplog.text
        assert "has no hidden states: it is computed again" in caplog.text


def test_what_lies_on_the_disk_does_not_decide_who_gets_states(
    bench: Bench, tmp_path: Path
) -> None:
    table, passes = ask(bench.policy, tmp_path, states=False)
    assert (table.states, passes) == (None, len(groups_of(bench.policy)))
    assert {p.name for p in (tmp_path / KEY).iterdir()} == {MANIFEST, TABLE}
    whole, passes = ask(bench.policy, tmp_path)
    assert whole.states is not None
    assert passes == len(groups_of(bench.policy)), "the entry is replaced by one with states"
    assert {p.name for p in (tmp_path / KEY).iterdir()} == {MANIFEST, TABLE, STATES, STARTS}
    assert ask(bench.policy, tmp_path, states=False)[0].states is None
    assert ask(bench.policy, tmp_path, states_bytes=10)[0].states is None
    again, passes = ask(bench.policy, tmp_path)
    assert passes == 0
    assert_equal(bench.policy, replace(table, states=whole.states), again)


# ------------------------------------------------------- whole or not there


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # what was read before is mapped, and must not change
    file.write_bytes(content)


def lie(file: Path) -> None:
    """Change what an intact entry is said to be."""
    about = json.loads(file.read_bytes())
    about["states"]["dtype"] = "bfloat16"
    file.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in (TABLE, STATES, STARTS) for damage in (flip, Path.unlink)),
        *((MANIFEST, damage) for damage in (flip, lie, Path.unlink)),
        ("extra", Path.touch),
    ],
)
def test_a_damaged_entry_is_computed_again(
    bench: Bench, entry: Path, name: str, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = ask(bench.policy, entry.parent)
    damage(entry / name)
    mended, passes = ask(bench.policy, entry.parent)
    assert passes == len(groups_of(bench.policy))
    assert "a damaged reference is removed and computed again" in caplog.text
    assert_equal(bench.policy, first, mended)
    assert ask(bench.policy, entry.parent)[1] == 0


def test_a_pass_that_is_stopped_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if 0 < done < total:
            raise InterruptedError("stopped by the test")

    with pytest.raises(InterruptedError):
        ask(bench.policy, tmp_path, progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {f"{KEY}.lock"}
    assert ask(bench.policy, tmp_path)[1] == len(groups_of(bench.policy))


def test_a_full_disk_is_said_and_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    """The limit on file sizes stands for the disk: the system refuses to write on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (4096, 10_000):  # while states are written, and while the table is
        states = limit == 4096
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(StorageFull, match="no room left under"):
                ask(bench.policy, tmp_path, states=states, count=PAIRS if states else 60)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path.name for path in tmp_path.iterdir()} == {f"{KEY}.lock"}


def test_what_is_used_is_kept_longest_and_mappings_outlive_eviction(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, _ = ask(bench.policy, tmp_path, key="a" * 64)
    states = all_states(bench.policy, found)
    size = sum(path.stat().st_size for path in (tmp_path / ("a" * 64)).iterdir())
    cap = 2 * size + size // 2
    ask(bench.policy, tmp_path, key="b" * 64, max_bytes=cap)
    time.sleep(0.02)
    assert ask(bench.policy, tmp_path, key="a" * 64, max_bytes=cap)[1] == 0
    time.sleep(0.02)
    ask(bench.policy, tmp_path, key="c" * 64, max_bytes=cap)
    assert entries_of(tmp_path) == {"a" * 64, "c" * 64}, "`b` was used least recently"
    assert "the whole store may take" not in caplog.text
    ask(bench.policy, tmp_path, key="d" * 64, max_bytes=size // 2)
    assert entries_of(tmp_path) == {"d" * 64}
    assert f"takes {size} bytes, the whole store may take {size // 2}" in caplog.text
    assert torch.equal(all_states(bench.policy, found), states), "its file has no name any more"


def entries_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_whoever_waits_for_another_process_can_be_stopped(bench: Bench, tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        reported.append((done, total))
        raise InterruptedError("cancelled")

    with (
        EntryFolder(tmp_path).locked(KEY, waiting=lambda: None),
        pytest.raises(InterruptedError, match="cancelled"),
    ):
        ask(bench.policy, tmp_path, progress=stop)
    assert reported == [(0, PAIRS)]


# ------------------------------------------------------------- several processes


def child(how: str, *, model: Path, store: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.unit.worker.training.store_child"),
            *(str(model), str(store), how, str(folder)),
        ],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_two_processes_that_want_the_same_run_the_base_once(
    llama_folder: Path, bench: Bench, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with child("leads", model=llama_folder, store=store, folder=tmp_path) as leader:
        give_up = time.monotonic() + CHILD_TIMEOUT_S
        while not (tmp_path / "begun").exists():
            assert leader.poll() is None, leader.communicate()
            assert time.monotonic() < give_up, "the first process does not begin"
            time.sleep(0.05)
        with child("follows", model=llama_folder, store=store, folder=tmp_path) as follower:
            said = [process.communicate(timeout=CHILD_TIMEOUT_S) for process in (leader, follower)]
    assert (leader.returncode, follower.returncode) == (0, 0), said
    found = [json.loads(out.splitlines()[-1]) for out, _ in said]
    expected = len(groups_of(bench.policy))
    assert [one["passes"] for one in found] == [expected, 0]
    assert found[0]["sha256"] == found[1]["sha256"]
    assert ask(bench.policy, store)[1] == 0


def test_a_process_that_is_killed_in_its_pass_leaves_nothing_visible(
    llama_folder: Path, bench: Bench, tmp_path: Path
) -> None:
    with child("dies", model=llama_folder, store=tmp_path / "store", folder=tmp_path) as process:
        _, errors = process.communicate(timeout=CHILD_TIMEOUT_S)
    assert process.returncode == -9, errors
    store = tmp_path / "store"
    left = {path.name for path in store.iterdir()}
    assert left == {f".tmp-{KEY}", f"{KEY}.lock"}
    assert (store / f".tmp-{KEY}" / STATES).is_file()
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    assert ask(bench.policy, store)[1] == len(groups_of(bench.policy))
    assert {path.name for path in store.iterdir()} == {KEY, f"{KEY}.lock"}
    EntryFolder(copy).remove_leftovers()
    assert list(copy.iterdir()) == []


# ---------------------------------------------------------------------- the key


def key_of(folder: Path, **changes: str) -> str:
    values = {
        "model": model_sha256(folder), "tokenizer": tokenizer_sha256(folder),
        "tokens": tokens_sha256(random_pairs(PAIRS)), "precision": "torch.float32",
        "form": "plain",
    }  # fmt: skip
    return reference_key(**(values | changes))


def test_the_key_depends_on_content_precision_and_form(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(llama_folder, tmp_path / "copy"))
    key = key_of(llama_folder)
    assert key_of(copy) == key, "content counts, not the folder"
    pairs = random_pairs(PAIRS)
    keys = [
        key,
        key_of(copy, tokens=tokens_sha256(random_pairs(PAIRS, seed=1))),
        key_of(copy, tokens=tokens_sha256(pairs[::-1])),
        key_of(copy, precision="torch.bfloat16"),
        key_of(copy, form="kdpo_segments"),
    ]
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    keys.append(key_of(copy))
    (copy / "chat_template.jinja").write_text("{{ 1 }}")
    keys.append(key_of(copy))
    monkeypatch.setattr(reference, "FORWARD_TOKENS", TOKENS + 1)
    keys.append(key_of(copy))
    assert len(set(keys)) == len(keys) == 8
    assert all(len(k) == 64 for k in keys)
