"""The compilation cache: its folder, and equal bits from cached programs."""

from __future__ import annotations

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from moe.system import compilation_cache
from moe.training.train import train
from tests.run_helpers import ONE, SETTINGS, tiny

_CHANGED = ("jax_compilation_cache_dir", *compilation_cache._SETTINGS)


@pytest.fixture(autouse=True)
def unchanged(monkeypatch, tmp_path):
    """JAX without a cache, a user's cache folder in tmp_path, and JAX's settings restored at the end."""
    before = {name: getattr(jax.config, name) for name in _CHANGED}
    monkeypatch.setattr(compilation_cache, "DEFAULT", str(tmp_path / "user"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # runs here use one of the tests' eight devices
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def _entries(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*-cache")}


@pytest.mark.slow
def test_a_second_start_reuses_the_programs_of_the_first_bit_for_bit(directory, monkeypatch, tmp_path):
    monkeypatch.setitem(compilation_cache._SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0.0)
    written, found = {}, []
    for name, folder in (
        ("without", ""),
        ("first", str(tmp_path / "programs")),
        ("second", str(tmp_path / "programs")),
    ):
        jax.clear_caches()
        compilation_cache.use(folder, str(tmp_path / name))
        train(tiny(directory, **SETTINGS, **{"train.num_steps": 3}), str(tmp_path / name), ONE, quiet=True)
        written[name] = (tmp_path / name / "metrics.jsonl").read_bytes()
        found.append(_entries(tmp_path / "programs"))
    assert written["without"] == written["first"] == written["second"]
    assert not found[0]
    assert any(name.startswith("jit_train_step") for name in found[1])
    assert found[1] == found[2]  # the second start compiled nothing


@pytest.mark.parametrize(
    ("folder", "processes", "expected"), [("auto", 1, "user"), ("auto", 2, "run/programs"), ("own", 2, "own")]
)
def test_processes_of_one_run_share_a_folder(monkeypatch, tmp_path, folder, processes, expected):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    compilation_cache.use(folder if folder == "auto" else str(tmp_path / folder), str(tmp_path / "run"))
    (machine,) = (tmp_path / expected).iterdir()
    assert machine.name.startswith("tpu-")
    assert jax.config.jax_compilation_cache_dir == str(machine)


def test_programs_of_several_cpu_devices_are_not_cached(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    compilation_cache.use(str(tmp_path / "programs"), str(tmp_path))
    assert jax.config.jax_compilation_cache_dir is None
    assert not list(tmp_path.iterdir())


def test_jaxs_own_variable_and_an_empty_name_leave_jaxs_settings_unchanged(monkeypatch, tmp_path):
    compilation_cache.use("", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    compilation_cache.use("auto", str(tmp_path))
    assert jax.config.jax_compilation_cache_dir is None
    assert not list(tmp_path.iterdir())


def test_an_unusable_folder_gives_one_line_on_stderr(capsys, tmp_path):
    (tmp_path / "file").touch()
    compilation_cache.use(str(tmp_path / "file"), str(tmp_path))
    assert jax.config.jax_compilation_cache_dir is None
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert "no compilation cache in " in printed.err
    assert "Not a directory" in printed.err


def test_cpus_with_other_instruction_sets_are_other_machines(monkeypatch, tmp_path):
    names = []
    for flags in ("fpu avx2", "fpu avx2", "fpu avx2 avx512f"):
        info = tmp_path / "cpuinfo"
        info.write_text(f"processor : 0\nflags : {flags}\n")
        monkeypatch.setattr(compilation_cache, "Path", lambda path, info=info: info)
        names.append(compilation_cache._machine())
    assert names[0] == names[1] != names[2]
