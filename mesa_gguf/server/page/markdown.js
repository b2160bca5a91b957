// A small part of Markdown as elements: paragraphs, headings, lists, quotes, code, tables, strong and emphasis. No links and no
// pictures: what a model writes leads nowhere.
import { h } from "./dom.js";

const FENCE = /^\s*(?:```|~~~)\s*([\w.+#-]*)\s*$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const BULLET = /^(\s*)[-*+]\s+(.*)$/;
const NUMBERED = /^(\s*)(\d{1,9})[.)]\s+(.*)$/;
const QUOTE = /^\s*>\s?(.*)$/;
const ROW = /^\s*\|(.+)\|\s*$/;
const RULE = /^\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)*\|?\s*$/;

/** The elements of a text. */
export function markdown(text) {
  return blocks(text.split("\n"), 0);
}

function blocks(lines, depth) {
  const found = [];
  let n = 0;
  const while_ = (test) => {
    const start = n;
    while (n < lines.length && test(lines[n], n - start)) n++;
    return lines.slice(start, n);
  };
  while (n < lines.length) {
    const line = lines[n];
    if (!line.trim()) {
      n++;
    } else if (FENCE.test(line)) {
      n++;
      const [, language] = FENCE.exec(line);
      const code = while_((l) => !(FENCE.test(l) && !FENCE.exec(l)[1]));
      n++;
      if (language) found.push(h("p.language", {}, language));
      found.push(h("pre", { tabindex: 0 }, h("code", {}, code.join("\n"))));
    } else if (HEADING.test(line)) {
      n++;
      const [, marks, title] = HEADING.exec(line);
      found.push(h(`h${Math.min(6, marks.length + 3)}`, {}, ...inline(title)));
    } else if (QUOTE.test(line) && depth < 4) {
      const inner = while_((l) => QUOTE.test(l)).map((l) => QUOTE.exec(l)[1]);
      found.push(h("blockquote", {}, ...blocks(inner, depth + 1)));
    } else if (ROW.test(line) && n + 1 < lines.length && RULE.test(lines[n + 1])) {
      found.push(table(while_((l) => ROW.test(l) || RULE.test(l))));
    } else if ((BULLET.test(line) || NUMBERED.test(line)) && depth < 4) {
      found.push(list(while_, NUMBERED.test(line), depth));
    } else {
      const own = while_((l, at) => l.trim() && (at === 0 || !begins(l)));
      found.push(h("p", {}, ...own.flatMap((l, at) => (at ? [h("br"), ...inline(l.trim())] : inline(l.trim())))));
    }
  }
  return found;
}

const begins = (line) =>
  FENCE.test(line) || HEADING.test(line) || BULLET.test(line) || NUMBERED.test(line) || QUOTE.test(line);

function list(while_, ordered, depth) {
  const mark = ordered ? NUMBERED : BULLET;
  let indent = null;
  const own = while_((l, at) => {
    const found = mark.exec(l);
    if (at === 0) indent = found[1].length;
    if (found && found[1].length <= indent) return true;
    // what stands further in belongs to the item before it
    return Boolean(l.trim()) && l.length - l.trimStart().length > indent;
  });
  const items = [];
  for (const line of own) {
    const found = mark.exec(line);
    if (found && found[1].length <= indent) items.push([found.at(-1)]);
    else items.at(-1).push(line.slice(Math.min(indent + 2, line.length - line.trimStart().length)));
  }
  const first = ordered ? Number(NUMBERED.exec(own[0])[2]) : null;
  return h(
    ordered ? "ol" : "ul",
    { start: first !== null && first !== 1 ? first : null },
    ...items.map(([head, ...rest]) => h("li", {}, ...inline(head), ...blocks(rest, depth + 1))),
  );
}

function table(lines) {
  const rows = lines.filter((line) => !RULE.test(line)).map((line) => ROW.exec(line)[1].split("|").map((cell) => cell.trim()));
  const [head, ...body] = rows;
  return h(
    "div.table",
    { tabindex: 0, role: "group", "aria-label": "Table" },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, ...head.map((cell) => h("th", { scope: "col" }, ...inline(cell))))),
      h("tbody", {}, ...body.map((row) => h("tr", {}, ...row.map((cell) => h("td", {}, ...inline(cell)))))),
    ),
  );
}

// no repetition stands in another, so the time is linear in the text
const INLINE = /`([^`]+)`|\*\*([^*]+)\*\*|__([^_]+)__|\*([^\s*][^*]*)\*/g;

function inline(text) {
  const found = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) found.push(text.slice(at, match.index));
    const [whole, code, strong, strongToo, emphasis] = match;
    if (code !== undefined) found.push(h("code", {}, code));
    else if (strong ?? strongToo) found.push(h("strong", {}, strong ?? strongToo));
    else found.push(h("em", {}, emphasis));
    at = match.index + whole.length;
  }
  if (at < text.length) found.push(text.slice(at));
  return found;
}
