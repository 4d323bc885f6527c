"""Which files of a repository are a split; `datasets` is the oracle of the usual names."""

from typing import Any

import pytest
from datasets.data_files import FILES_TO_IGNORE, _get_data_files_patterns
from fsspec.implementations.memory import MemoryFileSystem

from core.errors import InvalidInput
from worker.ingest.sources.hub_files import choose_files

SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]

USUAL = [
    [*SHARDS, "data/test-00000-of-00001.parquet", "README.md"],
    [*SHARDS, "data/test_prefs-00000-of-00001-abc.parquet"],
    ["train.jsonl", "test.jsonl"],
    ["my_train_file.jsonl", "my_dev_file.jsonl"],
    ["data/train.csv", "data/validation.csv", "data/eval.csv"],
    ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"],
    ["en/train/0.parquet", "en/test/0.parquet"],
    ["prefs.jsonl"],
    ["a/b/prefs.jsonl", "c.jsonl"],
    ["data-train/a.jsonl", "data-val/b.jsonl"],
    ["training.jsonl.gz", "evaluation.jsonl.gz"],
    ["retrained.jsonl"],
    ["test.jsonl"],
]


def usual(files: list[str], split: str | None = None) -> Any:
    return choose_files(files, {}, config=None, split=split)


def oracle(files: list[str]) -> dict[str, list[str]]:
    """What `datasets` makes of the same listing, on its own file system."""
    system = MemoryFileSystem(skip_instance_cache=True)
    system.store, system.pseudo_dirs = {}, [""]
    for name in files:
        system.pipe_file(f"/{name}", b"x")

    def resolve(pattern: str) -> list[str]:
        found = (path.lstrip("/") for path in system.glob(f"/{pattern}") if system.isfile(path))
        return [path for path in found if path not in FILES_TO_IGNORE]

    return {
        str(split): sorted({path for one in patterns for path in resolve(one)})
        for split, patterns in _get_data_files_patterns(resolve).items()
    }


@pytest.mark.parametrize("files", USUAL, ids=lambda files: files[0])
def test_usual_names_are_read_as_datasets_reads_them(files: list[str]) -> None:
    expected = oracle(files)
    assert expected
    for split, paths in expected.items():
        assert list(usual(files, split).files) == paths
    if len(expected) > 1:
        with pytest.raises(InvalidInput) as caught:
            usual(files)
        assert caught.value.code == "source_ambiguous"
        assert all(repr(split) in caught.value.message for split in expected)
    else:
        assert usual(files).split == next(iter(expected))


CARD = {
    "configs": [
        {"config_name": "helpful", "data_files": [
            {"split": "train", "path": "h/part-*.jsonl"},
            {"split": "test", "path": ["h/held.jsonl"]},
        ]},
        {"config_name": "harmless", "data_files": "x/**/*.jsonl", "default": True},
        {"config_name": "by_folder", "data_dir": "d"},
        {"config_name": "folder", "data_files": {"train": "x"}},
    ]
}  # fmt: skip
FILES = [
    *("README.md", "h/part-0.jsonl", "h/part-1.jsonl", "h/held.jsonl", "h/deep/part-2.jsonl"),
    *("x/1.jsonl", "x/y/2.jsonl", "d/train.csv", "d/test.csv", "script.py"),
]


@pytest.mark.parametrize(
    ("config", "split", "files"),
    [
        ("helpful", "train", ["h/part-0.jsonl", "h/part-1.jsonl"]),
        ("helpful", "test", ["h/held.jsonl"]),
        (None, None, ["x/1.jsonl", "x/y/2.jsonl"]),
        ("folder", None, ["x/1.jsonl", "x/y/2.jsonl"]),
        ("by_folder", "test", ["d/test.csv"]),
    ],
)
def test_the_card_decides(config: str | None, split: str | None, files: list[str]) -> None:
    assert list(choose_files(FILES, CARD, config=config, split=split).files) == files


@pytest.mark.parametrize(
    ("config", "split", "code", "listed"),
    [
        ("helpful", None, "source_ambiguous", ["train", "test"]),
        ("helpful", "validation", "source_not_found", ["train", "test"]),
        ("nope", None, "source_not_found", ["helpful", "harmless", "by_folder", "folder"]),
    ],
)
def test_what_there_is_is_listed(
    config: str | None, split: str | None, code: str, listed: list[str]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        choose_files(FILES, CARD, config=config, split=split)
    assert caught.value.code == code
    assert all(repr(name) in caught.value.message for name in listed)
    assert caught.value.hint


def test_several_configurations_without_a_default_are_ambiguous() -> None:
    card = {"configs": [{"config_name": n, "data_files": "x/*"} for n in ("a", "b")]}
    with pytest.raises(InvalidInput, match="2 configurations: 'a', 'b'") as caught:
        choose_files(FILES, card, config=None, split=None)
    assert caught.value.code == "source_ambiguous"


def test_the_hubs_own_conversion_has_configurations_as_folders() -> None:
    files = ["en/train/0000.parquet", "en/train/0001.parquet", "de/partial-train/0000.parquet"]
    chosen = choose_files(files, {}, config="en", split=None)
    assert (chosen.config, chosen.split, list(chosen.files)) == ("en", "train", files[:2])
    assert choose_files(files, {}, config="de", split="train").files == (files[2],)


def test_the_same_rows_in_two_formats_are_read_once() -> None:
    chosen = usual(["train.jsonl", "train.parquet", "train.csv"])
    assert (chosen.files, chosen.ignored) == (("train.parquet",), ("train.csv", "train.jsonl"))


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("**", ["a.csv", "d/a.csv", "d/e/a.csv", "d/e/b.csv"]),
        ("**/a.csv", ["a.csv", "d/a.csv", "d/e/a.csv"]),
        ("d/**/a.csv", ["d/a.csv", "d/e/a.csv"]),
        ("d/**a.csv", ["d/a.csv", "d/e/a.csv"]),
        ("*/a.csv", ["d/a.csv"]),
        ("d/**/*", ["d/a.csv", "d/e/a.csv", "d/e/b.csv"]),
        ("d/e/[!a].csv", ["d/e/b.csv"]),
        ("d/e/[a-c]?csv", ["d/e/a.csv", "d/e/b.csv"]),
        ("d?a.csv", []),
        ("./d/*", ["d/a.csv"]),
    ],
)
def test_patterns_of_a_card(pattern: str, files: list[str]) -> None:
    card = {"configs": [{"config_name": "a", "data_files": pattern}]}
    there = ["a.csv", "d/a.csv", "d/e/a.csv", "d/e/b.csv"]
    if files:
        assert list(choose_files(there, card, config=None, split=None).files) == files
    else:
        with pytest.raises(InvalidInput, match="names no data files"):
            choose_files(there, card, config=None, split=None)


def test_a_hostile_card_ends_soon() -> None:
    stars = {"configs": [{"config_name": "a", "data_files": "*a" * 30 + "b.csv"}]}
    nested: Any = "x"
    for _ in range(40):
        nested = [nested, nested]
    lists = {"configs": [{"config_name": "a", "data_files": [nested]}]}
    splits = {"configs": [{"config_name": "a", "data_files": [{"split": nested, "path": "x"}]}]}
    for card, found in ((stars, "names no"), (lists, "names a list"), (splits, "has no name")):
        with pytest.raises(InvalidInput, match=found):
            choose_files(["a" * 200 + ".csv"], card, config=None, split=None)


@pytest.mark.parametrize(
    ("files", "card", "found"),
    [
        (["README.md", "prefs.py"], {}, "only the script 'prefs.py', which is never run"),
        (["README.md", "weights.bin", ".cache/train.jsonl"], {}, "no data files"),
        (FILES, {"configs": "x"}, "is no list"),
        (FILES, {"configs": [{"name": "x"}]}, "no `config_name`"),
        (FILES, {"configs": [{"config_name": "a", "data_files": "https://b.org/x.jsonl"}]}, "only"),
        (FILES, {"configs": [{"config_name": "a", "data_files": "../../etc/*.csv"}]}, "names no"),
        (FILES, {"configs": [{"config_name": "a", "data_files": [{"path": "x"}]}]}, "mixes forms"),
    ],
)
def test_repositories_that_cannot_be_read(
    files: list[str], card: dict[str, Any], found: str
) -> None:
    with pytest.raises(InvalidInput, match=found) as caught:
        choose_files(files, card, config=None, split=None)
    assert caught.value.code == "source_unreadable"
    assert caught.value.hint
