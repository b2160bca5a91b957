// The server, as the page sees it: requests, streams, the API key, and whether it is there at all.

const KEY = "mesa-key";
const RETRY_FIRST = 500; // ms until the server is looked for again, twice as long each time
const RETRY_LAST = 4000;

/** An answer of the server that says no. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The server did not answer, or fell silent. */
export class LostError extends Error {
  constructor() {
    super("the server does not answer");
  }
}

/** Whether the server answers. Listeners are called with true or false when that changes. */
export const connection = {
  there: true,
  listeners: [],
  lost() {
    if (!this.there) return;
    this.there = false;
    for (const listener of this.listeners) listener(false);
    this.look(RETRY_FIRST);
  },
  found() {
    if (this.there) return;
    this.there = true;
    for (const listener of this.listeners) listener(true);
  },
  look(wait) {
    setTimeout(async () => {
      try {
        const response = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(5000) });
        if (response.ok) return this.found();
      } catch {
        // not yet
      }
      this.look(Math.min(RETRY_LAST, 2 * wait));
    }, wait);
  },
};

/** How the page asks for a key; set by the page: (wrong: boolean) => Promise<string|null>. */
export const keys = { ask: async () => null };

let asked = null; // one question at a time, however many requests want it

function key() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

async function anotherKey(used) {
  if (key() !== used) return true; // somebody entered one meanwhile
  asked ??= keys.ask(used !== null).finally(() => (asked = null));
  const given = await asked;
  if (given === null) return false;
  try {
    sessionStorage.setItem(KEY, given);
  } catch {
    return false;
  }
  return true;
}

/**
 * A request; what comes back is a response of 2xx.
 * @param {string} path
 * @param {{method?: string, json?: object, body?: BodyInit, signal?: AbortSignal}} options
 * @throws {ApiError|LostError} and AbortError where the signal says so
 */
export async function request(path, { method = "GET", json, body, signal } = {}) {
  for (;;) {
    const used = key();
    const headers = {};
    if (used !== null) headers.Authorization = `Bearer ${used}`;
    if (json !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, {
        method,
        headers,
        body: json !== undefined ? JSON.stringify(json) : body,
        signal,
        cache: "no-store",
        credentials: "omit",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      connection.lost();
      throw new LostError();
    }
    connection.found();
    if (response.ok) return response;
    if (response.status === 401 && (await anotherKey(used))) continue;
    throw new ApiError(response.status, await complaint(response));
  }
}

async function complaint(response) {
  try {
    const { error } = await response.json();
    if (typeof error?.message === "string") return error.message;
  } catch {
    // no JSON
  }
  return `the server answered ${response.status} ${response.statusText}`.trim();
}

export async function get(path, signal) {
  return (await request(path, { signal })).json();
}

/** Data of server-sent events, one string each. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        connection.lost();
        throw new LostError();
      }
      if (part.done) return;
      const lines = (rest + part.value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trimStart();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

//
// documents
//

export const files = {
  list: async () => (await get("v1/files?order=asc&limit=10000")).data,
  get: (id) => get(`v1/files/${encodeURIComponent(id)}`),
  async add(file, signal) {
    const body = new FormData();
    body.append("purpose", "user_data");
    body.append("file", file, file.name);
    return (await request("v1/files", { method: "POST", body, signal })).json();
  },
  remove: (id) => request(`v1/files/${encodeURIComponent(id)}`, { method: "DELETE" }),
  text: (id, start, stop, signal) => get(`v1/files/${encodeURIComponent(id)}/text?start=${start}&stop=${stop}`, signal),
  content: async (id) => (await request(`v1/files/${encodeURIComponent(id)}/content`)).blob(),
  /** A page of a PDF: its text, where a passage lies on it, and a picture. */
  page: (id, page, start, stop, signal) =>
    get(`v1/files/${encodeURIComponent(id)}/pages/${page}?start=${start}&stop=${stop}`, signal),
  picture: async (id, page, width, signal) =>
    (await request(`v1/files/${encodeURIComponent(id)}/pages/${page}.png?width=${width}`, { signal })).blob(),
  async *events(id, signal) {
    const response = await request(`v1/files/${encodeURIComponent(id)}/events`, { signal });
    for await (const data of events(response)) yield JSON.parse(data);
  },
};

export const collections = {
  list: async () => (await get("v1/vector_stores?limit=100")).data,
  files: async (id) => (await get(`v1/vector_stores/${encodeURIComponent(id)}/files?limit=10000`)).data.map((file) => file.id),
  create: async (name, file_ids) =>
    (await request("v1/vector_stores", { method: "POST", json: { name, file_ids } })).json(),
  add: (id, file_id) =>
    request(`v1/vector_stores/${encodeURIComponent(id)}/files`, { method: "POST", json: { file_id } }),
  remove: (id) => request(`v1/vector_stores/${encodeURIComponent(id)}`, { method: "DELETE" }),
};

export const conversations = {
  list: async () => (await get("page/conversations")).conversations,
  get: (id) => get(`page/conversations/${id}`),
  put: (id, conversation) => request(`page/conversations/${id}`, { method: "PUT", json: conversation }),
  remove: (id) => request(`page/conversations/${id}`, { method: "DELETE" }),
};

export const models = async () => (await get("v1/models")).data;

/**
 * An answer as it comes.
 * @yields {{progress?: object, piece?: string, annotations?: object[], mesa?: object, finish?: string}}
 */
export async function* chat(json, signal) {
  const response = await request("v1/chat/completions", { method: "POST", json: { ...json, stream: true }, signal });
  let ended = false;
  for await (const data of events(response)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, chunk.error.message);
    if (chunk.mesa?.progress) yield { progress: chunk.mesa.progress };
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { piece: choice.delta.content };
    if (choice?.finish_reason) {
      yield { finish: choice.finish_reason, annotations: choice.delta?.annotations ?? [], mesa: chunk.mesa ?? null };
    }
  }
  if (!ended) {
    connection.lost();
    throw new LostError();
  }
}
