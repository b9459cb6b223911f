// State -> page, at most once per animation frame. Reads the state, never changes it; what a person does
// goes to `actions`. Knows no socket and no storage.

import { element, setText } from "./dom.js";
import { ExchangeView, nodeLabel } from "./exchange_view.js";
import { isRunning } from "./exchange.js";
import { canRetry, canStop, MAX_QUESTION_CHARACTERS } from "./state.js";
import { STRINGS } from "./strings.js";

const COUNT_FROM_CHARACTERS = 2_000;
const AT_BOTTOM_PX = 24;

export class View {
  #views = new Map(); // exchange id -> ExchangeView
  #shown = { strings: null, models: null, phase: null };
  #finished = null; // what has been announced already: Map id -> whether it had ended
  #isAtBottom = true;

  constructor(keyProblem) {
    for (const id of PARTS) this[id.replace(/-./g, (part) => part[1].toUpperCase())] = document.getElementById(id);
    this.keyProblemText = keyProblem;
    this.scroller.addEventListener("scroll", () => this.#onScroll(), { passive: true });
    new ResizeObserver(() => this.#followBottom()).observe(this.scroller);
    document.addEventListener("themechange", () => this.#labelTheme());
  }

  viewOf(id) {
    return this.#views.get(id);
  }

  render(state, nowMs) {
    const strings = STRINGS[state.language];
    if (strings !== this.#shown.strings) this.#translate(strings);
    this.#shown.strings = strings;
    this.#renderConnection(state, strings, nowMs);
    this.#renderExchanges(state, strings, nowMs);
    this.#renderModels(state);
    this.renderComposer(state);
    this.#announce(state, strings);
    this.#followBottom();
  }

  /** The parts that depend on what is typed; called on every key, so it is cheap. */
  renderComposer(state) {
    const strings = STRINGS[state.language];
    const length = this.question.value.length;
    const isTooLong = length > MAX_QUESTION_CHARACTERS;
    this.count.hidden = length < COUNT_FROM_CHARACTERS;
    this.count.classList.toggle("problem", isTooLong);
    setText(this.count, (isTooLong ? strings.tooLong : strings.characters)(length, MAX_QUESTION_CHARACTERS));
    this.stop.hidden = !canStop(state);
    this.send.hidden = !this.stop.hidden && length === 0;
    this.send.disabled = isTooLong || this.question.value.trim() === "" || state.connection.phase === "key";
    // Measured without its own height, so that it shrinks too; CSS sets the limit.
    this.question.style.height = "auto";
    this.question.style.height = `${this.question.scrollHeight}px`;
  }

  toBottom() {
    this.#isAtBottom = true;
    this.#followBottom();
    this.jump.hidden = true;
  }

  /** Say `text` to a screen reader, once. */
  say(text) {
    this.announcer.replaceChildren(element("p", {}, text));
  }

  #translate(strings) {
    document.documentElement.lang = strings.language;
    for (const node of document.querySelectorAll("[data-text]")) setText(node, strings[node.dataset.text]);
    for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", strings[node.dataset.label]);
    this.question.placeholder = strings.placeholder;
    setText(this.language, strings.switchLanguage);
    this.language.setAttribute("aria-label", strings.switchLanguageLabel);
    this.language.lang = strings === STRINGS.en ? STRINGS.zh.language : STRINGS.en.language;
    for (const [button, label] of [[this.new, strings.newConversation], [this.stop, strings.stop], [this.send, strings.send]]) {
      button.setAttribute("aria-label", label);
      button.title = label;
    }
    this.examples.replaceChildren(
      ...strings.examples.map((text) => element("li", {}, element("button", { type: "button", "data-example": text }, text))),
    );
    this.#shown.strings = strings;
    this.#labelTheme();
  }

  #labelTheme() {
    const strings = this.#shown.strings;
    if (!strings) return;
    const label = document.documentElement.dataset.theme === "dark" ? strings.useLight : strings.useDark;
    this.theme.setAttribute("aria-label", label);
    this.theme.title = label;
  }

  #renderConnection({ connection, exchanges }, strings, nowMs) {
    const { phase, retryAtMs, reason, isRetry } = connection;
    this.status.dataset.phase = phase;
    setText(this.phase, strings.phase[phase]);
    const node = exchanges.findLast((exchange) => exchange.node)?.node;
    this.node.hidden = !node;
    if (node) {
      setText(this.node, nodeLabel(node));
      this.node.title = strings.answeredBy(node.name, node.region);
    }
    const isTrying = phase === "waiting" || (phase === "connecting" && isRetry);
    this.notice.hidden = !isTrying && phase !== "closed";
    if (isTrying) {
      const seconds = phase === "waiting" ? Math.max(0, Math.ceil((retryAtMs - nowMs) / 1000)) : 0;
      setText(this.noticeText, `${strings.waiting(seconds)} ${strings.waitingKept}`);
    } else if (phase === "closed") {
      setText(this.noticeText, strings.closed(reason));
    }
    setText(this.tryNow, phase === "closed" ? strings.connectAgain : strings.tryNow);
    this.#renderKeyForm(phase, strings);
    this.#sayPhase(phase, strings);
  }

  #renderKeyForm(phase, strings) {
    const wasHidden = this.keyForm.hidden;
    this.keyForm.hidden = phase !== "key";
    this.changeKey.hidden = phase === "key";
    const problem = this.keyProblemText();
    setText(this.keyProblem, problem ? strings[problem] : "");
    if (wasHidden && phase === "key") this.key.focus();
  }

  /** Only losing and regaining a connection is worth a sentence, not each attempt. */
  #sayPhase(phase, strings) {
    const before = this.#shown.phase;
    if (phase === "connecting" || phase === before) return;
    this.#shown.phase = phase;
    if (phase === "waiting") this.say(strings.connectionLost);
    if (phase === "closed") this.say(strings.phase.closed);
    if (phase === "open" && before !== null && before !== "key") this.say(strings.connectionBack);
  }

  #renderExchanges(state, strings, nowMs) {
    const { phase } = state.connection;
    const queuedText = phase !== "open" ? strings.queuedOffline : state.model !== null ? strings.queued : strings.queuedNoModel;
    const awayText = phase === "open" || phase === "connecting" ? strings.pickingUp : strings.pickUpLater;
    const ids = new Set(state.exchanges.map((exchange) => exchange.id));
    for (const [id, view] of this.#views) {
      if (ids.has(id)) continue;
      view.root.remove();
      this.#views.delete(id);
    }
    state.exchanges.forEach((exchange, index) => {
      let view = this.#views.get(exchange.id);
      if (!view) this.#views.set(exchange.id, (view = new ExchangeView()));
      if (this.conversation.children[index] !== view.root) {
        this.conversation.insertBefore(view.root, this.conversation.children[index] ?? null);
      }
      view.show(exchange, { strings, retryable: canRetry(state, exchange), queuedText, awayText });
      view.showElapsed(nowMs);
    });
    this.welcome.hidden = state.exchanges.length > 0 || state.connection.phase === "key";
  }

  #renderModels({ models, model }) {
    if (models !== this.#shown.models) {
      this.model.replaceChildren(...models.map((name) => element("option", { value: name }, name)));
      this.#shown.models = models;
    }
    this.model.hidden = models.length < 2;
    this.modelName.hidden = models.length !== 1;
    setText(this.modelName, models.length === 1 ? models[0] : "");
    if (model !== null) this.model.value = model;
  }

  #announce({ exchanges }, strings) {
    const isFinished = (exchange) => exchange.status !== "queued" && !isRunning(exchange);
    const previous = this.#finished;
    this.#finished = new Map(exchanges.map((exchange) => [exchange.id, isFinished(exchange)]));
    if (previous === null) return;
    for (const exchange of exchanges) {
      if (previous.get(exchange.id) !== false || !isFinished(exchange)) continue;
      this.say(announcement(exchange, strings));
    }
  }

  #onScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.#isAtBottom = scrollHeight - scrollTop - clientHeight <= AT_BOTTOM_PX;
    if (this.#isAtBottom) this.jump.hidden = true;
    else this.#offerJump();
  }

  #followBottom() {
    if (this.#isAtBottom) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.#offerJump();
  }

  #offerJump() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.jump.hidden = scrollHeight - scrollTop - clientHeight <= AT_BOTTOM_PX;
  }
}

const PARTS = [
  ...["announcer", "change-key", "composer", "conversation", "count", "examples", "jump", "key", "key-form", "key-problem"],
  ...["language", "model", "model-name", "new", "node", "notice", "notice-text", "phase", "question", "scroller", "send"],
  ...["status", "stop", "theme", "try-now", "welcome"],
];

function announcement(exchange, strings) {
  const outcome = {
    unsent: strings.unsent,
    stopped: strings.stopped,
    incomplete: strings.incomplete,
    interrupted: strings.interrupted,
  }[exchange.status];
  const error = exchange.error ? (strings.errors[exchange.error.code] ?? strings.errors.other) : null;
  const answer = exchange.answer === "" ? null : strings.finished(exchange.answer);
  return [answer, error, exchange.error?.sentence, outcome].filter(Boolean).join(" ") || strings.empty;
}
