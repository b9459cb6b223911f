"""The page's pure modules at a test's hand, run where they will run: inside Chromium."""

from __future__ import annotations

from typing import Any

from playwright.async_api import Page


class Module:
    """`await run(body, argument)` evaluates a function body with every module in scope. It may reuse the names below.

    `server(event, sequence)`: an event of a response's log has its number; news and refusals have none.
    """

    IMPORTS = """
      const [backoff, markdown, resume, state, storage, strings, watch, wire] = await Promise.all(
        ["backoff", "markdown", "resume", "state", "storage", "strings", "watch", "wire"].map((name) =>
          import(`/web/${name}.js`)));
      const open = { phase: "open", retryAtMs: null, reason: "" };
      const lost = { phase: "waiting", retryAtMs: 0, reason: "" };
      const closed = { phase: "closed", retryAtMs: null, reason: "" };
      const play = (events, from = state.initialState({ language: "en" })) => events.reduce(state.reduce, from);
      const server = (event, sequence) => ({ type: "server", event: { ...event, sequence } });
      const says = (text, sequence) => server({ type: "text", text }, sequence);
      const connect = [{ type: "connection", connection: open }, { type: "models", models: ["m"] }];
      const asked = [...connect, { type: "asked", question: "Hello" }, { type: "sending", id: 1, atMs: 0 }];
      const created = server({ type: "created", responseId: "r1" }, 0);
      const ended = (status, sequence) => server({ type: "ended", responseId: "r1", status, error: null }, sequence);
      const begun = [...asked, created, says("Hi", 1)];
      const done = [...begun, ended("done", 2)];
      const cut = { type: "connection", connection: lost };
      const back = { type: "connection", connection: open };
      const sends = (from) => state.nextSend(from, 0)?.message ?? null;
      const sent = (from) => play([state.nextSend(from, 0).event], from);
    """

    def __init__(self, page: Page) -> None:
        self._page = page

    async def run(self, body: str, argument: object = None) -> Any:
        return await self._page.evaluate(f"async (argument) => {{ {self.IMPORTS} {{ {body} }} }}", argument)
