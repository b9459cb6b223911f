"""What a person does on the page and looks for, and what they see it on."""

from __future__ import annotations

from typing import Any

from playwright.async_api import Page, expect

PHONE: dict[str, Any] = {"viewport": {"width": 320, "height": 568}, "has_touch": True, "is_mobile": True}


async def ask(page: Page, text: str) -> None:
    await page.fill("#question", text)
    await page.press("#question", "Enter")


async def expect_status(page: Page, status: str) -> None:
    await expect(page.locator(".exchange").last).to_have_attribute("data-status", status)


async def expect_phase(page: Page, phase: str) -> None:
    await expect(page.locator("#status")).to_have_attribute("data-phase", phase)


async def wait_long(page: Page) -> None:
    """From now on the page draws the longest wait before it reconnects, and a first one of 30 s."""
    await page.evaluate("() => { Math.random = () => 60; }")


# WCAG 2.2, 1.4.3: every visible text against the nearest background behind it.
LOW_CONTRAST = """() => {
  const parse = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const luminance = (colour) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = parse(colour).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return parse(colour)[3] === 0 ? behind(node.parentElement) : colour;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility() || node.closest(".offscreen")) continue;
    const [low, high] = [getComputedStyle(node).color, behind(node)].map(luminance).sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${node.className} ${text.data.slice(0, 40)}`);
  }
  return found;
}"""
