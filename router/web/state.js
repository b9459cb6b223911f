// Everything the page knows, in one place: (state, event) -> state. Pure; knows no DOM, socket, clock or storage.
//
// An exchange is a question and its answer. Its status:
//
//   queued --sent--> sent --created--> streaming --ended--> done | incomplete | failed | interrupted | stopped
//     |                |                   |
//     +--stop--> unsent +------ stop ------+--> stopping --ended--> stopped
//
// At most one exchange is sent, streaming or stopping: the server answers one at a time per connection, and
// text deltas do not name their response.

import { cancelRequest, createRequest } from "./wire.js";

export const MAX_QUESTION_CHARACTERS = 100_000;
const MAX_EXCHANGES = 200;
const MAX_SENDS = 3; // of one question whose connection was lost before the answer began
const RUNNING = new Set(["sent", "streaming", "stopping"]);

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
      return update(state, event.id, (exchange) => ({ status: "sent", model: state.model, sends: exchange.sends + 1 }));
    case "stop":
      return stop(state);
    case "cancelling":
      return state.leaving
        ? { ...state, leaving: { ...state.leaving, cancelled: true } }
        : updateRunning(state, { cancelled: true });
    case "new_conversation":
      return leave(state);
    case "server":
      return state.leaving ? onServerWhileLeaving(state, event.event) : onServer(state, event.event);
    default:
      throw new Error(`unknown event ${event.type}`);
  }
}

/** What to send now, and the event that says it was sent; or null. */
export function nextSend(state) {
  if (state.connection.phase !== "open") return null;
  const ending = state.leaving ?? stopping(state);
  if (ending) {
    const mayCancel = ending.responseId !== null && !ending.cancelled;
    return mayCancel ? { message: cancelRequest(ending.responseId), event: { type: "cancelling" } } : null;
  }
  if (running(state) || state.model === null) return null;
  const index = state.exchanges.findIndex((exchange) => exchange.status === "queued");
  if (index < 0) return null;
  return {
    message: createRequest(state.exchanges, index, state.model),
    event: { type: "sending", id: state.exchanges[index].id },
  };
}

export function running(state) {
  return state.exchanges.find((exchange) => RUNNING.has(exchange.status)) ?? null;
}

/** Something that the Stop button ends: a running answer, or a question that waits to be sent. */
export function canStop(state) {
  return state.exchanges.some((exchange) => RUNNING.has(exchange.status) || exchange.status === "queued");
}

/** Asking again is offered for what was never sent, and for the end of the conversation. */
export function canRetry(state, exchange) {
  const isLast = state.exchanges.at(-1) === exchange;
  return exchange.status === "unsent" || (isLast && ["interrupted", "failed", "stopped"].includes(exchange.status));
}

function stopping(state) {
  const exchange = running(state);
  return exchange?.status === "stopping" ? exchange : null;
}

function newExchange(id, question) {
  return {
    id,
    question,
    answer: "",
    status: "queued",
    responseId: null,
    cancelled: false,
    node: null,
    movedFrom: null,
    model: null,
    progress: null,
    error: null,
    sends: 0,
  };
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

function stop(state) {
  return mapExchanges(state, (exchange) => {
    if (exchange.status === "queued") return { ...exchange, status: "unsent" };
    if (exchange.status === "sent" || exchange.status === "streaming") return { ...exchange, status: "stopping" };
    return exchange;
  });
}

function leave(state) {
  const exchange = running(state);
  const leaving = exchange ? { responseId: exchange.responseId, cancelled: exchange.cancelled } : state.leaving;
  return { ...state, exchanges: [], leaving };
}

function onConnection(state, connection) {
  const next = { ...state, connection, leaving: connection.phase === "open" ? state.leaving : null };
  if (connection.phase === "open") return next;
  return mapExchanges(next, (exchange) => {
    switch (exchange.status) {
      case "queued":
        return connection.phase === "closed" ? { ...exchange, status: "unsent" } : exchange;
      case "sent":
        return exchange.sends < MAX_SENDS && connection.phase !== "closed"
          ? { ...exchange, status: "queued" }
          : { ...exchange, status: "unsent" };
      case "streaming":
        return { ...exchange, status: "interrupted", progress: null };
      case "stopping":
        return { ...exchange, status: "stopped", progress: null };
      default:
        return exchange;
    }
  });
}

function onServer(state, event) {
  const exchange = running(state);
  if (!exchange) return state;
  switch (event.type) {
    case "created":
      return updateRunning(state, {
        responseId: event.responseId,
        status: exchange.status === "sent" ? "streaming" : exchange.status,
      });
    case "message_begins":
      return exchange.answer === "" ? state : updateRunning(state, { answer: `${exchange.answer}\n\n` });
    case "text":
      return updateRunning(state, { answer: exchange.answer + event.text, progress: null });
    case "node":
      return onNode(state, exchange, event);
    case "progress":
      return exchange.answer === "" ? updateRunning(state, { progress: event.computed / Math.max(1, event.total) }) : state;
    case "ended":
      if (event.responseId !== exchange.responseId) return state;
      return updateRunning(state, { status: endStatus(exchange, event.status), error: event.error, progress: null });
    case "refused":
      return onRefused(state, exchange, event.error);
    default:
      throw new Error(`unknown server event ${event.type}`);
  }
}

function endStatus(exchange, status) {
  return exchange.status === "stopping" && status !== "done" ? "stopped" : status;
}

function onNode(state, exchange, { responseId, node, region }) {
  // The node may be named before or after `response.created`; it is never named for another response here.
  if (exchange.responseId !== null && responseId !== exchange.responseId) return state;
  const moved = exchange.node !== null && exchange.node.name !== node;
  return updateRunning(state, {
    node: { name: node, region },
    movedFrom: moved ? exchange.node.name : exchange.movedFrom,
  });
}

function onRefused(state, exchange, error) {
  if (error.param === "response_id") return state; // a cancel that came after the end
  if (error.code === "previous_response_not_found") {
    const index = state.exchanges.indexOf(exchange);
    const named = state.exchanges.slice(0, index).some((earlier) => earlier.responseId !== null);
    // Forget every stored response, so that the same question travels again with the whole conversation.
    if (named) {
      return mapExchanges(state, (other, at) => {
        if (at === index) return { ...other, status: other.status === "stopping" ? "stopped" : "queued" };
        return at < index ? { ...other, responseId: null } : other;
      });
    }
  }
  const status = exchange.status === "stopping" ? "stopped" : exchange.answer !== "" ? "interrupted" : "failed";
  return updateRunning(state, { status, error, progress: null });
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

function update(state, id, change) {
  return mapExchanges(state, (exchange) => (exchange.id === id ? { ...exchange, ...change(exchange) } : exchange));
}

function updateRunning(state, changes) {
  const exchange = running(state);
  return exchange ? update(state, exchange.id, () => changes) : state;
}
