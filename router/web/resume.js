// How an answer that lost its connection is picked up: on the next open connection we ask for the events after
// the last one taken, and they come exactly as they would have. A refusal that may pass is met by a fresh
// connection (perhaps to another router) after a wait. Pure; knows no clock, no socket and no text.
//
//   wanted --connection open, asked--> asked --an event--> (attached)
//     ^                                  |
//     +---- fresh connection ---- refused (or an event was missing)

export const WANTED = Object.freeze({ phase: "wanted", retryAfterMs: null });
export const ASKED = Object.freeze({ phase: "asked", retryAfterMs: null });
export const REFUSED = Object.freeze({ phase: "refused", retryAfterMs: null });

// With the waits below: about two minutes of refusals, however long the connection was away before.
export const MAX_REFUSALS = 24;
const BASE_MS = 500;
const CAP_MS = 8_000;
const MOST_MS = 30_000; // of what a server may ask for

/**
 * Milliseconds from refusal number `refusals` (1, 2, …) to the next attempt, at least what the server asked for
 * (`retryAfterMs` or null); `random` is uniform in [0, 1). Half of it is certain: that bounds the attempts per minute.
 */
export function resumeWaitMs(refusals, retryAfterMs, random) {
  const ceiling = Math.min(CAP_MS, BASE_MS * 2 ** Math.min(refusals - 1, 30));
  return Math.floor(Math.max(Math.min(retryAfterMs ?? 0, MOST_MS), (ceiling * (1 + random)) / 2));
}
