from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import ConfigError
from router.config import Config, load_config

ROOT = Path(__file__).parents[2]
DEV = "[auth]\ndev_key = true\n"
KEYS = f'[[auth.keys]]\nid = "a"\nsha256 = "{"0" * 64}"\ntenant = "t"\nroles = ["chat"]\n'


def load(text: str, **environ: str) -> Config:
    return load_config(text, environ, "router.toml")


def test_the_shipped_file_is_good_and_says_what_the_code_defaults_to() -> None:
    shipped = load_config((ROOT / "configs/router.toml").read_text(), {}, "configs/router.toml")
    built_in = load(DEV)
    assert shipped.limits == built_in.limits
    assert shipped.defaults == built_in.defaults
    assert shipped.session == built_in.session
    assert shipped.listen == built_in.listen
    assert not shipped.listen.compression


def test_a_key_is_overridden_from_the_environment() -> None:
    assert load(DEV, ROUTER__LISTEN__PORT="9000").listen.port == 9000
    listed = load(DEV, ROUTER__DISCOVERY__STATIC='["ws://a:1", "ws://b:2"]').discovery.static
    assert listed == ["ws://a:1", "ws://b:2"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "No key could ever be accepted"),
        (DEV + '[listen]\nhost = "0.0.0.0"\n', "dev_key.*0.0.0.0.*127.0.0.1"),
        (KEYS + '[listen]\nhost = "0.0.0.0"\n', "link.secret_file.*missing"),
        (DEV + '[router]\nname = "Tokio_1"\n', "router.name.*a-z"),
        (DEV + '[listen]\ntls_cert = "x.crt"\n', "tls_cert.*tls_key"),
        (DEV + '[link]\ntls_cert = "x.crt"\n', "link.tls_cert.*link.tls_key"),
        (DEV + '[discovery]\nstatic = ["http://a:1"]\n', "discovery.static.*ws://"),
        (DEV + '[discovery]\nrouters = ["eu=10.0.0.1:8080"]\n', "discovery.routers.*name=http://host:port"),
        (DEV + '[discovery]\nrouters = ["EU=http://a:1"]\n', "discovery.routers.*'EU=http://a:1'"),
        (DEV + '[discovery]\nrouters = ["=http://a:1"]\n', "discovery.routers"),
        (DEV + '[discovery]\nrouters = ["eu=http://a:1/v1"]\n', "discovery.routers"),
        (DEV + '[discovery]\nrouters = ["eu=http://a:99999"]\n', "discovery.routers"),
        (DEV + '[discovery]\nrouters = ["eu=http://a:1", "eu=http://b:1"]\n', "discovery.routers.*once"),
        (DEV + '[discovery]\nadvertise = "10.0.0.5:x"\n', "discovery.advertise.*host:port"),
        (DEV + '[store]\nredis = "10.0.0.1:6379"\n', "store.redis.*redis://host:port"),
        (DEV + '[store]\nredis = "redis://a:0"\n', "store.redis"),
        (DEV + '[store]\nredis = "redis://a"\nredis_file = "x"\n', "store.redis.*store.redis_file.*one of them"),
        (DEV + '[store]\nredis_prefix = "a b"\n', "store.redis_prefix.*'a b'"),
        (DEV + '[store]\nredis = "redis://a"\ndurability = "power"\n', "store.durability.*SQLite alone"),
        (DEV + '[store]\ndurability = "much"\n', "store.durability"),
        (DEV + "[store]\nmax_bytes = 5\n", "store.max_bytes.*at least 1048576"),
        (DEV + "[store]\nkeep_days = -1\n", "store.keep_days"),
        (
            KEYS
            + '[listen]\nhost = "0.0.0.0"\n[link]\nsecret_file = "s"\n[discovery]\nconsul = "http://127.0.0.1:8500"\n',
            "0.0.0.0.*discovery.advertise",
        ),
        (DEV + "[listen]\nprot = 1\n", "listen.prot.*not a known key"),
        (DEV + "[listen]\nport = 70000\n", "listen.port"),
        (DEV + "[defaults]\ntemperature = -1\n", "defaults.temperature"),
        (KEYS.replace("0" * 64, "abc"), "SHA-256"),
        (KEYS.replace('["chat"]', '["root"]'), "auth.keys"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_sentence_that_names_the_key(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load(text)
    assert "\n" not in caught.value.message


def test_keys_and_a_secret_allow_listening_everywhere() -> None:
    text = KEYS + '[listen]\nhost = "0.0.0.0"\n[link]\nsecret_file = "/etc/edgechat/link-secret"\n'
    assert load(text).auth.keys[0].tenant == "t"


def _main(*arguments: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "router", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_check_config_says_good_and_starts_nothing() -> None:
    checked = _main("--config", "configs/router.toml", "--check-config", environ={})
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "good" in checked.stdout


def test_a_bad_configuration_ends_the_process_with_one_line_and_status_2() -> None:
    checked = _main("--check-config", environ={"ROUTER__LISTEN__PORT": "x", "ROUTER__AUTH__DEV_KEY": "true"})
    assert checked.returncode == 2
    assert checked.stderr.count("\n") == 1
    assert "ROUTER__LISTEN__PORT" in checked.stderr


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({"ROUTER__LISTEN__TLS_CERT": "/none.pem", "ROUTER__LISTEN__TLS_KEY": "/none.pem"}, "listen.tls_cert"),
        ({"ROUTER__LINK__TLS_CA": "/none.pem"}, "[link]"),
        ({"ROUTER__LINK__SECRET_FILE": "/none"}, "link.secret_file"),
        ({"ROUTER__DISCOVERY__CONSUL": "localhost:8500"}, "discovery.consul"),
        ({"ROUTER__DISCOVERY__STATIC": '["ws://"]'}, "discovery.static"),
    ],
)
def test_check_config_finds_what_would_keep_the_router_from_starting(environ: dict[str, str], key: str) -> None:
    checked = _main("--check-config", environ={"ROUTER__AUTH__DEV_KEY": "true"} | environ)
    assert (checked.returncode, checked.stderr.count("\n")) == (2, 1)
    assert key in checked.stderr


def test_an_empty_link_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(" \n")
    environ = {"ROUTER__LINK__SECRET_FILE": str(tmp_path / "secret"), "ROUTER__AUTH__DEV_KEY": "true"}
    checked = _main("--check-config", environ=environ)
    assert checked.returncode == 2
    assert "is empty" in checked.stderr


def test_the_password_of_a_redis_is_not_repeated_in_what_is_said_about_its_address() -> None:
    with pytest.raises(ConfigError) as refused:
        load('[auth]\ndev_key = true\n[store]\nredis = "http://:hush@a:1"\n')
    assert "hush" not in refused.value.message
