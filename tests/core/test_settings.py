from __future__ import annotations

import msgspec
import pytest

from core.errors import ConfigError
from core.settings import host_and_port, is_loopback, load_settings


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    roles: list[str] = msgspec.field(default_factory=lambda: ["chat"])


class Listen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: int = 8080
    tls: bool = False
    rate: float = 1.0


class Auth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[Key] = []


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    listen: Listen = Listen()
    auth: Auth = Auth()


def load(text: str = "", **environ: str) -> Config:
    return load_settings(Config, text, environ, prefix="ROUTER", where="router.toml")


def refusal(text: str = "", **environ: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load(text, **environ)
    return refused.value.message


def test_nothing_said_gives_the_defaults() -> None:
    assert load() == Config()


def test_toml_is_read_into_types() -> None:
    text = '[listen]\nport = 1\ntls = true\nrate = 2\n[[auth.keys]]\nid = "a"\nroles = ["admin"]\n'
    assert load(text) == Config(Listen(port=1, tls=True, rate=2.0), Auth([Key("a", ["admin"])]))


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ROUTER__LISTEN__PORT", "9000", Config(Listen(port=9000))),
        ("ROUTER__LISTEN__HOST", "::1", Config(Listen(host="::1"))),
        ("ROUTER__LISTEN__HOST", "", Config(Listen(host=""))),
        ("ROUTER__LISTEN__HOST", '"quoted"', Config(Listen(host="quoted"))),
        ("ROUTER__LISTEN__HOST", "[not toml", Config(Listen(host="[not toml"))),
        ("ROUTER__LISTEN__TLS", "true", Config(Listen(tls=True))),
        ("ROUTER__LISTEN__RATE", "0.5", Config(Listen(rate=0.5))),
        ("ROUTER__AUTH__KEYS", '[{id = "a"}]', Config(auth=Auth([Key("a")]))),
    ],
)
def test_a_variable_wins_over_the_file_and_takes_the_keys_type(variable: str, value: str, expected: Config) -> None:
    assert load("[listen]\n", **{variable: value}) == expected
    assert load('[listen]\nport = 8080\nhost = "127.0.0.1"', **{variable: value}) == expected


def test_variables_of_others_are_none_of_our_business() -> None:
    assert load(ROUTERX__LISTEN__PORT="1", EDGE__LISTEN__PORT="2", PATH="/bin") == Config()


@pytest.mark.parametrize(
    ("text", "environ", "parts"),
    [
        ("[listen]\nprot = 1", {}, ["router.toml sets 'listen.prot'", "not a known key"]),
        ("[lisen]\n", {}, ["router.toml sets 'lisen'", "not a known key"]),
        ("", {"ROUTER__LISTEN__PROT": "1"}, ["ROUTER__LISTEN__PROT sets 'listen.prot'", "not a known key"]),
        ("", {"ROUTER__LISTEN__PORT": "many"}, ["ROUTER__LISTEN__PORT sets 'listen.port'", "`int`"]),
        ('[listen]\nport = "many"', {}, ["router.toml sets 'listen.port'", "`int`"]),
        ("[[auth.keys]]\n", {}, ["router.toml sets 'auth.keys[", "missing required field `id`"]),
        ("", {"ROUTER__AUTH__KEYS": "[{}]"}, ["ROUTER__AUTH__KEYS sets 'auth.keys[", "missing required field `id`"]),
        ("", {"ROUTER__PORT": "1"}, ["ROUTER__PORT", "ROUTER__SECTION__KEY"]),
        ("", {"ROUTER__LISTEN__PORT__X": "1"}, ["ROUTER__SECTION__KEY"]),
        ("listen = 1", {"ROUTER__LISTEN__PORT": "1"}, ["ROUTER__LISTEN__PORT", "not a section"]),
        ("[listen", {}, ["router.toml is not valid TOML"]),
    ],
)
def test_a_mistake_is_named_with_its_key_and_where_it_came_from(
    text: str, environ: dict[str, str], parts: list[str]
) -> None:
    message = refusal(text, **environ)
    assert all(part in message for part in parts), message
    assert message.endswith(".") and "$" not in message


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_is_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "127.example.com", "127.0.0.1.example.com", "a"])
def test_whatever_others_could_reach_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.7", ("10.0.0.7", 1)),
        ("a.example:80", ("a.example", 80)),
        ("[fd00::7]", ("fd00::7", 1)),
        ("[fd00::7]:80", ("fd00::7", 80)),
        ("fd00::7", ("fd00::7", 1)),
    ],
)
def test_an_address_has_a_host_and_perhaps_a_port(address: str, expected: tuple[str, int]) -> None:
    assert host_and_port(address, 1) == expected


@pytest.mark.parametrize("address", ["a:http", "a:70000", ":80", "[fd00::7", "http://a:80", "a/b", "me@a", "[a]b:1"])
def test_what_names_no_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        host_and_port(address, 1)
