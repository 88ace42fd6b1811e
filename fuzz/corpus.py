"""Plans worth keeping: failures, and the few that cover all pairs; in a file, or shared between machines.

The file is JSON lines. Sharing goes through Hypothesis's example databases (a folder, or Redis), which hold bytes
under a key: the key is the target, the bytes are a plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuzz.coverage import features, pairs, valid_pairs
from fuzz.plan import Plan

if TYPE_CHECKING:  # half a second to import, which most campaigns need not wait for
    from hypothesis.database import ExampleDatabase


class StoreError(RuntimeError):
    """A shared store that cannot be reached; the message says which, and what is missing."""


def open_store(place: str | None) -> ExampleDatabase | None:
    """The store at `redis://host:port/db` or in a folder; None for None.

    Raises:
        StoreError: the `redis` extra is not installed, or no server answers.
    """
    if place is None:
        return None
    if not place.startswith(("redis://", "rediss://", "unix://")):
        from hypothesis.database import DirectoryBasedExampleDatabase

        return DirectoryBasedExampleDatabase(place)
    try:
        from hypothesis.extra.redis import RedisExampleDatabase
        from redis import Redis
        from redis.exceptions import RedisError
    except ImportError as error:
        raise StoreError(f"{place} needs the `redis` extra: {error}") from error
    server = Redis.from_url(place)
    try:
        server.ping()
    except RedisError as error:
        raise StoreError(f"no Redis answers at {place}: {error}") from error
    return RedisExampleDatabase(server, key_prefix=b"rpa-fuzz:")


def save(store: ExampleDatabase | None, target: str, plan: Plan) -> None:
    """Share a plan with every campaign on the same target."""
    if store is not None:
        store.save(target.encode(), plan.to_json().encode())


def fetch(store: ExampleDatabase | None, target: str) -> list[Plan]:
    """Every plan shared for a target; what is no plan of this version is left out."""
    found = []
    for blob in [] if store is None else store.fetch(target.encode()):
        try:
            found.append(Plan.from_json(blob.decode()))
        except ValueError:
            continue
    return sorted(found, key=lambda plan: plan.to_json())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line; a last line cut short by a crash is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def minimised(entries: Iterable[tuple[Plan, str | None]]) -> list[tuple[Plan, str | None]]:
    """The fewest entries (greedily) that keep every pair of features and every finding covered."""
    left = list(entries)
    covers = [(pairs(features(plan)) & valid_pairs()) | {("finding", finding)} for plan, finding in left]
    wanted = set().union(*covers) - {("finding", None)}
    kept = []
    while wanted:
        best = max(range(len(left)), key=lambda i: len(covers[i] & wanted))
        kept.append(left[best])
        wanted -= covers[best]
    return kept
