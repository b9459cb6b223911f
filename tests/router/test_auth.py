from __future__ import annotations

import pytest

from core.errors import Forbidden, NotAuthorised
from router.auth import Keyring, check_origin, presented_key, subprotocols
from router.config import Auth
from router.errors import HostRefused, OriginRefused
from tests.router.fakes import key

ALICE, OPS = key("alice", "acme", "chat"), key("ops", "ops", "admin")


def test_a_known_key_gives_its_tenant_and_roles() -> None:
    who = Keyring(Auth(keys=[ALICE, OPS])).authenticate("alice")
    assert (who.key_id, who.tenant, who.roles) == ("alice", "acme", frozenset({"chat"}))


@pytest.mark.parametrize("presented", [None, "", "bob", "alice ", "dev"])
def test_an_unknown_or_missing_key_is_refused(presented: str | None) -> None:
    with pytest.raises(NotAuthorised):
        Keyring(Auth(keys=[ALICE])).authenticate(presented)


def test_the_dev_key_has_both_roles_where_it_is_allowed() -> None:
    assert Keyring(Auth(dev_key=True)).authenticate("dev").roles == {"chat", "admin"}


def test_a_key_without_the_role_is_forbidden() -> None:
    who = Keyring(Auth(keys=[ALICE])).authenticate("alice")
    who.require("chat")
    with pytest.raises(Forbidden, match="admin"):
        who.require("admin")


def test_every_key_is_compared_even_after_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(a: str, b: str) -> bool:
        compared.append(b)
        return a == b

    monkeypatch.setattr("router.auth.hmac.compare_digest", compare)
    Keyring(Auth(keys=[ALICE, OPS])).authenticate("alice")
    assert compared == [ALICE.sha256, OPS.sha256]


def test_the_key_is_found_in_the_header_or_else_in_a_subprotocol() -> None:
    assert presented_key("Bearer k1", []) == "k1"
    assert presented_key("bearer  k1 ", []) == "k1"
    assert presented_key("Basic k1", ["openai-insecure-api-key.k2"]) is None
    assert presented_key(None, ["responses.v1.json", "openai-insecure-api-key.k2"]) == "k2"
    assert presented_key(None, ["responses.v1.json"]) is None


def test_offered_subprotocols_keep_their_order() -> None:
    assert subprotocols(" a, b ,,c") == ["a", "b", "c"]
    assert subprotocols(None) == []


@pytest.mark.parametrize(
    ("origin", "host", "loopback_only"),
    [
        (None, "127.0.0.1:8080", True),
        (None, "[::1]:8080", True),
        (None, None, True),
        (None, "chat.example", False),
        ("http://127.0.0.1:8080", "127.0.0.1:8080", True),
        ("http://localhost:8080", "localhost:8080", True),
        ("https://chat.example", "chat.example", False),
        ("https://allowed.example", "chat.example", False),
    ],
)
def test_programs_our_own_page_and_allowed_sites_may_call(origin: str | None, host: str, loopback_only: bool) -> None:
    check_origin(origin, host, ["https://allowed.example"], loopback_only=loopback_only)


@pytest.mark.parametrize(
    ("origin", "host", "loopback_only"),
    [
        ("https://evil.example", "127.0.0.1:8080", True),
        ("null", "127.0.0.1:8080", True),
        ("http://127.0.0.1:9999", "127.0.0.1:8080", True),
        ("null", None, False),
        ("http://[", "127.0.0.1:8080", True),
        ("http://[", "http://[", False),
    ],
)
def test_other_sites_may_not_call(origin: str, host: str | None, loopback_only: bool) -> None:
    with pytest.raises(OriginRefused):
        check_origin(origin, host, ["https://allowed.example"], loopback_only=loopback_only)


@pytest.mark.parametrize("host", ["evil.example:8080", "127.0.0.1.evil.example", "[", "", "192.0.2.1:8080"])
@pytest.mark.parametrize("with_origin", [True, False])
def test_a_name_that_others_point_at_this_machine_is_not_ours(host: str, with_origin: bool) -> None:
    # A page sends no Origin with a GET to the host that it came from.
    origin = f"http://{host}" if with_origin else None
    with pytest.raises((HostRefused, OriginRefused)):
        check_origin(origin, host, [], loopback_only=True)
