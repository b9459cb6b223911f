// Everything the page knows, in one place: (state, event) -> state. Pure; knows no DOM, socket, clock or storage.
//
// At most one exchange is running (sent, streaming, away or stopping; see exchange.js): the server answers one at
// a time per connection, and text deltas do not name their response.

import { hear, isRunning, lose, newExchange, stop } from "./exchange.js";
import { ASKED } from "./resume.js";
import { cancelRequest, createRequest, resumeRequest } from "./wire.js";

export const MAX_QUESTION_CHARACTERS = 100_000;
const MAX_EXCHANGES = 200;
const MAX_ABANDONED = 8;

export function initialState({ language, exchanges = [], model = null }) {
  return {
    language,
    // phase: connecting | open | waiting (until retryAtMs) | closed (by the server, for good) | key (we need one)
    connection: { phase: "connecting", retryAtMs: null, reason: "", isRetry: false },
    models: [],
    model,
    exchanges,
    nextId: exchanges.reduce((most, exchange) => Math.max(most, exchange.id + 1), 1),
    // A response of a conversation the person has left; nothing is sent until the server has ended it.
    leaving: null,
    // Responses that nobody waits for and that no connection says anything of: the next one cancels them, once. Should
    // that be lost too, the server ends them itself for want of a reader.
    abandoned: [],
    // What this connection may still say belongs to an abandoned response: only a fresh one is of use.
    isStale: false,
  };
}

export function reduce(state, event) {
  switch (event.type) {
    case "connection":
      return onConnection(state, event.connection);
    case "models":
      return { ...state, models: event.models, model: event.models.includes(state.model) ? state.model : (event.models[0] ?? null) };
    case "model_chosen":
      return { ...state, model: event.model };
    case "language_chosen":
      return { ...state, language: event.language };
    case "asked":
      return ask(state, event.question);
    case "retry":
      return retry(state, event.id);
    case "sending":
      return mapExchanges(state, (exchange) =>
        exchange.id === event.id
          ? { ...exchange, status: "sent", model: state.model, sends: exchange.sends + 1, sentAtMs: event.atMs }
          : exchange,
      );
    case "resuming":
      return mapRunning(state, (exchange) => ({ ...exchange, pickup: ASKED }));
    case "stop":
      return mapExchanges(abandonAway(state), stop);
    case "cancelling":
      return state.leaving
        ? { ...state, leaving: { ...state.leaving, cancelled: true } }
        : mapRunning(state, (exchange) => ({ ...exchange, cancelled: true }));
    case "abandoning":
      return { ...state, abandoned: state.abandoned.filter((id) => id !== event.responseId) };
    case "new_conversation":
      return leave(state);
    case "server":
      return state.leaving ? onServerWhileLeaving(state, event.event) : onServer(state, event.event);
    default:
      throw new Error(`unknown event ${event.type}`);
  }
}

/** What to send at `nowMs`, and the event that says it was sent; or null. */
export function nextSend(state, nowMs) {
  if (state.connection.phase !== "open" || state.isStale) return null;
  const [responseId] = state.abandoned;
  if (responseId) return { message: cancelRequest(responseId), event: { type: "abandoning", responseId } };
  const exchange = running(state);
  const ending = state.leaving ?? (exchange?.status === "stopping" ? exchange : null);
  if (ending) {
    const mayCancel = ending.responseId !== null && !ending.cancelled;
    return mayCancel ? { message: cancelRequest(ending.responseId), event: { type: "cancelling" } } : null;
  }
  if (exchange?.pickup?.phase === "wanted") {
    return { message: resumeRequest(exchange.responseId, exchange.sequence), event: { type: "resuming" } };
  }
  if (exchange || state.model === null) return null;
  const index = state.exchanges.findIndex((candidate) => candidate.status === "queued");
  if (index < 0) return null;
  return {
    message: createRequest(state.exchanges, index, state.model),
    event: { type: "sending", id: state.exchanges[index].id, atMs: nowMs },
  };
}

/** What the server owes us, in the words of watch.js. */
export function awaits(state) {
  if (state.connection.phase !== "open") return null;
  const exchange = running(state);
  if (state.leaving) return "answer";
  if (!exchange || exchange.pickup?.phase === "refused") return "nothing";
  return exchange.status === "sent" ? "begin" : "answer";
}

export function running(state) {
  return state.exchanges.find(isRunning) ?? null;
}

/** Something that the Stop button ends: a running answer, or a question that waits to be sent. */
export function canStop(state) {
  return state.exchanges.some((exchange) => isRunning(exchange) || exchange.status === "queued");
}

/** Asking again is offered for what was never sent, and for the end of the conversation. */
export function canRetry(state, exchange) {
  const isLast = state.exchanges.at(-1) === exchange;
  return exchange.status === "unsent" || (isLast && ["interrupted", "failed", "stopped"].includes(exchange.status));
}

function ask(state, question) {
  const text = question.trim();
  if (text === "" || text.length > MAX_QUESTION_CHARACTERS) return state;
  const exchange = newExchange(state.nextId, text);
  // A closed connection does not come back by itself, so the question must not look as if it waited for it.
  if (state.connection.phase === "closed") exchange.status = "unsent";
  const exchanges = [...state.exchanges, exchange].slice(-MAX_EXCHANGES);
  return { ...state, exchanges, nextId: state.nextId + 1 };
}

function retry(state, id) {
  const exchange = state.exchanges.find((candidate) => candidate.id === id);
  if (!exchange || !canRetry(state, exchange)) return state;
  // Moved to the end: a question is answered in the light of all that was said before it.
  const others = state.exchanges.filter((candidate) => candidate !== exchange);
  return { ...state, exchanges: [...others, newExchange(id, exchange.question)] };
}

function leave(state) {
  const exchange = running(state);
  if (!exchange) return { ...state, exchanges: [] };
  if (exchange.status === "away") return { ...abandonAway(state), exchanges: [] };
  return { ...state, exchanges: [], leaving: { responseId: exchange.responseId, cancelled: exchange.cancelled } };
}

/** Nobody waits any more for an answer that is away. A resume that was asked for may still be answered. */
function abandonAway(state) {
  const exchange = running(state);
  if (exchange?.status !== "away") return state;
  return { ...abandon(state, exchange), isStale: state.connection.phase === "open" };
}

function abandon(state, { responseId }) {
  if (responseId === null) return state;
  return { ...state, abandoned: [...state.abandoned, responseId].slice(-MAX_ABANDONED) };
}

function onConnection(state, connection) {
  if (connection.phase === "open") return { ...state, connection };
  const exchange = running(state);
  const ending = state.leaving ?? (exchange?.status === "stopping" ? exchange : null);
  const next = { ...(ending ? abandon(state, ending) : state), connection, leaving: null, isStale: false };
  return mapExchanges(next, (each) => lose(each, connection.phase === "closed"));
}

function onServer(state, event) {
  const exchange = running(state);
  if (!exchange || state.isStale) return state;
  const isForgotten = event.type === "refused" && event.error.code === "previous_response_not_found";
  return (isForgotten && askWithItems(state, exchange)) || mapRunning(state, (each) => hear(each, event));
}

/** Forget every stored response, so that the same question travels again with the whole conversation; null: there is none. */
function askWithItems(state, exchange) {
  const index = state.exchanges.indexOf(exchange);
  if (!state.exchanges.slice(0, index).some((earlier) => earlier.responseId !== null)) return null;
  return mapExchanges(state, (other, at) => {
    if (at === index) return { ...other, status: other.status === "stopping" ? "stopped" : "queued" };
    return at < index ? { ...other, responseId: null } : other;
  });
}

function onServerWhileLeaving(state, event) {
  const { leaving } = state;
  switch (event.type) {
    case "created":
      return { ...state, leaving: { ...leaving, responseId: event.responseId } };
    case "ended":
      return event.responseId === leaving.responseId ? { ...state, leaving: null } : state;
    case "refused":
      return { ...state, leaving: null };
    default:
      return state;
  }
}

function mapExchanges(state, change) {
  return { ...state, exchanges: state.exchanges.map(change) };
}

function mapRunning(state, change) {
  return mapExchanges(state, (exchange) => (isRunning(exchange) ? change(exchange) : exchange));
}
