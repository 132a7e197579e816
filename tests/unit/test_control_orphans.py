"""Nothing outlives the guardian, whichever process is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

SLEEP = "import time; time.sleep(60)"
CLUSTER = f"""
import os, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # may be ignored
    signal.signal(number, signal.SIG_DFL)
from cluster.control.orphans import guard
guard()
nest = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]," \\
       " start_new_session=True).wait()"
child = subprocess.Popen([sys.executable, "-c", nest], process_group=0)
while not (grandchildren := __import__("psutil").Process(child.pid).children()):
    time.sleep(0.02)
print(os.getpid(), child.pid, grandchildren[0].pid, flush=True)
exit_code = EXIT
if exit_code is not None:
    os._exit(exit_code)
time.sleep(60)
"""


def start(exit_code: int | None = None) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = CLUSTER.replace("EXIT", repr(exit_code), 1)
    guardian = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env
    )
    assert guardian.stdout is not None
    pids = [int(pid) for pid in guardian.stdout.readline().split()]
    living = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            living.append(psutil.Process(pid))
    return guardian, living


def runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # it may end between two looks
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def all_gone(processes: list[psutil.Process], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(map(runs, processes)):
            return True
        time.sleep(0.02)
    return False


def test_what_ended_below_is_reaped_and_what_runs_is_left() -> None:
    code = f"""
import os, subprocess, sys
from cluster.control.orphans import reap_adopted
reap_adopted()  # without a child
running = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
ended = os.fork()
if not ended:
    os._exit(0)
os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
reap_adopted()
assert running.poll() is None
running.kill()
running.wait()
try:
    os.waitpid(ended, 0)
except ChildProcessError:
    sys.exit(7)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=180).returncode == 7


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.parametrize("code", [0, 3])
def test_what_the_cluster_leaves_behind_ends_and_its_exit_code_is_passed_on(code: int) -> None:
    guardian, processes = start(exit_code=code)
    assert guardian.wait(60) == code
    assert all_gone(processes)
    guardian.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_killed_cluster_takes_everything_with_it() -> None:
    guardian, processes = start()
    processes[0].kill()
    assert guardian.wait(60) == 128 + signal.SIGKILL
    assert all_gone(processes)
    guardian.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_cluster_through_the_guardian(number: signal.Signals) -> None:
    guardian, processes = start()
    guardian.send_signal(number)
    assert guardian.wait(60) in (1, 130, 128 + number)
    assert all_gone(processes)
    guardian.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_killed_guardian_ends_the_cluster_process() -> None:
    guardian, processes = start()
    guardian.kill()
    guardian.wait(60)
    assert all_gone(processes[:1])  # its SIGTERM; in order it ends the others itself
    for process in processes[1:]:
        process.kill()
    guardian.communicate()
