from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import ConfigError
from edge_node.config import advertised, read_settings
from tests.edge_node.fake_engine import settings_with

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "edge.toml"
LEAST = '[node]\nname = "eu"\nregion = "eu"\nrelease = "releases/x"\n'


def refusal(text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read_settings(text, environ or {}, "edge.toml")
    return caught.value.message


def test_the_shipped_file_says_the_defaults() -> None:
    shipped = read_settings(SHIPPED.read_text(), {}, "configs/edge.toml")
    least = read_settings(LEAST.replace("releases/x", shipped.node.release), {}, "edge.toml")
    assert shipped == least


def test_a_key_is_overridden_by_the_environment() -> None:
    settings = read_settings(LEAST, {"EDGE__LISTEN__PORT": "7102", "EDGE__ENGINE__SPIN_US": "0"}, "edge.toml")
    assert (settings.listen.port, settings.engine.spin_us) == (7102, 0)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LEAST + "[engine]\nslotz = 4\n", "engine.slotz"),
        (LEAST + "[engine]\nslots = 0\n", "engine.slots"),
        (LEAST + '[engine]\ndevice = "tpu"\n', "engine.device"),
        (LEAST + "[engine]\nkv_cache_bytes = -1\n", "engine.kv_cache_bytes"),
        (LEAST + '[listen]\nhost = "0.0.0.0"\n', "link.secret_file"),
        (LEAST + '[listen]\ntls_cert = "a.pem"\n', "listen.tls_key"),
        (LEAST + '[link]\nclient_ca = "a.pem"\n', "link.client_ca"),
        (LEAST + '[discovery]\nconsul = "localhost:8500"\n', "discovery.consul"),
        (LEAST + '[discovery]\nadvertise = "host:http"\n', "discovery.advertise"),
        (LEAST.replace('name = "eu"', 'name = "EU 1"'), "node.name"),
        ("[node]\n", "node"),
        ("node", "not valid TOML"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(text: str, named: str) -> None:
    sentence = refusal(text)
    assert named in sentence
    assert "edge.toml" in sentence


def test_a_wildcard_address_cannot_be_registered() -> None:
    text = LEAST + '[listen]\nhost = "0.0.0.0"\n[link]\nsecret_file = "s"\n[discovery]\nconsul = "http://c:8500"\n'
    assert "discovery.advertise" in refusal(text)
    assert read_settings(text + 'advertise = "10.0.0.7"\n', {}, "edge.toml").discovery.advertise == "10.0.0.7"


@pytest.mark.parametrize(
    ("advertise", "expected"),
    [
        ("", ("127.0.0.1", 7101)),
        ("10.0.0.7", ("10.0.0.7", 7101)),
        ("node.example:443", ("node.example", 443)),
        ("fd00::7", ("fd00::7", 7101)),
        ("[fd00::7]:443", ("fd00::7", 443)),
        ("[fd00::7]", ("fd00::7", 7101)),
    ],
)
def test_the_advertised_address_defaults_to_where_the_node_listens(advertise: str, expected: tuple[str, int]) -> None:
    settings = settings_with(discovery={"advertise": f'"{advertise}"'})
    assert advertised(settings, 7101) == expected
