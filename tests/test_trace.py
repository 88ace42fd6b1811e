"""Traces: both published formats by content, and one clear line for every file that is not one."""

import gzip
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.trace import BLOCK_TOKENS, MOONCAKE_CONVERSATION, Request, TraceError, read, scan

MOONCAKE = (
    '{"timestamp": 40, "input_length": 700, "output_length": 3, "hash_ids": [0, 7]}\n'
    '{"timestamp": 52, "input_length": 513, "output_length": 1, "hash_ids": [0, 9]}\n'
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
)
REAL = Path(__file__).parents[2] / "shared" / "traces"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/traces is not on this machine")


def written(tmp_path: Path, text: str | bytes, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_mooncake_lines_become_requests(tmp_path):
    assert list(read(written(tmp_path, MOONCAKE))) == [
        Request(0.0, 700, 3, (0, 7)),
        Request(12.0, 513, 1, (0, 9)),
    ]


def test_azure_rows_become_requests(tmp_path):
    first, second = read(written(tmp_path, AZURE))
    assert first == Request(0.0, 4808, 10)
    assert (second.prompt, second.output, round(second.arrival)) == (3180, 8, 52)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.rstrip("\n"),
        lambda text: "\n" + text + "\n\n",
    ],
    ids=["crlf", "bom", "no newline at the end", "blank lines"],
)
@pytest.mark.parametrize("text", [MOONCAKE, AZURE], ids=["mooncake", "azure"])
def test_what_editors_and_exports_do_to_a_file_changes_nothing(tmp_path, text, change):
    plain = list(read(written(tmp_path, text, "plain")))
    assert list(read(written(tmp_path, change(text), "changed"))) == plain


def test_format_is_told_by_content_not_by_name(tmp_path):
    assert len(list(read(written(tmp_path, MOONCAKE, "trace.csv")))) == 2
    assert len(list(read(written(tmp_path, AZURE, "trace.jsonl")))) == 2


def test_azure_columns_may_come_in_any_order_with_others_and_with_zones(tmp_path):
    text = "Model,GeneratedTokens,TIMESTAMP,ContextTokens\nx,8,2024-05-10 00:00:00.009930+00:00,31\n"
    assert list(read(written(tmp_path, text))) == [Request(0.0, 31, 8)]


LINE = '{"timestamp": 0, "input_length": 6, "output_length": 3, "hash_ids": [0]}'
BROKEN = {
    # name: (content, the words its one line must hold)
    "empty": ("", "empty; expected a Mooncake .jsonl or an Azure .csv"),
    "blank": ("\n \n", "empty; expected"),
    "header only": ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
    "prose": ("Dear all,\nsee below\n", "line 1: expected a Mooncake object"),
    "json array": ("[" + LINE + "]", "line 1: expected a Mooncake object"),
    "other csv": ("a,b,c\n1,2,3\n", "line 1: expected a Mooncake object"),
    "csv without header": ("2023-11-16 18:17:03.97,4808,10\n", "Azure header TIMESTAMP"),
    "csv without timestamps": ("ContextTokens,GeneratedTokens\n1,2\n", "line 1: expected the columns TIMESTAMP"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not a text file"),
    "gzip": (gzip.compress(MOONCAKE.encode()), "not a text file"),
    "zero bytes": ("a\0b\n", "line 1: not a text file"),
    "one endless line": ("{" + " " * (1 << 24), "line 1: longer than"),
    "cut jsonl": (MOONCAKE[:-20], "line 2: expected one JSON object"),
    "cut within a list": (MOONCAKE + '{"timestamp": 60, "input_length": 700, "hash_ids": [0, ', "line 3: expected one"),
    "cut csv": (AZURE + "2023-11-16 18:17:05.1,31", "line 4: expected 3 columns"),
    "two objects a line": (LINE + LINE, "line 1: expected one JSON object"),
    "foreign object": ('{"prompt": "hello"}', 'line 1: expected "timestamp", found only prompt'),
    "later foreign line": (LINE + "\nnull\n", "line 2: expected one JSON object, found 'null'"),
    "no hash_ids": ('{"timestamp": 0, "input_length": 6, "output_length": 3}', 'expected "hash_ids"'),
    "deep": ('{"timestamp": ' + "[" * 100_000, "line 1: expected one JSON object"),
    "text length": (LINE.replace("6", '"6"'), "input_length: expected a whole number of tokens from 1"),
    "fraction": (LINE.replace("6", "6.5"), "input_length: expected a whole number"),
    "no prompt": (LINE.replace("6", "0"), "input_length: expected a whole number of tokens from 1"),
    "true": (LINE.replace("6", "true"), "input_length: expected a whole number"),
    "negative output": (LINE.replace("3", "-3"), "output_length: expected a whole number of tokens from 0"),
    "huge": (LINE.replace("6", str(2**31)), "input_length: expected a whole number of tokens from 1 to 2147483647"),
    "nan time": (LINE.replace(": 0", ": NaN", 1), "timestamp: expected milliseconds"),
    "text time": (LINE.replace(": 0", ': "noon"', 1), "timestamp: expected milliseconds"),
    "ids no list": (LINE.replace("[0]", "0"), "hash_ids: expected a list of integers"),
    "ids negative": (LINE.replace("[0]", "[-1]"), "hash_ids: expected a list of integers from 0 up"),
    "ids text": (LINE.replace("[0]", '["a"]'), "hash_ids: expected a list of integers"),
    "csv text": (AZURE.replace("3180", "many"), "line 3: ContextTokens: expected a whole number"),
    "csv negative": (AZURE.replace(",8\n", ",-8\n"), "line 3: GeneratedTokens: expected a whole number"),
    "csv time": (AZURE.replace("2023-11-16 18:17:04.0319600", "yesterday"), "line 3: TIMESTAMP: expected a time"),
    "csv empty cell": (AZURE.replace("3180", ""), "line 3: ContextTokens: expected a whole number"),
    "csv header twice": (AZURE + AZURE, "line 4: TIMESTAMP: expected a time"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_with_file_place_and_expectation(tmp_path, name):
    content, words = BROKEN[name]
    path = written(tmp_path, content)
    with pytest.raises(TraceError) as caught:
        list(read(path))
    text = str(caught.value)
    assert text.startswith(str(path))
    assert words in text
    assert "\n" not in text
    assert len(text) < len(str(path)) + 250


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(TraceError, match="no such file; expected a Mooncake"):
        next(read(tmp_path / "nowhere.jsonl"))
    with pytest.raises(TraceError, match="a folder; expected a Mooncake"):
        next(read(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TraceError, match="not a regular file"):
        next(read(tmp_path / "pipe"))


def test_reading_streams(tmp_path):
    """A request is out before the broken line behind it is seen."""
    requests = read(written(tmp_path, MOONCAKE + "broken\n"))
    assert next(requests).prompt == 700


@settings(deadline=None)
@given(st.text(max_size=300))
def test_no_text_does_anything_but_parse_or_raise_trace_error(tmp_path_factory, text):
    path = written(tmp_path_factory.getbasetemp(), text.encode("utf-8", "surrogatepass"), "any")
    lines = 1
    try:
        scan(read(path))
    except TraceError as error:
        lines = len(str(error).splitlines())
    assert lines == 1


@settings(deadline=None)
@given(st.data())
def test_every_cut_of_a_trace_parses_whole_lines_or_is_refused(tmp_path_factory, data):
    text = data.draw(st.sampled_from([MOONCAKE, AZURE]))
    cut = text[: data.draw(st.integers(0, len(text)))]
    path = written(tmp_path_factory.getbasetemp(), cut, "cut")
    try:
        count = scan(read(path)).requests
    except TraceError:
        return
    assert count <= cut.count("\n") + 1


def test_scan_counts_sizes_and_remarks():
    block = BLOCK_TOKENS
    found = scan([Request(5.0, block, 1, (0,)), Request(3.0, 1, 1, (0, 1)), Request(9.0, 2, 2)])
    assert (found.requests, found.prompt_tokens, found.output_tokens) == (3, block + 3, 4)
    assert (found.duration, found.with_blocks, found.longest(), found.longest(0.5)) == (9.0, 2, 2 * block, 4)
    assert sorted(found.remarks.values()) == [1, 1]


def test_statistics_draw_the_same_requests_for_a_seed_and_others_for_another():
    first, again, other = (list(MOONCAKE_CONVERSATION.draw(seed, 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_statistics_draw_what_they_say():
    requests = list(MOONCAKE_CONVERSATION.draw(0, 4000))
    for column, values in (
        (MOONCAKE_CONVERSATION.prompt, sorted(r.prompt for r in requests)),
        (MOONCAKE_CONVERSATION.output, sorted(r.output for r in requests)),
    ):
        assert column[0] <= values[0]
        assert values[-1] <= column[-1]
        for level, figure in zip((10, 25, 50, 75, 90), column[1:6], strict=True):
            below = sum(value < figure for value in values) / len(values)
            assert abs(below - level / 100) < 0.03  # five standard deviations of a share of 4000
    blocks = [b for r in requests for b in r.blocks]
    assert all(len(r.blocks) == -(-r.prompt // BLOCK_TOKENS) and r.blocks[0] == 0 for r in requests)
    assert 0.58 < len(set(blocks)) / len(blocks) < 0.69  # the trace: 182,790 of 288,500
    assert all(a.arrival <= b.arrival for a, b in pairwise(requests))


@needs_real
@pytest.mark.parametrize(
    ("name", "requests", "duration", "with_blocks"),
    [
        ("mooncake_conversation.jsonl", 12_031, 3_536_999, 12_031),
        ("azure_llm_2023_code.csv", 8_819, 3_435_948, 0),
    ],
)
def test_the_real_traces(name, requests, duration, with_blocks):
    found = scan(read(REAL / name))
    assert (found.requests, round(found.duration), found.with_blocks) == (requests, duration, with_blocks)
    assert not found.remarks
