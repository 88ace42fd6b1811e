"""`rpa explain`, `rpa tune` and `rpa cache` as a newcomer types them: empty state, wrong input, a round trip."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from fuzz import tuning
from fuzz.commands import config
from fuzz.models import MODELS
from rpa import PersistentCache, RaggedPageAttentionv2Config
from rpa.select import STORE

app = typer.Typer()
app.command("explain")(config.explain)
app.command("tune")(config.tune)
app.add_typer(config.cache, name="cache")
CFG = RaggedPageAttentionv2Config(num_warps=4, platform="triton")


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("RPA_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("RPA_AUTOTUNE_POLICY", raising=False)
    monkeypatch.delenv("EJKERNEL_AUTOTUNE_POLICY", raising=False)


def _rpa(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_an_empty_store_is_shown_cleared_and_exported_without_being_made(tmp_path):
    for words, told in ((("show",), "0 configs"), (("clear",), "0 configs forgotten")):
        code, text = _rpa("cache", *words)
        assert (code, told in text) == (0, True), text
    assert _rpa("cache", "export", tmp_path / "out.json")[0] == 0
    assert not (tmp_path / "store").exists()
    assert json.loads((tmp_path / "out.json").read_text())["entries"] == {}


def test_what_is_exported_can_be_imported_elsewhere(tmp_path, monkeypatch):
    PersistentCache(STORE).put("H200", "op@0", "tokens<=8", CFG, note="measured")
    code, text = _rpa("cache", "show")
    assert code == 0
    for part in ("1 configs", "H200|op@0|tokens<=8", "num_warps", "measured"):
        assert part in text
    assert _rpa("cache", "export", tmp_path / "out.json")[0] == 0
    assert _rpa("cache", "clear")[0] == 0
    assert PersistentCache(STORE).get("H200", "op@0", "tokens<=8") is None
    monkeypatch.setenv("RPA_CACHE_DIR", str(tmp_path / "elsewhere"))
    code, text = _rpa("cache", "import", tmp_path / "out.json")
    assert (code, "1 configs in" in text) == (0, True)
    assert PersistentCache(STORE).get("H200", "op@0", "tokens<=8") == CFG


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not JSON"),
        ("[]", "no store of rpa"),
        (b"\xff\xfe", "codec"),
        ('{"schema": 9, "entries": {}}', "schema 9"),
        ('{"schema": 1, "entries": {"a": {}}}', "'a' is no entry of a store"),
        ('{"schema": 1, "entries": {"a|b|c": 3}}', "no entry of a store"),
        ('{"schema": 1, "entries": {"a|b|c": {"config": {"num_wraps": 1}}}}', "'num_wraps' is unknown"),
        (None, "No such file"),
    ],
)
def test_what_is_no_store_is_refused_and_changes_nothing(content, told, tmp_path):
    file = tmp_path / "in.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, text = _rpa("cache", "import", file)
    assert (code, told in text) == (2, True), text
    assert not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_written_is_said_without_a_traceback(tmp_path):
    (tmp_path / "store").write_text("a file where the folder should be")
    (tmp_path / "in.json").write_text('{"schema": 1, "entries": {"a|b|c": {"config": {}}}}')
    code, text = _rpa("cache", "import", tmp_path / "in.json")
    assert (code, "warning: " in text, "Traceback" in text) == (2, True, False), text
    assert _rpa("cache", "export", tmp_path)[0] == 2
    code, text = _rpa("tune", "--only", "tiny.full/b4x1k")  # before any time is spent
    assert (code, "are not stored" in text, "tuned" in text) == (2, True, False), text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("explain", "--model", "nosuch"), "no model is called 'nosuch'"),
        (("explain", "--layer", "nosuch"), "has no layer 'nosuch'"),
        (("explain", "--platform", "fpga"), "platform='fpga'"),
        (("explain", "--tokens", "0"), "greater than or equal to 1"),
        (("explain", "--context", str(10**17)), "too large"),
        (("tune", "--budget", "soon"), "'soon' is no time above 0; write 90s"),
        (("tune", "--budget", "0.001", "--only", "tiny.full/b4x1k"), "nothing was tuned"),
        (("tune", "--only", "nosuch"), "no cell's name contains or matches it; they begin with"),
        (("tune", "--only", "tiny.full/b4x1k", "--table", "/dev/full/table.json"), "a file in an existing folder"),
        (("tune", "--platform", "fpga"), "platform='fpga'"),
        (("tune", "--table", "/nosuch/table.json"), "a file in an existing folder is expected"),
        (("tune", "--workers", "0"), "greater than or equal to 1"),
        (("cache", "nosuch"), "nosuch"),
    ],
)
def test_wrong_input_is_told_with_exit_code_2(words, told):
    code, text = _rpa(*words)
    assert (code, told in text, "Traceback" in text) == (2, True, False), text


def test_explain_needs_no_device_memory_for_a_large_model():
    code, text = _rpa("explain", "--model", "llama3-8b", "--context", "131072", "--seqs", "256", "--tokens", "256")
    assert code == 0
    for part in ("backend", "source", "reason", "stages", "pallas_tpu"):
        assert part in text


def test_what_was_tuned_before_an_interrupt_is_stored(monkeypatch):
    def interrupted(*_):
        entry = {"config": CFG.to_dict(), "note": "measured"}
        yield tuning.Outcome("first", "tuned: 1.0 us", {"H200|op@0|tokens<=8": entry})
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "each", interrupted)
    code, text = _rpa("tune", "--only", "tiny.full/b4x")
    assert (code, "first: tuned: 1.0 us" in text) == (130, True), text
    assert PersistentCache(STORE).get("H200", "op@0", "tokens<=8") == CFG


def test_on_a_gpu_every_preset_is_tuned_and_no_key_twice():
    cells = tuning.distinct(tuning.cells_to_tune("gpu"))
    presets = {(m.name, entry.name) for m in MODELS.values() for entry in m.layers if m.name != "tiny"}
    assert {(cell.model.name, cell.layer.name) for cell in cells} == presets
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.name for cell in tuning.distinct([*cells, *cells])] == [cell.name for cell in cells]


@pytest.mark.slow
def test_an_interrupted_tuning_run_ends_at_once_and_leaves_the_store_whole(tmp_path):
    environment = {**os.environ, "RPA_CACHE_DIR": str(tmp_path / "store")}
    command = [sys.executable, "-m", "fuzz.cli", "tune", "--only", "tiny.full/b4x", "--iters", "2", "--budget", "9h"]
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert "float32: tuned: " in process.stdout.readline()  # the first cell is stored, and many are left
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "Traceback" not in errors, errors + out
    assert PersistentCache(STORE, tmp_path / "store").entries()  # a broken file would be a warning, and so an error


@pytest.mark.slow
def test_workers_tune_cells_side_by_side_into_one_table(tmp_path):
    table = tmp_path / "table.json"
    command = [sys.executable, "-m", "fuzz.cli", "tune", "--budget", "2h", "--workers", "2", "--iters", "4"]
    words = ["--only", "tiny.full/b4x", "--only", "p16", "--table", table]
    done = subprocess.run([*command, *words], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    entries = json.loads(table.read_text())["entries"]
    assert len(entries) == 5
    assert f"{len(entries)} configs in {table}" in done.stdout.replace("\n", "")
    for key, entry in entries.items():
        assert key.startswith("ragged_page_attention_v2@0|auto tokens<=")
        assert "tiny.full" in entry["note"]
        RaggedPageAttentionv2Config.from_dict(entry["config"])
