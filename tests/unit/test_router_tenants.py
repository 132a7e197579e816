"""Who a caller is, what it may ask for, and that its caches are its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.config_clients import ClassesConfig
from cluster.errors import ConfigError, InvalidRequest, PermissionDenied, Unauthenticated
from router.admission.offers import SloClass
from router.capacity import policy
from router.generation import Urgency
from router.slo import slo_of
from router.tenants import Shown, Tenant, Tenants

SECRET = b"a secret of the tests"
TOKEN, OTHER = "token-of-the-first-tenant", "token-of-the-second-one"


def config(tenants: list[dict[str, Any]], **fields: Any) -> Config:
    return Config(models=[{"name": "m", "path": "p"}], tenants=tenants, **fields)  # type: ignore[list-item, arg-type]


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    (tmp_path / "first").write_text(f"{TOKEN}\nrotated-token-of-the-first\n")
    (tmp_path / "second").write_text(OTHER)
    made = config(
        [
            {"name": "first", "token_file": str(tmp_path / "first")},
            {
                "name": "second",
                "token_file": str(tmp_path / "second"),
                "identities": ["second.example"],
                "classes": ["standard"],
            },
        ],
        router={"tls": {"cert_file": "c", "key_file": "k", "client_ca_file": "a"}},
    )
    return Tenants(made, SECRET, "the cluster's own token")


def bearer(token: str) -> Shown:
    return Shown.from_header(f"Bearer {token}")


def test_a_tenant_is_known_by_any_of_its_tokens_or_its_certificate(tenants: Tenants) -> None:
    assert tenants.identify(bearer(TOKEN)).name == "first"
    assert tenants.identify(bearer("rotated-token-of-the-first")).name == "first"
    assert tenants.identify(bearer(OTHER)).name == "second"
    assert tenants.identify(Shown(None, ("x", "second.example"))).name == "second"
    assert tenants.identify(Shown.from_header(f"bearer  {TOKEN}")).name == "first"


@pytest.mark.parametrize(
    "shown",
    [
        Shown(),
        Shown.from_header(None),
        Shown.from_header("Bearer"),
        Shown.from_header(f"Basic {TOKEN}"),
        bearer(""),
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "x"),
        bearer(TOKEN.upper()),
        bearer("x" * 100_000),
        bearer("ünïcode-is-not-a-token"),
        bearer("\udcff\udcfe"),  # as HTTP's headers come that are not UTF-8
        Shown(None, ("third.example",)),
    ],
)
def test_nobody_else_is(tenants: Tenants, shown: Shown) -> None:
    with pytest.raises(Unauthenticated) as refused:
        tenants.identify(shown)
    assert TOKEN not in str(refused.value)
    with pytest.raises(Unauthenticated):
        tenants.check_operator(shown)


def test_a_tenant_is_no_operator(tenants: Tenants) -> None:
    with pytest.raises(Unauthenticated):
        tenants.check_operator(bearer(TOKEN))
    tenants.check_operator(bearer("the cluster's own token"))


def test_without_tenants_everyone_is_the_default() -> None:
    everyone = Tenants(config([]), SECRET, "own")
    assert everyone.identify(Shown()).name == "default"
    assert everyone.identify(bearer("whatever")).cache_salt("mine") == "mine"
    everyone.check_operator(Shown())


def test_no_salt_of_one_tenant_is_another_ones(tenants: Tenants) -> None:
    first, second = tenants.identify(bearer(TOKEN)), tenants.identify(bearer(OTHER))
    salts = {t.cache_salt(own) for t in (first, second) for own in ("", "a", "b")}
    assert len(salts) == 6
    assert first.cache_salt(second.cache_salt("a")) not in salts
    again = tenants.named("first")
    assert again is not None and again.cache_salt("a") == first.cache_salt("a")
    assert tenants.named("default") is None


def test_two_callers_cannot_have_one_token(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(TOKEN)
    same = {"token_file": str(tmp_path / "t")}
    with pytest.raises(ConfigError, match="same token"):
        Tenants(config([{"name": "a", **same}, {"name": "b", **same}]), SECRET, "own")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "token_file: .* cannot be read"), ("", "holds no token"), ("short", "16 characters")],
)
def test_bad_secrets_are_named_and_never_shown(
    tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "t").write_text(content)
    made = config([{"name": "a", "token_file": str(tmp_path / "t")}])
    with pytest.raises(ConfigError, match=f"tenants.a.*{words}") as refused:
        Tenants(made, SECRET, "own")
    assert "short" not in str(refused.value)


def test_tokens_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config([{"name": "a", "token_env": "TOKENS_OF_A"}])
    with pytest.raises(ConfigError, match="TOKENS_OF_A is not set"):
        Tenants(made, SECRET, "own")
    monkeypatch.setenv("TOKENS_OF_A", TOKEN)
    assert Tenants(made, SECRET, "own").identify(bearer(TOKEN)).name == "a"


@pytest.mark.parametrize(
    ("tenants", "words"),
    [
        ([{"name": "a"}], "nobody could be it"),
        ([{"name": "a", "token_env": "X"}, {"name": "a", "token_env": "Y"}], "named twice"),
        ([{"name": "a", "identities": ["i"]}], "client_ca_file"),
        ([{"name": "a b", "token_env": "X"}], "pattern"),
        ([{"name": "a", "token_env": "X", "classes": ["urgent"]}], "interactive"),
        ([{"name": "a", "token_env": "X", "limits": {"tokens_per_second": 0}}], "greater than 0"),
        ([{"name": "a", "token_env": "X", "token": "in the file"}], "Extra inputs"),
    ],
)
def test_impossible_tenants_are_refused(tenants: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(tenants)


def test_the_class_follows_from_the_deadline() -> None:
    classes = ClassesConfig()
    quick = slo_of(classes, Tenant(), Urgency(), 10)
    assert (quick.slo_class, quick.ttft_seconds) == (SloClass.INTERACTIVE, 2.0)
    slow = slo_of(classes, Tenant(), Urgency(), 600)
    assert (slow.slo_class, slow.tpot_seconds) == (SloClass.STANDARD, 0.5)
    batch = slo_of(classes, Tenant(), Urgency(SloClass.BATCH), 10)
    assert (batch.slo_class, batch.ttft_seconds) == (SloClass.BATCH, math.inf)
    own = slo_of(classes, Tenant(), Urgency(ttft_seconds=0.5, priority=3), 600)
    assert (own.ttft_seconds, own.tpot_seconds, own.priority) == (0.5, 0.5, 3)


def test_a_tenant_gets_no_class_that_it_may_not_have() -> None:
    standard_only = Tenant("t", frozenset({SloClass.STANDARD}))
    assert slo_of(ClassesConfig(), standard_only, Urgency(), 1).slo_class is SloClass.STANDARD
    with pytest.raises(PermissionDenied, match="may not ask for interactive"):
        slo_of(ClassesConfig(), standard_only, Urgency(SloClass.INTERACTIVE), 1)


@pytest.mark.parametrize(
    ("urgency", "field"),
    [
        (Urgency(priority=101), "priority"),
        (Urgency(ttft_seconds=0.0), "targets.ttft_seconds"),
        (Urgency(tpot_seconds=math.nan), "targets.tpot_seconds"),
        (Urgency(tpot_seconds=math.inf), "targets.tpot_seconds"),
    ],
)
def test_urgency_has_limits(urgency: Urgency, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        slo_of(ClassesConfig(), Tenant(), urgency, 10)
    assert refused.value.field == field


def test_limits_reach_admission() -> None:
    limits = {"requests_per_second": 3, "max_running_requests": 2}
    made = policy(config([{"name": "a", "token_env": "X", "weight": 2, "limits": limits}]))
    tenant = made.tenant("a")
    assert (tenant.weight, tenant.limits.requests_per_second) == (2, 3)
    assert (tenant.limits.max_running, tenant.limits.tokens_per_second) == (2, math.inf)
    assert made.patience_seconds[SloClass.INTERACTIVE] == math.inf
    assert made.patience_seconds[SloClass.BATCH] == 60
