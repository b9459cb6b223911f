// Light Markdown -> a tree of plain objects: paragraphs, headings, lists, quotes, tables, fenced code; bold,
// emphasis and code within a line. Half-finished markup, which every streamed answer has, is valid input.
// Links and HTML stay the text they are. Pure and linear in time; dom.js makes nodes of the tree.

const FENCE = /^\s*(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const TABLE_RULE = /^:?-+:?$/; // of each cell
const MAX_DEPTH = 3;

/** Blocks: {kind, source, …}. `source` changes exactly when the block does, so that finished ones are kept. */
export function parseBlocks(text) {
  const lines = text.split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [block, next] = readBlock(lines, at);
    blocks.push({ ...block, source: lines.slice(at, next).join("\n") });
    at = next;
  }
  return blocks;
}

function readBlock(lines, at) {
  const fence = FENCE.exec(lines[at]);
  if (fence) return readCode(lines, at, fence);
  const heading = HEADING.exec(lines[at]);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] }, at + 1];
  if (RULE.test(lines[at])) return [{ kind: "rule" }, at + 1];
  if (ITEM.test(lines[at])) return readList(lines, at);
  if (QUOTE.test(lines[at])) return readQuote(lines, at);
  if (startsTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at);
}

function readCode(lines, at, [, mark, info]) {
  const body = [];
  let next = at + 1;
  while (next < lines.length) {
    const line = lines[next];
    next += 1;
    const closing = line.trim();
    if (closing.startsWith(mark) && closing === mark[0].repeat(closing.length)) break;
    body.push(line);
  }
  return [{ kind: "code", language: info.trim().split(/\s/)[0], text: body.join("\n") }, next];
}

function readList(lines, at) {
  const items = [];
  let next = at;
  for (; next < lines.length; next += 1) {
    const item = RULE.test(lines[next]) ? null : ITEM.exec(lines[next]);
    if (item) {
      const depth = Math.min(MAX_DEPTH, Math.floor(item[1].replace(/\t/g, "    ").length / 2));
      items.push({ depth, number: item[2] === undefined ? null : Number(item[2]), text: item[3] });
    } else if (lines[next].trim() === "") {
      // A blank line inside a list is a gap between items, at its end the end.
      if (!ITEM.test(lines[next + 1] ?? "")) break;
    } else if (/^\s+\S/.test(lines[next]) && !FENCE.test(lines[next])) {
      items.at(-1).text += `\n${lines[next].trim()}`;
    } else {
      break;
    }
  }
  return [{ kind: "list", items }, next];
}

function readQuote(lines, at) {
  const body = [];
  let next = at;
  for (let quote; next < lines.length && (quote = QUOTE.exec(lines[next])); next += 1) body.push(quote[1]);
  return [{ kind: "quote", text: body.join("\n") }, next];
}

function startsTable(lines, at) {
  const rule = lines[at + 1] ?? "";
  return lines[at].includes("|") && rule.includes("|") && cells(rule).every((cell) => TABLE_RULE.test(cell));
}

function readTable(lines, at) {
  const rows = [cells(lines[at])];
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|"); next += 1) rows.push(cells(lines[next]));
  return [{ kind: "table", head: rows[0], rows: rows.slice(1) }, next];
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function readParagraph(lines, at) {
  let next = at + 1;
  while (next < lines.length && !interrupts(lines, next)) next += 1;
  return [{ kind: "paragraph", text: lines.slice(at, next).join("\n") }, next];
}

function interrupts(lines, at) {
  const line = lines[at];
  const starts = [FENCE, HEADING, ITEM, QUOTE, RULE].some((pattern) => pattern.test(line));
  return line.trim() === "" || starts || startsTable(lines, at);
}

/** Spans of one text: {kind: "text" | "code" | "strong" | "em", text}. An unclosed mark is the text it is. */
export function parseInline(text) {
  const spans = [];
  const unclosed = new Set(); // marks without a closing one ahead: looked for once, so that time stays linear
  let plain = "";
  for (let at = 0; at < text.length; ) {
    const mark = unclosed.size === 4 ? null : markAt(text, at);
    const end = mark && !unclosed.has(mark) ? closing(text, at + mark.length, mark) : -1;
    if (end < 0) {
      if (mark) unclosed.add(mark);
      const step = mark ? mark.length : 1;
      plain += text.slice(at, at + step);
      at += step;
      continue;
    }
    if (plain) spans.push({ kind: "text", text: plain });
    plain = "";
    spans.push({ kind: KINDS[mark], text: text.slice(at + mark.length, end) });
    at = end + mark.length;
  }
  if (plain) spans.push({ kind: "text", text: plain });
  return spans;
}

const KINDS = { "``": "code", "`": "code", "**": "strong", "*": "em" };

function markAt(text, at) {
  const first = text[at];
  if (first !== "`" && first !== "*") return null;
  const mark = text[at + 1] === first ? first + first : first;
  // "2 * 3" is no emphasis: an opening mark touches what it opens.
  return first === "*" && /^\s?$/.test(text[at + mark.length] ?? "") ? null : mark;
}

function closing(text, from, mark) {
  for (let end = text.indexOf(mark, from); end >= 0; end = text.indexOf(mark, end + 1)) {
    if (end === from) continue;
    const isDoubled = mark === "*" && (text[end + 1] === "*" || text[end - 1] === "*");
    const isSpaced = mark[0] === "*" && /\s/.test(text[end - 1]);
    if (!isDoubled && !isSpaced) return end;
  }
  return -1;
}
