"""What a life refuses on the host it has landed on, and the address it takes there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import Config
from cluster.control import arrival
from cluster.control.arrival import check_clock, check_host, land
from cluster.control.interfaces import InterfaceMissing, choose
from cluster.control.reconcile import desired_slots
from cluster.errors import ConfigError
from cluster.store.clock import certain_offset

OWN = "10.0.0.7"
INTERFACES = {"lo": ["127.0.0.1", "::1"], "eth0": ["fd00::7", OWN], "ib0": ["192.168.9.7"]}


def config(model: Path, **sections: object) -> Config:
    models = [{"name": "m", "path": str(model)}]
    return Config.model_validate({"models": models, **sections})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "address"),
    [
        (None, OWN),
        ("eth0", OWN),
        ("ib0", "192.168.9.7"),
        ("192.168.0.0/16", "192.168.9.7"),
        ("192.168.9.7", "192.168.9.7"),
        ("fd00::/8", "fd00::7"),
    ],
)
def test_an_interface_is_a_name_an_address_or_a_network(spec: str, address: str) -> None:
    assert choose("worker.host", spec, OWN, INTERFACES) == address


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(InterfaceMissing) as caught:
        choose("handoff.host", "eth9", OWN, INTERFACES)
    for word in ("handoff.host", "eth9", "ib0 (192.168.9.7)"):
        assert word in str(caught.value)


def test_only_routers_listen_everywhere_and_then_say_where_they_are(model: Path) -> None:
    everywhere = config(model, router={"host": "0.0.0.0"})
    *_, router = desired_slots(everywhere)
    landing = land(everywhere, router, OWN, INTERFACES)
    assert (landing.config.router.host, landing.advertised_host) == ("0.0.0.0", OWN)
    with pytest.raises(ConfigError, match=r"worker\.host.*every interface"):
        worker, *_ = desired_slots(everywhere)
        land(config(model, worker={"host": "0.0.0.0"}), worker, OWN, INTERFACES)


def test_a_worker_takes_its_own_interface_and_one_for_transfers(model: Path) -> None:
    given = config(model, worker={"host": "eth0"}, handoff={"host": "ib0"})
    worker, *_ = desired_slots(given)
    landing = land(given, worker, "10.9.9.9", INTERFACES)
    assert (landing.host, landing.config.handoff.host) == (OWN, "192.168.9.7")


def test_a_model_that_is_not_on_this_host_is_named_with_the_host(model: Path) -> None:
    given = config(model / "none")
    worker, *_, router = desired_slots(given)
    for slot in (worker, router):
        with pytest.raises(ConfigError) as caught:
            check_host(given, slot, OWN, gpus=0)
        for word in ("m.path", str(model / "none"), OWN, "every host"):
            assert word in str(caught.value)


def test_a_router_needs_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    given = config(model)
    worker, *_, router = desired_slots(given)
    check_host(given, router, OWN, gpus=0)
    with pytest.raises(ConfigError, match="no weights"):
        check_host(given, worker, OWN, gpus=0)


def test_a_gpu_that_ray_counts_must_be_there(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = config(model)
    worker, *_ = desired_slots(given)
    monkeypatch.setattr(arrival, "GPU_DEVICES", (tmp_path / "nvidiactl",))
    with pytest.raises(ConfigError, match=r"no device.*--gpus"):
        check_host(given, worker, OWN, gpus=1)
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(arrival, "has_gpu_engine", lambda: False)
    with pytest.raises(ConfigError, match=r"no vLLM for GPUs.*gpu target"):
        check_host(given, worker, OWN, gpus=1)


def test_clocks_may_differ_by_half_of_what_tickets_allow() -> None:
    check_clock(2.4, "here")
    check_clock(-2.4, "here")
    with pytest.raises(ConfigError, match=r"3\.0 s ahead of the store's.*NTP"):
        check_clock(3.0, "here")
    with pytest.raises(ConfigError, match="behind"):
        check_clock(-3.0, "here")


def test_a_slow_answer_does_not_count_as_a_wrong_clock() -> None:
    assert certain_offset(100.0, 109.0, 104.0) == 0.0
    assert certain_offset(100.0, 101.0, 95.0) == 5.0
    assert certain_offset(100.0, 101.0, 105.0) == -4.0
