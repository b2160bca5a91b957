// The documents: adding, how their reading goes on, choosing.
import { LostError, collections, connection, files } from "./api.js";
import { announce, ask, byId, count, h, icon, iconButton, plural } from "./dom.js";

const LOOK_AGAIN = 2000; // ms, while something is being read
const AT_ONCE = 2; // uploads
const KINDS = { pdf: "PDF", html: "HTML", docx: "DOCX", epub: "EPUB", markdown: "Markdown", code: "code", text: "text" };

export class Documents {
  /**
   * @param {{changed: () => void, open: (file: object) => void}} page what happens when the choice changes, and to look into one
   */
  constructor(page) {
    this.page = page;
    this.files = new Map(); // by id, in the order in which they were added
    this.sending = []; // not on the server yet: {file, collection, state: "waiting" | "sending" | "failed", error}
    this.stores = [];
    this.chosen = new Set();
    this.collection = null; // the id of the one that is shown
    this.members = null; // the ids of its files
    this.rows = new Map();
    this.followed = null; // whose progress is listened to
    this.timer = null;
    byId("add-files").onclick = () => byId("file-input").click();
    byId("add-folder").onclick = () => byId("folder-input").click();
    byId("drop-here").onclick = () => byId("file-input").click();
    for (const id of ["file-input", "folder-input"]) {
      byId(id).onchange = (event) => {
        // the path of a file that was not chosen by its folder is empty
        this.add([...event.target.files].map((file) => ({ file, folder: file.webkitRelativePath.split("/")[0] || null })));
        event.target.value = "";
      };
    }
    byId("collection").onchange = (event) => this.show(event.target.value || null);
    byId("choose-none").onclick = () => {
      this.chosen.clear();
      this.draw();
      byId("add-files").focus();
    };
    byId("collect").onclick = () => this.collect();
    byId("remove-collection").onclick = () => this.removeCollection();
    connection.listeners.push(() => this.draw());
    this.takeDrops();
  }

  /** What is asked about: {files: id[]} or {collection: id}; null where there is nothing. */
  get scope() {
    const chosen = [...this.chosen].filter((id) => this.usable(id));
    if (chosen.length) return { files: chosen };
    if (this.collection) return { collection: this.collection };
    const all = [...this.files.keys()].filter((id) => this.usable(id));
    return all.length ? { files: all, all: true } : null;
  }

  usable(id) {
    const file = this.files.get(id);
    return file !== undefined && file.status !== "error";
  }

  /** A scope in words. */
  describe(scope) {
    if (!scope) return "";
    if (scope.collection) return `the collection ${this.stores.find((store) => store.id === scope.collection)?.name ?? "that is gone"}`;
    const names = scope.files.map((id) => this.files.get(id)?.filename).filter(Boolean);
    if (names.length === 1) return names[0];
    if (scope.all) return `all ${names.length} documents`;
    return names.length === 2 ? names.join(" and ") : plural(names.length, "document");
  }

  /** Choose what a conversation was about. */
  choose(scope) {
    if (!scope) return;
    if (scope.files) this.chosen = new Set(scope.all ? [] : scope.files.filter((id) => this.files.has(id)));
    const store = scope.collection && this.stores.find((s) => s.id === scope.collection) ? scope.collection : null;
    if (scope.collection) this.chosen.clear();
    this.show(store);
  }

  //
  // what the server has
  //

  /** Ask the server for all of it; while that goes on, once more afterwards. */
  refresh() {
    this.wanted = true;
    this.refreshing ??= this.refreshAll().finally(() => (this.refreshing = null));
    return this.refreshing;
  }

  async refreshAll() {
    clearTimeout(this.timer);
    while (this.wanted) {
      this.wanted = false;
      const before = new Map(this.files);
      try {
        const [list, stores] = await Promise.all([files.list(), collections.list()]);
        if (this.collection && !stores.some((store) => store.id === this.collection)) this.collection = null;
        this.members = this.collection ? new Set(await collections.files(this.collection)) : null;
        // what was added while the list was on its way may not be in it
        const added = [...this.files.values()].filter((file) => !before.has(file.id));
        this.files = new Map([...list, ...added.filter((file) => !list.some(({ id }) => id === file.id))].map((file) => [file.id, file]));
        this.stores = stores;
        for (const id of this.chosen) if (!this.files.has(id)) this.chosen.delete(id);
        for (const file of list) this.tell(before.get(file.id), file);
      } catch (error) {
        if (error instanceof LostError) return; // it is asked again when the server is back
        throw error;
      }
    }
    this.draw();
    this.follow();
  }

  /** Say what has come to an end. */
  tell(before, file) {
    if (!before || before.status === file.status) return;
    if (file.status === "processed") announce(`${file.filename} has been read`);
    if (file.status === "error") announce(`${file.filename} could not be read: ${file.status_details}`);
  }

  /** Listen to the one that is being read; look at the others now and then. */
  follow() {
    const busy = [...this.files.values()].filter((file) => file.status === "uploaded");
    if (!busy.length) return;
    this.timer = setTimeout(() => this.refresh(), LOOK_AGAIN);
    if (this.followed) return;
    const file = busy.find((f) => f.mesa?.state === "reading") ?? busy[0];
    this.followed = file.id;
    this.listen(file.id).finally(() => {
      this.followed = null;
      if (connection.there) this.refresh();
    });
  }

  async listen(id) {
    const stop = new AbortController();
    try {
      for await (const file of files.events(id, stop.signal)) {
        if (!this.files.has(id)) break;
        this.tell(this.files.get(id), file);
        this.files.set(id, file);
        this.drawRow(file);
        this.page.changed();
      }
    } catch (error) {
      if (!(error instanceof LostError)) console.warn(error);
      await new Promise((resolve) => setTimeout(resolve, LOOK_AGAIN));
    } finally {
      stop.abort();
    }
  }

  //
  // adding
  //

  /**
   * @param {{file: File, folder: string|null}[]} found the folder's name becomes a collection
   */
  add(found) {
    const wanted = found.filter(({ file }) => !file.name.startsWith("."));
    if (!wanted.length) return;
    for (const { file, folder } of wanted) this.sending.push({ file, folder, state: "waiting", error: null });
    announce(`Adding ${plural(wanted.length, "document")}`);
    this.draw();
    this.send();
  }

  send() {
    while (this.sending.filter((one) => one.state === "sending").length < AT_ONCE) {
      const next = this.sending.find((one) => one.state === "waiting");
      if (!next || !connection.there) return;
      next.state = "sending";
      this.sendOne(next).then(() => this.send());
    }
  }

  async sendOne(one) {
    this.draw();
    try {
      const file = await files.add(one.file);
      this.sending = this.sending.filter((other) => other !== one);
      this.files.set(file.id, file);
      this.chosen.add(file.id);
      if (one.folder) await this.putInto(one.folder, [file.id]);
    } catch (error) {
      if (error instanceof LostError) {
        one.state = "waiting"; // it is sent when the server is back
      } else {
        // of a file that was moved meanwhile, the browser says no more than that
        one.state = "failed";
        one.error = error.message;
        announce(`${one.file.name} was not added: ${error.message}`);
      }
      this.draw();
    }
    await this.refresh();
  }

  takeDrops() {
    const cover = byId("drop-cover");
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    let depth = 0;
    addEventListener("dragenter", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth++;
      cover.hidden = false;
    });
    addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    addEventListener("dragleave", (event) => {
      if (!hasFiles(event)) return;
      depth = Math.max(0, depth - 1);
      cover.hidden = depth === 0;
    });
    addEventListener("drop", async (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth = 0;
      cover.hidden = true;
      this.add(await dropped(event.dataTransfer));
    });
  }

  //
  // collections
  //

  async show(collection) {
    this.collection = collection;
    this.members = null;
    this.draw();
    if (collection) await this.refresh();
  }

  async collect() {
    const name = await ask("Put into a collection", {
      text: `${plural(this.chosen.size, "document")} can be asked about together by one name.`,
      field: { label: "Name", choices: this.stores.map((store) => store.name) },
      yes: "Put",
    });
    if (!name?.trim()) return;
    await this.guard(async () => {
      await this.putInto(name.trim(), [...this.chosen]);
      await this.refresh();
      announce(`Put into ${name.trim()}`);
    });
  }

  putInto(name, ids) {
    // one after the other: two at once would make the collection twice
    const add = async () => {
      const store = this.stores.find((s) => s.name === name);
      if (store) for (const id of ids) await collections.add(store.id, id);
      else this.stores.push(await collections.create(name, ids));
    };
    this.putting = (this.putting ?? Promise.resolve()).catch(() => {}).then(add);
    return this.putting;
  }

  async removeCollection() {
    const store = this.stores.find((s) => s.id === this.collection);
    if (!store) return;
    const yes = await ask(`Remove the collection ${store.name}?`, { text: "Its documents stay.", yes: "Remove" });
    if (yes === null) return;
    await this.guard(async () => {
      await collections.remove(store.id);
      this.collection = null;
      await this.refresh();
    });
  }

  async remove(file) {
    const yes = await ask(`Remove ${file.filename}?`, {
      text: "The document and what was read of it go from the library. Conversations stay.",
      yes: "Remove",
    });
    if (yes === null) return;
    await this.guard(async () => {
      await files.remove(file.id);
      this.chosen.delete(file.id);
      await this.refresh();
      announce(`${file.filename} was removed`);
      byId("add-files").focus();
    });
  }

  async guard(act) {
    try {
      await act();
    } catch (error) {
      if (error instanceof LostError) return; // the banner says it
      await ask("That did not work", { text: error.message, yes: "Close" });
    }
  }

  //
  // drawing
  //

  draw() {
    const list = byId("document-list");
    const shown = [...this.files.values()].filter((file) => !this.members || this.members.has(file.id)).reverse();
    const rows = [...this.sending.map((one) => this.sendingRow(one)), ...shown.map((file) => this.drawRow(file))];
    // rows stay the same elements, so that the focus stays where it is
    for (const [n, row] of rows.entries()) if (list.children[n] !== row) list.insertBefore(row, list.children[n] ?? null);
    while (list.children.length > rows.length) list.lastChild.remove();
    for (const id of this.rows.keys()) if (!this.files.has(id)) this.rows.delete(id);

    byId("no-documents").hidden = rows.length > 0;
    byId("no-documents").textContent = this.collection ? "None in this collection." : "None yet. Drop files anywhere on this page.";
    const select = byId("collection");
    byId("collections").hidden = this.stores.length === 0;
    select.replaceChildren(
      h("option", { value: "" }, "All documents"),
      ...this.stores.map((store) => h("option", { value: store.id }, store.name)),
    );
    select.value = this.collection ?? "";
    byId("remove-collection").hidden = !this.collection;
    byId("chosen").hidden = this.chosen.size === 0;
    byId("chosen-count").textContent = `${count(this.chosen.size)} chosen`;
    this.page.changed();
  }

  drawRow(file) {
    let row = this.rows.get(file.id);
    if (!row) {
      const box = h("input", {
        type: "checkbox",
        "aria-describedby": `about-${file.id}`,
        onchange: (event) => {
          if (event.target.checked) this.chosen.add(file.id);
          else this.chosen.delete(file.id);
          this.draw();
        },
      });
      const name = h("span.name", {}, file.filename);
      const about = h("div.about", { id: `about-${file.id}` });
      const element = h(
        "li.document",
        {},
        h("label", { title: file.filename }, box, name),
        h(
          "span.row-buttons",
          {},
          iconButton("eye", `Look into ${file.filename}`, () => this.page.open(this.files.get(file.id))),
          iconButton("trash", `Remove ${file.filename}`, () => this.remove(file)),
        ),
        about,
      );
      row = { element, box, about, said: "" };
      this.rows.set(file.id, row);
    }
    row.box.checked = this.chosen.has(file.id);
    row.box.disabled = file.status === "error";
    row.element.classList.toggle("failed", file.status === "error");
    const said = JSON.stringify([file.status, file.status_details, file.mesa]);
    if (said !== row.said) {
      row.said = said;
      row.about.replaceChildren(...about(file));
    }
    return row.element;
  }

  sendingRow(one) {
    const leave = () => {
      this.sending = this.sending.filter((other) => other !== one);
      this.draw();
    };
    const again = () => {
      one.state = "waiting";
      this.draw();
      this.send();
    };
    const waits = connection.there ? "waiting to be sent" : "is sent when the server is back";
    return h(
      `li.document.sending${one.state === "failed" ? ".failed" : ""}`,
      {},
      h("span.name", { title: one.file.name }, one.file.name),
      h(
        "span.row-buttons",
        {},
        one.state === "failed" ? iconButton("retry", `Try ${one.file.name} again`, again) : null,
        one.state === "sending" ? null : iconButton("close", `Leave ${one.file.name} out`, leave),
      ),
      h("div.about", {}, one.state === "failed" ? one.error : one.state === "sending" ? "being sent" : waits),
    );
  }
}

/** What is known of a document, and how far its reading is. */
function about(file) {
  const { state, kind, tokens, tokens_read: done, seconds_left: left, notes } = file.mesa ?? {};
  if (file.status === "error") return [h("span", {}, icon("warn"), " ", file.status_details ?? "could not be read")];
  if (file.status === "uploaded") {
    if (!tokens) return [state === "loading" ? "taking out its text" : "waiting"];
    const share = Math.min(100, Math.floor((100 * done) / tokens));
    const time = left === null || left === undefined ? "" : `, ${duration(left)} left`;
    const words = done || state === "reading" ? `${count(done)} of ${count(tokens)} tokens read${time}` : `waiting, ${plural(tokens, "token")}`;
    return [
      h("progress", { max: tokens, value: done, "aria-label": `Reading ${file.filename}` }, `${share} %`),
      h("span", {}, words),
    ];
  }
  const words = [KINDS[kind] ?? kind, tokens ? plural(tokens, "token") : null].filter(Boolean).join(", ");
  return [h("span", {}, words), ...(notes ?? []).map((note) => h("span.note", { title: note }, note))];
}

/** Seconds in words, roughly. */
export function duration(seconds) {
  if (seconds < 1.5) return "a second";
  if (seconds < 90) return `${Math.round(seconds)} seconds`;
  if (seconds < 5400) return plural(Math.round(seconds / 60), "minute");
  return `${(seconds / 3600).toFixed(1)} hours`;
}

/** The files of a drop, those in folders among them. */
async function dropped(transfer) {
  // entries must be taken before the first await: the list is empty afterwards
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ file, folder: null }));
  const found = [];
  const walk = async (entry, folder) => {
    if (entry.isFile) {
      const file = await new Promise((resolve) => entry.file(resolve, () => resolve(null)));
      if (file) found.push({ file, folder });
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([])));
      if (!some.length) return; // it gives a hundred at a time
      for (const inner of some) await walk(inner, folder ?? entry.name);
    }
  };
  for (const entry of entries) await walk(entry, null);
  return found;
}
