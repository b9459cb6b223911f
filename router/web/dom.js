// Small helpers that make DOM nodes. Text enters through text nodes only, never as HTML: what a model or a
// person writes is shown, never run. Knows neither state nor connection.

import { parseBlocks, parseInline } from "./markdown.js";

/** element("button", {class: "quiet", "aria-label": "Copy"}, "Copy") */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Copy to the clipboard, also where pages without TLS may not use the clipboard API. Returns whether it worked. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const box = element("textarea", { class: "offscreen", "aria-hidden": "true", tabindex: "-1" });
    box.value = text;
    const focused = document.activeElement;
    document.body.append(box);
    box.select();
    const copied = document.execCommand("copy");
    box.remove();
    focused?.focus?.();
    return copied;
  }
}

/**
 * Make `container` show `text`. Blocks that have not changed since the last call keep their nodes, so that a
 * streaming answer costs its last block per frame and a selection above it survives.
 */
export function renderMarkdown(container, text, strings) {
  const blocks = parseBlocks(text);
  const shown = container.shown ?? [];
  let kept = 0;
  while (kept < blocks.length && kept < shown.length && shown[kept] === blockKey(blocks[kept], strings)) kept += 1;
  while (container.childNodes.length > kept) container.lastChild.remove();
  container.append(...blocks.slice(kept).map((block) => blockNode(block, strings)));
  container.shown = blocks.map((block) => blockKey(block, strings));
}

function blockKey(block, strings) {
  return `${strings.language} ${block.kind} ${block.source}`;
}

function blockNode(block, strings) {
  switch (block.kind) {
    case "heading":
      return element(block.level <= 2 ? "h3" : "h4", {}, ...inline(block.text));
    case "rule":
      return element("hr");
    case "list":
      return listNode(block.items);
    case "quote":
      return element("blockquote", {}, ...inline(block.text));
    case "table":
      return tableNode(block);
    case "code":
      return codeNode(block, strings);
    default:
      return element("p", {}, ...inline(block.text));
  }
}

function inline(text) {
  return parseInline(text).map((span) => (span.kind === "text" ? span.text : element(span.kind, {}, span.text)));
}

/** Nested lists out of items with depths; a list opened by a number counts on from it. */
function listNode(items) {
  const root = element("div", { class: "list" });
  const open = []; // [{depth, list}], outermost first
  for (const item of items) {
    while (open.length > 0 && open.at(-1).depth > item.depth) open.pop();
    const ordered = item.number !== null;
    let top = open.at(-1);
    if (!top || top.depth < item.depth || (top.list.localName === "ol") !== ordered) {
      if (top?.depth === item.depth) open.pop();
      const parent = open.at(-1)?.list.lastElementChild ?? root;
      top = { depth: item.depth, list: element(ordered ? "ol" : "ul", { start: ordered ? String(item.number) : null }) };
      parent.append(top.list);
      open.push(top);
    }
    top.list.append(element("li", {}, ...inline(item.text)));
  }
  return root;
}

function tableNode({ head, rows }) {
  const row = (name, cells) => element("tr", {}, ...cells.map((cell) => element(name, {}, ...inline(cell))));
  const table = element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, ...rows.map((cells) => row("td", cells))));
  return element("div", { class: "table", tabindex: "0" }, table);
}

function codeNode({ language, text }, strings) {
  const button = element("button", { type: "button", class: "quiet", "data-copy": "code", "aria-label": strings.copyCode }, strings.copy);
  const bar = element("div", { class: "code-bar" }, element("span", {}, language), button);
  return element("div", { class: "code" }, bar, element("pre", { tabindex: "0" }, element("code", {}, text)));
}
