"""Filter the system calls of programs that nobody has read: allow those for computing, reading and printing.

Linux on x86-64 and arm64; no privileges are needed. This file uses the standard library alone, because the sandbox's
server loads it by path.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

Number = tuple[int | None, int | None]
"""A call's number in the kernel's tables: (x86-64, arm64); None if the architecture lacks the call."""

ALLOWED: dict[str, Number] = {
    # Memory.
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "msync": (26, 227), "membarrier": (324, 283), "get_mempolicy": (239, 236),
    # Threads.
    "futex": (202, 98), "futex_waitv": (449, 449), "set_robust_list": (273, 99), "rseq": (334, 293),
    "set_tid_address": (218, 96), "gettid": (186, 178), "sched_yield": (24, 124), "exit": (60, 93),
    "exit_group": (231, 94), "restart_syscall": (219, 128), "arch_prctl": (158, None),
    # Open files.
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287),
    "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "fsync": (74, 82), "fdatasync": (75, 83),
    "fadvise64": (221, 223), "sendfile": (40, 71), "poll": (7, None), "ppoll": (271, 73), "select": (23, None),
    "pselect6": (270, 72), "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd": (284, None),
    "eventfd2": (290, 19), "signalfd": (282, None), "signalfd4": (289, 74), "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87), "recvfrom": (45, 207), "recvmsg": (47, 212),
    "shutdown": (48, 210), "getsockname": (51, 204), "getpeername": (52, 205), "getsockopt": (55, 209),
    # The file system, read.
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "umask": (95, 166), "statfs": (137, 43), "fstatfs": (138, 44), "getxattr": (191, 8),
    "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    # Signals of its own, and children, which it cannot have.
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None),
    "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103), "wait4": (61, 260), "waitid": (247, 95),
    # Time.
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    # The process and the machine, read.
    "getpid": (39, 172), "getppid": (110, 173), "getpgid": (121, 155), "getpgrp": (111, None), "getsid": (124, 156),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148),
    "getresgid": (120, 150), "getgroups": (115, 158), "capget": (125, 90), "getrlimit": (97, 163),
    "getrusage": (98, 165), "getpriority": (140, 141), "getcpu": (309, 168), "getrandom": (318, 278),
    "sysinfo": (99, 179), "uname": (63, 160), "sched_getaffinity": (204, 123), "sched_getscheduler": (145, 120),
    "sched_getparam": (143, 121), "sched_getattr": (315, 275), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "sched_rr_get_interval": (148, 127),
}  # fmt: skip
"""Calls allowed with any arguments. They affect only the program's own process and files that it may read."""

# Calls whose arguments decide.
OPEN, OPENAT, CLONE, KILL, TGKILL = (2, None), (257, 56), (56, 220), (62, 129), (234, 131)
PRLIMIT64, SETPRIORITY, SCHED_SETAFFINITY, PRCTL = (302, 261), (141, 140), (203, 122), (157, 167)
IOCTL, FCNTL, SOCKETPAIR, SENDTO = (16, 29), (72, 25), (53, 199), (44, 206)
ABSENT: tuple[Number, ...] = ((437, 437), (435, 435))
"""openat2 and clone3. A filter cannot see their arguments, which lie in memory; libc falls back to older calls."""

KNOWN = {"x86_64": ((0, 335), (424, 470)), "aarch64": ((0, 244), (260, 295), (424, 470))}
"""Ranges of the call numbers in the kernel's tables when this list was reviewed (6.18). A refused call in them gives
EPERM, like a missing permission; any other number gives ENOSYS, like a kernel without the call."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
THREAD = (0x3D0F00, 0x7D0F00)
"""The flags with which glibc and musl start a thread; no process or namespace is made with them."""
IOCTLS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: terminals read, and flags of own descriptors."""
FCNTLS = (0, 1, 2, 3, 4, 1030, 1032)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ: no owners, signals, locks or leases."""
PRCTLS = (15, 16, 0x53564D41)
"""PR_SET_NAME, PR_GET_NAME, PR_SET_VMA: names of threads and of memory."""
RLIMIT_STACK, PRIO_PROCESS, AF_UNIX, SOCK_STREAM, SOCK_FLAGS = 3, 0, 1, 1, 0x80800

LOAD, AND, JUMP_IF, JUMP_FROM, JUMP_IF_ANY, GIVE = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
"""Instructions of BPF: ld abs word; and; jeq; jge; jset; ret."""
ALLOW, REFUSE, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCHITECTURE = 0, 4
ANY = 0xFFFFFFFF

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER_MODE = 38, 22, 2

Instruction = tuple[int, int, int, int]
"""Operation, number of instructions to skip if it is true and if it is false, and the value."""
REFUSED: Instruction = (GIVE, 0, 0, REFUSE | errno.EPERM)
PASSED: Instruction = (GIVE, 0, 0, ALLOW)


def _argument(place: int, high: bool = False) -> int:
    """Return the offset of the lower or higher half of an argument in seccomp_data (little-endian)."""
    return 16 + 8 * place + (4 if high else 0)


def _only(place: int, *values: int, mask: int = ANY, high: bool = False) -> list[Instruction]:
    """Refuse the call unless half an argument, under `mask`, is one of `values`; otherwise continue."""
    code = [(LOAD, 0, 0, _argument(place, high))]
    code += [(AND, 0, 0, mask)] if mask != ANY else []
    code += [(JUMP_IF, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [*code, REFUSED]


def _none(place: int) -> list[Instruction]:
    """Refuse the call unless an argument is a null pointer."""
    return _only(place, 0) + _only(place, 0, high=True)


def _call(number: Number, machine: str, body: list[Instruction]) -> list[Instruction]:
    """Run `body`, which must return, if this is the call; otherwise continue with the number still loaded."""
    value = number[list(ARCHITECTURES).index(machine)]
    return [] if value is None else [(JUMP_IF, 0, len(body), value), *body]


def _pack(code: list[Instruction]) -> bytes:
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


@functools.cache
def _shared(machine: str) -> bytes:
    """Return the end of the filter, which is the same for every process."""
    code: list[Instruction] = []
    for name in ALLOWED:
        code += _call(ALLOWED[name], machine, [PASSED])
    opening: list[tuple[int, Number]] = [(1, OPEN), (2, OPENAT)]
    for place, number in opening:
        flags = [(LOAD, 0, 0, _argument(place)), (JUMP_IF_ANY, 0, 1, WRITING), REFUSED, PASSED]
        code += _call(number, machine, flags)
    code += _call(CLONE, machine, [*_only(0, *THREAD), PASSED])
    code += _call(IOCTL, machine, [*_only(1, *IOCTLS), PASSED])
    code += _call(FCNTL, machine, [*_only(1, *FCNTLS), PASSED])
    code += _call(PRCTL, machine, [*_only(0, *PRCTLS), PASSED])
    # A pair of streams reaches no other process, unless a call names an address.
    code += _call(SOCKETPAIR, machine, [*_only(0, AF_UNIX), *_only(1, SOCK_STREAM, mask=ANY ^ SOCK_FLAGS), PASSED])
    code += _call(SENDTO, machine, [*_none(4), PASSED])
    absent = (GIVE, 0, 0, REFUSE | errno.ENOSYS)
    for number in ABSENT:
        code += _call(number, machine, [absent])
    for first, end in KNOWN[machine]:
        code += [(JUMP_FROM, 0, 2, first), (JUMP_FROM, 1, 0, end), REFUSED]
    return _pack([*code, absent])


def program(machine: str, pid: int) -> bytes:
    """Return the filter for process `pid`, as instructions of classic BPF.

    A refused call gives EPERM, so that a program sees an ordinary PermissionError; see `KNOWN` for the others.
    """
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF, 1, 0, ARCHITECTURES[machine]),
        (GIVE, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        # The x32 table has different numbers for the same calls.
        code += [(JUMP_IF_ANY, 0, 1, 0x40000000), (GIVE, 0, 0, KILL_PROCESS)]
    for number in (KILL, TGKILL):
        code += _call(number, machine, [*_only(0, pid), PASSED])
    code += _call(SCHED_SETAFFINITY, machine, [*_only(0, 0, pid), PASSED])
    code += _call(SETPRIORITY, machine, [*_only(0, PRIO_PROCESS), *_only(1, 0, pid), PASSED])
    # Limits may be read (the pointer to new ones is null). That of the stack may be set: memory is limited anyway.
    stack = [(LOAD, 0, 0, _argument(1)), (JUMP_IF, 0, 1, RLIMIT_STACK), PASSED]
    code += _call(PRLIMIT64, machine, [*_only(0, 0, pid), *stack, *_none(2), PASSED])
    return _pack(code) + _shared(machine)


def is_available() -> bool:
    """Return whether this machine can confine programs."""
    if platform.system() != "Linux" or platform.machine() not in ARCHITECTURES:
        return False
    # Request the mode without a filter: EFAULT means that the kernel has it.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, None, 0, 0)
    return ctypes.get_errno() == errno.EFAULT


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine() -> None:
    """Put the filter on this process for good. Raise OSError if the kernel refuses."""
    instructions = program(platform.machine(), os.getpid())
    libc = ctypes.CDLL(None, use_errno=True)
    filters = _Program(len(instructions) // 8, instructions)
    calls = ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(filters), 0, 0))
    for arguments in calls:
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses a filter of system calls")
