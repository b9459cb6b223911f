// When to distrust a connection that looks open. A laptop that slept or a NAT that forgot leaves a socket on
// which nothing comes any more, and the browser may notice only after minutes. The protocol has no ping of its
// own; the probe is a fresh connection, which costs little, because answers are picked up exactly.
// Pure: (watch, event) -> watch; times are arguments, milliseconds of the wall clock (it goes on during sleep).

export const TICK_MS = 1_000;
const SLEPT_MS = 5_000; // a tick so much late was slept through
const DOUBT_MS = 3_000; // after waking: what was under way may still arrive
const SILENT_MS = 15_000; // a node that reads or writes says so about every second
const MOST_SILENT_MS = 120_000;
const AWAY_MS = 60_000; // out of sight for so long, an idle connection may be gone

export function initialWatch(nowMs) {
  return {
    reconnect: false, // the answer to the last event: give this connection up
    tickMs: nowMs,
    heardMs: nowMs, // the silence counts from here: something was heard, the connection opened, the page was shown
    doubtedMs: null,
    hiddenMs: null, // since when the page is out of sight
    silences: 0, // reconnects since something was heard, each of which doubles the patience
  };
}

/**
 * `awaits` says what is expected from the server: "answer" (news about every second), "begin" (a sent question that
 * may wait its turn in silence), "nothing" (the connection is idle) or null (the connection is not open).
 * Events: opened | heard | hidden | shown | online | tick, each with `nowMs` and `awaits`.
 */
export function step(watch, event) {
  const { nowMs, awaits } = event;
  const next = { ...watch, reconnect: false };
  switch (event.type) {
    case "opened":
      return { ...next, heardMs: nowMs, doubtedMs: null };
    case "heard":
      return { ...next, heardMs: nowMs, doubtedMs: null, silences: 0 };
    case "hidden":
      return { ...next, hiddenMs: watch.hiddenMs ?? nowMs, doubtedMs: null };
    case "shown":
      return onShown(next, nowMs, awaits);
    case "online":
      return onWoken(next, nowMs, awaits);
    case "tick":
      return onTick(next, nowMs, awaits);
    default:
      throw new Error(`unknown event ${event.type}`);
  }
}

function onShown(watch, nowMs, awaits) {
  const wasLongAway = watch.hiddenMs !== null && nowMs - watch.hiddenMs >= AWAY_MS;
  const next = { ...watch, hiddenMs: null, tickMs: nowMs, heardMs: nowMs };
  // A short look elsewhere is no reason to send a waiting question to the end of the line.
  return awaits === "answer" || wasLongAway ? onWoken(next, nowMs, awaits) : next;
}

function onWoken(watch, nowMs, awaits) {
  if (awaits === "nothing") return { ...watch, reconnect: true, doubtedMs: null };
  return { ...watch, doubtedMs: awaits === null ? null : nowMs };
}

function onTick(watch, nowMs, awaits) {
  if (watch.hiddenMs !== null) return watch; // timers of a hidden page are slowed down: nothing can be told from them
  const next = { ...watch, tickMs: nowMs };
  if (Math.abs(nowMs - watch.tickMs - TICK_MS) > SLEPT_MS) return onWoken({ ...next, heardMs: nowMs }, nowMs, awaits);
  if (watch.doubtedMs !== null && nowMs - watch.doubtedMs >= DOUBT_MS) return { ...next, doubtedMs: null, reconnect: awaits !== null };
  const patienceMs = Math.min(SILENT_MS * 2 ** watch.silences, MOST_SILENT_MS);
  if (awaits !== "answer" || nowMs - watch.heardMs < patienceMs) return next;
  return { ...next, heardMs: nowMs, silences: watch.silences + 1, reconnect: true };
}
