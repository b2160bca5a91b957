// Elements made by hand. Text always becomes a text node: nothing that a model or a document says is read as HTML.

/**
 * An element.
 * @param {string} tag its name, with classes: "p.faint"
 * @param {object} attributes `onclick` and the like are listeners; true is an attribute without value, false and null none
 * @param {...(Node|string|null|false)} children
 */
export function h(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.classList.add(...classes);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== false && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  element.append(...children);
  return element;
}

const PATHS = {
  close: "M5 5l10 10M15 5L5 15",
  copy: "M7.500 7.500h8v9h-8zM12.500 7.500v-3h-8v9h3",
  done: "M4.500 10.500l4 4 7-8.500",
  down: "M6 8l4 4 4-4",
  eye: "M2.500 10S5.500 5 10 5s7.500 5 7.500 5-3 5-7.500 5-7.500-5-7.500-5zM10 8.200a1.800 1.800 0 100 3.600 1.800 1.800 0 000-3.600z",
  left: "M12 5l-5 5 5 5",
  minus: "M5 10h10",
  moon: "M16 11.500A6.500 6.500 0 018.500 4a6.500 6.500 0 107.500 7.500z",
  page: "M5.500 3h6l3.500 3.500V17h-9.500zM11.500 3v3.500H15",
  plus: "M5 10h10M10 5v10",
  retry: "M15.500 10a5.500 5.500 0 11-1.800-4.100M15.500 3.500v3h-3",
  right: "M8 5l5 5-5 5",
  save: "M10 4v8.500M6.500 9.500L10 13l3.500-3.500M4 16h12",
  sun: "M10 6.800a3.200 3.200 0 100 6.400 3.200 3.200 0 000-6.400zM10 2v2M10 16v2M2 10h2M16 10h2M4.400 4.400l1.400 1.400M14.200 14.200l1.400 1.400M15.600 4.400l-1.400 1.400M5.800 14.200l-1.400 1.400",
  system: "M3 4.500h14v9H3zM7.500 16.500h5M10 13.500v3",
  trash: "M4 6h12M8 6V4h4v2M6 6l.7 10h6.600L14 6",
  warn: "M10 3.500L17.500 16.500h-15zM10 8.500v3.500M10 14.200v.1",
};

/** A picture that says nothing to a screen reader. */
export function icon(name) {
  return svg("svg", { class: "icon", viewBox: "0 0 20 20", "aria-hidden": "true" }, svg("path", { d: PATHS[name] }));
}

/** A button of a picture; its label is read aloud and shown by the pointer. */
export function iconButton(name, label, onclick, attributes = {}) {
  return h("button.quiet", { type: "button", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

export const byId = (id) => document.getElementById(id);

const numbers = new Intl.NumberFormat("en");
export const count = (n) => numbers.format(n);
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** What a screen reader says now. */
export function announce(text) {
  const line = byId("announce");
  line.textContent = "";
  // the same text twice in a row would not be said
  requestAnimationFrame(() => (line.textContent = text));
}

/**
 * A question in a dialog.
 * @param {string} title
 * @param {{text?: string, field?: {label: string, type?: string, value?: string, choices?: string[]}, yes: string}} options
 * @returns {Promise<string|null>} what was entered, or "" where there is no field; null where it was left
 */
export function ask(title, { text, field, yes }) {
  const dialog = byId("dialog");
  if (dialog.open) dialog.close();
  const before = document.activeElement;
  return new Promise((resolve) => {
    const input =
      field &&
      h("input", {
        id: "dialog-field",
        type: field.type ?? "text",
        value: field.value ?? "",
        required: true,
        maxlength: 200,
        autocomplete: "off",
        list: field.choices?.length ? "dialog-choices" : null,
      });
    let answer = null;
    dialog.replaceChildren(
      h(
        "form",
        {
          method: "dialog",
          onsubmit: () => (answer = input ? input.value : ""),
        },
        h("h2", { id: "dialog-title" }, title),
        text ? h("p", {}, text) : null,
        input ? h("label", { for: "dialog-field" }, field.label) : null,
        input ?? null,
        field?.choices?.length
          ? h("datalist", { id: "dialog-choices" }, ...field.choices.map((choice) => h("option", { value: choice })))
          : null,
        h(
          "div.dialog-buttons",
          {},
          h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
          h("button.main", { type: "submit" }, yes),
        ),
      ),
    );
    dialog.addEventListener(
      "close",
      () => {
        dialog.replaceChildren();
        if (before instanceof HTMLElement && before.isConnected) before.focus();
        resolve(answer);
      },
      { once: true },
    );
    dialog.showModal();
  });
}
