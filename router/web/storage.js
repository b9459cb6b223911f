// What survives a reload. Preferences live in localStorage; the conversation in sessionStorage, so that two
// tabs never overwrite each other. Every write may fail (quota, private mode): the page then works from memory.
// Knows nothing of the page; what it reads back is checked, never trusted.

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

/** The reverse of `pack`; what was running when the page went away is now interrupted or was never sent. */
export function unpack(json) {
  let parsed;
  try {
    parsed = JSON.parse(json);
  } catch {
    return [];
  }
  if (!Array.isArray(parsed)) return [];
  return parsed.filter(isExchange).map((exchange) => ({
    id: exchange.id,
    question: exchange.question,
    answer: exchange.answer,
    status: ENDED.has(exchange.status) ? exchange.status : statusAfterReload(exchange.status),
    responseId: text(exchange.responseId),
    cancelled: false,
    node: text(exchange.node?.name) ? { name: exchange.node.name, region: text(exchange.node.region) ?? "" } : null,
    movedFrom: text(exchange.movedFrom),
    model: text(exchange.model),
    progress: null,
    error: text(exchange.error?.code) ? { param: null, retryable: false, sentence: "", ...exchange.error } : null,
    sends: 0,
  }));
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
