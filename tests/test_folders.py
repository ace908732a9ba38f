"""Files of a folder change all at once, and one process at a time changes them."""

import errno
import multiprocessing
import os

import filelock
import pytest

from killing import forks, killed_at_every_operation
from moeify.files import write_json, write_text
from moeify.folders import finish, locked, replacing_files


def write(folder, text="new", names=("a", "in/b")):
    with replacing_files(folder) as stage:
        for name in names:
            write_text(stage.new / name, text)
        stage.obsolete.add("c")


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


OLD = {"a": "old", "in/b": "old", "c": "old", "mine": "mine"}
NEW = {"a": "new", "in/b": "new", "mine": "mine"}


@pytest.fixture
def old(tmp_path):
    for name, text in OLD.items():
        write_text(tmp_path / "start" / name, text)
    return tmp_path / "start"


@forks
def test_a_kill_at_any_file_operation_leaves_all_old_files_or_all_new_ones(old, tmp_path):
    seen = []
    for folder, done in killed_at_every_operation(write, old, tmp_path):
        finish(folder)
        found = {name: text for name, text in contents(folder).items() if not name.startswith(".moeify-save")}
        assert found in (OLD, NEW)
        seen.append(found)
        write(folder, "later", names=["a"])
        assert contents(folder) == {name: t for name, t in (found | {"a": "later"}).items() if name != "c"}
        assert not done or found == NEW
    assert OLD in seen


def test_an_exception_leaves_the_folder_as_it_was(old):
    (old / "taken").mkdir()
    for name, fault in (("taken", "is a folder, and a file of this name is to be saved"), ("mine/b", "mine is a file")):
        with pytest.raises(OSError, match=fault):
            write(old, names=["a", name])
    with pytest.raises(UnicodeEncodeError), replacing_files(old) as stage:
        write_text(stage.new / "a", "half \ud800")
    assert contents(old) == OLD


def test_what_is_to_be_deleted_outside_the_folder_is_not(old, tmp_path):
    write_text(tmp_path / "precious", "x")
    (old / "link").symlink_to(tmp_path)
    for name in ("../precious", str(tmp_path / "precious"), "link/precious"):
        write_json(old / ".moeify-commit" / "obsolete.json", {"obsolete": [name]})
        with pytest.raises(ValueError, match="outside the folder"):
            finish(old)
    assert (tmp_path / "precious").exists()


def test_links_do_not_lead_a_save_that_is_finished_to_files_elsewhere(old, tmp_path):
    write_text(tmp_path / "elsewhere" / "new" / "a", "precious")
    for link, target in (
        (".moeify-commit", tmp_path / "elsewhere"),
        (".moeify-commit/new", tmp_path / "elsewhere/new"),
    ):
        (old / link).parent.mkdir(exist_ok=True)
        (old / link).symlink_to(target)
        with pytest.raises(ValueError, match="a link to elsewhere; delete it"):
            finish(old)
        (old / link).unlink()
    assert (tmp_path / "elsewhere" / "new" / "a").read_text() == "precious"


def hold(folder, held, end):
    with locked(folder, ".lock", "is working"):
        held.set()
        end.wait(60)


@forks
def test_a_second_process_is_refused_until_the_first_one_ends_however_it_does(tmp_path):
    fork = multiprocessing.get_context("fork")
    held, end = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(tmp_path, held, end))
    other.start()
    assert held.wait(60)
    with (
        pytest.raises(OSError, match=r"another process is working in .*wait until it ends"),
        locked(tmp_path, ".lock", "is working"),
    ):
        pass
    other.kill()
    other.join()
    with locked(tmp_path, ".lock", "is working"):
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_said(error, tmp_path, monkeypatch, capsys):
    def acquire(self):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with locked(tmp_path, ".lock", "is working"):
        pass
    assert "has no locks" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="for root every folder can be written to")
def test_a_folder_that_cannot_be_written_to_is_not_one_without_locks(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError), locked(tmp_path, ".lock", "is working"):
        pass
