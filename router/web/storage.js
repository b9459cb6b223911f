// What survives a reload. Preferences live in localStorage; the conversation in sessionStorage, so that two
// tabs never overwrite each other (a duplicated tab has its own copy, and both may read one answer to its end). An
// exchange is written whole: its answer and the number of its last event never part. Every write may fail (quota, private mode): the page then works from memory.
// Knows nothing of the page; what it reads back is checked, never trusted.

import { newExchange } from "./exchange.js";
import { WANTED } from "./resume.js";

const CONVERSATION = "edgechat.conversation";
const MAX_STORED_CHARACTERS = 1_000_000;
const ENDED = new Set(["done", "incomplete", "failed", "interrupted", "stopped", "unsent"]);

export function readPreference(name) {
  try {
    return localStorage.getItem(`edgechat.${name}`);
  } catch {
    return null;
  }
}

/** Keep `value`; null forgets it. Returns whether the browser kept it. */
export function writePreference(name, value) {
  try {
    if (value === null) localStorage.removeItem(`edgechat.${name}`);
    else localStorage.setItem(`edgechat.${name}`, value);
    return true;
  } catch {
    return false;
  }
}

export function readConversation() {
  try {
    return unpack(sessionStorage.getItem(CONVERSATION));
  } catch {
    return [];
  }
}

/** Keep the newest exchanges that fit; on a full store fewer, in the end none. */
export function writeConversation(exchanges) {
  for (let limit = MAX_STORED_CHARACTERS; limit >= 1_000; limit = Math.floor(limit / 4)) {
    try {
      sessionStorage.setItem(CONVERSATION, pack(exchanges, limit));
      return true;
    } catch {
      // Quota: try with fewer exchanges.
    }
  }
  return false;
}

/** JSON of the newest exchanges whose texts fit into `limit` characters. */
export function pack(exchanges, limit) {
  let size = 0;
  let first = exchanges.length;
  while (first > 0) {
    size += exchanges[first - 1].question.length + exchanges[first - 1].answer.length + 300;
    if (size > limit) break;
    first -= 1;
  }
  return JSON.stringify(exchanges.slice(first));
}

/** The reverse of `pack`; an answer that was running when the page went away is away, and will be picked up. */
export function unpack(json) {
  let parsed;
  try {
    parsed = JSON.parse(json);
  } catch {
    return [];
  }
  if (!Array.isArray(parsed)) return [];
  const stored = parsed.filter(isExchange);
  const newestRunning = stored.findLast((exchange) => exchange.status === "streaming" || exchange.status === "away");
  return stored.map((exchange) => unpackExchange(exchange, exchange === newestRunning));
}

function unpackExchange(stored, mayRun) {
  const responseId = text(stored.responseId);
  const isAway = mayRun && responseId !== null && Number.isSafeInteger(stored.sequence) && stored.sequence >= 0;
  return {
    ...newExchange(stored.id, stored.question),
    answer: stored.answer,
    sequence: isAway ? stored.sequence : -1,
    status: isAway ? "away" : ENDED.has(stored.status) ? stored.status : statusAfterReload(stored.status),
    responseId,
    pickup: isAway ? WANTED : null,
    node: text(stored.node?.name) ? { name: stored.node.name, region: text(stored.node.region) ?? "" } : null,
    movedFrom: text(stored.movedFrom),
    model: text(stored.model),
    progress: isAway && stored.progress >= 0 && stored.progress <= 1 ? stored.progress : null,
    sentAtMs: Number.isFinite(stored.sentAtMs) ? stored.sentAtMs : null,
    error: text(stored.error?.code) ? { param: null, retryable: false, sentence: "", ...stored.error } : null,
  };
}

function statusAfterReload(status) {
  if (status === "queued" || status === "sent") return "unsent";
  return status === "stopping" ? "stopped" : "interrupted";
}

function isExchange(value) {
  return Number.isSafeInteger(value?.id) && typeof value.question === "string" && typeof value.answer === "string";
}

function text(value) {
  return typeof value === "string" ? value : null;
}
