"""Which files of a hub repository are a split: what its card says, else the usual names.

The conventions are those of the `datasets` library; nothing in the repository is ever run.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import InvalidInput

TRAIN = "train"
_KEYWORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATORS = "[-._ 0-9]"
_SHARDED = re.compile(r"data/([^/]*)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
_CONVERTED = re.compile(r"([^/]+)/(?:partial-)?([^/]+)/[0-9]{4}\.parquet")
# In the order in which equal counts are decided.
_SUFFIXES = ("parquet", "jsonl", "ndjson", "json", "csv", "tsv", "arrow", "feather", "zip", "tar")
_DATA = re.compile(rf".*\.({'|'.join(_SUFFIXES)})(?:\.(?:gz|zst|xz))?|.*\.tgz", re.IGNORECASE)
_NO_DATA = frozenset({"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json",
                      "dummy_data.zip"})  # fmt: skip
_MAX_NAMES = 30


@dataclass(frozen=True)
class Chosen:
    """The files of one split, in the order of their names; `ignored` are of another format."""

    config: str
    split: str
    files: tuple[str, ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class _Config:
    name: str
    splits: Mapping[str, tuple[str, ...]]
    is_default: bool = False


def choose_files(
    files: Sequence[str], card: Mapping[str, Any], *, config: str | None, split: str | None
) -> Chosen:
    """Return the data files of a configuration and split; `card` is the metadata of the README.

    Raises:
        InvalidInput: `source_ambiguous` or `source_not_found` (what there is, is listed),
            `source_unreadable`: no data files, or a card that cannot be followed.
    """
    data = sorted(name for name in files if _is_data(name))
    if not data:
        raise _no_data(files)
    configs = _configs(data, card)
    found = _config_of(configs, config)
    splits = {name: paths for name, paths in found.splits.items() if paths}
    if not splits:
        raise _unreadable(f"the configuration {found.name!r} names no data files that are there")
    chosen = _split_of(splits, split, found.name)
    kept = _of_one_format(splits[chosen])
    ignored = tuple(name for name in splits[chosen] if name not in kept)
    return Chosen(found.name, chosen, kept, ignored)


def _is_data(name: str) -> bool:
    parts = name.split("/")
    if any(part.startswith((".", "__")) for part in parts) or parts[-1] in _NO_DATA:
        return False
    return _DATA.fullmatch(parts[-1]) is not None


def _config_of(configs: Sequence[_Config], wanted: str | None) -> _Config:
    names = [one.name for one in configs]
    if wanted is not None:
        for one in configs:
            if one.name == wanted:
                return one
        raise _missing("configuration", wanted, names, "config")
    if len(configs) == 1:
        return configs[0]
    default = [one for one in configs if one.is_default] or [
        one for one in configs if one.name == "default"
    ]
    if len(default) == 1:
        return default[0]
    raise _ambiguous("configurations", names, "config")


def _split_of(splits: Mapping[str, tuple[str, ...]], wanted: str | None, config: str) -> str:
    if wanted is not None:
        if wanted not in splits:
            raise _missing(f"split of configuration {config!r}", wanted, list(splits), "split")
        return wanted
    if len(splits) == 1:
        return next(iter(splits))
    raise _ambiguous(f"splits in configuration {config!r}", list(splits), "split")


# ------------------------------------------------------------------ configurations


def _configs(data: Sequence[str], card: Mapping[str, Any]) -> list[_Config]:
    stated = card.get("configs")
    if stated:
        if not isinstance(stated, list):
            raise _unreadable("`configs` of the repository's card is no list")
        return [_stated(data, entry) for entry in stated]
    converted = [match for name in data if (match := _CONVERTED.fullmatch(name))]
    if len(converted) == len(data):
        return _by_folders(converted)
    return [_Config("default", _by_names(data))]


def _stated(data: Sequence[str], entry: object) -> _Config:
    """Return a configuration as the card has it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("config_name"), str):
        raise _unreadable("an entry of `configs` in the repository's card has no `config_name`")
    name, folder = entry["config_name"], entry.get("data_dir")
    if folder is not None and not isinstance(folder, str):
        raise _unreadable(f"`data_dir` of configuration {name!r} is no text")
    base = "" if not folder else folder.removeprefix("./").strip("/") + "/"
    inside = {path.removeprefix(base): path for path in data if path.startswith(base)}
    patterns = entry.get("data_files")
    if patterns is None:
        found = _by_names(list(inside))
    else:
        found = {
            split: tuple(dict.fromkeys(p for one in globs for p in _matching(inside, one)))
            for split, globs in _patterns(patterns, name).items()
        }
    splits = {split: tuple(inside[p] for p in paths) for split, paths in found.items()}
    return _Config(name, splits, is_default=entry.get("default") is True)


def _patterns(stated: object, config: str) -> dict[str, list[str]]:
    """Return the patterns of each split; patterns without a split are of `train`."""
    if isinstance(stated, dict):
        found = {str(split): _texts(paths, config) for split, paths in stated.items()}
    elif isinstance(stated, list) and any(isinstance(item, dict) for item in stated):
        found = {}
        for item in stated:
            if not isinstance(item, dict) or set(item) != {"split", "path"}:
                raise _unreadable(
                    f"`data_files` of configuration {config!r} mixes forms; expected entries of "
                    "`split` and `path`"
                )
            split = item["split"]
            if not isinstance(split, str | int | float):
                raise _unreadable(f"a split of configuration {config!r} has no name")
            if str(split) in found:
                raise _unreadable(f"configuration {config!r} has split {split!r} twice")
            found[str(split)] = _texts(item["path"], config)
    else:
        found = {TRAIN: _texts(stated, config)}
    return found


def _texts(value: object, config: str) -> list[str]:
    texts: list[str] = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str) or "://" in text:
            # Never as text: lists that are in each other many times over would not end.
            named = repr(text[:100]) if isinstance(text, str) else f"a {type(text).__name__}"
            raise _unreadable(
                f"`data_files` of configuration {config!r} names {named}; only files of the "
                "repository are read"
            )
        texts.append(text)
    return texts


def _matching(paths: Mapping[str, str], pattern: str) -> list[str]:
    """Return the files that a pattern of the card names; a folder stands for what is in it."""
    pattern = pattern.removeprefix("./")
    if not any(mark in pattern for mark in "*[?"):
        folder = pattern.rstrip("/") + "/"
        return [path for path in paths if path == pattern or path.startswith(folder)]
    tokens = _tokens(pattern)
    return [path for path in paths if _fits(tokens, path)]


def _tokens(pattern: str) -> list[str | re.Pattern[str]]:
    """Return the parts of a glob: characters, `?`, `*`, `**`, `**/`, and `[...]` as a pattern."""
    tokens: list[str | re.Pattern[str]] = []
    for part in re.findall(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\]|.", pattern):
        if part[0] != "[" or len(part) == 1:
            tokens.append(part)
            continue
        negated = part[1] in "!^"
        inner = part[2 if negated else 1 : -1].replace("\\", "\\\\").replace("[", "\\[")
        try:
            tokens.append(re.compile(f"[{'^' if negated else ''}{inner}]"))
        except re.error as error:
            raise _unreadable(f"the pattern {pattern[:100]!r} cannot be read: {error}") from error
    return tokens


def _fits(tokens: Sequence[str | re.Pattern[str]], path: str) -> bool:
    """Whether a glob names a whole path: `*` stays in a folder, `**` does not.

    All ways to read it go on at once, character by character: as a regular expression a card's
    pattern of many stars could be tried for years.
    """
    at = _entered(tokens, 0)
    for character in path:
        after: set[int] = set()
        for state in at:
            match tokens[state] if state < len(tokens) else None:
                case None:
                    continue
                case "**/":
                    after |= {state} | (_entered(tokens, state + 1) if character == "/" else set())
                case "**":
                    after |= _entered(tokens, state)
                case "*":
                    after |= _entered(tokens, state) if character != "/" else set()
                case token:
                    after |= _entered(tokens, state + 1) if _is_one(token, character) else set()
        if not after:
            return False
        at = after
    return len(tokens) in at


def _entered(tokens: Sequence[str | re.Pattern[str]], state: int) -> set[int]:
    """Return where a reading can be that has come to a token: stars may stand for nothing."""
    first = state
    while state < len(tokens) and tokens[state] in ("*", "**", "**/"):
        state += 1
    return set(range(first, state + 1))


def _is_one(mark: str | re.Pattern[str], character: str) -> bool:
    if isinstance(mark, re.Pattern):
        return mark.fullmatch(character) is not None
    return character != "/" if mark == "?" else character == mark


def _by_folders(converted: Sequence[re.Match[str]]) -> list[_Config]:
    """Return what the hub's own conversion (branch `refs/convert/parquet`) has."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for match in converted:
        splits = found.setdefault(match[1], {})
        splits[match[2]] = (*splits.get(match[2], ()), match[0])
    return [_Config(name, splits) for name, splits in found.items()]


def _by_names(data: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return splits by the usual names: of shards, else folders, else files; else all is train."""
    sharded: dict[str, tuple[str, ...]] = {}
    for path in data:
        if match := _SHARDED.fullmatch(path):
            sharded[match[1]] = (*sharded.get(match[1], ()), path)
    if sharded:
        return sharded
    for form in (r"(?:.*/)?(?:[^/]*{s})?{k}(?:{s}[^/]*)?/.*", r"(?:.*/)?(?:[^/]*{s})?{k}{s}[^/]*"):
        found = {}
        for split, keywords in _KEYWORDS.items():
            pattern = re.compile(form.format(s=_SEPARATORS, k=f"(?:{'|'.join(keywords)})"))
            found[split] = tuple(path for path in data if pattern.fullmatch(path))
        found = {split: paths for split, paths in found.items() if paths}
        if found:
            return found
    return {TRAIN: tuple(data)} if data else {}


def _of_one_format(paths: Sequence[str]) -> tuple[str, ...]:
    """Keep the files of the most frequent format: a repository often has the same rows in two."""
    counts = Counter(_format(path) for path in paths)
    best = min(counts, key=lambda suffix: (-counts[suffix], _SUFFIXES.index(suffix)))
    return tuple(path for path in paths if _format(path) == best)


def _format(path: str) -> str:
    match = _DATA.fullmatch(path)
    assert match is not None
    return (match[1] or "tar").lower()


# ------------------------------------------------------------------ refusals


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(repr(name[:100]) for name in names[:_MAX_NAMES]) + more


def _ambiguous(what: str, names: Sequence[str], param: str) -> InvalidInput:
    return InvalidInput(
        f"the repository has {len(names)} {what}: {_listed(names)}",
        code="source_ambiguous",
        param=f"source.{param}",
        hint=f"name one of them as `{param}`",
    )


def _missing(what: str, wanted: str, names: Sequence[str], param: str) -> InvalidInput:
    return InvalidInput(
        f"the repository has no {what} named {wanted!r}; there is {_listed(names)}",
        code="source_not_found",
        param=f"source.{param}",
        hint=f"name one of them as `{param}`",
    )


def _unreadable(why: str) -> InvalidInput:
    return InvalidInput(
        why,
        code="source_unreadable",
        param="source",
        hint="download the files and upload them, or take revision refs/convert/parquet",
    )


def _no_data(files: Sequence[str]) -> InvalidInput:
    scripts = [name for name in files if "/" not in name and name.endswith(".py")]
    found = f"only the script {scripts[0]!r}, which is never run" if scripts else "no data files"
    return _unreadable(
        f"the repository has {found}; expected files that end with {', '.join(_SUFFIXES)}"
    )
