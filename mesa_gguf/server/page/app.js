// The page: what belongs together is put together here.
import { LostError, connection, keys, models } from "./api.js";
import { Conversation } from "./conversation.js";
import { Documents } from "./documents.js";
import { announce, ask, byId, h, icon } from "./dom.js";
import { History } from "./history.js";
import { Source } from "./source.js";

const THEMES = { system: "the system's", light: "light", dark: "dark" };
const DRAFT = "mesa-draft";
const WATCH = 10000; // ms between looks at whether the server is there

const question = byId("question");
const reads = () => [...document.querySelectorAll("input[name=read]")];

const source = new Source();
const documents = new Documents({
  changed: drawScope,
  open: (file) => openPassage({ file_id: file.id, filename: file.filename, start: 0, stop: 0 }),
});
const history = new History({ removed: (id) => id === conversation.id && begin() });
const conversation = new Conversation({
  opened: ({ id, title }) => {
    if (location.hash !== `#${id}`) window.history.pushState(null, "", `#${id}`);
    name(id, title);
  },
  keep: (id, kept) => history.keep(id, kept),
  busy: drawBusy,
  open: openPassage,
  describe: (scope) => documents.describe(scope),
});

function openPassage(passage) {
  const file = documents.files.get(passage.file_id);
  source.open({ ...passage, kind: file?.mesa?.kind, has_content: file?.mesa?.has_content });
}

//
// asking
//

function drawScope() {
  const { scope } = documents;
  byId("scope").textContent = scope ? `Asks ${documents.describe(scope)}` : "No document: asks the model alone";
  document.querySelector(".reads").hidden = !scope;
  question.placeholder = scope ? "Ask about your documents" : "Ask";
}

function drawBusy() {
  const { isBusy } = conversation;
  // the focus would be lost with the button that goes
  const focused = document.activeElement === byId("send") || document.activeElement === byId("stop");
  byId("send").hidden = isBusy;
  byId("stop").hidden = !isBusy;
  if (focused) (isBusy ? byId("stop") : question).focus();
}

function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function draft(text) {
  try {
    if (text) sessionStorage.setItem(DRAFT, text);
    else sessionStorage.removeItem(DRAFT);
  } catch {
    // storage is switched off
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || conversation.isBusy) return;
  if (!connection.there) return announce("The server does not answer. Your question is kept here.");
  question.value = "";
  draft("");
  fit();
  const read = reads().find((radio) => radio.checked).value;
  conversation.ask(text, documents.scope, read);
});
question.addEventListener("input", () => {
  fit();
  draft(question.value);
});
question.addEventListener("keydown", (event) => {
  // not while an input method composes a character
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
byId("stop").onclick = () => conversation.stop();

addEventListener("keydown", (event) => {
  if (byId("dialog").open) return;
  const typing = event.target instanceof Element && event.target.matches("input:not([type=checkbox], [type=radio]), textarea, select");
  if (event.key === "Escape") {
    if (document.body.classList.contains("drawn")) drawer(false);
    else if (conversation.isBusy) conversation.stop();
    else if (source.isOpen) source.close();
  } else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    question.focus();
  }
});

//
// conversations
//

/** Say which conversation is open. */
function name(id, title) {
  history.mark(id);
  byId("title").textContent = title || "Ask your documents";
  document.title = title ? `${title} · Mesa` : "Mesa";
}

function begin() {
  conversation.stop();
  conversation.reset();
  window.history.replaceState(null, "", location.pathname);
  name(null, "");
  drawBusy();
  question.focus();
}

async function openConversation(id) {
  if (!/^[\w-]{1,64}$/.test(id) || (id === conversation.id && conversation.turns.length)) return;
  let kept;
  try {
    kept = await history.get(id);
  } catch (error) {
    if (!(error instanceof LostError)) announce(error.message);
    return;
  }
  if (location.hash !== `#${id}`) return; // another one was chosen meanwhile
  if (!kept) return begin();
  conversation.stop();
  conversation.load(id, kept);
  const last = kept.turns.at(-1);
  if (last?.scope) documents.choose(last.scope);
  name(id, kept.title);
  drawBusy();
  if (matchMedia("(max-width: 52rem)").matches) drawer(false);
}

addEventListener("hashchange", () => (location.hash ? openConversation(location.hash.slice(1)) : begin()));
byId("new-conversation").onclick = () => {
  begin();
  drawer(false);
};

//
// the drawer, on narrow windows
//

function drawer(open) {
  document.body.classList.toggle("drawn", open);
  byId("open-drawer").setAttribute("aria-expanded", String(open));
  byId("main").inert = open;
  if (open) byId("close-drawer").focus();
  else if (byId("drawer").contains(document.activeElement)) (byId("open-drawer").offsetParent ? byId("open-drawer") : question).focus();
}

byId("open-drawer").onclick = () => drawer(true);
byId("close-drawer").onclick = () => drawer(false);
matchMedia("(max-width: 52rem)").addEventListener("change", () => drawer(false));

//
// light and dark
//

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("mesa-theme", theme);
  } catch {
    // storage is switched off
  }
  const button = byId("theme");
  button.replaceChildren(icon({ system: "system", light: "sun", dark: "moon" }[theme]));
  button.setAttribute("aria-label", `Colours: ${THEMES[theme]}. Change them`);
  button.title = `Colours: ${THEMES[theme]}`;
}

byId("theme").onclick = () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % names.length];
  setTheme(next);
  announce(`Colours: ${THEMES[next]}`);
};

//
// the server: lost, found, locked
//

connection.listeners.push((there) => {
  const banner = byId("banner");
  banner.hidden = there;
  banner.replaceChildren(
    icon("warn"),
    h("span", {}, h("strong", {}, "The server does not answer. "), "Looking for it again and again. Nothing that you see here is lost."),
  );
  announce(there ? "The server is back" : "The server does not answer. Looking for it again and again.");
  if (there) start();
});

keys.ask = async (wrong) =>
  ask("API key", {
    text: wrong ? "That key is not the one." : "This server wants a key. It is kept until this tab is closed.",
    field: { label: "Key", type: "password" },
    yes: "Enter",
  });

setInterval(() => {
  if (connection.there && !document.hidden) fetch("health", { cache: "no-store", signal: AbortSignal.timeout(8000) }).catch(() => connection.lost());
}, WATCH);

async function start() {
  try {
    await history.flush();
    await Promise.all([documents.refresh(), history.refresh()]);
    documents.send();
    if (location.hash) await openConversation(location.hash.slice(1));
    const [model] = await models();
    byId("served-by").textContent = model ? `Answered by ${model.id}, on this server` : "";
  } catch (error) {
    if (error instanceof LostError) return;
    announce(error.message);
    console.error(error);
  }
}

setTheme(document.documentElement.dataset.theme ?? "system");
try {
  question.value = sessionStorage.getItem(DRAFT) ?? "";
} catch {
  // storage is switched off
}
fit();
drawScope();
question.focus();
start();
