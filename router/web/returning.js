// Brings a running answer back: makes a fresh connection where one looks open but is not (watch.js says when), and
// after a refusal once its wait is over (resume.js says how long). Clock, randomness and timers are injected.
// Knows neither the page nor what is said on the connection.

import { resumeWaitMs } from "./resume.js";
import { initialWatch, step, TICK_MS } from "./watch.js";

export class Returning {
  #world;
  #freshConnection;
  #watch;
  #awaits = null; // see watch.js
  #pickup = null; // see resume.js: whose wait runs, if it was refused
  #timer = null;

  /** `world`: { now, random, setTimeout, clearTimeout, setInterval }. `freshConnection()` replaces the present one. */
  constructor(world, freshConnection) {
    this.#world = world;
    this.#freshConnection = freshConnection;
    this.#watch = initialWatch(world.now());
    world.setInterval(() => this.on("tick"), TICK_MS);
  }

  /** After every change of the state: what the server owes us, and the running exchange, if any. */
  look(awaits, exchange) {
    if (this.#awaits === null && awaits !== null) this.on("opened");
    this.#awaits = awaits;
    const pickup = exchange?.pickup ?? null;
    if (pickup === this.#pickup) return;
    this.#pickup = pickup;
    this.#world.clearTimeout(this.#timer);
    if (pickup?.phase !== "refused") return;
    const waitMs = resumeWaitMs(exchange.refusals, pickup.retryAfterMs, this.#world.random());
    this.#timer = this.#world.setTimeout(this.#freshConnection, waitMs);
  }

  /** `type`: an event of watch.js. */
  on(type) {
    this.#watch = step(this.#watch, { type, nowMs: this.#world.now(), awaits: this.#awaits });
    if (this.#watch.reconnect) this.#freshConnection();
  }
}
