"""The cache of compiled kernels: nobody else's code is loaded, damage is mended, compilers print what they like."""

import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moeify.kernels.cpu.cpp import LEVELS, build, compiler, library

pytestmark = pytest.mark.skipif(os.name == "nt" or not shutil.which("c++"), reason="needs a C++ compiler")
COMPILER = """#!/bin/sh
case "$*" in *--version*) printf 'version \\377\\376'; exit 0;; esac
printf 'warning \\377\\n' >&2
"""


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """The portable kernel from an empty cache; a fake compiler takes a moment where a real one takes seconds."""
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    runs = []

    def compile_(command, made):
        runs.append(made)
        time.sleep(0.05)
        made.write_bytes(b"a library")

    monkeypatch.setattr(build, "compile_", compile_)

    def get() -> tuple[Path, int]:
        return build._compiled("portable", ["c++"]), len(runs)

    return get


def test_a_library_is_compiled_once(compiled):
    file, _ = compiled()
    assert compiled() == (file, 1)
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert {path.suffix for path in file.parent.iterdir()} == {".so", ".sha256"}


def test_a_library_that_several_want_at_once_is_compiled_once(compiled):
    with ThreadPoolExecutor() as pool:
        wanted = [pool.submit(compiled) for _ in range(4)]
    assert {each.result()[1] for each in wanted} == {1}


@pytest.mark.parametrize("damage", [b"", b"a librarz", b"a lib"])
def test_a_damaged_library_is_compiled_again(compiled, damage):
    file, _ = compiled()
    file.write_bytes(damage)
    assert compiled() == (file, 2)
    assert file.read_bytes() == b"a library"


def test_a_library_without_its_hash_is_compiled_again(compiled):
    file, _ = compiled()
    file.with_name(f"{file.name}.sha256").unlink()
    assert compiled() == (file, 2)


@pytest.mark.parametrize("part", ["folder", "library"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_what_others_may_write_to_is_refused(compiled, part, mode):
    file, _ = compiled()
    (file.parent if part == "folder" else file).chmod(mode)
    with pytest.raises(PermissionError, match=r"others may write to .*chmod go-w it, or set MOEIFY_CACHE"):
        compiled()


@pytest.mark.parametrize("part", ["folder", "library"])
def test_what_belongs_to_somebody_else_is_refused(compiled, part, monkeypatch):
    file, _ = compiled()
    theirs = file.parent if part == "folder" else file
    real = Path.stat

    def stat(path, **options):
        status = real(path, **options)
        return os.stat_result([*status[:4], 54321, *status[5:]]) if path == theirs else status

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(PermissionError, match=r"belongs to another user.*set MOEIFY_CACHE to a folder of your own"):
        compiled()


@pytest.fixture
def fresh():
    """Load kernels again in spite of what this process has loaded."""
    build._load.cache_clear()
    yield build._load
    build._load.cache_clear()


def test_without_a_compiler_the_kernel_of_the_cache_is_loaded(compiled, fresh, monkeypatch):
    loaded = []
    monkeypatch.setattr(build.ctypes, "CDLL", loaded.append)
    file, _ = compiled()
    monkeypatch.setattr(build, "_find", lambda command: None)
    fresh("portable", None)
    assert loaded == [str(file)]
    assert "CXX=none-there is not found" in fresh("portable", "none-there")
    build._load.cache_clear()
    file.write_bytes(b"a lib")
    assert "none of c++, g++ and clang++ is found; install a C++ compiler" in fresh("portable", None)


@pytest.mark.parametrize("error", [RuntimeError("no home"), ValueError("odd"), OSError("disk")])
def test_whatever_goes_wrong_is_a_reason_and_not_a_crash(compiled, fresh, monkeypatch, error):
    def fail(command, made):
        raise error

    monkeypatch.setattr(build, "compile_", fail)
    assert fresh("portable", "c++") == f"it could not be compiled by c++: {error}"


def test_what_killed_compilations_left_is_swept(compiled):
    folder = compiled()[0].parent
    old, young = folder / "compiling-old", folder / "compiling-young"
    for left in (old, young):
        left.mkdir()
    os.utime(old, (0, 0))
    compiled()[0].unlink()
    compiled()
    assert not old.exists()
    assert young.exists()


def test_a_cache_that_is_refused_is_a_reason_and_not_a_crash(compiled):
    file, _ = compiled()
    file.parent.chmod(0o777)
    build._load.cache_clear()
    try:
        assert "its cache cannot be used: others may write to" in str(build._load("portable", "c++"))
    finally:
        build._load.cache_clear()


@pytest.mark.parametrize("status", [0, 1])
def test_a_compiler_may_print_what_is_not_utf_8(tmp_path, monkeypatch, status):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"{COMPILER}exit {status}\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    build._load.cache_clear()
    try:
        outcome = build._load("portable", str(compiler))
    finally:
        build._load.cache_clear()
    assert "it could not be compiled" in outcome


@pytest.fixture
def wheel(compiled, fresh, tmp_path, monkeypatch):
    """The folder of a wheel's libraries, and the libraries that are loaded."""
    loaded = []
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: loaded.append(Path(path)) or path)
    build.PREBUILT.mkdir()
    return build.PREBUILT / f"{build.name('portable')}.so", loaded


def test_options_come_last_and_make_a_library_of_their_own(compiled, monkeypatch):
    commands, replace = [], build._compile
    monkeypatch.setattr(build, "_compile", lambda command, file: commands.append(command) or replace(command, file))
    file, _ = compiled()
    other = build._compiled("portable", ["c++"], ["-O1", "-g"])
    assert other != file
    assert commands == [["c++", *compiler.FLAGS], ["c++", *compiler.FLAGS, "-O1", "-g"]]


@pytest.mark.usefixtures("compiled")
def test_a_library_of_the_wheel_goes_before_the_compiler_unless_cxx_or_options_are_given(wheel, fresh):
    file, loaded = wheel
    file.write_bytes(b"a library")
    fresh("portable", None)
    fresh("portable", "c++")
    fresh("portable", None, ("-O1",))
    assert loaded[0] == file
    assert {path.parent for path in loaded[1:]} == {build.env.cache_folder() / "cpp"}
    assert len(set(loaded)) == 3


def test_a_library_of_other_sources_is_not_that_of_this_version(wheel, fresh):
    file, loaded = wheel
    file.with_name("layer-portable-0123456789abcdef.so").write_bytes(b"a library")
    fresh("portable", None)
    assert loaded[0].parent != file.parent


def test_a_library_that_the_system_cannot_load_is_compiled_and_said(wheel, fresh, monkeypatch, caplog):
    file, loaded = wheel
    file.write_bytes(b"a library")

    def load(path):
        if Path(path) == file:
            raise OSError("libgomp.so.1: cannot open shared object file")
        loaded.append(Path(path))

    monkeypatch.setattr(build.ctypes, "CDLL", load)
    fresh("portable", None)
    assert len(loaded) == 1
    assert "libgomp.so.1" in caplog.text


def test_the_libraries_are_tied_to_no_version_of_torch():
    if reason := build.why_not():
        pytest.skip(reason)
    if shutil.which("ldd"):
        needed = subprocess.run(["ldd", library()._name], capture_output=True, text=True).stdout
        assert "libc" in needed
        assert "torch" not in needed
        assert "c10" not in needed
    included = [line for path in compiler.SOURCES for line in path.read_text().splitlines() if "#include" in line]
    assert included
    assert not any("torch" in line for line in included)


def test_a_wheel_has_every_instruction_set():
    hook = (Path(__file__).parents[3] / "hatch_build.py").read_text()
    assert all(f'"{level}"' in hook for level in LEVELS)
