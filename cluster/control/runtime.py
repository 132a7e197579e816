"""Ray itself: an embedded cluster on loopback, or a connection to one that runs.

Every Ray call that blocks runs on one thread that lives as long as the process: Linux sends a
child's parent-death signal when the *thread* that started it ends, and that signal is what takes
gcs, raylet and with them all actors down when this process is SIGKILLed.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from cluster.config import Config
from cluster.control.launch import Launch
from cluster.control.reconcile import desired_slots
from cluster.errors import ConfigError, Unavailable

OBJECT_STORE_BYTES = 80 << 20
"""No token and no KV block passes through it."""

CONNECT_SECONDS = 90.0
MAX_TEMP_PATH = 40
"""Ray puts Unix sockets some 63 characters below its directory; Linux allows 107 in all."""

_CHECKOUT = Path(__file__).resolve().parent.parent.parent
T = TypeVar("T")


class RayRuntime:
    """Ray, started or joined. The caller owns it and calls `stop()`.

    Attributes:
        embedded: it is ours and ends with us.
    """

    def __init__(self, config: Config, runtime_dir: Path) -> None:
        self.embedded = config.ray.address is None
        self._config = config
        self._runtime_dir = runtime_dir
        self._thread = ThreadPoolExecutor(1, "ray")
        self._temp: Path | None = None
        self._controller: Any = None

    async def start(self) -> None:
        """Starts or joins Ray.

        Raises:
            Unavailable: it cannot be reached or does not start.
            ConfigError: its Ray or Python version is another one.
        """
        address = self._config.ray.address
        if address is None:
            await self._on_thread(self._start_embedded)
        else:
            await self._check_reachable(address)
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await self._on_thread(lambda: self._join(address))
            except TimeoutError:
                raise _unreachable(address, f"no answer in {CONNECT_SECONDS:g} s") from None
        _take_sigterm_back()

    async def start_controller(self, launch: Launch) -> Any:
        """The controller's actor handle.

        Raises:
            ConfigError: this Ray cluster already runs a pdserve cluster of the name.
        """
        self._controller = await self._on_thread(lambda: self._create_controller(launch))
        return self._controller

    async def stop(self) -> None:
        """Ends the controller and, if embedded, Ray with everything in it."""
        await self._on_thread(self._shutdown)

    def remove_files(self) -> None:
        """Removes an embedded Ray's own files, once all its processes are gone."""
        if self._temp is not None:
            shutil.rmtree(self._temp, ignore_errors=True)

    async def _on_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _start_embedded(self) -> None:
        self._temp = _temp_dir(self._runtime_dir)
        token = self._runtime_dir / "ray_token"
        token.unlink(missing_ok=True)
        with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        path = [str(_CHECKOUT), str(_CHECKOUT / "proto"), os.environ.get("PYTHONPATH", "")]
        os.environ.update(  # read by Ray's C++ core at import, and by every process it starts
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # no GPU: keep the user's variables
            RAY_memory_monitor_refresh_ms="0",  # engines take their memory once, at the start
            RAY_enable_worker_prestart="0",
            RAY_worker_niceness="0",  # not 15: all else on the host would come before engines
            RAY_enable_metrics_collection="0",
            PYTHONPATH=os.pathsep.join(part for part in path if part),
        )
        os.environ.pop("RAY_ADDRESS", None)
        import ray

        cpus = sum(slot.pool.num_cpus for slot in desired_slots(self._config)) + 1
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                namespace=self._config.ray.namespace,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(self._temp),
            )
        except Exception as error:
            raise Unavailable(
                f"Ray does not start: {_first_line(error)}; its logs are in {self._temp}"
            ) from error

    def _join(self, address: str) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray

        in_checkout = (_CHECKOUT / "pyproject.toml").is_file()  # else it is installed, as elsewhere
        path = {"PYTHONPATH": f"{_CHECKOUT}{os.pathsep}{_CHECKOUT}/proto"} if in_checkout else {}
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level="ERROR",
                namespace=self._config.ray.namespace,
                runtime_env={"env_vars": path} if path else None,
            )
        except Exception as error:
            raise _not_joined(address, error, ray.__version__) from error

    async def _check_reachable(self, address: str) -> None:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if not colon or not port.isdigit():
            return  # "auto" and the like: Ray itself looks it up
        try:
            async with asyncio.timeout(5):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
        except (OSError, TimeoutError, socket.gaierror) as error:
            raise _unreachable(address, str(error) or "no answer in 5 s") from error

    def _create_controller(self, launch: Launch) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from cluster.control.controller import Controller

        name = controller_name(launch.config.name)
        namespace = self._config.ray.namespace
        with suppress(ValueError):
            ray.get_actor(name, namespace=namespace)
            raise ConfigError(
                f"name: the Ray cluster already runs a pdserve cluster called "
                f"{launch.config.name!r}; stop it or choose another name"
            )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"name": name, "namespace": namespace, "num_cpus": 0, "max_restarts": 3}
        # On this host: the cluster ends with this process, so with any other host it need not.
        actor = ray.remote(Controller).options(scheduling_strategy=here, **options)
        return actor.remote(launch, namespace)

    def _shutdown(self) -> None:
        import ray

        if self._controller is not None:
            with suppress(Exception):
                ray.kill(self._controller)
        ray.shutdown()


def controller_name(cluster: str) -> str:
    """Of the controller's actor."""
    return f"pdserve-{cluster}-controller"


def _temp_dir(runtime_dir: Path) -> Path:
    """A directory for Ray, the same one at every start, so that what a killed run left goes."""
    path = runtime_dir / "ray"
    if len(str(path)) > MAX_TEMP_PATH:
        mark = hashlib.blake2b(str(runtime_dir).encode(), digest_size=6).hexdigest()
        path = Path("/tmp", f"pdserve-{os.getuid()}-{mark}")
    with suppress(FileNotFoundError):
        if path.lstat().st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:  # someone else's
        path = Path(tempfile.mkdtemp(prefix="pdserve-", dir="/tmp"))
    return path


def _take_sigterm_back() -> None:
    """Ray's C++ core puts a handler of its own in front of ours, one that prints a stack and aborts
    the process three seconds later: in the middle of an orderly shutdown."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
            signal.siginterrupt(signal.SIGTERM, False)


def _unreachable(address: str, why: str) -> Unavailable:
    return Unavailable(
        f"no Ray cluster answers at {address} ({why}): start one with `ray start --head`, mend "
        "ray.address, or leave it unset for an embedded one"
    )


def _not_joined(address: str, error: Exception, version: str) -> ConfigError | Unavailable:
    said = " ".join(str(error).split())
    if "ersion mismatch" in said:
        return ConfigError(
            f"ray.address: the cluster at {address} runs other versions: {said}; "
            f"install ray=={version} there or the cluster's version here"
        )
    if "uthentication" in said or "auth token" in said.lower() or "AUTH_MODE" in said:
        return ConfigError(
            f"ray.address: the cluster at {address} does not take this token"
            f" ({_first_line(error)}): set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the token"
            " that its hosts were started with"
        )
    if "Failed to connect to Ray cluster" in said:
        return Unavailable(
            f"something answers at {address}, but not as a Ray cluster that knows this client: if"
            " its hosts ask for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here as"
            " there; else mend ray.address"
        )
    if "node" in said.lower() and "raylet" in said.lower():
        return Unavailable(
            f"this host is not part of the Ray cluster at {address}: join it first with"
            f" `ray start --address {address}` ({_first_line(error)})"
        )
    return _unreachable(address, _first_line(error))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
