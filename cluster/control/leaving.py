"""A host's goodbye: asked by the host itself, done by the controller."""

from __future__ import annotations

from cluster.config import Config
from cluster.control.runtime import controller_name
from cluster.errors import ConfigError, Unavailable

ANSWER_SECONDS = 30.0
"""What ending the lives may take beyond their drain."""


def leave(config: Config, drain_seconds: float) -> list[str]:
    """Drains every life on this Ray host; the slots they were in.

    Raises:
        ConfigError: the cluster is one with an embedded Ray, on one host.
        Unavailable: this is no Ray host, the cluster does not run, or the drain took too long.
    """
    if config.ray.address is None:
        raise ConfigError(
            "ray.address is not set: a cluster with a Ray of its own is on one host, and "
            "`pdserve down` ends it; for another give its file with -f, or --ray-address"
        )
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(
            address=config.ray.address,
            namespace=config.ray.namespace,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except Exception as error:
        raise Unavailable(f"no Ray runs on this host: {error}") from error
    try:
        controller = ray.get_actor(controller_name(config.name), namespace=config.ray.namespace)
        node_id = ray.get_runtime_context().get_node_id()
        left = controller.leave.remote(node_id, drain_seconds)
        return list(ray.get(left, timeout=drain_seconds + ANSWER_SECONDS))
    except ValueError as error:
        raise Unavailable(f"no cluster called {config.name!r} runs on this Ray") from error
    except (RayError, TimeoutError) as error:
        raise Unavailable(f"the controller did not drain this host: {error}") from error
    finally:
        ray.shutdown()
