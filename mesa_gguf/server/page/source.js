// A passage in its place: the text around it, or the page of a PDF as it looks.
import { LostError, files } from "./api.js";
import { announce, byId, count, h, icon, iconButton, svg } from "./dom.js";

const AROUND = 6000; // characters shown on either side of a passage
const MORE = 12000; // when more of the text is asked for
const ZOOMS = [1, 1.5, 2, 3]; // of a page, times the panel's width
const WIDTHS = [1400, 2100, 2800, 4200]; // of its picture, in pixels

export class Source {
  constructor() {
    this.panel = byId("source");
    this.work = null; // what is being fetched
    this.keys = {}; // what keys do in the view that is shown
    this.from = null; // where the focus was
    this.zoom = 1;
    this.panel.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const act = event.key === "Escape" ? () => this.close() : this.keys[event.key];
      if (!act) return;
      event.preventDefault();
      event.stopPropagation();
      act();
    });
  }

  get isOpen() {
    return !this.panel.hidden;
  }

  /**
   * @param {{file_id: string, filename: string, kind?: string, page?: number, heading?: string[], start: number, stop: number}} passage
   *   start === stop: nothing is marked
   */
  async open(passage) {
    if (!this.isOpen) this.from = document.activeElement;
    this.passage = passage;
    this.keys = {};
    this.panel.hidden = false;
    document.body.classList.add("with-source");
    byId("main").inert = matchMedia("(max-width: 52rem)").matches; // it lies over everything
    const isPdf = passage.kind === "pdf" && passage.has_content !== false;
    this.asPage = this.asText = null;
    this.body = h("div.source-body", { tabindex: 0, role: "region", "aria-label": passage.filename });
    const views = isPdf
      ? h(
          "div.views",
          { role: "group", "aria-label": "Show as" },
          (this.asPage = h("button", { type: "button", "aria-pressed": "true", onclick: () => this.show("page") }, "Page")),
          (this.asText = h("button", { type: "button", "aria-pressed": "false", onclick: () => this.show("text") }, "Text")),
        )
      : null;
    this.panel.replaceChildren(
      h(
        "header",
        {},
        h("h2", { id: "source-title", tabindex: -1, title: passage.filename }, passage.filename),
        views,
        passage.has_content === false ? null : iconButton("save", `Save ${passage.filename}`, () => this.save()),
        iconButton("close", "Close the document", () => this.close()),
      ),
      this.body,
    );
    byId("source-title").focus({ preventScroll: true });
    await this.show(isPdf ? "page" : "text", true);
  }

  close() {
    this.work?.abort();
    this.panel.hidden = true;
    this.panel.replaceChildren();
    document.body.classList.remove("with-source");
    byId("main").inert = false;
    if (this.from instanceof HTMLElement && this.from.isConnected) this.from.focus();
    else byId("question").focus();
    this.from = null;
  }

  async show(view, isFirst = false) {
    this.work?.abort();
    const work = (this.work = new AbortController());
    if (view !== "page") this.keys = {}; // while the next page comes, they turn on
    this.asPage?.setAttribute("aria-pressed", String(view === "page"));
    this.asText?.setAttribute("aria-pressed", String(view === "text"));
    this.body.setAttribute("aria-busy", "true");
    try {
      if (view === "page") await this.showPage(this.passage.page ?? 1, work.signal, isFirst);
      else await this.showText(work.signal);
    } catch (error) {
      if (error.name === "AbortError") return;
      const text = error instanceof LostError ? "The server does not answer." : error.message;
      const again = h("button.small", { type: "button", onclick: () => this.show(view) }, "Try again");
      this.body.replaceChildren(h("p.trouble", {}, icon("warn"), " ", text, " ", again));
    } finally {
      this.body.removeAttribute("aria-busy");
    }
  }

  async save() {
    try {
      const blob = await files.content(this.passage.file_id);
      const url = URL.createObjectURL(new Blob([blob], { type: "application/octet-stream" }));
      const link = h("a", { href: url, download: this.passage.filename });
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    } catch (error) {
      announce(`${this.passage.filename} cannot be saved: ${error.message}`);
    }
  }

  //
  // as text
  //

  async showText(signal) {
    const { file_id, start, stop } = this.passage;
    const part = await files.text(file_id, Math.max(0, start - AROUND), stop + AROUND, signal);
    const text = h("div.text");
    this.body.replaceChildren(text);
    const mark = this.addText(text, part, { start, stop });
    const earlier = h("button.small.more", { type: "button" }, "Earlier");
    const later = h("button.small.more", { type: "button" }, "Later");
    earlier.onclick = () => this.more(earlier, part, Math.max(0, part.start - MORE), part.start, text, true);
    later.onclick = () => this.more(later, part, part.stop, part.stop + MORE, text, false);
    earlier.hidden = part.start === 0;
    later.hidden = part.stop >= part.characters;
    text.before(earlier);
    text.after(later);
    if (mark) {
      mark.scrollIntoView({ block: "center" });
      announce(`${where(this.passage)}: ${mark.textContent}`);
    }
  }

  async more(button, part, start, stop, text, before) {
    button.disabled = true;
    try {
      const found = await files.text(this.passage.file_id, start, stop, this.work.signal);
      const height = this.body.scrollHeight;
      const holder = h("div");
      this.addText(holder, found, null);
      if (before) {
        text.prepend(...holder.childNodes);
        part.start = found.start;
        this.body.scrollTop += this.body.scrollHeight - height; // what is read stays where it is
        button.hidden = part.start === 0;
      } else {
        text.append(...holder.childNodes);
        part.stop = found.stop;
        button.hidden = part.stop >= part.characters;
      }
    } catch (error) {
      if (error.name !== "AbortError") announce(error.message);
    } finally {
      button.disabled = false;
    }
  }

  /** Put a part of the text into an element, with its headings and pages, and a passage marked. Returns the mark. */
  addText(element, part, passage) {
    const characters = Array.from(part.text); // the server counts code points, a string UTF-16 units
    const slice = (from, to) => characters.slice(from - part.start, to - part.start).join("");
    const borders = part.places.filter((place) => place.start > part.start || place.start === part.start);
    let mark = null;
    let at = part.start;
    let page = part.places[0] && part.places[0].start < part.start ? part.places[0].page : null;
    const add = (upTo, heading) => {
      if (upTo <= at) return;
      const pieces = [];
      const cuts = passage ? [Math.max(at, Math.min(upTo, passage.start)), Math.max(at, Math.min(upTo, passage.stop))] : [at, at];
      if (cuts[0] > at) pieces.push(slice(at, cuts[0]));
      if (cuts[1] > cuts[0]) {
        const own = h("mark", {}, slice(cuts[0], cuts[1]));
        mark ??= own;
        pieces.push(own);
      }
      if (upTo > cuts[1]) pieces.push(slice(cuts[1], upTo));
      if (heading) element.append(h("span.heading", {}, ...pieces));
      else element.append(...pieces);
      at = upTo;
    };
    for (const place of borders) {
      add(place.start, false);
      if (place.page !== null && place.page !== page) {
        page = place.page;
        element.append(h("span.page-number", {}, `Page ${count(page)}`));
      }
      // a heading's own line, where the text has it
      const title = place.heading.at(-1);
      if (title) {
        const line = slice(place.start, Math.min(part.stop, place.start + 400)).split("\n", 1)[0];
        if (plain(line).endsWith(plain(title))) add(place.start + Array.from(line).length, true);
      }
    }
    add(part.stop, false);
    return mark;
  }

  //
  // as a page
  //

  async showPage(number, signal, isFirst) {
    const { file_id, filename, start, stop } = this.passage;
    const pixelsFor = (width) => WIDTHS.find((one) => one >= width * devicePixelRatio) ?? WIDTHS.at(-1);
    const picture = (pixels) => files.picture(file_id, number, pixels, signal);
    let early = isFirst ? null : picture(pixelsFor(this.zoom * this.body.clientWidth)); // the passage may be on the next page
    early?.catch(() => {}); // told where it is waited for
    const found = await files.page(file_id, number, start, stop, signal);
    if (isFirst && found.goes_on && found.text.length < (stop - start) / 2) {
      // most of it is on the next page
      this.passage = { ...this.passage, page: found.goes_on };
      return this.showPage(found.goes_on, signal, false);
    }
    const { width, height, rectangles, lines, pages } = found;
    const image = h("img", { alt: `Page ${number} of ${filename}`, width, height });
    const box = { viewBox: `0 0 ${width} ${height}` };
    const marks = svg(
      "svg",
      { class: "marks", ...box, "aria-hidden": "true" },
      ...rectangles.map(([x, y, w, h]) => svg("rect", { x: x - 1, y: y - 1, width: w + 2, height: h + 2, rx: 1.5 })),
    );
    // the page's words, to be selected and read aloud; the picture shows them
    const words = svg("svg", { class: "words", ...box, role: "group", "aria-label": `Text of page ${number}` }, ...lines.map(line));
    const sheet = h("div.sheet", {}, image, marks, words);
    const go = (to) => {
      if (to < 1 || to > pages) return;
      this.passage = { ...this.passage, page: to };
      this.show("page");
    };
    const turn = (by) => go((this.passage.page ?? number) + by); // the next one may be on its way already
    const previous = iconButton("left", "Page before", () => turn(-1), { disabled: number <= 1 });
    const next = iconButton("right", "Page after", () => turn(1), { disabled: number >= pages });
    const size = h("span.zoom", {});
    const smaller = iconButton("minus", "Smaller", () => zoom(-1));
    const larger = iconButton("plus", "Larger", () => zoom(1));
    const fit = () => {
      sheet.style.width = `${100 * this.zoom}%`;
      size.textContent = `${100 * this.zoom} %`;
      const focused = document.activeElement; // a button that is switched off would lose it
      smaller.disabled = this.zoom === ZOOMS[0];
      larger.disabled = this.zoom === ZOOMS.at(-1);
      if (focused === smaller && smaller.disabled) larger.focus();
      if (focused === larger && larger.disabled) smaller.focus();
    };
    let drawn = 0; // pixels that the picture is wide
    const draw = async () => {
      const pixels = pixelsFor(sheet.clientWidth);
      if (pixels <= drawn) return;
      const url = URL.createObjectURL(await (early ?? picture(pixels)));
      early = null;
      await new Promise((resolve) => {
        image.onload = image.onerror = resolve;
        image.src = url;
      });
      URL.revokeObjectURL(url);
      drawn = pixels;
    };
    const zoom = (by) => {
      const to = ZOOMS[ZOOMS.indexOf(this.zoom) + by];
      if (!to) return;
      // what is in the middle stays there, but lines are seen from their beginning
      const { body } = this;
      const x = (body.scrollLeft + body.clientWidth / 2) / body.scrollWidth;
      const y = (body.scrollTop + body.clientHeight / 2) / body.scrollHeight;
      this.zoom = to;
      fit();
      const text = (Math.min(...lines.map(([left]) => left)) / width) * sheet.clientWidth;
      const across = x * body.scrollWidth - body.clientWidth / 2;
      body.scrollTo(Math.min(across, text), y * body.scrollHeight - body.clientHeight / 2);
      announce(size.textContent);
      draw().catch((error) => error.name !== "AbortError" && announce(error.message));
    };
    const focused = this.body.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    this.body.replaceChildren(
      h("div.page-bar", {}, previous, h("span", {}, `Page ${count(number)} of ${count(pages)}`), next, smaller, size, larger),
      sheet,
      found.goes_on
        ? h("button.small.more", { type: "button", onclick: () => go(found.goes_on) }, `The passage goes on on page ${count(found.goes_on)}`)
        : "",
    );
    this.keys = { "+": () => zoom(1), "=": () => zoom(1), "-": () => zoom(-1), n: () => turn(1), p: () => turn(-1) };
    fit();
    if (focused) ([previous, next, smaller, larger].find((one) => one.ariaLabel === focused && !one.disabled) ?? this.body).focus();
    await draw();
    if (rectangles.length) marks.firstChild.scrollIntoView({ block: "center", inline: "center" });
    else this.body.scrollTo(0, 0);
    const said = found.text ? `: ${found.text}` : "";
    announce(`Page ${number} of ${filename}${said}`);
  }
}

/** A piece of a page's text, over the place where the picture shows it. */
function line([x, y, width, height, text]) {
  const upright = height > 2 * width && text.length > 2; // it runs from top to bottom
  const [length, size] = upright ? [height, width] : [width, height];
  const place = upright ? { x: 0, y: 0, transform: `translate(${x + 0.2 * width} ${y}) rotate(90)` } : { x, y: y + 0.8 * height };
  return svg("text", { ...place, "font-size": size, textLength: length, lengthAdjust: "spacingAndGlyphs" }, text);
}

const plain = (text) => text.replace(/[\s#*_]+/g, " ").trim().toLowerCase();

/** Where a passage is, in words. */
export function where({ page, heading }) {
  const words = [];
  if (page) words.push(`page ${count(page)}`);
  if (heading?.length) words.push(heading.at(-1));
  return words.join(", ");
}
