// One exchange on the page: the question, the answer as it grows, and the line beneath it with the node and
// what can be done. Knows the shape of an exchange and nothing else of the state.

import { element, renderMarkdown, setText } from "./dom.js";
import { isRunning } from "./exchange.js";

const CLAMP_CHARACTERS = 1_200;
const CLAMP_LINES = 14;
const ELAPSED_FROM_S = 5; // a shorter wait is not worth counting

/** "edge-1 · eu"; a node that is named after its region is said once. */
export function nodeLabel({ name, region }) {
  return region === "" || region === name ? name : `${name} · ${region}`;
}

export class ExchangeView {
  #exchange = null;
  #strings = null;
  #retryable = null;
  #texts = "";
  #isOpen = false;

  constructor() {
    this.questionLabel = element("h2", { class: "offscreen" });
    this.question = element("div", { class: "question", dir: "auto" });
    this.more = element("button", { type: "button", class: "link", "data-do": "more" });
    this.delivery = element("p", { class: "delivery" });
    this.answerLabel = element("h2", { class: "offscreen" });
    this.waitText = element("span");
    this.elapsed = element("span", { class: "elapsed" });
    this.bar = element("progress", { max: "100" });
    this.wait = element(
      "div",
      { class: "wait" },
      element("p", {}, element("span", { class: "pulse", "aria-hidden": "true" }), element("span", {}, this.waitText, this.elapsed)),
      this.bar,
    );
    this.answer = element("div", { class: "answer", dir: "auto" });
    this.notice = element("div", { class: "outcome" });
    this.node = element("span", { class: "node" });
    this.copy = element("button", { type: "button", class: "quiet", "data-copy": "answer" });
    this.retry = element("button", { type: "button", class: "outlined", "data-do": "retry" });
    this.below = element("div", { class: "meta" }, this.node, this.copy);
    this.reply = element("div", { class: "reply" }, this.answerLabel, this.answer, this.wait, this.notice, this.below);
    this.root = element("article", { class: "exchange" }, this.questionLabel, this.question, this.more, this.delivery, this.reply);
  }

  toggleQuestion() {
    this.#isOpen = !this.#isOpen;
    this.#clamp(this.#exchange.question);
  }

  /**
   * Show `exchange`; does nothing when nothing it shows has changed. `queuedText` and `awayText`: what a question that
   * waits to be sent, and an answer that is away, wait for.
   */
  show(exchange, { strings, retryable, queuedText, awayText }) {
    const texts = `${queuedText} ${awayText}`;
    const same = exchange === this.#exchange && strings === this.#strings;
    if (same && retryable === this.#retryable && texts === this.#texts) return;
    const previous = this.#exchange;
    Object.assign(this.root.dataset, { id: exchange.id, status: exchange.status });
    this.#exchange = exchange;
    this.#strings = strings;
    this.#retryable = retryable;
    this.#texts = texts;
    setText(this.questionLabel, strings.you);
    setText(this.answerLabel, strings.assistant);
    setText(this.retry, strings.retry);
    setText(this.copy, strings.copy);
    this.copy.setAttribute("aria-label", strings.copyAnswer);
    if (previous?.question !== exchange.question) setText(this.question, exchange.question);
    this.#clamp(exchange.question);
    this.#showDelivery(exchange, queuedText);
    this.#showAnswer(exchange);
    this.#showWait(exchange, awayText);
    this.#showOutcome(exchange);
    this.#showNode(exchange);
  }

  #clamp(question) {
    const isLong = question.length > CLAMP_CHARACTERS || question.split("\n", CLAMP_LINES + 1).length > CLAMP_LINES;
    this.more.hidden = !isLong;
    this.question.classList.toggle("clamped", isLong && !this.#isOpen);
    this.more.setAttribute("aria-expanded", String(this.#isOpen));
    setText(this.more, this.#isOpen ? this.#strings.showLess : this.#strings.showAll);
  }

  /** How long the first words have been waited for; called on every frame. */
  showElapsed(nowMs) {
    const { answer, sentAtMs, status } = this.#exchange;
    const seconds = sentAtMs === null ? 0 : Math.floor((nowMs - sentAtMs) / 1000);
    this.elapsed.hidden = this.wait.hidden || status === "away" || answer !== "" || seconds < ELAPSED_FROM_S;
    if (!this.elapsed.hidden) setText(this.elapsed, this.#strings.elapsed(seconds));
  }

  #showDelivery({ status }, queuedText) {
    const strings = this.#strings;
    const texts = { queued: queuedText, unsent: strings.unsent };
    this.delivery.hidden = !(status in texts);
    if (status in texts) this.delivery.replaceChildren(texts[status], ...(status === "unsent" ? [this.retry] : []));
  }

  #showAnswer({ status, answer }) {
    this.reply.hidden = status === "queued" || status === "unsent";
    renderMarkdown(this.answer, answer, this.#strings);
    this.answer.hidden = answer === "";
    this.copy.hidden = answer === "" || status === "streaming" || status === "stopping";
  }

  /** Why nothing is to be read yet, or no more for the moment. A node that takes over reads the conversation anew. */
  #showWait({ status, answer, progress }, awayText) {
    const strings = this.#strings;
    const isReading = progress !== null && progress < 1;
    const percent = isReading ? Math.floor(progress * 100) : 0;
    this.wait.hidden = !isRunning(this.#exchange) || (answer !== "" && status !== "away" && !isReading);
    const waitsFor = isReading ? strings.reading(percent) : strings.thinking;
    setText(this.waitText, { away: awayText, stopping: strings.stopping }[status] ?? waitsFor);
    this.bar.hidden = !isReading || status === "stopping";
    this.bar.value = percent;
    this.bar.setAttribute("aria-label", strings.readingLabel);
  }

  #showOutcome({ status, answer, error }) {
    const strings = this.#strings;
    const lines = [];
    if (error) {
      lines.push(element("strong", {}, strings.errors[error.code] ?? strings.errors.other));
      // That its id was not found adds nothing for a person.
      if (error.sentence && error.code !== "response_not_found") lines.push(element("span", {}, error.sentence));
    }
    if (status === "interrupted" && (answer !== "" || !error)) lines.unshift(element("span", { class: "mark" }, strings.interrupted));
    if (status === "stopped") lines.push(element("span", { class: "mark" }, strings.stopped));
    if (status === "incomplete") lines.push(element("span", { class: "mark" }, strings.incomplete));
    if (status === "done" && answer.trim() === "") lines.push(element("span", { class: "mark" }, strings.empty));
    const ended = ["interrupted", "failed", "stopped"].includes(status);
    const actions = [];
    if (ended && this.#retryable) actions.push(this.retry);
    if (error?.code === "context_length_exceeded") {
      actions.push(element("button", { type: "button", class: "outlined", "data-do": "new" }, strings.newConversation));
    }
    const hadFocus = this.notice.contains(document.activeElement);
    this.notice.hidden = lines.length === 0;
    this.notice.replaceChildren(element("div", {}, ...lines), ...(actions.length ? [element("div", { class: "row" }, ...actions)] : []));
    if (hadFocus) this.notice.querySelector("button")?.focus();
  }

  #showNode({ node, movedFrom, model }) {
    this.node.hidden = node === null;
    this.below.hidden = node === null && this.copy.hidden;
    if (!node) return;
    const moved = movedFrom ? `, ${this.#strings.movedFrom(movedFrom)}` : "";
    setText(this.node, nodeLabel(node) + moved);
    this.node.title = this.#strings.answeredBy(node.name, node.region) + (model ? ` (${model})` : "") + moved;
  }
}
