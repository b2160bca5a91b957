// One conversation: questions, answers as they come, and where they stand.
import { ApiError, LostError, chat } from "./api.js";
import { announce, byId, count, h, icon, iconButton, plural } from "./dom.js";
import { markdown } from "./markdown.js";
import { where } from "./source.js";

export class Conversation {
  /**
   * @param {{opened: (conversation: Conversation) => void, keep: (id: string, kept: object) => void, busy: () => void, open: (passage: object) => void,
   *   describe: (scope: object) => string}} page
   */
  constructor(page) {
    this.page = page;
    this.thread = byId("thread");
    this.list = byId("turns");
    this.work = null; // of the answer that is being written
    this.reset();
    // what is new is kept in view while the reader is at the end
    this.thread.addEventListener("scroll", () => this.showToEnd(), { passive: true });
    byId("to-end").onclick = () => {
      this.toEnd();
      byId("question").focus();
    };
  }

  reset() {
    this.id = newId();
    this.title = "";
    this.turns = []; // {question, scope, about, read, answer: null | {text, citations, said, mode, partly, stands, ending, error}}
    this.drawAll();
  }

  /** Take up a conversation that was kept. */
  load(id, kept) {
    this.id = id;
    this.title = kept.title;
    this.turns = kept.turns;
    // one that the page was closed upon
    for (const { answer } of this.turns) if (answer && answer.ending === null) answer.ending = "lost";
    this.drawAll();
    this.toEnd();
  }

  get isBusy() {
    return this.work !== null;
  }

  ask(question, scope, read) {
    const turn = { question, scope, about: scope ? this.page.describe(scope) : "", read, answer: null };
    if (!this.turns.length) this.title = question.replace(/\s+/g, " ").slice(0, 120);
    this.turns.push(turn);
    this.drawAll();
    return this.answer(turn);
  }

  /** Answer the last question again. */
  retry(read) {
    const turn = this.turns.at(-1);
    if (!turn || this.isBusy) return;
    turn.read = read ?? turn.read;
    byId("question").focus(); // the button goes
    return this.answer(turn);
  }

  stop() {
    this.work?.abort();
  }

  async answer(turn) {
    const work = (this.work = new AbortController());
    const { id, title, turns } = this; // another conversation may be opened meanwhile
    const keep = () => this.page.keep(id, { version: 1, title, turns });
    const answer = { text: "", citations: [], said: null, mode: null, partly: false, stands: true, ending: null, error: null };
    turn.answer = answer;
    this.progress = null;
    this.drawLast();
    this.toEnd();
    this.page.busy();
    this.page.opened(this);
    keep();
    announce("Answering");
    let frame = null;
    const soon = () => (frame ??= requestAnimationFrame(() => ((frame = null), this.drawWriting(turn))));
    try {
      for await (const event of chat(this.request(turn), work.signal)) {
        if (event.progress) this.progress = event.progress;
        if (event.piece) {
          answer.text += event.piece;
          this.progress = null;
        }
        if (event.finish) {
          answer.ending = event.finish;
          answer.citations = event.annotations;
          const { read, said, stands } = event.mesa ?? {};
          answer.said = said ?? null;
          answer.mode = read?.mode ?? null;
          answer.partly = Boolean(read && read.chunks < read.of_chunks);
          answer.notes = read?.notes ?? [];
          answer.stands = stands ?? true;
        }
        soon();
      }
    } catch (error) {
      if (error.name === "AbortError") answer.ending = "stopped";
      else if (error instanceof LostError) answer.ending = "lost";
      else {
        answer.ending = "error";
        answer.error = error instanceof ApiError ? error.message : "something went wrong in this page";
        if (!(error instanceof ApiError)) console.error(error);
      }
    }
    if (frame !== null) cancelAnimationFrame(frame);
    this.progress = null;
    if (this.work === work) this.work = null;
    if (this.turns === turns) {
      this.drawLast();
      announce(spoken(answer));
    }
    this.page.busy();
    keep();
  }

  request(turn) {
    const messages = [];
    for (const { question, answer } of this.turns) {
      messages.push({ role: "user", content: question });
      if (answer === turn.answer) break;
      if (answer?.text) messages.push({ role: "assistant", content: answer.text });
      else messages.pop(); // it was never answered
    }
    const json = { model: "mesa", messages, progress: true };
    if (turn.scope?.collection) json.collection = turn.scope.collection;
    else if (turn.scope) json.documents = turn.scope.files;
    if (turn.scope) json.read = turn.read;
    return json;
  }

  //
  // drawing
  //

  drawAll() {
    byId("welcome").hidden = this.turns.length > 0;
    this.list.hidden = this.turns.length === 0;
    this.list.replaceChildren(...this.turns.map((turn) => this.drawTurn(turn)));
    this.showToEnd();
  }

  drawLast() {
    const turn = this.turns.at(-1);
    const stay = this.isAtEnd;
    this.list.lastChild?.replaceWith(this.drawTurn(turn));
    if (stay) this.toEnd();
  }

  drawTurn(turn) {
    const { answer } = turn;
    const isLast = turn === this.turns.at(-1);
    const writing = isLast && answer !== null && answer.ending === null;
    const element = h(
      "li.turn",
      {},
      h("div.question", {}, h("h2", {}, turn.question), turn.about ? h("p.faint", {}, `of ${turn.about}`) : null),
    );
    if (!answer) return element;
    const body = h("div.answer-text", writing ? { "aria-busy": "true" } : {});
    const part = h("div.answer", {}, h("h3.hidden", {}, "Answer"), body);
    element.append(part);
    if (writing) {
      this.body = body;
      this.drawWriting(turn);
      return element;
    }
    body.append(...markdown(answer.text));
    if (answer.citations.length) this.addNumbers(body, answer.citations);
    part.append(...this.below(turn, isLast));
    return element;
  }

  drawWriting(turn) {
    if (!this.body?.isConnected && this.body?.parentNode === null) return;
    const stay = this.isAtEnd;
    const { text } = turn.answer;
    if (text) {
      this.body.replaceChildren(...markdown(text));
      (this.body.lastElementChild ?? this.body).append(h("span.caret", { "aria-hidden": "true" }));
    } else {
      const { state, tokens_read: done, tokens } = this.progress ?? {};
      const reading = state === "reading" && tokens > 0;
      this.body.replaceChildren(
        h(
          "p.waiting",
          {},
          h("span.dots", { "aria-hidden": "true" }, h("span"), h("span"), h("span")),
          reading ? `reading, ${count(done)} of ${plural(tokens, "token")}` : state === "waiting" ? "waiting for the model" : "thinking",
        ),
      );
    }
    if (stay) this.toEnd();
  }

  /** Citations as numbers behind the answer. */
  addNumbers(body, citations) {
    const last = body.lastElementChild ?? body.appendChild(h("p"));
    const into = last.matches("ul, ol") ? (last.lastElementChild ?? last) : last.matches("p") ? last : body.appendChild(h("p"));
    into.append(
      " ",
      h(
        "span.numbers",
        {},
        ...citations.map((citation, n) =>
          h(
            "button.number",
            {
              type: "button",
              "aria-label": `Passage ${n + 1}: ${citation.filename}${where(citation) ? `, ${where(citation)}` : ""}`,
              title: citation.quote,
              onclick: () => this.page.open(citation),
            },
            String(n + 1),
          ),
        ),
      ),
    );
  }

  below(turn, isLast) {
    const { answer } = turn;
    const parts = [];
    const trouble = {
      stopped: answer.text ? "Stopped before its end." : "Stopped before it began.",
      lost: "The connection was lost before the end.",
      length: "The answer was cut at its longest.",
      error: answer.error,
    }[answer.ending];
    if (trouble) parts.push(h(`p.trouble${answer.ending === "stopped" ? ".calm" : ""}`, {}, icon("warn"), " ", trouble));
    if (!answer.stands) {
      parts.push(
        h(
          "p.caution",
          { role: "note" },
          icon("warn"),
          h("span", {}, h("strong", {}, "Not in the passages. "), "Most words of this answer do not occur in what was read for it. Check it before you rely on it."),
        ),
      );
    }
    if (answer.citations.length) {
      parts.push(
        h(
          "details.passages",
          { open: isLast },
          h("summary", {}, icon("down"), plural(answer.citations.length, "likely passage")),
          h("ol", {}, ...answer.citations.map((citation, n) => this.passage(citation, n, turn))),
        ),
      );
    }
    for (const note of answer.notes ?? []) parts.push(h("p.faint", {}, note));
    const buttons = h("div.answer-buttons");
    if (answer.text) buttons.append(this.copyButton(turn));
    if (isLast) {
      buttons.append(iconButton("retry", "Ask again", () => this.retry(), { class: "quiet retry" }));
      if (answer.partly && answer.ending !== "error") {
        for (const mode of ["all", "each"]) {
          if (mode === turn.read) continue;
          const label = mode === "all" ? "Read all" : "Read each chunk";
          buttons.append(h("button.small", { type: "button", onclick: () => this.retry(mode) }, label));
        }
      }
    }
    parts.push(h("div.meta", {}, answer.said ? h("span.said", {}, sentence(answer.said)) : null, buttons));
    return parts;
  }

  passage(citation, n, turn) {
    const place = where(citation);
    return h(
      "li",
      {},
      h(
        "button.passage",
        { type: "button", onclick: () => this.page.open(citation) },
        h("span.number", { "aria-hidden": "true" }, String(n + 1)),
        h(
          "span.passage-head",
          {},
          h("span.passage-name", {}, citation.filename),
          place ? h("span.faint", {}, place) : null,
          citation.literal ? h("span.tag", { title: "The answer stands in this passage word by word" }, "word by word") : null,
        ),
        h("span.quote", {}, ...excerpt(citation.quote, turn)),
      ),
    );
  }

  copyButton(turn) {
    const button = iconButton("copy", "Copy the answer", async () => {
      const done = await copy(asText(turn.answer));
      button.replaceChildren(icon(done ? "done" : "warn"));
      announce(done ? "Copied" : "The browser does not let this page copy");
      setTimeout(() => button.replaceChildren(icon("copy")), 1500);
    });
    return button;
  }

  //
  // scrolling
  //

  get isAtEnd() {
    const { scrollTop, scrollHeight, clientHeight } = this.thread;
    return scrollHeight - scrollTop - clientHeight < 60;
  }

  toEnd() {
    this.thread.scrollTop = this.thread.scrollHeight;
    this.showToEnd();
  }

  showToEnd() {
    byId("to-end").hidden = this.isAtEnd || this.turns.length === 0;
  }
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + ".";

const WORD = /[\p{L}\p{N}]+/gu;
const words = (text) => text.toLowerCase().match(WORD) ?? [];

// "the" and "is" say nothing
const tells = (word) => word.length > 3 || /\p{N}|[^\p{Script=Latin}]/u.test(word);

/** A quote from the sentence on that has most of the words that the answer adds to the question, with these words strong. */
function excerpt(quote, { question, answer }) {
  const asked = new Set(words(question));
  const telling = new Set(words(answer.text).filter((word) => !asked.has(word) && tells(word)));
  const sentences = quote.replace(/\s+/g, " ").trim().split(/(?<=[.!?。！？]) /);
  const scores = sentences.map((one) => new Set(words(one).filter((word) => telling.has(word))).size);
  const best = scores.indexOf(Math.max(...scores));
  // short beginnings are kept: they help to understand
  const first = sentences.slice(0, best).join(" ").length > 80 ? best : 0;
  const text = sentences.slice(first).join(" ");
  const found = first > 0 ? ["… "] : [];
  let at = 0;
  for (const match of text.matchAll(WORD)) {
    if (!telling.has(match[0].toLowerCase())) continue;
    found.push(text.slice(at, match.index), h("b", {}, match[0]));
    at = match.index + match[0].length;
  }
  return [...found, text.slice(at)];
}

/** What a screen reader says of an answer. */
function spoken(answer) {
  if (answer.ending === "stopped") return "Stopped";
  if (answer.ending === "lost") return "The connection was lost before the end of the answer";
  if (answer.ending === "error") return `No answer: ${answer.error}`;
  const warned = answer.stands ? "" : " Caution: most of its words do not occur in what was read.";
  return `Answer: ${answer.text}${warned} ${answer.said ? sentence(answer.said) : ""}`;
}

function asText(answer) {
  const passages = answer.citations.map((citation, n) => `[${n + 1}] ${[citation.filename, where(citation)].filter(Boolean).join(", ")}`);
  return [answer.text, ...(passages.length ? ["", ...passages] : [])].join("\n");
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // without https on another machine there is no clipboard: the old way
    const field = h("textarea", { class: "hidden", "aria-hidden": "true" });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

/** 16 random bytes; crypto.randomUUID is missing without https on another machine. */
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
