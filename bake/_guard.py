"""Run as a script: `python -I _guard.py PARENT PROGRAM ARGUMENT…`. Becomes the program.

Linux kills the program when the process that started it ends, however it ends: nobody is left to
stop a runtime that holds a model once bake itself was killed. See prctl(2), PR_SET_PDEATHSIG, which
outlives execve(2).
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, program = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it was asked about
        sys.exit(1)
    try:
        os.execv(program[0], program)
    except OSError as error:
        sys.exit(f"{program[0]}: {error.strerror}")
