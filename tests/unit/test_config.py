"""The configuration: what it refuses, and in what words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.config import Config, RouterConfig
from cluster.errors import ConfigError

GOOD = "models:\n- {name: m, path: p}\n"


def load(folder: Path, text: str) -> Config:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return Config.load(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["mapping"]),
        ("models: []", ["models"]),
        ("models: [", ["not YAML"]),
        (GOOD + "roter: {}", ["roter", "did you mean 'router'"]),
        (GOOD + "router: {grpc_prt: 1}", ["router.grpc_prt", "did you mean 'grpc_port'"]),
        ("models:\n- {nam: m, path: p}", ["models.0.nam", "did you mean 'name'"]),
        ("models:\n- {name: m}", ["models.0.path", "required"]),
        (GOOD + "router: {http_port: 70000}", ["router.http_port", "70000"]),
        (GOOD + "router: {http_port: 50051}", ["must differ"]),
        (GOOD + "router: {operator_port: 8000}", ["http_port and operator_port must differ"]),
        (GOOD + "- {name: m, path: q}", ["m is named twice"]),
        (GOOD + "- {name: a/b, path: q}\n- {name: a-b, path: q}", ["a/b", "a-b", "rename one"]),
        (GOOD + "router: {pool: {replicas: 0}}", ["router.pool.replicas", "one at least"]),
        (GOOD + "worker: {ports: 9-8}", ["worker.ports", "lower port first"]),
        (GOOD + "store: {url: 'http://x'}", ["store", "redis://"]),
        (GOOD + "secret: short", ["16 characters"]),
        (
            GOOD + "router: {http_port: 1}\nrouter: {grpc_port: 2}",
            ["router is there twice", "line 4"],
        ),
        (GOOD + "router: {http_port: 1, http_port: 2}", ["http_port is there twice"]),
        (GOOD + "store: x", ["store: must be a section with fields of url, "]),
        ("models:\n- {name: m, path: p, engine_args: {block_size: 1}}", ["block_size"]),
        (
            "models:\n- {name: m, path: p, engine_args: {scheduler_cls: x}}",
            ["scheduler_cls", "sets"],
        ),
        ("models:\n- {name: m, path: p, engine_args: {speculative_config: {}}}", ["a drafter"]),
        ("models:\n- {name: m, path: p, engine_args: {logits_processors: []}}", ["first token"]),
        ("models:\n- {name: m, path: p, engine: simulated}", ["models.0", "max_model_len"]),
        ("models:\n- {name: m, path: p, decode: {replicas: -1}}", ["models.0.decode.replicas"]),
    ],
)
def test_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    for word in words:
        assert word in str(caught.value)


def test_secrets_are_never_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD + "secret: hunter2\nstore: {url: 'http://:hunter3@x'}")
    assert "hunter" not in str(caught.value)
    config = load(tmp_path, GOOD + "secret: hunter2-hunter2-hunter2")
    assert "hunter2" not in repr(config)


@pytest.mark.parametrize(
    "text",
    [
        "store: redis://:hunter2@h",
        "store: {url: [redis://:hunter2@h]}",
        "operator: hunter2",
        "secret: hunter2-hunter2: x",  # not YAML
    ],
)
def test_no_mistake_shows_a_secret(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD + text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("PDSERVE_ROUTR__GRPC_PORT", "did you mean PDSERVE_ROUTER__…"),
        ("PDSERVE_STORE_URL", "did you mean PDSERVE_STORE__URL"),
        ("PDSERVE_STORE", "PDSERVE_STORE: must be JSON"),
        ("PDSERVE_ROUTER__GRPC_PRT", "router.grpc_prt: is not a field; did you mean 'grpc_port'"),
    ],
)
def test_a_variable_that_would_be_lost_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, words: str
) -> None:
    monkeypatch.setenv(variable, "redis://:hunter2@h")
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load(tmp_path, GOOD)
    assert "hunter2" not in str(caught.value)


def test_variables_of_others_are_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes tells every pod of every Service in this way."""
    for variable in ("PDSERVE_HTTP_SERVICE_HOST", "PDSERVE_OPERATOR_PORT", "PDSERVE_RUNTIME_DIR"):
        monkeypatch.setenv(variable, "tcp://10.0.0.1:8000")
    load(tmp_path, GOOD)


def test_secrets_come_from_files_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, text in (
        ("PDSERVE_SECRET_FILE", "s" * 32),
        ("PDSERVE_STORE_URL_FILE", "redis://h/1"),
    ):
        file = tmp_path / variable
        file.write_text(text + "\n")
        monkeypatch.setenv(variable, str(file))
    config = load(tmp_path, GOOD + "store: {lease_seconds: 3}")
    assert config.secret is not None and config.secret.get_secret_value() == "s" * 32
    assert config.store.url is not None and config.store.url.get_secret_value() == "redis://h/1"
    assert config.store.lease_seconds == 3


@pytest.mark.parametrize("text", [None, "", "\n"])
def test_a_secret_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    file = tmp_path / "secret"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("PDSERVE_SECRET_FILE", str(file))
    with pytest.raises(ConfigError, match=f"PDSERVE_SECRET_FILE: {file}"):
        load(tmp_path, GOOD)


def test_the_environment_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDSERVE_ROUTER__GRPC_PORT", "6000")
    config = load(tmp_path, GOOD + "router: {grpc_port: 5000, http_port: 5001}")
    assert (config.router.grpc_port, config.router.http_port) == (6000, 5001)


def test_model_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    config = load(tmp_path, "models:\n- {name: m, path: weights}\n- {name: h, path: org/model}")
    assert [m.path for m in config.models] == [str(tmp_path / "weights"), "org/model"]


def test_without_a_file_it_is_the_shipped_model() -> None:
    config = Config.load(None)
    assert (Path(config.models[0].path) / "config.json").exists()
    assert config.router == RouterConfig()


def test_the_sample_has_every_field() -> None:
    """deploy/cluster.yaml is the reference; a field that it misses is not documented."""
    root = Path(__file__).resolve().parents[2]
    text = (root / "deploy" / "cluster.yaml").read_text()
    Config.load(root / "deploy" / "cluster.yaml")

    def names(model: type) -> set[str]:
        found = set()
        for name, info in model.model_fields.items():  # type: ignore[attr-defined]
            found.add(name)
            for inner in (info.annotation, *getattr(info.annotation, "__args__", ())):
                if hasattr(inner, "model_fields"):
                    found |= names(inner)
        return found

    missing = {name for name in names(Config) if f"{name}:" not in text}
    assert not missing
