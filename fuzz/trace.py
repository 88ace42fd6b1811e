"""Reading serving traces: what requests came, when, how long, and which prompt blocks they shared.

Two published formats are recognised by their content, never by their name:

- Mooncake (kvcache-ai/Mooncake, FAST'25 release, Apache-2.0): one JSON object a line with `timestamp` in ms,
  `input_length` and `output_length` in tokens, and `hash_ids`, one for each 512-token block of the prompt;
  equal ids mean equal prefixes, so equal pages.
- Azure LLM inference (Azure/AzurePublicDataset, CC-BY; Patel et al., Splitwise, ISCA 2024): CSV with the
  columns `TIMESTAMP`, `ContextTokens` and `GeneratedTokens`.

A file is read as a stream, in constant memory, and whole before the first step: a trace that is broken at its
end is refused at the start. With no file, requests are drawn from published length statistics.
"""

from __future__ import annotations

import csv
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np

BLOCK_TOKENS = 512  # prompt tokens that one hash id stands for
MAX_TOKENS = 2**31 - 1  # context lengths are int32
MAX_LINE = 1 << 24  # characters: a line longer than this is not a request


@dataclass(frozen=True)
class Request:
    """One request: arrival in ms from the trace's start, lengths in tokens, one id a prompt block."""

    arrival: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


class TraceError(ValueError):
    """A trace that cannot be used: the message is one line naming file, line and what was expected."""


@dataclass
class Scan:
    """What one pass over a trace found: counts, sizes by power of two, and remarks worth showing."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    duration: float = 0.0  # ms
    with_blocks: int = 0
    sizes: Counter[int] = field(default_factory=Counter)  # bit length of prompt + output: requests
    remarks: Counter[str] = field(default_factory=Counter)

    def add(self, request: Request) -> None:
        """Count one request and note what is odd about it."""
        if request.arrival < self.duration:
            self.remarks["earlier than the line before it, admitted in file order"] += 1
        if request.blocks and len(request.blocks) != -(-request.prompt // BLOCK_TOKENS):
            self.remarks[f"hash_ids do not number one for each {BLOCK_TOKENS} prompt tokens"] += 1
        self.requests += 1
        self.prompt_tokens += request.prompt
        self.output_tokens += request.output
        self.duration = max(self.duration, request.arrival)
        self.with_blocks += bool(request.blocks)
        self.sizes[(request.prompt + request.output - 1).bit_length()] += 1

    def longest(self, share: float = 0.99) -> int:
        """A power of two that at least `share` of the requests fit in, prompt and output together."""
        seen = 0
        for bits in sorted(self.sizes):
            seen += self.sizes[bits]
            if seen >= share * self.requests:
                return 1 << bits
        return 1


def scan(requests: Iterable[Request]) -> Scan:
    """Go through all requests once, in constant memory."""
    result = Scan()
    for request in requests:
        result.add(request)
    return result


# ---------------------------------------------------------------------------------------------------- files


def read(path: str | Path) -> Iterator[Request]:
    """The requests of a trace file in file order, arrival counted from the first one.

    Raises:
        TraceError: the file is missing, empty, not a trace, or malformed; one line that says where and why.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise TraceError(f"{path}: no such file; expected a Mooncake .jsonl or an Azure .csv trace")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise TraceError(f"{path}: {kind}; expected a Mooncake .jsonl or an Azure .csv trace")
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _numbered(path, file)
    except UnicodeDecodeError as error:
        raise TraceError(
            f"{path}: not a text file (byte 0x{error.object[error.start]:02x}); "
            "expected a Mooncake .jsonl or an Azure .csv trace"
        ) from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None


def _numbered(path: Path, file: TextIO) -> Iterator[Request]:
    lines = _lines(path, file)
    first = next(lines, None)
    if first is None:
        raise TraceError(f"{path}: empty; expected a Mooncake .jsonl or an Azure .csv trace")
    number, text = first
    parse: Callable[[str], Request]
    if text.startswith("{"):
        parse, rest = _mooncake, _chain(first, lines)
    elif "contexttokens" in text.lower() and "generatedtokens" in text.lower():
        parse, rest = _azure(path, number, text), lines
    else:
        raise TraceError(
            f"{path}, line {number}: expected a Mooncake object "
            f'{{"timestamp": ...}} or the Azure header TIMESTAMP,ContextTokens,GeneratedTokens, '
            f"found {_quote(text)}"
        )
    yield from _parsed(path, rest, parse)


def _parsed(path: Path, lines: Iterator[tuple[int, str]], parse: Callable[[str], Request]) -> Iterator[Request]:
    start: float | None = None
    for number, text in lines:
        try:
            request = parse(text)
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: {error}") from None
        start = request.arrival if start is None else start
        yield Request(request.arrival - start, request.prompt, request.output, request.blocks)
    if start is None:
        raise TraceError(f"{path}: no requests; expected at least one line below the header")


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, str]]:
    """Numbered lines, blank ones left out; a line without end is refused before it fills the memory."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) >= MAX_LINE:
            raise TraceError(f"{path}, line {number}: longer than {MAX_LINE} characters, not a trace")
        if "\0" in line:
            raise TraceError(f"{path}, line {number}: not a text file (a zero byte); expected a trace")
        if text := line.strip():
            yield number, text


def _chain(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _mooncake(text: str) -> Request:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        cut = "" if text.endswith("}") else "; is the file cut off?"
        raise ValueError(
            f"expected one JSON object, {error.msg[0].lower()}{error.msg[1:]} at column {error.colno}{cut}"
        ) from None
    except RecursionError:
        raise ValueError("expected one JSON object, found one nested too deeply") from None
    if not isinstance(entry, dict):
        raise ValueError(f"expected one JSON object, found {_quote(text)}")
    for name in ("timestamp", "input_length", "output_length", "hash_ids"):
        if name not in entry:
            raise ValueError(f'expected "{name}", found only {", ".join(entry) or "an empty object"}')
    ids = entry["hash_ids"]
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"hash_ids: expected a list of integers from 0 up, found {_quote(json.dumps(ids))}")
    arrival = entry["timestamp"]
    if type(arrival) not in (int, float) or not math.isfinite(arrival):
        raise ValueError(f"timestamp: expected milliseconds, found {_quote(json.dumps(arrival))}")
    return Request(
        float(arrival),
        _count("input_length", entry["input_length"], 1),
        _count("output_length", entry["output_length"], 0),
        tuple(ids),
    )


def _azure(path: Path, number: int, header: str) -> Callable[[str], Request]:
    columns = [name.strip().lower() for name in next(csv.reader([header]))]
    wanted = ("timestamp", "contexttokens", "generatedtokens")
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise TraceError(
            f"{path}, line {number}: expected the columns TIMESTAMP, ContextTokens and GeneratedTokens, "
            f"found {_quote(header)}"
        )
    when, prompt, output = (columns.index(name) for name in wanted)

    def parse(text: str) -> Request:
        cells = [cell.strip() for cell in next(csv.reader([text]))]
        if len(cells) != len(columns):
            raise ValueError(f"expected {len(columns)} columns ({header.strip()}), found {len(cells)}: {_quote(text)}")
        return Request(
            _milliseconds(cells[when]),
            _count("ContextTokens", _integer("ContextTokens", cells[prompt]), 1),
            _count("GeneratedTokens", _integer("GeneratedTokens", cells[output]), 0),
        )

    return parse


def _milliseconds(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        example = "2023-11-16 18:17:03.9799600"
        raise ValueError(f"TIMESTAMP: expected a time such as {example}, found {_quote(text)}") from None
    # Differences alone matter, so a time without a zone may be read as any zone.
    return (moment.replace(tzinfo=None) - datetime(2000, 1, 1)).total_seconds() * 1e3


def _integer(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name}: expected a whole number of tokens, found {_quote(text)}")
    return int(text)


def _count(name: str, value: object, least: int) -> int:
    if type(value) is not int or not least <= value <= MAX_TOKENS:
        raise ValueError(
            f"{name}: expected a whole number of tokens from {least} to {MAX_TOKENS}, found {_quote(json.dumps(value))}"
        )
    return value


def _quote(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


# --------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Statistics:
    """Published figures of a trace, enough to draw requests like its own.

    Args:
        source: whose trace, under which licence.
        percentiles: the levels at which `prompt` and `output` (tokens) are given.
        gap: mean time between arrivals, ms.
        common: leading prompt blocks that every request shares.
        reuse: chance that a request continues an earlier one's prompt.
    """

    source: str
    percentiles: tuple[int, ...]
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    gap: float
    common: int
    reuse: float

    def draw(self, seed: int, count: int | None = None) -> Iterator[Request]:
        """Requests drawn from the figures, the same ones for the same seed; endless without `count`."""
        return islice(self._draw(np.random.default_rng([seed, 0x7ACE])), count)

    def _draw(self, rng: np.random.Generator) -> Iterator[Request]:
        clock, fresh = 0.0, self.common
        recent: list[tuple[int, ...]] = []
        while True:
            prompt, output = (self._length(column, rng) for column in (self.prompt, self.output))
            total = -(-prompt // BLOCK_TOKENS)
            head = tuple(range(min(self.common, total)))
            if recent and rng.random() < self.reuse:
                head = recent[rng.integers(len(recent))][:total]
            blocks = head + tuple(range(fresh, fresh + total - len(head)))
            fresh += total - len(head)
            recent = [*recent[-63:], blocks]
            yield Request(clock, prompt, output, blocks)
            clock += rng.exponential(self.gap)

    def _length(self, column: tuple[int, ...], rng: np.random.Generator) -> int:
        """Inverse of the distribution, straight in the logarithm between two published percentiles."""
        level = rng.random() * 100
        i = min(bisect_right(self.percentiles, level), len(column) - 1)
        share = (level - self.percentiles[i - 1]) / (self.percentiles[i] - self.percentiles[i - 1])
        return round(column[i - 1] * (column[i] / column[i - 1]) ** share)


# 12,031 requests over 3,537 s; of their 288,500 prompt blocks 182,790 are distinct and block 0 is everyone's.
# `reuse` is set so that draws share as many.
MOONCAKE_CONVERSATION = Statistics(
    source="length statistics of Mooncake's conversation trace (kvcache-ai/Mooncake, FAST'25, Apache-2.0)",
    percentiles=(0, 10, 25, 50, 75, 90, 99, 100),
    prompt=(891, 964, 2306, 6909, 15368, 27367, 85401, 126195),
    output=(1, 24, 156, 350, 472, 597, 1120, 2000),
    gap=294.0,
    common=1,
    reuse=0.87,
)
