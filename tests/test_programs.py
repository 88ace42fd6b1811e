"""Compiled programs are kept for the next campaign, and nothing that is wrong with them is a campaign's end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fuzz.programs import kept, sort_of_machine

FOLDER, SIZE = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"
PROGRAM = """
import jax, jax.numpy as jnp
print(jax.jit(lambda x: jnp.tanh(x) @ jnp.exp(x))(jnp.linspace(-1, 1, 81).reshape(9, 9)).tobytes().hex())
"""


def test_campaigns_share_a_bounded_folder_and_machines_of_another_sort_do_not(tmp_path: Path) -> None:
    mine = {"RPA_CACHE_DIR": str(tmp_path), "NPROC": "1"}
    first, second = (kept(tmp_path / name, mine) for name in ("a", "b"))
    assert first == second
    assert Path(first[FOLDER]).is_dir()
    assert int(first[SIZE]) > 0
    assert kept(tmp_path / "a", {**mine, "NPROC": "2"})[FOLDER] != first[FOLDER]
    assert sort_of_machine(mine) == sort_of_machine(dict(mine))


def test_what_the_user_says_of_the_folder_wins(tmp_path: Path) -> None:
    mine = {"RPA_CACHE_DIR": str(tmp_path), FOLDER: str(tmp_path / "mine")}
    assert not {FOLDER, SIZE} & set(kept(tmp_path, mine))
    assert SIZE not in kept(tmp_path, {"RPA_CACHE_DIR": str(tmp_path), SIZE: "-1"})


def test_where_no_folder_can_be_made_a_campaign_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = kept(tmp_path, {"RPA_CACHE_DIR": str(tmp_path / "file")})
    assert found[FOLDER] == str(tmp_path / "compiled")


def test_a_damaged_program_is_compiled_again_and_a_loaded_one_answers_the_same_bits(tmp_path: Path) -> None:
    environ = {**os.environ, "RPA_CACHE_DIR": str(tmp_path)}
    environ.pop(FOLDER, None)
    environ |= kept(tmp_path, environ) | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def answer() -> tuple[str, str]:
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    compiled, _ = answer()
    programs = [path for path in Path(environ[FOLDER]).glob("*-cache") if "lambda" in path.name]
    assert programs, "nothing was kept"
    assert answer() == (compiled, "")  # loaded, and not a word about it
    for path in programs:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # as a process leaves it that is killed
    again, words = answer()
    assert again == compiled
    assert "Error reading persistent compilation cache" in words
