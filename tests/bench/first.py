"""`make bench-first`: what the first conversation costs. Prints a table and writes docs/benchmarks/first.md.

    export       seconds and peak memory of `python -m export`
    bare loop    the graph alone, one process, KV bound in place (tests/bench/bare_loop.py)
    product      client -> router -> link -> node -> child and back, same release, same threads
    first token  from `response.create` to the first id
    router       what the router adds: the same request over the link and through the router, in turn

Figures of one run belong together; the machine may be shared, so candidates alternate and medians are given.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import websockets

from core.conversation import Item
from core.frames import PROTOCOL, Generate, Hello, Sampling, Tokens, decode_to_router, encode
from core.manifest import MANIFEST_NAME, decode_manifest
from tests.bench.report import ROOT, THREADS, Figure, figure, provenance, publish, table
from tests.e2e.processes import Fleet, build_fleet, link_secret
from tests.tools.peak_rss import run_measured

RELEASE = ROOT / "releases/smollm2-135m"
MODEL = "smollm2-135m"
STREAMS = (1, 8)
ROUNDS = 4
NEW_TOKENS = 128
LATENCY_ROUNDS = 40
STORY = "Tell me a long story about the number {index} and the river it fell into."


def measure_export() -> list[Figure]:
    """Time whole exports from the GGUF, interpreter start included."""
    gguf = subprocess.run(
        [sys.executable, "scripts/get-model"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    seconds, mebibytes = [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            mebibytes.append(run_measured("export", [gguf, "--recipe", "gguf-exact", "--out", f"{folder}/{MODEL}"]))
            seconds.append(time.monotonic() - started)
    return [figure("export", seconds, "s"), figure("export, peak RSS", mebibytes, "MiB")]


def bare_loop() -> dict[int, float]:
    """Tokens per second of the graph alone, by number of streams, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.bare_loop", str(RELEASE)]
    command += ["--threads", str(THREADS), "--steps", str(NEW_TOKENS // 2), "--repeats", "1"]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured = json.loads(printed)
    return {streams: measured[f"streams_{streams}"]["bare_tokens_s"] for streams in STREAMS}


async def product(fleet: Fleet, streams: int) -> float:
    """Tokens per second of all streams together, from the first delta of the last one to begin until one ends."""

    async def one(index: int) -> list[float]:
        times: list[float] = []
        async with client(fleet) as socket:
            body = {
                "input": STORY.format(index=index),
                "temperature": 1,
                "seed": index,
                "max_output_tokens": NEW_TOKENS,
            }
            await socket.send(json.dumps({"type": "response.create", "model": MODEL, "store": False, **body}))
            async for message in socket:
                event = json.loads(message)
                if event["type"] == "response.output_text.delta":
                    times.append(time.monotonic())
                elif event["type"] in {"response.completed", "response.incomplete"}:
                    return times
                elif event["type"] in {"response.failed", "error"}:
                    raise SystemExit(f"bench: the router answered {event}")
        raise SystemExit("bench: the router closed the connection")

    times = await asyncio.gather(*(one(index) for index in range(streams)))
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    return sum(begin < moment <= end for each in times for moment in each) / (end - begin)


async def first_id_through_router(fleet: Fleet, prompt: str) -> float:
    """Seconds from `response.create` on an open connection to the first id, whether or not it has text."""
    async with client(fleet) as socket:
        started = time.monotonic()
        body = {"input": prompt, "temperature": 0, "max_output_tokens": 1, "store": False}
        await socket.send(json.dumps({"type": "response.create", "model": MODEL, **body}))
        async for message in socket:
            event = json.loads(message)
            if event["type"] == "response.output_item.added":
                return time.monotonic() - started
            if event["type"] in {"response.failed", "error"}:
                raise SystemExit(f"bench: the router answered {event}")
    raise SystemExit("bench: the router closed the connection")


async def first_id_over_link(link: websockets.ClientConnection, release: str, prompt: str, number: int) -> float:
    """Seconds from `Generate` on an open link to the first row: what the router itself waits for."""
    started = time.monotonic()
    items = [Item("message", "user", prompt)]
    request = Generate(f"bench_{number}", 1, release, items, [], 0, Sampling(temperature=0), [], 1)
    await link.send(encode(request))
    while True:
        frame = decode_to_router(await receive_bytes(link))
        if isinstance(frame, Tokens):
            return time.monotonic() - started


async def receive_bytes(link: websockets.ClientConnection) -> bytes:
    message = await link.recv()
    assert isinstance(message, bytes)
    return message


def client(fleet: Fleet) -> websockets.connect:
    """A connection to the router."""
    url = fleet.base_url.replace("http", "ws", 1) + "/responses"
    return websockets.connect(url, additional_headers={"Authorization": "Bearer dev"}, compression=None, proxy=None)


async def measure_product(fleet: Fleet, secret: str) -> list[Figure]:
    """Bare loop and product in turn, then latencies."""
    figures: list[Figure] = []
    await product(fleet, 2)  # warm
    bare: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    through: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    for number in range(ROUNDS):
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        for streams, rate in (await asyncio.to_thread(bare_loop)).items():
            bare[streams].append(rate)
            through[streams].append(await product(fleet, streams))
    for streams in STREAMS:
        ratio = [100 * ours / alone for ours, alone in zip(through[streams], bare[streams], strict=True)]
        figures.append(figure(f"bare loop, streams: {streams}", bare[streams], "tokens/s"))
        figures.append(figure(f"product, streams: {streams}", through[streams], "tokens/s"))
        figures.append(figure(f"product over bare loop, streams: {streams}", ratio, "%"))
    for words in (16, 256, 1024):
        prompt = "river " * words
        waits = [1e3 * await first_id_through_router(fleet, prompt) for _ in range(ROUNDS)]
        figures.append(figure(f"time to first token, about {words} prompt tokens", waits, "ms"))
    figures.extend(await measure_router(fleet, secret))
    return figures


async def measure_router(fleet: Fleet, secret: str) -> list[Figure]:
    """The same short request over the link and through the router, in turn."""
    release = decode_manifest((RELEASE / MANIFEST_NAME).read_bytes(), MANIFEST_NAME).release
    node = next(iter(fleet.nodes.values()))
    direct, routed = [], []
    headers = {"Authorization": f"Bearer {secret}"}
    async with websockets.connect(
        f"{node.link_url}/link", additional_headers=headers, compression=None, proxy=None
    ) as link:
        await link.send(encode(Hello(PROTOCOL, "bench", "bench", "")))
        for number in range(LATENCY_ROUNDS):
            direct.append(1e3 * await first_id_over_link(link, release, "Hi", number))
            routed.append(1e3 * await first_id_through_router(fleet, "Hi"))
    added = [through - alone for through, alone in zip(routed, direct, strict=True)]
    return [
        figure("first token over the link", direct, "ms"),
        figure("first token through the router", routed, "ms"),
        figure("added by the router, pair by pair", added, "ms"),
    ]


def report(figures: list[Figure]) -> list[str]:
    """The page for docs/benchmarks."""
    return [
        "# The first conversation",
        "",
        "Written by `make bench-first`. Medians of a shared machine; rows of one run belong together.",
        "",
        f"- {provenance('onnxruntime', 'numpy', 'aiohttp', 'websockets')}",
        f"- SmolLM2-135M, recipe gguf-exact, {THREADS} threads, {NEW_TOKENS} new tokens a stream;",
        "  router, node and the measuring client share the cores with each other, the bare loop has them alone",
        "",
        *table(figures),
    ]


def main() -> int:
    """Run everything; about five minutes on two cores."""
    figures = measure_export()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fleet = build_fleet(RELEASE, folder, None, nodes=["eu"], edge={"EDGE__ENGINE__THREADS": str(THREADS)})
        try:
            fleet.start()
            figures += asyncio.run(measure_product(fleet, link_secret(folder).read_text().strip()))
        finally:
            fleet.close()
    publish("first.md", report(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
