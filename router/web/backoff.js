// When to connect again: exponential backoff with full jitter, so that a thousand pages that lost one
// router do not return in the same second. Pure: knows no clock, no randomness and no socket.

export const BASE_MS = 500;
export const CAP_MS = 30_000;
// A connection that lived shorter counts as another failure: accept-then-close must not become a tight loop.
export const STABLE_MS = 5_000;

/** Milliseconds to wait before attempt `attempt` (0, 1, …); `random` is uniform in [0, 1). */
export function backoffMs(attempt, random) {
  const ceiling = Math.min(CAP_MS, BASE_MS * 2 ** Math.min(attempt, 30));
  return Math.floor(random * ceiling);
}

/** The attempt to count from once a connection that lived `livedMs` (0: it never opened) is lost. */
export function attemptAfter(attempt, livedMs) {
  return livedMs >= STABLE_MS ? 0 : attempt;
}

/** 1000 (done) and 1008 (policy) are said on purpose; coming back would only be told the same again. */
export function mayReconnect(closeCode) {
  return closeCode !== 1000 && closeCode !== 1008;
}
