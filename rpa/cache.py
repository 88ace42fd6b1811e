"""Where chosen configs are kept: in memory, in overlays, in a file that many processes share, in shipped tables."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from rpa import settings
from rpa.config import RaggedPageAttentionv2Config
from rpa.device import Device

SCHEMA = 1
_PATIENCE = 20.0  # seconds to wait for another process's write
_LARGEST = 64 << 20  # bytes, of 100,000 configs: a file of more is somebody else's and is not read
Triple = tuple[str, str, str]  # device, operation, key

overlays: ContextVar[tuple[Any, ...]] = ContextVar("rpa_overlays", default=())  # innermost first


# ------------------------------------------------------------------ memory and overlays


class ConfigCache:
    """Configs of this process by (device, operation, key); threads may share it, since each method is one step."""

    def __init__(self) -> None:
        self._data: dict[Triple, Any] = {}
        self.generation = object()  # another after each change, so that a remembered choice can tell that it is stale

    def get(self, device: str, op: str, key: str) -> Any | None:
        return self._data.get((device, op, key))

    def put(self, device: str, op: str, key: str, cfg: Any) -> None:
        self._data[device, op, key] = cfg
        self.generation = object()

    def clear(self) -> None:
        self._data.clear()
        self.generation = object()

    def size(self) -> int:
        return len(self._data)

    def keys(self) -> list[Triple]:
        return list(self._data)


@contextlib.contextmanager
def overlay_cache(overlay: Mapping[Triple, Any] | RaggedPageAttentionv2Config) -> Iterator[None]:
    """Within the block, configs that win over every store; the innermost block wins.

    Args:
        overlay: `{(device, operation, key): config}`, keys as `explain(...).key` gives them, or one config for
            every call.
    """
    token = overlays.set((overlay, *overlays.get()))
    try:
        yield
    finally:
        overlays.reset(token)


def find_overlay(triple: Triple) -> Any | None:
    found = (overlay.get(triple) if isinstance(overlay, Mapping) else overlay for overlay in overlays.get())
    return next((config for config in found if config is not None), None)


# ------------------------------------------------------------------ the file


class PersistentCache:
    """Configs in one JSON file: merged under a lock, replaced atomically, never a reason for a call to fail.

    A file that is truncated, foreign, of another schema or not writable is a warning and a miss. Nothing is read
    or created before the first `get` or `put`.

    Args:
        opname: names the file, `<opname>.json`.
        path: the file, or an existing folder to hold it; None takes `RPA_CACHE_DIR`, else the user's cache folder.
        loader, dumper: a config from plain data and back; None is for our own.
    """

    generation = 0  # counts this process's writes to any store, so that a remembered choice can tell it is stale

    def __init__(
        self,
        opname: str,
        path: str | os.PathLike[str] | None = None,
        loader: Callable[[Any], Any] | None = None,
        dumper: Callable[[Any], Any] | None = None,
    ) -> None:
        self.opname = opname
        self._path = None if path is None else Path(os.path.expanduser(path))
        self._loader = loader or RaggedPageAttentionv2Config.from_dict
        self._dumper = dumper or _plain
        self._read: tuple[Any, dict[str, Any]] = (None, {})  # stamp of the file, its entries

    @property
    def path(self) -> Path:
        """The file, found anew at each use since the environment may change."""
        if self._path is None:
            return settings.cache_dir() / f"{self.opname}.json"
        return self._path / f"{self.opname}.json" if os.path.isdir(self._path) else self._path

    def get(self, device: str, op: str, key: str) -> Any | None:
        """The stored config, or None; an entry that is no config is a warning and None."""
        entry = self.entries().get("|".join((device, op, key)))
        return None if entry is None else config_of(entry, f"{self.path}: the entry {key!r}", self._loader)

    def put(self, device: str, op: str, key: str, cfg: Any, note: str = "") -> None:
        """Add one config to what other processes have stored meanwhile."""
        entry = {"config": self._dumper(cfg), "note": note, "versions": versions()}
        self.merge({"|".join((device, op, key)): entry})

    def entries(self) -> dict[str, Any]:
        """All entries, `"device|operation|key" -> {"config", "note", "versions"}`; read again when the file changed."""
        path = self.path
        try:
            stat = path.stat()
            stamp = (path, stat.st_mtime_ns, stat.st_size, stat.st_ino)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError:
            stamp = (path,)  # reading it will say why
        if self._read[0] != stamp:
            self._read = (stamp, _readable(path))
        return self._read[1]

    def merge(self, added: Mapping[str, Any], *, replace: bool = False) -> bool:
        """Write `added` over the file's entries (with `replace`, instead of them); False, with a warning, if not."""
        path = self.path
        try:
            from filelock import FileLock

            path = Path(os.path.realpath(path))  # a link stays one
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock", timeout=_PATIENCE):  # its Timeout is an OSError
                entries = {} if replace else _current(path)
                _write(path, {**entries, **added})
        except (OSError, ValueError, TypeError, MemoryError, NotImplementedError, ImportError) as error:
            warn(f"{path}: configs are not stored, and are found anew in the next process: {error}")
            return False
        PersistentCache.generation += 1
        return True


def _current(path: Path) -> dict[str, Any]:
    """The entries to merge into; a broken file is set aside, one of a later schema is left alone (OSError)."""
    try:
        return read(path)
    except FileNotFoundError:
        return {}
    except ValueError:
        os.replace(path, f"{path}.bad")
        return {}


def _readable(file: Any) -> dict[str, Any]:
    """The entries of a file, none of one that cannot be used."""
    try:
        return read(file)
    except (OSError, ValueError, MemoryError) as error:
        warn(f"{file}: this store is not usable and counts as empty: {error}")
        return {}


def read(file: Any) -> dict[str, Any]:
    """The entries of a store's file.

    Raises:
        ValueError: it holds no store of this schema.
        OSError: it cannot be read, or a later version wrote it and would lose what only that one knows.
    """
    if os.path.exists(file) and not os.path.isfile(file):  # opening a pipe would wait for its writer
        raise OSError("it is no file")
    if (size := os.path.getsize(file)) > _LARGEST:
        raise OSError(f"it has {size} bytes, and no store grows past {_LARGEST}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(data, dict) or not isinstance(data.get("entries"), dict) or "schema" not in data:
        raise ValueError("it is JSON, but no store of rpa")
    schema = data["schema"]
    if schema != SCHEMA:
        kind = OSError if isinstance(schema, int) and schema > SCHEMA else ValueError
        raise kind(f"it has schema {schema!r}, and this version reads and writes {SCHEMA}")
    return data["entries"]


def config_of(entry: Any, where: str, loader: Callable[[Any], Any] = RaggedPageAttentionv2Config.from_dict) -> Any:
    """The config of an entry; None, with a warning, where it holds none."""
    try:
        return loader(entry["config"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        warn(f"{where} is not a usable config and is ignored: {type(error).__name__}: {error}")
        return None


def render(entries: Mapping[str, Any]) -> str:
    """The text of a store."""
    document = {"schema": SCHEMA, "versions": versions(), "entries": dict(sorted(entries.items()))}
    return json.dumps(document, indent=1) + "\n"


def _write(path: Path, entries: Mapping[str, Any]) -> None:
    """Replace the file whole: a reader sees the old text or the new one, and a crash leaves one of them."""
    temporary = path.with_name(f".{path.name}.new")  # one name, so that the killed writers leave one file at most
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(render(entries))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _plain(cfg: Any) -> Any:
    if hasattr(cfg, "to_dict"):
        return cfg.to_dict()
    return dataclasses.asdict(cfg) if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type) else cfg


def warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


# ------------------------------------------------------------------ versions and the shipped tables


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """The versions that a tuned config depends on."""
    found = {}
    for name in ("rpa", "jax", "triton", "jax-triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def shipped(device: Device) -> dict[str, Any]:
    """The tuned table that ships for a kind of accelerator, `"operation|key without versions" -> entry`, if any."""
    return _table(device.kind) if device.accelerator else {}


@lru_cache(maxsize=16)
def _table(kind: str) -> dict[str, Any]:
    name = re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")
    file = resources.files("rpa").joinpath("tuned", f"{name}.json")
    return _readable(file) if file.is_file() else {}
