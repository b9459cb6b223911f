// Puts the page together: the state, the connection, the view, the storage, and what a person does.
// The only module with side effects at load time; it decides nothing that state.js could decide.

import { Connection } from "./connection.js";
import { copyText, setText } from "./dom.js";
import { View } from "./render.js";
import { Returning } from "./returning.js";
import { awaits, canStop, initialState, MAX_QUESTION_CHARACTERS, nextSend, reduce, running } from "./state.js";
import { readConversation, readPreference, writeConversation, writePreference } from "./storage.js";
import { chooseLanguage, STRINGS } from "./strings.js";
import { isUsableKey, readFrame } from "./wire.js";

const SAVE_AFTER_MS = 500;
const REDRAW_MS = 250; // of what counts seconds
const COPIED_FOR_MS = 2_000;
const LOOPBACK = /^(localhost|127(\.\d+){3}|\[::1\])$/;

let state = initialState({
  language: chooseLanguage(readPreference("language"), navigator.languages ?? [navigator.language]),
  exchanges: readConversation(),
  model: readPreference("model"),
});
let keyProblem = null; // a name in strings.js
let keyTried = null; // the key in use; kept once the server has accepted it
let isKeyGiven = readPreference("key") !== null;
let isFrameAsked = false;
let saveTimer = null;

const view = new View(() => keyProblem);
const world = {
  origin: location.origin,
  fetch: (...args) => fetch(...args),
  WebSocket,
  now: () => Date.now(),
  random: () => Math.random(),
  setTimeout: (...args) => setTimeout(...args),
  clearTimeout: (timer) => clearTimeout(timer),
  setInterval: (...args) => setInterval(...args),
};
const connection = new Connection(world, {
  phase: onPhase,
  refusedKey: onRefusedKey,
  models: (models) => dispatch({ type: "models", models }),
  frame: (text) => {
    returning.on("heard");
    onServer(readFrame(text));
  },
});
const returning = new Returning(world, () => connection.tryNow());

function dispatch(event) {
  const before = state;
  state = reduce(state, event);
  if (state === before) return;
  for (let next = nextSend(state, Date.now()); next && connection.send(next.message); next = nextSend(state, Date.now())) {
    state = reduce(state, next.event);
  }
  returning.look(awaits(state), running(state));
  if (state.isStale) connection.tryNow();
  if (state.exchanges !== before.exchanges) saveSoon();
  askFrame();
}

function onServer(event) {
  if (event === null) return;
  if (event.type === "refused" && event.error.code === "websocket_connection_limit_reached") {
    connection.tryNow(); // an hour is over; nothing is wrong
    return;
  }
  dispatch({ type: "server", event });
}

function onPhase(change) {
  if (change.phase === "open") {
    writePreference("key", keyTried);
    keyProblem = null;
  }
  dispatch({ type: "connection", connection: change });
}

function onRefusedKey() {
  // Where nobody has given a key yet, `dev` was tried; that it is refused is no mistake of the person's.
  keyProblem = isKeyGiven ? "keyWrong" : null;
}

function connect(key) {
  keyTried = key;
  connection.start(key);
}

function askFrame() {
  if (isFrameAsked) return;
  isFrameAsked = true;
  // A hidden tab gets no frames: it is drawn once it is seen again, and nothing piles up.
  requestAnimationFrame(() => {
    isFrameAsked = false;
    view.render(state, Date.now());
    if (state.connection.phase === "waiting" || running(state)?.answer === "") setTimeout(askFrame, REDRAW_MS);
  });
}

function saveSoon() {
  saveTimer ??= setTimeout(save, SAVE_AFTER_MS);
}

function save() {
  clearTimeout(saveTimer);
  saveTimer = null;
  writeConversation(state.exchanges);
}

function ask(text) {
  if (text.trim() === "" || text.length > MAX_QUESTION_CHARACTERS || state.connection.phase === "key") return;
  dispatch({ type: "asked", question: text });
  view.question.value = "";
  view.question.focus();
  view.toBottom();
}

function stop() {
  // Pressed twice, the server does not react: a new connection ends the matter.
  if (running(state)?.status === "stopping") connection.tryNow();
  else dispatch({ type: "stop" });
  view.question.focus();
}

function newConversation() {
  dispatch({ type: "new_conversation" });
  view.toBottom();
  view.question.focus();
}

function retry(id) {
  if (state.connection.phase === "closed") connection.tryNow();
  dispatch({ type: "retry", id });
  view.toBottom();
  view.question.focus();
}

async function copy(button) {
  const article = button.closest("article");
  const isCode = button.dataset.copy === "code";
  const exchange = state.exchanges.find((candidate) => candidate.id === Number(article.dataset.id));
  const text = isCode ? button.closest(".code").querySelector("code").textContent : exchange.answer;
  const strings = STRINGS[state.language];
  const said = (await copyText(text)) ? strings.copied : strings.copyFailed;
  setText(button, said);
  view.say(said);
  setTimeout(() => setText(button, STRINGS[state.language].copy), COPIED_FOR_MS);
}

function listen() {
  view.composer.addEventListener("submit", (event) => {
    event.preventDefault();
    ask(view.question.value);
  });
  view.question.addEventListener("input", () => view.renderComposer(state));
  view.question.addEventListener("keydown", (event) => {
    // Inside an input method Enter chooses a candidate; 229 is how Safari says so after the composition's end.
    const composes = event.isComposing || event.keyCode === 229;
    if (event.key !== "Enter" || event.shiftKey || composes) return;
    event.preventDefault();
    ask(view.question.value);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing && canStop(state)) stop();
  });
  view.stop.addEventListener("click", stop);
  view.new.addEventListener("click", newConversation);
  view.jump.addEventListener("click", () => {
    view.toBottom();
    view.question.focus();
  });
  view.tryNow.addEventListener("click", () => {
    connection.tryNow();
    view.question.focus();
  });
  view.examples.addEventListener("click", ({ target }) => {
    if (target.dataset.example) ask(target.dataset.example);
  });
  view.conversation.addEventListener("click", ({ target }) => {
    const id = Number(target.closest("article")?.dataset.id);
    if (target.dataset.copy) copy(target);
    else if (target.dataset.do === "retry") retry(id);
    else if (target.dataset.do === "new") newConversation();
    else if (target.dataset.do === "more") view.viewOf(id).toggleQuestion();
  });
}

function listenSettings() {
  view.theme.addEventListener("click", () => document.dispatchEvent(new Event("toggletheme")));
  view.language.addEventListener("click", () => {
    const language = state.language === "en" ? "zh" : "en";
    writePreference("language", language);
    dispatch({ type: "language_chosen", language });
  });
  view.model.addEventListener("change", () => {
    writePreference("model", view.model.value);
    dispatch({ type: "model_chosen", model: view.model.value });
    view.question.focus();
  });
  view.changeKey.addEventListener("click", () => {
    keyProblem = null;
    connection.askForKey();
  });
  view.keyForm.addEventListener("submit", (event) => {
    event.preventDefault();
    const key = view.key.value.trim();
    keyProblem = isUsableKey(key) ? null : "keyMalformed";
    askFrame();
    if (keyProblem) return;
    isKeyGiven = true;
    view.key.value = "";
    connect(key);
    view.question.focus();
  });
}

function listenWorld() {
  const onWoken = (type) => {
    if (state.connection.phase === "waiting") connection.tryNow();
    else returning.on(type);
  };
  const onVisibility = () => {
    if (document.visibilityState === "visible") return onWoken("shown");
    returning.on("hidden");
    save();
  };
  addEventListener("online", () => onWoken("online"));
  document.addEventListener("visibilitychange", onVisibility);
  addEventListener("pagehide", save);
  // Out of the back-forward cache, where sockets do not live.
  addEventListener("pageshow", ({ persisted }) => persisted && state.connection.phase !== "key" && connection.tryNow());
  if (document.visibilityState !== "visible") returning.on("hidden");
}

listen();
listenSettings();
listenWorld();
const storedKey = readPreference("key") ?? (LOOPBACK.test(location.hostname) ? "dev" : null);
if (storedKey !== null && isUsableKey(storedKey)) connect(storedKey);
else connection.askForKey();
askFrame();
if (matchMedia("(pointer: fine)").matches && state.connection.phase !== "key") view.question.focus();
