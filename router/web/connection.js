// One connection to the router, kept alive: asks for the models (which tells a wrong key from a dead server; a
// failed WebSocket handshake cannot), opens the socket, and comes back with backoff when it is lost.
// Everything it touches is injected, so that tests can lead it. Knows nothing of conversations.

import { attemptAfter, backoffMs, mayReconnect } from "./backoff.js";
import { subprotocols } from "./wire.js";

const OPEN_TIMEOUT_MS = 10_000;
const MODELS_AGAIN_MS = 2_000;

export class Connection {
  #world;
  #on;
  #key = null;
  #attempt = 0;
  #timer = null;
  #socket = null;
  #openedAtMs = null;
  #generation = 0; // what comes from an earlier attempt is dropped

  /**
   * `world`: { origin, fetch, WebSocket, now, random, setTimeout, clearTimeout }.
   * `on`: { phase({phase, retryAtMs, reason, isRetry}), refusedKey(), models(names), frame(text) }.
   */
  constructor(world, on) {
    this.#world = world;
    this.#on = on;
  }

  /** Connect with `key`, at once, whatever was under way before. */
  start(key) {
    this.#key = key;
    this.#attempt = 0;
    this.tryNow();
  }

  /** Connect at once, whatever was under way. What replaces an open connection is not told as a retry: nothing is wrong yet. */
  tryNow() {
    const isRetry = this.#attempt > 0 && this.#openedAtMs === null;
    this.#drop();
    const generation = this.#generation;
    this.#say("connecting", { isRetry });
    this.#guard(generation, this.#connect(generation));
  }

  /** Let go of the connection and ask for a key. */
  askForKey() {
    this.#drop();
    this.#say("key");
  }

  /** Send `message`; false when there is no open socket. */
  send(message) {
    if (this.#socket?.readyState !== this.#world.WebSocket.OPEN) return false;
    this.#socket.send(JSON.stringify(message));
    return true;
  }

  async #connect(generation) {
    const models = await this.#askModels(generation);
    if (generation !== this.#generation) return;
    this.#open(generation, models.length === 0);
  }

  async #askModels(generation) {
    const { fetch, origin } = this.#world;
    const response = await fetch(`${origin}/v1/models`, {
      headers: { Authorization: `Bearer ${this.#key}` },
      cache: "no-store",
      signal: AbortSignal.timeout(OPEN_TIMEOUT_MS),
    });
    if (generation !== this.#generation) return [];
    if (response.status === 401 || response.status === 403) {
      this.#on.refusedKey();
      this.askForKey();
      return [];
    }
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    const models = (await response.json()).data.map((model) => model.id);
    if (generation === this.#generation) this.#on.models(models);
    return models;
  }

  /** Until a node serves something there is nothing to send to: ask again, on the same connection. */
  async #awaitModels(generation) {
    const models = await this.#askModels(generation);
    if (generation !== this.#generation || models.length > 0) return;
    this.#timer = this.#world.setTimeout(() => this.#guard(generation, this.#awaitModels(generation)), MODELS_AGAIN_MS);
  }

  #guard(generation, promise) {
    promise.catch((error) => this.#lost(generation, String(error?.message ?? error)));
  }

  #open(generation, lacksModels) {
    const { WebSocket, origin, setTimeout, clearTimeout, now } = this.#world;
    const socket = new WebSocket(`${origin.replace(/^http/, "ws")}/v1/responses`, subprotocols(this.#key));
    this.#socket = socket;
    this.#timer = setTimeout(() => this.#lost(generation, ""), OPEN_TIMEOUT_MS);
    const current = () => generation === this.#generation;
    socket.onopen = () => {
      if (!current()) return;
      clearTimeout(this.#timer);
      this.#openedAtMs = now();
      this.#say("open");
      if (lacksModels) this.#guard(generation, this.#awaitModels(generation));
    };
    socket.onmessage = ({ data }) => {
      if (current() && typeof data === "string") this.#on.frame(data);
    };
    socket.onclose = ({ code, reason }) => {
      if (!current()) return;
      if (mayReconnect(code)) {
        this.#lost(generation, reason);
      } else {
        this.#drop();
        this.#say("closed", { reason });
      }
    };
  }

  #lost(generation, reason) {
    if (generation !== this.#generation) return;
    const { now, random, setTimeout } = this.#world;
    const livedMs = this.#openedAtMs === null ? 0 : now() - this.#openedAtMs;
    const attempt = attemptAfter(this.#attempt, livedMs);
    const waitMs = backoffMs(attempt, random());
    this.#attempt = attempt + 1;
    this.#drop();
    this.#timer = setTimeout(() => this.tryNow(), waitMs);
    this.#say("waiting", { retryAtMs: now() + waitMs, reason, isRetry: true });
  }

  #drop() {
    this.#generation += 1;
    this.#world.clearTimeout(this.#timer);
    this.#timer = null;
    this.#openedAtMs = null;
    const socket = this.#socket;
    this.#socket = null;
    if (socket) socket.close();
  }

  #say(phase, { retryAtMs = null, reason = "", isRetry = false } = {}) {
    this.#on.phase({ phase, retryAtMs, reason, isRetry });
  }
}
