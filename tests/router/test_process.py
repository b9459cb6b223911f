"""The router as a process: it starts, says what is wrong in one line, and stops when told."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientError, ClientSession

ROOT = Path(__file__).parents[2]


def _environ(tmp_path: Path, **changes: str) -> dict[str, str]:
    base = {
        "PATH": os.environ["PATH"],
        "ROUTER__AUTH__DEV_KEY": "true",
        "ROUTER__STORE__PATH": str(tmp_path / "router.sqlite"),
    }
    return base | changes


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def process(environ: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router", cwd=ROOT, env=environ, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def answers(url: str, http: ClientSession, router: asyncio.subprocess.Process) -> None:
    """Wait until something answers at `url`; the test's own time limit ends it."""
    while True:
        assert router.returncode is None
        try:
            async with http.get(url) as answer:
                assert answer.status == 200
                return
        except ClientError:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_router_serves_until_it_is_told_to_stop_and_leaves_with_status_0(
    tmp_path: Path, number: signal.Signals
) -> None:
    port = _free_port()
    async with process(_environ(tmp_path, ROUTER__LISTEN__PORT=str(port))) as router, ClientSession() as http:
        await answers(f"http://127.0.0.1:{port}/livez", http, router)
        async with http.ws_connect(
            f"ws://127.0.0.1:{port}/v1/responses", headers={"Authorization": "Bearer dev"}
        ) as client:
            router.send_signal(number)
            await client.receive(timeout=30)
            assert client.close_code == 1012
        _, said = await router.communicate()
        assert router.returncode == 0
        assert b"Traceback" not in said


async def test_a_taken_port_is_one_line_and_status_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with process(_environ(tmp_path, ROUTER__LISTEN__PORT=str(port))) as router:
            _, said = await router.communicate()
    assert router.returncode == 2
    assert said.decode() == (
        f"router: Port {port} on 127.0.0.1 is taken; stop what listens there, or set `listen.port`.\n"
    )


async def test_an_unusable_certificate_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("not a certificate")
    pem = str(tmp_path / "x.pem")
    environ = _environ(tmp_path, ROUTER__LISTEN__PORT="0", ROUTER__LISTEN__TLS_CERT=pem, ROUTER__LISTEN__TLS_KEY=pem)
    async with process(environ) as router:
        _, said = await router.communicate()
    assert (router.returncode, said.count(b"\n")) == (2, 1)
    assert b"listen.tls_cert" in said


async def test_a_store_that_cannot_be_opened_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environ = _environ(tmp_path, ROUTER__LISTEN__PORT="0", ROUTER__STORE__PATH=str(tmp_path / "file" / "router.sqlite"))
    async with process(environ) as router:
        _, said = await router.communicate()
    assert (router.returncode, said.count(b"\n")) == (2, 1)


async def test_with_a_certificate_the_router_speaks_tls(tmp_path: Path) -> None:
    certificate, private = tmp_path / "router.crt", tmp_path / "router.key"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*request, "-keyout", str(private), "-out", str(certificate)], check=True, capture_output=True)
    port = _free_port()
    environ = _environ(
        tmp_path,
        ROUTER__LISTEN__PORT=str(port),
        ROUTER__LISTEN__TLS_CERT=str(certificate),
        ROUTER__LISTEN__TLS_KEY=str(private),
    )
    trusting = ssl.create_default_context(cafile=str(certificate))
    async with process(environ) as router, ClientSession() as http:
        while True:
            assert router.returncode is None
            try:
                async with http.get(f"https://127.0.0.1:{port}/livez", ssl=trusting) as answer:
                    assert answer.status == 200
                    break
            except ClientError:
                await asyncio.sleep(0.05)
