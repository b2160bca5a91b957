// Conversations on the server's disk: the list, and keeping the one that goes on.
import { ApiError, LostError, connection, conversations } from "./api.js";
import { announce, ask, byId, h, iconButton } from "./dom.js";

export class History {
  /** @param {{open: (id: string) => void, removed: (id: string) => void}} page */
  constructor(page) {
    this.page = page;
    this.list = [];
    this.current = null;
    this.unkept = new Map(); // what the server has not got yet, by id
    this.busy = false;
    addEventListener("beforeunload", (event) => {
      if (this.unkept.size) event.preventDefault();
    });
  }

  async refresh() {
    try {
      this.list = await conversations.list();
    } catch (error) {
      if (!(error instanceof LostError)) throw error;
      return;
    }
    this.draw();
  }

  async get(id) {
    if (this.unkept.has(id)) return this.unkept.get(id);
    try {
      return await conversations.get(id);
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return null;
      throw error;
    }
  }

  /** Keep a conversation, now or when the server is back. */
  keep(id, kept) {
    this.unkept.set(id, structuredClone(kept));
    return this.flush();
  }

  async flush() {
    if (this.busy) return;
    this.busy = true;
    try {
      while (this.unkept.size && connection.there) {
        const [id, kept] = this.unkept.entries().next().value;
        await conversations.put(id, kept);
        if (this.unkept.get(id) === kept) this.unkept.delete(id);
        this.touch(id, kept.title);
      }
    } catch (error) {
      if (!(error instanceof LostError)) announce(`This conversation is not kept: ${error.message}`);
    } finally {
      this.busy = false;
    }
  }

  touch(id, title) {
    this.list = [{ id, title, updated_at: Date.now() / 1000 }, ...this.list.filter((one) => one.id !== id)];
    this.draw();
  }

  mark(id) {
    this.current = id;
    this.draw();
  }

  async remove({ id, title }) {
    const yes = await ask("Remove this conversation?", { text: `“${title}” goes from the server's disk.`, yes: "Remove" });
    if (yes === null) return;
    try {
      await conversations.remove(id);
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 404)) return announce(`Not removed: ${error.message}`);
    }
    this.unkept.delete(id);
    this.list = this.list.filter((one) => one.id !== id);
    this.draw();
    announce("The conversation was removed");
    byId("new-conversation").focus();
    this.page.removed(id);
  }

  draw() {
    byId("no-conversations").hidden = this.list.length > 0;
    byId("conversation-list").replaceChildren(
      ...this.list.map((one) =>
        h(
          "li.conversation",
          {},
          h(
            "a",
            { href: `#${one.id}`, title: one.title, "aria-current": one.id === this.current ? "page" : null },
            one.title || "Untitled",
          ),
          h("span.row-buttons", {}, iconButton("trash", `Remove “${one.title || "Untitled"}”`, () => this.remove(one))),
        ),
      ),
    );
  }
}
