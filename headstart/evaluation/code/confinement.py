"""Give up privileges and access to files before running a program that nobody has read.

Linux only. It uses the standard library alone, because the sandbox's server loads this file by path. `seccomp` filters
the system calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import struct
import sys
import threading
from collections.abc import Iterator

_PR_SET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 3, 4, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> int:
    return int(_libc().prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))))


def drop_capabilities() -> None:
    """Give up every capability for good, including those that a privileged program would gain.

    Root keeps access to its files, but has no power over other processes, devices or the machine. Raises OSError if the
    kernel refuses.
    """
    for capability in range(64):
        if _prctl(_PR_CAPBSET_DROP, capability) != 0:
            break  # after the last one, or at once for a user without capabilities
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if _libc().capset(header, none) != 0 or _prctl(_PR_SET_NO_NEW_PRIVS, 1) != 0:
        raise OSError(ctypes.get_errno(), "the kernel does not let this process give up its privileges")


def hide_memory() -> None:
    """Close /proc/PID/{environ,mem,maps,fd} of this process, and of those it forks, to others of the same user."""
    _prctl(_PR_SET_DUMPABLE, 0)


_hiding = threading.Lock()
_hidden, _before = 0, 1


@contextlib.contextmanager
def hidden_memory() -> Iterator[None]:
    """Hide the memory within the block. Blocks of several threads may overlap; the last one to end restores."""
    global _hidden, _before
    with _hiding:
        if not _hidden:
            _before = _prctl(_PR_GET_DUMPABLE, 0)
            hide_memory()
        _hidden += 1
    try:
        yield
    finally:
        with _hiding:
            _hidden -= 1
            if not _hidden:
                _prctl(_PR_SET_DUMPABLE, _before)


def end_with(parent: int) -> None:
    """Let the kernel kill this process when `parent`, which forked it, ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _syscall(number: int, *arguments: bytes | int | None) -> int:
    return int(_libc().syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))


# Landlock: rights of linux/landlock.h, the calls' numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _ASK_VERSION, _PATH_BENEATH = 444, 445, 446, 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All file rights of a version, by the first version that has them."""
_DEVICES = ("null", "zero", "full", "random", "urandom")


class FileRules:
    """File rules that a process applies to itself, if the kernel has Landlock (5.13 and later).

    No file can be written, made, removed or executed. Files can be read, except devices and other processes in /proc.
    The memory of other processes cannot be read, and from kernel 6.12 on no signal can be sent to them.
    """

    def __init__(self) -> None:
        """Open everything that may be read, once for all processes that will be forked."""
        self._version = _syscall(_CREATE_RULESET, None, 0, _ASK_VERSION)
        self._readable: list[int] = []
        if self._version < 1:
            return
        below_root = (entry.path for entry in os.scandir("/") if entry.name not in ("proc", "dev"))
        in_proc = (entry.path for entry in os.scandir("/proc") if not entry.name.isdigit())
        devices = (f"/dev/{name}" for name in _DEVICES)
        own = (os.getcwd(), sys.prefix, sys.base_prefix)
        for path in (*below_root, *(path for path in in_proc if os.path.isfile(path)), *devices, *own):
            with contextlib.suppress(OSError):
                self._readable.append(os.open(path, os.O_PATH))

    def apply(self) -> None:
        """Apply the rules to this process for good. Raise OSError if the kernel has Landlock and refuses."""
        if self._version < 1:
            return
        handled = max(rights for version, rights in _FILE_RIGHTS.items() if version <= self._version)
        network, scoped = 3 * (self._version >= 4), 3 * (self._version >= 6)
        attributes = struct.pack("<QQQ", handled, network, scoped)
        rules = _syscall(_CREATE_RULESET, attributes, len(attributes), 0)
        own = [(_READ_DIR, os.open("/", os.O_PATH)), (_READ_FILE, os.open("/proc/self", os.O_PATH))]
        for right, fd in [*((_READ_FILE, fd) for fd in self._readable), *own]:
            _syscall(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("<Qi", right, fd), 0)
        if rules < 0 or _syscall(_RESTRICT_SELF, rules, 0) != 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses Landlock's rules")
