"""A filter of system calls for programs that nobody has read: no network, no processes, no signals, no files written.

Linux, x86-64 and arm64; needs no privileges. The standard library alone, for the sandbox's server imports little.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Names as in the kernel's tables: (x86-64, arm64), None where the architecture lacks the call.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # Network.
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200),
    "listen": (50, 201), "io_uring_setup": (425, 425),
    # Processes; clone is looked at, see below.
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "unshare": (272, 97),
    "setns": (308, 268), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    # Signals to others; tgkill is looked at.
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    # Files; open and openat are looked at.
    "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33),
    "truncate": (76, 45), "fallocate": (285, 47), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "fsopen": (430, 430), "open_tree": (428, 428), "mount_setattr": (442, 442), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "quotactl": (179, 60), "swapon": (167, 224), "swapoff": (168, 225),
    # Memory that no limit counts, and limits themselves; prlimit64 is looked at.
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "setrlimit": (160, 164),
    # The machine.
    "reboot": (169, 142), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
    "acct": (163, 89), "syslog": (103, 116), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
OPEN, OPENAT, OPENAT2 = (2, None), (257, 56), (437, 437)
CLONE, CLONE3, TGKILL, PRLIMIT64 = (56, 220), (435, 435), (234, 131), (302, 261)

CLONE_THREAD = 0x10000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

LOAD, JUMP_IF, JUMP_IF_ANY, GIVE = 0x20, 0x15, 0x45, 0x06  # BPF: ld abs word; jeq; jset; ret
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCHITECTURE = 0, 4

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER_MODE = 38, 22, 2


def _argument(place: int, high: bool = False) -> int:
    """Where the lower or higher half of an argument lies in seccomp_data (little-endian)."""
    return 16 + 8 * place + (4 if high else 0)


def program(machine: str, pid: int) -> bytes:
    """The filter for one process, as instructions of classic BPF.

    A refused call gives EPERM, so that a program sees an ordinary PermissionError. Calls whose arguments lie in memory,
    where a filter cannot look (clone3, openat2), give ENOSYS: libc then takes the older ones.
    """
    column = list(ARCHITECTURES).index(machine)
    refuse, absent = REFUSE | errno.EPERM, REFUSE | errno.ENOSYS
    code: list[tuple[int, int, int, int]] = []

    def add(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        code.append((operation, if_true, if_false, value & 0xFFFFFFFF))

    def call(number: tuple[int | None, int | None], *body: tuple[int, int, int, int]) -> None:
        """`body`, which must return, where this is the call; behind it the number is loaded still."""
        value = number[column]
        if value is not None:
            add(JUMP_IF, value, 0, len(body))
            code.extend(body)

    def ends(value: int) -> tuple[int, int, int, int]:
        return (GIVE, 0, 0, value)

    def load(place: int, high: bool = False) -> tuple[int, int, int, int]:
        return (LOAD, 0, 0, _argument(place, high))

    add(LOAD, ARCHITECTURE)
    add(JUMP_IF, ARCHITECTURES[machine], 1, 0)
    add(GIVE, KILL)
    add(LOAD, NUMBER)
    if machine == "x86_64":
        # The x32 table has other numbers for the same calls.
        add(JUMP_IF_ANY, 0x40000000, 0, 1)
        add(GIVE, KILL)
    opening: list[tuple[int, tuple[int | None, int | None]]] = [(1, OPEN), (2, OPENAT)]
    for place, number in opening:
        call(number, load(place), (JUMP_IF_ANY, 0, 1, WRITING), ends(refuse), ends(ALLOW))
    call(CLONE, load(0), (JUMP_IF_ANY, 1, 0, CLONE_THREAD), ends(refuse), ends(ALLOW))
    call(TGKILL, load(0), (JUMP_IF, 1, 0, pid), ends(refuse), ends(ALLOW))
    # Limits may be read: then the pointer to new ones is null.
    only_reads = [load(2), (JUMP_IF, 0, 2, 0), load(2, True), (JUMP_IF, 1, 0, 0), ends(refuse), ends(ALLOW)]
    call(PRLIMIT64, *only_reads)
    for unreadable in (OPENAT2, CLONE3):
        call(unreadable, ends(absent))
    for refused in REFUSED.values():
        call(refused, ends(refuse))
    add(GIVE, ALLOW)
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def is_available() -> bool:
    """Whether this machine can confine programs."""
    if platform.system() != "Linux" or platform.machine() not in ARCHITECTURES:
        return False
    # Asks for the mode with no filter at all: EFAULT says that it is there.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, None, 0, 0)
    return ctypes.get_errno() == errno.EFAULT


def confine() -> None:
    """Puts the filter on this process, for good. Raises OSError where the kernel refuses."""
    instructions = program(platform.machine(), os.getpid())

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    filters = Program(len(instructions) // 8, instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(filters), 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses a filter of system calls")
