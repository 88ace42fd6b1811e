"""The store: what a crash, a race, a foreign file or a read-only disk does to it, and to nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from rpa import ConfigCache, PersistentCache, RaggedPageAttentionv2Config, overlay_cache
from rpa import cache as stores
from rpa.device import Device

CFG = RaggedPageAttentionv2Config(num_queries_per_block=32, platform="xla")
OTHER = CFG.replace(num_queries_per_block=64)


@pytest.fixture
def store(tmp_path):
    return PersistentCache("op", tmp_path / "op.json")


def _again(store: PersistentCache) -> PersistentCache:
    """Another process's view of the same file."""
    return PersistentCache(store.opname, store.path)


def test_what_is_put_is_found_typed_and_only_under_its_key(store):
    store.put("H200", "op@0", "tokens<=8", CFG)
    assert _again(store).get("H200", "op@0", "tokens<=8") == CFG
    for miss in (("H100", "op@0", "tokens<=8"), ("H200", "op@1", "tokens<=8"), ("H200", "op@0", "tokens<=4")):
        assert store.get(*miss) is None


def test_nothing_is_touched_before_the_first_use(tmp_path):
    store = PersistentCache("op", tmp_path / "deep" / "op.json")
    assert store.get("d", "o", "k") is None
    assert not list(tmp_path.iterdir())


def test_the_file_names_its_schema_and_the_versions_that_wrote_it(store):
    store.put("d", "o", "k", CFG, note="why")
    document = json.loads(store.path.read_text())
    assert document["schema"] == stores.SCHEMA
    assert {"rpa", "jax"} <= document["versions"].keys()
    assert document["entries"]["d|o|k"]["note"] == "why"


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"schema": 1, "entries": {"d|o|k": {"conf', "[]", "3", "null", '{"entries": {}}', '{"schema": 1}',
     "[" * 100_000, "\ufeff{}", '{"schema": 0, "entries": {}}', '{"schema": "1", "entries": {}}', "\x00\x01"],
    ids=lambda text: repr(text[:24]),
)  # fmt: skip
def test_a_broken_or_foreign_file_is_a_warning_and_a_miss_and_is_set_aside_by_the_next_put(store, text):
    store.path.write_text(text)
    with pytest.warns(RuntimeWarning, match="counts as empty"):
        assert store.get("d", "o", "k") is None
    assert store.get("d", "o", "k") is None  # told once for each state of the file
    store.put("d", "o", "k", CFG)
    assert _again(store).get("d", "o", "k") == CFG
    assert Path(f"{store.path}.bad").read_text() == text


def test_a_file_cut_at_any_byte_is_a_warning_and_a_miss(store):
    store.put("d", "o", "k", CFG)
    whole = store.path.read_text()
    for length in range(len(whole) - 1):  # its last byte is a line's end
        store.path.write_text(whole[:length])
        with pytest.warns(RuntimeWarning, match="counts as empty"):
            assert _again(store).get("d", "o", "k") is None


def test_a_huge_foreign_file_is_neither_read_nor_replaced(store, monkeypatch):
    store.path.write_bytes(b"[")
    os.truncate(store.path, 1 << 40)  # sparse; reading it would not end
    with pytest.warns(RuntimeWarning, match=f"it has {1 << 40} bytes"):
        assert store.get("d", "o", "k") is None
    with pytest.warns(RuntimeWarning, match=r"are not stored.*bytes"):
        store.put("d", "o", "k", CFG)
    assert store.path.stat().st_size == 1 << 40


def test_what_a_killed_writer_left_is_overwritten(store):
    (store.path.parent / ".op.json.new").write_text('{"schema": 1, "ent')
    store.put("d", "o", "k", CFG)
    assert store.get("d", "o", "k") == CFG
    assert {path.name for path in store.path.parent.iterdir()} == {"op.json", "op.json.lock"}


def test_bytes_that_are_no_text_are_a_warning_and_a_miss(store):
    store.path.write_bytes(b"\xff\xfe\xfa")
    with pytest.warns(RuntimeWarning, match="counts as empty"):
        assert store.get("d", "o", "k") is None
    store.put("d", "o", "k", CFG)
    assert store.get("d", "o", "k") == CFG


def test_a_later_versions_file_is_never_written(store):
    text = json.dumps({"schema": stores.SCHEMA + 1, "entries": {"d|o|k": "new ways"}})
    store.path.write_text(text)
    with pytest.warns(RuntimeWarning, match=f"schema {stores.SCHEMA + 1}"):
        assert store.get("d", "o", "k") is None
    with pytest.warns(RuntimeWarning, match="are not stored"):
        store.put("d", "o", "k", CFG)
    assert store.path.read_text() == text


@pytest.mark.parametrize(
    "entry",
    [{"config": {"num_wraps": 4}}, {"config": {"platform": "tilelang"}}, {"config": {"num_warps": 0}},
     {"config": [1]}, {}, [], None, "text", 4],
)  # fmt: skip
def test_an_entry_that_is_no_config_is_a_warning_and_a_miss(store, entry):
    store.put("d", "o", "good", CFG)
    entries = {**store.entries(), "d|o|bad": entry}
    store.path.write_text(stores.render(entries))
    if entry is None:
        assert store.get("d", "o", "bad") is None
    else:
        with pytest.warns(RuntimeWarning, match="'bad' is not a usable config"):
            assert store.get("d", "o", "bad") is None
    assert store.get("d", "o", "good") == CFG


def test_two_handles_lose_nothing(store):
    other = _again(store)
    assert store.get("d", "o", "a") is None
    assert other.get("d", "o", "b") is None
    store.put("d", "o", "a", CFG)
    other.put("d", "o", "b", OTHER)
    for handle in (store, other, _again(store)):
        assert (handle.get("d", "o", "a"), handle.get("d", "o", "b")) == (CFG, OTHER)


_RACER = """
import sys
from rpa import PersistentCache, RaggedPageAttentionv2Config
store = PersistentCache("op", sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    store.put("d", "o", f"{sys.argv[2]} {i}", RaggedPageAttentionv2Config(num_warps=i + 1))
"""


def test_two_racing_processes_lose_nothing(store):
    racers = [
        subprocess.Popen([sys.executable, "-c", _RACER, store.path, name], text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name in ("one", "two")
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:  # both are past their imports, so that they do overlap
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate(timeout=120)
        assert racer.returncode == 0
    for name in ("one", "two"):
        for i in range(40):
            assert store.get("d", "o", f"{name} {i}") == RaggedPageAttentionv2Config(num_warps=i + 1)


def test_a_crash_while_writing_leaves_the_old_file_and_no_litter(store, monkeypatch):
    store.put("d", "o", "k", CFG)
    old = store.path.read_text()

    def crash(*_):
        raise OSError("the power went")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.warns(RuntimeWarning, match="the power went"):
        store.put("d", "o", "k", OTHER)
    assert store.path.read_text() == old
    assert {path.name for path in store.path.parent.iterdir()} <= {"op.json", "op.json.lock"}


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    store = PersistentCache("op", tmp_path / "file" / "op.json")
    with pytest.warns(RuntimeWarning, match="are not stored"):
        store.put("d", "o", "k", CFG)
    assert store.get("d", "o", "k") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere, so nothing is read-only to it")
def test_a_read_only_folder_is_a_warning(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.warns(RuntimeWarning, match="are not stored"):
        PersistentCache("op", tmp_path / "op.json").put("d", "o", "k", CFG)


def test_a_file_that_may_not_be_read_is_a_warning_and_a_miss(store, monkeypatch):
    store.put("d", "o", "k", CFG)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        assert _again(store).get("d", "o", "k") is None


def test_the_environment_says_where_at_each_use(tmp_path, monkeypatch):
    store = PersistentCache("op")
    for name in ("one", "two"):
        monkeypatch.setenv("RPA_CACHE_DIR", str(tmp_path / name))
        assert store.path == tmp_path / name / "op.json"
        assert store.get("d", "o", "k") is None
        store.put("d", "o", "k", CFG)
        assert store.get("d", "o", "k") == CFG


@pytest.mark.skipif(sys.platform != "linux", reason="the default place differs by platform; Linux's is checked")
def test_without_a_word_the_users_cache_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("RPA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert PersistentCache("op").path == tmp_path / "rpa" / "op.json"
    import platformdirs

    assert PersistentCache("op").path.parent == platformdirs.user_cache_path("rpa")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # which its specification has ignored
    assert PersistentCache("op").path == Path("~/.cache/rpa/op.json").expanduser()


@pytest.mark.skipif(sys.platform != "linux", reason="how a home is found differs by platform; Linux's is checked")
def test_a_user_without_a_home_has_a_store_among_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setenv("RPA_CACHE_DIR", "~no such user/store")
    assert str(PersistentCache("op").path) == "~no such user/store/op.json"
    for name in ("RPA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor the user is known
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    PersistentCache("op").put("d", "o", "k", CFG)
    assert PersistentCache("op").get("d", "o", "k") == CFG
    assert PersistentCache("op").path.is_relative_to(tmp_path)


@pytest.mark.parametrize("name", ["stat", "read_text"])
def test_a_file_that_nobody_may_look_at_is_one_warning(store, monkeypatch, name):
    store.put("d", "o", "k", CFG)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    again = _again(store)
    monkeypatch.setattr(Path, "read_text", refuse)
    if name == "stat":
        monkeypatch.setattr(Path, "stat", refuse)
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        assert again.get("d", "o", "k") is None
    assert again.get("d", "o", "k") is None


def test_a_relative_folder_below_one_that_is_gone_is_a_warning_and_a_miss(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    store = PersistentCache("op", "below/op.json")
    assert store.get("d", "o", "k") is None
    with pytest.warns(RuntimeWarning, match="are not stored"):
        store.put("d", "o", "k", CFG)


def test_a_config_that_is_no_data_is_a_warning(store):
    with pytest.warns(RuntimeWarning, match=r"are not stored.*not JSON serializable"):
        store.put("d", "o", "k", object())
    assert not store.path.exists()


def test_a_folder_in_the_files_place_is_a_warning_and_a_miss(tmp_path):
    store = PersistentCache("op", tmp_path)
    store.path.mkdir()
    with pytest.warns(RuntimeWarning, match="counts as empty"):
        assert store.get("d", "o", "k") is None
    with pytest.warns(RuntimeWarning, match="are not stored"):
        store.put("d", "o", "k", CFG)


def test_a_disk_that_is_full_is_a_warning_and_leaves_the_old_file(store, monkeypatch):
    store.put("d", "o", "k", CFG)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        store.put("d", "o", "k", OTHER)
    monkeypatch.undo()
    assert _again(store).get("d", "o", "k") == CFG
    assert {path.name for path in store.path.parent.iterdir()} <= {"op.json", "op.json.lock"}


_HOLDER = """
import os, sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.readline()
os._exit(1)
"""


def test_a_lock_is_waited_for_while_its_holder_lives_and_not_after(store, monkeypatch):
    command = [sys.executable, "-c", _HOLDER, f"{store.path}.lock"]
    holder = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(stores, "_PATIENCE", 0.1)
    with pytest.warns(RuntimeWarning, match="are not stored"):
        store.put("d", "o", "k", CFG)
    holder.communicate("\n", timeout=60)  # it dies with the lock in its hands
    assert Path(f"{store.path}.lock").exists()
    store.put("d", "o", "k", CFG)
    assert store.get("d", "o", "k") == CFG


def test_a_damaged_table_that_ships_is_a_warning_and_a_miss(tmp_path, monkeypatch):
    monkeypatch.setattr(stores.resources, "files", lambda package: tmp_path)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "some_chip.json").write_text('{"schema": 1, "entr')
    with pytest.warns(RuntimeWarning, match="counts as empty"):
        assert stores.shipped(Device("gpu", "Some Chip")) == {}


def test_what_is_no_file_is_neither_opened_nor_replaced(store):
    os.mkfifo(store.path)  # opening it would wait for a writer for ever
    with pytest.warns(RuntimeWarning, match="it is no file"):
        assert store.get("d", "o", "k") is None
    with pytest.warns(RuntimeWarning, match=r"are not stored.*it is no file"):
        store.put("d", "o", "k", CFG)
    assert store.path.is_fifo()


def test_a_link_goes_on_pointing_at_the_file(store, tmp_path):
    (tmp_path / "real").mkdir()
    store.path.symlink_to(tmp_path / "real" / "table.json")
    store.put("d", "o", "k", CFG)
    assert PersistentCache("op", tmp_path / "real" / "table.json").get("d", "o", "k") == CFG
    assert store.path.is_symlink()


def test_a_folder_as_path_holds_the_file(tmp_path):
    assert PersistentCache("op", tmp_path).path == tmp_path / "op.json"


_IMPORT = """
import os, sys
touched = []
def hook(event, args):
    if event == "open" and (str(args[0]).startswith(os.environ["RPA_CACHE_DIR"]) or "w" in str(args[1] or "")):
        touched.append(str(args[0]))
    if event == "os.mkdir":
        touched.append(str(args[0]))
sys.addaudithook(hook)
before = set(sys.modules)
import jax
touched.clear()
import rpa
print(touched, [m for m in ("oracle", "fuzz", "triton", "hypothesis", "rpa.backends.xla") if m in sys.modules])
"""


def test_importing_reads_and_writes_nothing_and_heeds_no_environment(tmp_path):
    (tmp_path / "ragged-page-attention.json").write_text('{"truncated')
    env = {
        **os.environ,
        "RPA_CACHE_DIR": str(tmp_path),
        "RPA_AUTOTUNE_POLICY": "bogus",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run([sys.executable, "-W", "error", "-c", _IMPORT], env=env, text=True, capture_output=True)
    assert (done.stdout, done.stderr) == ("[] []\n", "")


# ------------------------------------------------------------------ memory and overlays


def test_memory_is_shared_by_threads():
    memory = ConfigCache()
    threads = [
        threading.Thread(target=lambda n=n: [memory.put("d", "o", f"{n} {i}", CFG) for i in range(200)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.size() == 800 == len(memory.keys())
    memory.clear()
    assert memory.size() == 0


def test_the_innermost_overlay_wins_and_ends_with_its_block():
    triple = ("d", "o", "k")
    with overlay_cache({triple: CFG}):
        with overlay_cache({triple: OTHER}):
            assert stores.find_overlay(triple) == OTHER
        with overlay_cache({}):
            assert stores.find_overlay(triple) == CFG
    assert stores.find_overlay(triple) is None


def test_an_overlay_is_of_its_own_thread():
    seen = []
    with overlay_cache(CFG):
        thread = threading.Thread(target=lambda: seen.append(stores.find_overlay(("d", "o", "k"))))
        thread.start()
        thread.join()
    assert seen == [None]


def test_every_table_that_ships_can_be_read():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in Path(stores.__file__).parent.glob("tuned/*.json"):
            entries = stores.read(file)
            assert entries, file.name
            for key, entry in entries.items():
                assert key.startswith("ragged_page_attention_v2@"), key
                RaggedPageAttentionv2Config.from_dict(entry["config"])
