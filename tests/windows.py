"""Run commands of moeify as on Windows: `python windows.py COMMANDS.json`, a list of the arguments of each.

The modules of moeify, and no others, find `os`, `signal`, `mmap`, `platform` and `sys` as they are there, and none of
the modules that only Unix has; where they open a text without naming its encoding, they get an error. A command that
fails ends the run with its status.
"""

from __future__ import annotations

import builtins
import json
import mmap
import os
import platform
import signal
import sys
import types
import warnings
from pathlib import Path
from typing import Any

UNIX = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
ABSENT = {
    os: (
        "O_CLOEXEC O_DIRECTORY O_DSYNC O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC WNOHANG chown chroot confstr "
        "copy_file_range ctermid eventfd fchmod fchown fdatasync fork forkpty fstatvfs getegid geteuid getgid "
        "getgroups getloadavg getpgid getpgrp getpriority getsid getuid getxattr killpg lchown lockf major "
        "memfd_create minor mkfifo mknod nice openpty pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn "
        "pread preadv pwrite pwritev readv register_at_fork sched_getaffinity sched_setaffinity sched_yield "
        "sendfile setpgid setpriority setsid setuid setxattr statvfs sync sysconf sysconf_names ttyname uname "
        "wait wait3 wait4 waitid writev"
    ),
    signal: (
        "ITIMER_REAL SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 "
        "alarm pause pthread_kill pthread_sigmask setitimer sigpending sigwait"
    ),
    mmap: "MADV_HUGEPAGE MADV_SEQUENTIAL MADV_WILLNEED MAP_ANONYMOUS MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE",
    platform: "",
    sys: "getdlopenflags setdlopenflags abiflags",
}

FINDINGS = (1, 3)
"""Statuses of `moeify doctor`: it found something, or could not decide; errors end with 2, or a traceback."""


def _open(path: Any, *arguments: Any, **options: Any) -> int:
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return os.open(path, *arguments, **options)


THERE: dict[types.ModuleType, dict[str, Any]] = {
    os: {"name": "nt", "open": _open},
    platform: {"system": lambda: "Windows"},
    sys: {"platform": "win32"},
}


class There(types.ModuleType):
    """A module as it is on Windows."""

    def __init__(self, here: types.ModuleType) -> None:
        super().__init__(here.__name__)
        self.__dict__.update(THERE.get(here, {}))
        self.__dict__["_here"], self.__dict__["_absent"] = here, set(ABSENT[here].split())

    def __getattr__(self, name: str) -> Any:
        if name in self._absent:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on Windows")
        return getattr(self._here, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._here, name, value)


_MODULES = {here.__name__: There(here) for here in ABSENT}
_import = builtins.__import__


def _on_windows(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    if globals and str(globals.get("__name__")).partition(".")[0] == "moeify":
        if name in UNIX:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in _MODULES:
            return _MODULES[name]
    return _import(name, globals, locals, fromlist, level)


def main() -> None:
    warnings.filterwarnings("error", category=EncodingWarning, module="moeify")
    builtins.__import__ = _on_windows
    from moeify.cli import main as moeify

    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print("moeify", *command, flush=True)
        arguments, sys.argv = sys.argv, ["moeify", *command]
        try:
            moeify()
        except SystemExit as end:
            if end.code and (command[0] != "doctor" or end.code not in FINDINGS):
                raise
        sys.argv = arguments


if __name__ == "__main__":
    main()
