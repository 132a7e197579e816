"""No process outlives its cluster, whichever way the cluster ends.

`guard()` forks: the parent becomes a guardian that does nothing but wait, the child goes on as the
cluster's own process. Linux hands every orphan below the guardian to it (child subreaper), so when
the child is gone – ended, crashed or SIGKILLed – the guardian finds whatever is left in its own
process tree and kills it: raylet, agents, actors, engines, even what moved to another session.
When the guardian itself is SIGKILLed the child gets SIGTERM and shuts down in order.

Within the tree Ray kills an actor's process group when the actor dies, as long as the raylet lives.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_SI_KERNEL = 0x80
_WAIT_SECONDS = 5.0
KILL_SECONDS = 10.0


def guard() -> None:
    """Puts a guardian between the caller and its parent; returns in the child only.

    Call it while the process has one thread. The guardian passes SIGINT, SIGTERM and SIGHUP on,
    but for those that the terminal sent to the child as well, and exits with the child's status.
    """
    become_subreaper()
    sys.stdout.flush()
    sys.stderr.flush()
    guardian = os.getpid()
    child = os.fork()
    if child == 0:
        become_subreaper()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != guardian:  # it died before the line above took effect
            os.kill(os.getpid(), signal.SIGTERM)
        return
    code = 1
    try:
        code = _wait(child)
        kill_descendants()
    finally:
        os._exit(code)


def become_subreaper() -> None:
    """Orphans below this process become its children instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap_adopted() -> None:
    """Reaps what ended below this process after its own parent had gone.

    As child subreaper it inherits a dead actor's children; nobody else would ever wait for them.
    """
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def descendants() -> list[psutil.Process]:
    """Every living process below this one."""
    living = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def kill_descendants(timeout: float = KILL_SECONDS) -> list[str]:
    """Kills everything below this process; returns what it was as `pid name`.

    Repeats until nothing is left, as a dying parent may have just started a child.
    """
    killed: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        living = descendants()
        for process in living:
            with suppress(psutil.Error):
                killed.setdefault(process.pid, f"{process.pid} {process.name()}")
                process.kill()
        _reap()
        if not living:
            break
        time.sleep(0.02)
    return list(killed.values())


def _wait(child: int) -> int:
    passed_on = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, {*passed_on, signal.SIGCHLD})
    while True:
        with suppress(ChildProcessError):  # orphans come and go as well
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    return 128 - code if code < 0 else code
        info = signal.sigtimedwait({*passed_on, signal.SIGCHLD}, _WAIT_SECONDS)
        if info is not None and info.si_signo in passed_on and info.si_code != _SI_KERNEL:
            with suppress(ProcessLookupError):
                os.kill(child, info.si_signo)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _prctl(option: int, value: int) -> None:
    if _LIBC is not None:
        _LIBC.prctl(option, value, 0, 0, 0)
