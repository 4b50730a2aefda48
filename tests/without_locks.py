"""sft.py on file systems that offer no locks, as NFS is where no lockd runs: the system itself refuses them.

python tests/without_locks.py ENOLCK recipes/demo.yaml ...
"""

import ctypes
import errno
import os
import platform
import runpy
import sys
from pathlib import Path

# flock and fcntl by the numbers of the kernel's tables, and the fcntl commands that lock (F_SETLK, F_SETLKW).
NUMBERS = {"x86_64": (73, 72), "aarch64": (32, 25)}
F_SETLK, F_SETLKW = 6, 7
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
NUMBER, SECOND_ARGUMENT = 0, 24  # where struct seccomp_data has them
ALLOW, ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 22, 38, 2  # linux/prctl.h


class Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("value", ctypes.c_uint32))


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction)))


def refuse_locks(number: int) -> None:
    """Have every lock of this thread, and of what it starts from now on, fail with this errno."""
    flock, fcntl = NUMBERS[platform.machine()]
    instructions = (
        (LOAD, 0, 0, NUMBER),
        (JUMP_EQUAL, 4, 0, flock),
        (JUMP_EQUAL, 0, 4, fcntl),
        (LOAD, 0, 0, SECOND_ARGUMENT),
        (JUMP_EQUAL, 1, 0, F_SETLK),
        (JUMP_EQUAL, 0, 1, F_SETLKW),
        (RETURN, 0, 0, ERRNO | number),
        (RETURN, 0, 0, ALLOW),
    )
    program = Program(len(instructions), (Instruction * len(instructions))(*instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
    refuse_locks(getattr(errno, sys.argv[1]))
    sys.argv = ["scripts/sft.py", *sys.argv[2:]]
    runpy.run_path("scripts/sft.py", run_name="__main__")
