"""A training set of exact counts: so many rows of each group, some from an earlier set.

A group is one or several `source`s. Of the rows that may be drawn, those whose prompt was not
drawn yet come first, in an order that a hash of (seed, group, row) decides: the same seed draws
the same rows whatever the order of the files. A prompt occurs at most `max_per_prompt` times in
the whole mix, copies included.
"""

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.chat import Row, prompt_hash, to_line
from data.errors import DataError
from data.fingerprint import unit_hash
from data.manifest import (
    ROWS,
    Manifest,
    Output,
    Plan,
    Tally,
    Tick,
    no_tick,
    perform,
    read_files,
)

INPUT, ANCHOR_INPUT = "mode.input", "mode.anchor_input"
# Why a row is not in the mix.
NO_GROUP, NOT_DRAWN = "no_group", "not_drawn"


@dataclass(frozen=True)
class Recipe:
    """What a mix consists of.

    Attributes:
        counts: rows of each group.
        groups: patterns of `source` (`*`, `?`, `[...]`) of each group; a group that is not
            named here consists of the source of its own name.
        anchors: of the rows of a group, how many come from the earlier set.
        max_per_prompt: how often a prompt may occur.
        repeat: whether a row may be repeated to fill a count, within `max_per_prompt`; the id of
            copy k is ID#k.
        seed: of the draw and of the order.
    """

    counts: Mapping[str, int]
    groups: Mapping[str, Sequence[str]]
    anchors: Mapping[str, int]
    max_per_prompt: int = 1
    repeat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.counts:
            raise DataError("mode.counts={}: allowed: {GROUP: ROWS, ...}")
        allowed = ", ".join(self.counts)
        for key, names in (("groups", self.groups), ("anchors", self.anchors)):
            for group in names:
                if group not in self.counts:
                    raise DataError(
                        f"mode.{key}.{group}: has no count in mode.counts; allowed: {allowed}"
                    )
        for group, count in self.anchors.items():
            if count > self.counts[group]:
                raise DataError(
                    f"mode.anchors.{group}={count}: more than mode.counts.{group}="
                    f"{self.counts[group]}; allowed: up to that"
                )
        if self.max_per_prompt < 1:
            raise DataError(f"mode.max_per_prompt={self.max_per_prompt}: allowed: an integer >= 1")

    def group_of(self, source: str) -> str | None:
        """The group of a source, None: it belongs to none.

        Raises:
            DataError: it belongs to several.
        """
        fitting = [group for group in self.counts if self._fits(group, source)]
        if len(fitting) > 1:
            raise DataError(
                f"mode.groups: source {source!r} fits {' and '.join(fitting)}; allowed: one group"
            )
        return fitting[0] if fitting else None

    def _fits(self, group: str, source: str) -> bool:
        return any(fnmatchcase(source, pattern) for pattern in self.groups.get(group, (group,)))


class Candidate(NamedTuple):
    """A row that may be drawn: `offset` is its place in the spool file."""

    identifier: str
    source: str
    prompt: str
    place: str
    offset: int


class Drawn(NamedTuple):
    """A row of the mix; copies count from 1."""

    candidate: Candidate
    copy: int


def mix(
    folder: Path,
    rows: Sequence[Path],
    anchor_rows: Sequence[Path],
    recipe: Recipe,
    tick: Tick = no_tick,
) -> Manifest:
    """Write a mix as `rows.jsonl`, in an order that the seed decides.

    Args:
        folder: where it goes.
        rows: files of new rows.
        anchor_rows: files of the earlier set, from which the anchors are drawn.
        recipe: what is wanted.
        tick: told of every row read.

    Raises:
        DataError: too few rows for a group (with what is there and what is wanted), a source in
            two groups, two rows of the mix with one id, or a bad row or file.
    """
    if recipe.anchors and not anchor_rows:
        raise DataError(f"{ANCHOR_INPUT}=[]: mode.anchors needs rows; allowed: files, globs")
    inputs = {INPUT: rows, ANCHOR_INPUT: anchor_rows}
    options = json.loads(json.dumps(asdict(recipe)))
    # The order of the keys decides which group draws first.
    plan = Plan("mix", folder, (ROWS,), inputs, options | {"order": list(recipe.counts)})

    def work(files: dict[str, Output]) -> Manifest:
        """Draw the rows and write them in a shuffled order."""
        # The spool holds all rows, so that only their ids and hashes are in memory.
        with tempfile.TemporaryFile(dir=folder, prefix=".spool.") as spool:
            fresh = _spool(rows, INPUT, recipe, spool, tick)
            anchors = _spool(anchor_rows, ANCHOR_INPUT, recipe, spool, tick) if anchor_rows else {}
            used: Counter[str] = Counter()
            old = draw(anchors, recipe.anchors, recipe, used, ANCHOR_INPUT)
            rest = {g: count - recipe.anchors.get(g, 0) for g, count in recipe.counts.items()}
            new = draw(fresh, rest, recipe, used, INPUT)
            drawn = in_order([*_flat(old), *_flat(new)], recipe.seed)
            _check_ids(drawn)
            for item in drawn:
                files[ROWS].write(_line(item, spool))
        facts = {
            "rows": _tally(fresh, new),
            "anchor_rows": _tally(anchors, old),
            "mix": _facts(old, new, recipe),
        }
        _check_sums(facts, recipe, files[ROWS].lines)
        return facts

    return perform(plan, work)


def draw(
    candidates: Mapping[str | None, Sequence[Candidate]],
    wanted: Mapping[str, int],
    recipe: Recipe,
    used: Counter[str],
    key: str,
) -> dict[str, list[Drawn]]:
    """So many rows of each group.

    Args:
        candidates: by group.
        wanted: rows of each group.
        recipe: the caps and the seed.
        used: how often each prompt occurs in the mix so far; updated.
        key: where the candidates come from, for the message.

    Raises:
        DataError: a group has too few, by name.
    """
    drawn: dict[str, list[Drawn]] = {}
    for group, count in wanted.items():
        there = candidates.get(group, ())
        order = sorted(there, key=lambda c: _rank(recipe.seed, group, c))
        possible = _by_turns(order, recipe, used)
        if len(possible) < count:
            sources = ", ".join(recipe.groups.get(group, (group,)))
            raise DataError(
                f"mode.counts: group {group} (sources {sources}) wants {count} rows of {key},"
                f" available {len(possible)} ({len(there)} rows, at most"
                f" {recipe.max_per_prompt} per prompt,"
                f" {'with' if recipe.repeat else 'without'} copies); allowed: up to that"
            )
        drawn[group] = possible[:count]
        used.update(item.candidate.prompt for item in drawn[group])
    return drawn


def _by_turns(order: Sequence[Candidate], recipe: Recipe, used: Counter[str]) -> list[Drawn]:
    """All that the caps allow: first what brings a prompt its first occurrence, then its second,
    and so on; of one prompt, all rows before the first copy of one."""
    by_prompt: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in order:
        by_prompt[candidate.prompt].append(candidate)
    turns: list[tuple[int, int, Drawn]] = []
    rank = {candidate.offset: number for number, candidate in enumerate(order)}
    for prompt, rows in by_prompt.items():
        room = recipe.max_per_prompt - used[prompt]
        for turn in range(room if recipe.repeat else min(room, len(rows))):
            copy, number = divmod(turn, len(rows))
            item = Drawn(rows[number], copy + 1)
            turns.append((used[prompt] + turn, rank[item.candidate.offset], item))
    return [item for _, _, item in sorted(turns)]


def in_order(drawn: Sequence[Drawn], seed: int) -> list[Drawn]:
    """Shuffled by a hash of (seed, id, copy)."""

    def place(item: Drawn) -> tuple[float, str, int]:
        found = item.candidate
        return unit_hash(f"order\n{seed}\n{item.copy}\n{found.identifier}"), found.prompt, item.copy

    return sorted(drawn, key=place)


def _rank(seed: int, group: str, candidate: Candidate) -> tuple[float, str, int]:
    chance = unit_hash(f"draw\n{seed}\n{group}\n{candidate.prompt}\n{candidate.identifier}")
    return chance, candidate.identifier, candidate.offset


def _spool(
    paths: Sequence[Path], key: str, recipe: Recipe, spool: BinaryIO, tick: Tick
) -> dict[str | None, list[Candidate]]:
    """Copy all rows to the spool and note by group where they are."""
    found: dict[str | None, list[Candidate]] = defaultdict(list)
    groups: dict[str, str | None] = {}
    for place, row in read_files(paths, key):
        source = row["source"]
        if source not in groups:
            groups[source] = recipe.group_of(source)
        candidate = Candidate(row["id"], source, prompt_hash(row), place, spool.tell())
        found[groups[source]].append(candidate)
        spool.write(to_line(row).encode())
        tick(1)
    return found


def _line(item: Drawn, spool: BinaryIO) -> bytes:
    spool.seek(item.candidate.offset)
    line = spool.readline()
    if item.copy == 1:
        return line
    row: Row = json.loads(line)
    return to_line(row | {"id": _name(item)}).encode()


def _name(item: Drawn) -> str:
    identifier = item.candidate.identifier
    return identifier if item.copy == 1 else f"{identifier}#{item.copy}"


def _check_ids(drawn: Sequence[Drawn]) -> None:
    places: dict[str, str] = {}
    for item in drawn:
        other = places.setdefault(_name(item), item.candidate.place)
        if other != item.candidate.place:
            raise DataError(
                f"{item.candidate.place}: id {_name(item)!r} is also at {other};"
                " allowed: an id of its own for every row of the mix"
            )


def _flat(drawn: Mapping[str, Sequence[Drawn]]) -> Iterator[Drawn]:
    for items in drawn.values():
        yield from items


def _tally(
    candidates: Mapping[str | None, Sequence[Candidate]], drawn: Mapping[str, Sequence[Drawn]]
) -> dict:
    """What became of every row read; copies are counted apart."""
    tally = Tally()
    taken = {item.candidate.offset for item in _flat(drawn)}
    for group, rows in candidates.items():
        for row in rows:
            if row.offset in taken:
                tally.keep(row.source)
            else:
                tally.remove(row.source, NO_GROUP if group is None else NOT_DRAWN)
    return tally.as_dict()


def _check_sums(facts: Manifest, recipe: Recipe, lines: int) -> None:
    """Exactly what was asked, and every line of it a row that was read or a copy of one."""
    drawn = sum(sum(facts[part]["out"].values()) for part in ("rows", "anchor_rows"))
    copies = sum(group["copies"] for group in facts["mix"].values())
    assert {name: group["rows"] for name, group in facts["mix"].items()} == dict(recipe.counts)
    assert lines == sum(recipe.counts.values()) == drawn + copies


def _facts(
    old: Mapping[str, Sequence[Drawn]], new: Mapping[str, Sequence[Drawn]], recipe: Recipe
) -> dict[str, dict]:
    """{group: {"rows", "anchors", "copies", "prompts", "sources"}} of the mix."""
    facts = {}
    for group in recipe.counts:
        items = [*old.get(group, ()), *new.get(group, ())]
        facts[group] = {
            "rows": len(items),
            "anchors": len(old.get(group, ())),
            "copies": sum(item.copy > 1 for item in items),
            "prompts": len({item.candidate.prompt for item in items}),
            "sources": dict(sorted(Counter(item.candidate.source for item in items).items())),
        }
    return facts
