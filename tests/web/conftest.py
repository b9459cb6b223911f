"""Chromium, once for all tests of the page, and a fake router for each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright

from tests.web.fake_router import FakeRouter
from tests.web.modules import Module

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
CHROMIUM = Path("/usr/bin/chromium")

OpenPage = Callable[..., Awaitable[Page]]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail(f"There is no {CHROMIUM}: run `make system-deps`.")
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield chromium
        await chromium.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def modules(browser: Browser) -> AsyncIterator[Module]:
    """One page for all: the modules keep nothing between calls."""
    router = FakeRouter()
    await router.up()
    page = await browser.new_page()
    await page.goto(router.url)
    yield Module(page)
    await page.close()
    await router.down()


@pytest_asyncio.fixture(loop_scope="session")
async def router() -> AsyncIterator[FakeRouter]:
    fake = FakeRouter()
    await fake.up()
    yield fake
    await fake.down()


@pytest_asyncio.fixture(loop_scope="session")
async def open_page(browser: Browser, router: FakeRouter) -> AsyncIterator[OpenPage]:
    """Open the page in a fresh profile; options are those of a browser context. No script error, no outside request."""
    complaints: list[str] = []
    contexts = []

    async def open_it(path: str = "", **options: Any) -> Page:
        context = await browser.new_context(**{"locale": "en-US", **options})
        contexts.append(context)
        page = await context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.extend(csp_complaint(message.text)))
        page.on("request", lambda request: complaints.extend(outside(request.url, router.url)))
        await page.goto(router.url + path)
        return page

    yield open_it
    for context in contexts:
        await context.close()
    assert complaints == []


def csp_complaint(text: str) -> list[str]:
    return [text] if "Content Security Policy" in text else []


def outside(url: str, own: str) -> list[str]:
    return [] if url.startswith((own, "data:", "blob:")) else [f"a request left for {url}"]
