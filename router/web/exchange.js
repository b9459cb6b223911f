// One question and its answer, and what becomes of them by what the server says. Pure; knows neither the rest
// of the conversation nor the connection.
//
//   queued --sent--> sent --created--> streaming --ended--> done | incomplete | failed | interrupted | stopped
//     |                |                | |   ^
//     |                |                | |   | next event          (away: the answer goes on without us;
//     |                |                | cut |                      resume.js says how it is picked up)
//     |                |                | v   |
//     |                |                | away +--refused for good--> interrupted
//     |                |                |   |
//     +--stop--> unsent +----- stop ----+   +--stop--> stopped
//                               |
//                               +--> stopping --ended--> stopped
//
// Invariant: `answer` is what the events up to and including number `sequence` said, each of them taken once.
// The two change together and are stored together, so that an answer can be picked up from any stored state.

import { MAX_REFUSALS, REFUSED, WANTED } from "./resume.js";

const RUNNING = new Set(["sent", "streaming", "away", "stopping"]);
const MAX_SENDS = 3; // of one question whose connection was lost before the answer began

export function newExchange(id, question) {
  return {
    id,
    question,
    answer: "",
    sequence: -1, // number of the last event taken
    status: "queued",
    responseId: null,
    cancelled: false,
    pickup: null, // while away: see resume.js
    refusals: 0, // to pick it up, since the last event taken
    node: null,
    movedFrom: null,
    model: null,
    progress: null, // how much of the conversation the node has read, 0 to 1
    sentAtMs: null,
    error: null,
    sends: 0,
  };
}

export function isRunning(exchange) {
  return RUNNING.has(exchange.status);
}

/** What the server says about a running exchange. */
export function hear(exchange, event) {
  switch (event.type) {
    case "node":
      return onNode(exchange, event);
    case "progress":
      if (isOfAnother(exchange, event)) return exchange;
      return { ...answered(exchange), progress: event.computed / Math.max(1, event.total) };
    case "refused":
      return onRefused(exchange, event.error);
    default:
      return onLogged(exchange, event);
  }
}

/** The connection is not open (any more); `isFinal`: nor will it be by itself. */
export function lose(exchange, isFinal) {
  switch (exchange.status) {
    case "queued":
      return isFinal ? { ...exchange, status: "unsent" } : exchange;
    case "sent":
      return { ...exchange, status: exchange.sends < MAX_SENDS && !isFinal ? "queued" : "unsent" };
    case "streaming":
    case "away":
      return { ...exchange, status: "away", pickup: WANTED };
    case "stopping":
      return end(exchange, "stopped");
    default:
      return exchange;
  }
}

export function stop(exchange) {
  switch (exchange.status) {
    case "queued":
      return { ...exchange, status: "unsent" };
    case "sent":
    case "streaming":
      return { ...exchange, status: "stopping" };
    case "away":
      return end(exchange, "stopped");
    default:
      return exchange;
  }
}

function end(exchange, status, error = null) {
  return { ...exchange, status, error, progress: null, pickup: null };
}

/** An event of the response's log. */
function onLogged(exchange, event) {
  const isBegun = exchange.responseId !== null;
  if (isBegun === (event.type === "created")) return exchange; // of an answer that is none of ours any more, or heard before
  if (event.type === "ended" && event.responseId !== exchange.responseId) return exchange;
  if (isBegun && event.sequence <= exchange.sequence) return exchange;
  if (isBegun && event.sequence > exchange.sequence + 1) return onGap(exchange);
  return say({ ...attached(exchange), sequence: event.sequence, refusals: 0 }, event);
}

function say(exchange, event) {
  switch (event.type) {
    case "created":
      return { ...exchange, responseId: event.responseId, status: exchange.status === "sent" ? "streaming" : exchange.status };
    case "message_begins":
      return exchange.answer === "" ? exchange : { ...exchange, answer: `${exchange.answer}\n\n` };
    case "text":
      return { ...exchange, answer: exchange.answer + event.text, progress: null };
    case "ended":
      return end(exchange, exchange.status === "stopping" && event.status !== "done" ? "stopped" : event.status, event.error);
    case "other":
      return exchange;
    default:
      throw new Error(`unknown server event ${event.type}`);
  }
}

/** An event is missing, which no server should do: rather no text than a wrong one. What follows is fetched again. */
function onGap(exchange) {
  if (exchange.pickup?.phase === "refused") return exchange;
  const error = { code: "bad_frame", sentence: "", param: null, retryable: true, retryAfterMs: null };
  return exchange.status === "stopping" ? end(exchange, "stopped") : tryLater(exchange, error);
}

function onRefused(exchange, error) {
  const isAway = exchange.status === "away";
  if (error.param === "response_id" && !isAway) return exchange; // a cancel that came after the end
  if (exchange.status === "stopping") return end(exchange, "stopped", error);
  if (error.retryable && exchange.responseId !== null) return tryLater(exchange, error);
  return end(exchange, isAway || exchange.answer !== "" ? "interrupted" : "failed", error);
}

function tryLater(exchange, error) {
  const refusals = exchange.refusals + 1;
  if (refusals > MAX_REFUSALS) return end(exchange, "interrupted", error);
  return { ...exchange, status: "away", refusals, pickup: { ...REFUSED, retryAfterMs: error.retryAfterMs } };
}

function attached(exchange) {
  return exchange.status === "away" ? { ...exchange, status: "streaming", pickup: null } : exchange;
}

/** A resume is answered by any news; what still comes after a refusal does not take it back. */
function answered(exchange) {
  return exchange.pickup?.phase === "asked" ? attached(exchange) : exchange;
}

/** News without a number may come before `response.created`, and is then this exchange's. */
function isOfAnother(exchange, event) {
  return exchange.responseId !== null && event.responseId !== exchange.responseId;
}

function onNode(exchange, event) {
  if (isOfAnother(exchange, event)) return exchange;
  const { node, region } = event;
  const moved = exchange.node !== null && exchange.node.name !== node;
  return {
    ...answered(exchange),
    node: { name: node, region },
    movedFrom: moved ? exchange.node.name : exchange.movedFrom,
  };
}
