"""Limits and access in small: the bucket, addresses, tokens, and where a server may listen."""

from __future__ import annotations

import pytest

from expunge.core.errors import UserError
from expunge.service.auth import check_binding, is_loopback, token_from
from expunge.service.limits import RateLimit


def test_a_bucket_empties_and_fills():
    limit = RateLimit(None, per_second=2, burst=3)
    assert [limit.take("a", 0.0) for _ in range(3)] == [0, 0, 0]
    assert limit.take("a", 0.0) == pytest.approx(0.5)
    assert limit.take("b", 0.0) == 0  # each client has its own
    assert limit.take("a", 0.49) > 0 and limit.take("a", 1.0) == 0
    assert [limit.take("a", 100.0) for _ in range(4)][:3] == [0, 0, 0]  # no more than the burst
    assert limit.take("a", 100.0) > 0


def test_clients_without_number_take_no_memory_without_end():
    limit = RateLimit(None, per_second=1, burst=1, most_clients=10)
    for n in range(1000):
        limit.take(str(n), float(n))
    assert len(limit._buckets) == 10


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST"]
)
def test_this_machine(host):
    assert is_loopback(host)
    check_binding(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.org", "", "localhost.evil.org", "127.0.0.1.evil.org"])  # fmt: skip
def test_other_machines_need_a_token(host):
    assert not is_loopback(host)
    with pytest.raises(UserError, match="token"):
        check_binding(host, None)
    check_binding(host, "x" * 20)


def test_tokens_come_from_a_file_of_ones_own_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("EXPUNGE_TOKEN", raising=False)
    assert token_from(None) is None
    monkeypatch.setenv("EXPUNGE_TOKEN", "short")
    with pytest.raises(UserError, match="16 characters"):
        token_from(None)
    monkeypatch.setenv("EXPUNGE_TOKEN", "x" * 16)
    assert token_from(None) == "x" * 16
    file = tmp_path / "token"
    file.write_text("y" * 20 + "\n")
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        token_from(str(file))
    file.chmod(0o600)
    assert token_from(str(file)) == "y" * 20
    file.write_text("")
    with pytest.raises(UserError):
        token_from(str(file))  # an empty file must not mean no token
    with pytest.raises(UserError, match="cannot read"):
        token_from(str(tmp_path / "none"))
