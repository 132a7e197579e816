"""docs/configuration.md says what the model says."""

from __future__ import annotations

from pathlib import Path

from cluster.config_reference import markdown, sections

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == markdown(), "run `pdserve config reference > docs/configuration.md`"


def test_every_field_says_what_it_means() -> None:
    silent = [field.path for section in sections() for field in section.fields if not field.meaning]
    assert not silent


def test_seconds_bytes_and_counts_have_their_unit() -> None:
    fields = {field.path: field for section in sections() for field in section.fields}
    assert fields["handoff.ticket_seconds"].unit == "seconds"
    assert fields["models.*.kv_cache_bytes"].unit == "bytes"
    assert fields["models.*.prefill.replicas"].unit == "processes"
    assert not [p for p, f in fields.items() if p.endswith(("_seconds", "_bytes")) and not f.unit]


def test_what_reloads_is_marked() -> None:
    live = {field.path for section in sections() for field in section.fields if field.live}
    assert "models.*.decode.replicas" in live and "targets.ttft_seconds" in live
    assert "tenants.*.limits.tokens_per_second" in live and "store.url" not in live
