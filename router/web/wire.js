// The Responses WebSocket mode in both directions: requests are built and server events are translated
// into the few events that state.js knows. Pure; knows no socket and nothing of the page.

export const SUBPROTOCOLS = ["responses.v1.json", "edgechat.ext.v1"];
const KEY_PREFIX = "openai-insecure-api-key.";

/** A key travels as a subprotocol, which must be an HTTP token (RFC 9110 section 5.6.2). */
export function isUsableKey(key) {
  return /^[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,512}$/.test(key);
}

export function subprotocols(key) {
  return [...SUBPROTOCOLS, KEY_PREFIX + key];
}

export function cancelRequest(responseId) {
  return { type: "response.cancel", response_id: responseId };
}

/** Ask for the events after number `sequence`; they come as if the connection had never been lost. */
export function resumeRequest(responseId, sequence) {
  return { type: "edgechat:resume", response_id: responseId, starting_after: sequence };
}

/**
 * The request for `exchanges[index]`: the newest stored response before it is named, and whatever was
 * said since (an interrupted answer, say) travels as items. With no stored response the whole
 * conversation travels. Exchanges without an answer are left out: they failed and would fail again.
 */
export function createRequest(exchanges, index, model) {
  let anchor = index - 1;
  while (anchor >= 0 && !isStored(exchanges[anchor])) anchor -= 1;
  const items = exchanges
    .slice(anchor + 1, index)
    .filter((exchange) => exchange.answer !== "")
    .flatMap((exchange) => [
      { role: "user", content: exchange.question },
      { role: "assistant", content: exchange.answer },
    ]);
  const question = exchanges[index].question;
  const request = {
    type: "response.create",
    model,
    input: items.length === 0 ? question : [...items, { role: "user", content: question }],
    store: true,
  };
  if (anchor >= 0) request.previous_response_id = exchanges[anchor].responseId;
  return request;
}

function isStored(exchange) {
  return exchange.responseId !== null && (exchange.status === "done" || exchange.status === "incomplete");
}

/**
 * One frame's text -> an event for state.js, or null for what the page has no use for. Events of a response's log
 * carry their number as `sequence`, also those of which nothing else matters ("other").
 */
export function readFrame(text) {
  let message;
  try {
    message = JSON.parse(text);
  } catch {
    return badFrame(text);
  }
  switch (message?.type) {
    case "edgechat:node":
      return { type: "node", responseId: message.response_id, node: message.node, region: message.region };
    case "edgechat:progress":
      return { type: "progress", responseId: message.response_id, computed: message.computed, total: message.total };
    case "error":
      return { type: "refused", error: readError({ ...message.error, ...message }) };
    default: {
      if (typeof message?.type !== "string" || !message.type.startsWith("response.")) return null;
      const sequence = message.sequence_number;
      return Number.isSafeInteger(sequence) ? { ...readLogged(message), sequence } : badFrame(text);
    }
  }
}

function readLogged(message) {
  switch (message.type) {
    case "response.created":
      return { type: "created", responseId: message.response.id };
    case "response.output_item.added":
      return { type: message.item?.type === "message" ? "message_begins" : "other" };
    case "response.output_text.delta":
      return { type: "text", text: message.delta };
    case "response.completed":
      return { type: "ended", responseId: message.response.id, status: "done", error: null };
    case "response.incomplete": {
      const status = message.response.status === "cancelled" ? "stopped" : "incomplete";
      return { type: "ended", responseId: message.response.id, status, error: null };
    }
    case "response.failed": {
      const error = readError(message.response.error ?? {});
      return { type: "ended", responseId: message.response.id, status: error.retryable ? "interrupted" : "failed", error };
    }
    default:
      return { type: "other" };
  }
}

function badFrame(text) {
  return { type: "refused", error: readError({ code: "bad_frame", message: text.slice(0, 200) }) };
}

/**
 * Our code leads the sentence where the SDK's closed list had no room for it ("node_lost: …"). Retryable: the same
 * may work later; an `error` event says so by its status or by when to come back.
 */
function readError(error) {
  const { code, edgechat_code: ourCode, message = "", param = null, retryable, status, retry_after_ms: retryAfterMs } = error;
  const led = /^([a-z][a-z_]{2,60}): (.+)$/s.exec(message);
  return {
    code: ourCode ?? led?.[1] ?? code ?? "server_error",
    sentence: led ? led[2] : message,
    param,
    retryable: retryable ?? (status === 503 || Number.isFinite(retryAfterMs)),
    retryAfterMs: Number.isFinite(retryAfterMs) ? retryAfterMs : null,
  };
}
