// Conversations, kept in this browser and nowhere else.

const NAME = "outlier-mlx";
const STORE = "conversations";

let opened = null;
/** Where there is no IndexedDB (some private windows), conversations last as long as the page. */
const inMemory = new Map();

export const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 10);

function open() {
  opened ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return opened;
}

async function run(mode, work) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(STORE, mode);
    const request = work(transaction.objectStore(STORE));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

/** Whether conversations outlive the page. */
export const lasts = async () => (await open()) !== null;

/** All conversations, the one that was used last first. */
export async function all() {
  const found = (await open()) ? await run("readonly", (s) => s.getAll()) : [...inMemory.values()];
  return found.sort((a, b) => b.changed - a.changed);
}

/** Keep a conversation; rejects if there is no room for it. */
export async function put(conversation) {
  if (await open()) await run("readwrite", (s) => s.put(conversation));
  else inMemory.set(conversation.id, conversation);
}

export async function remove(id) {
  if (await open()) await run("readwrite", (s) => s.delete(id));
  inMemory.delete(id);
}

/** The text of a file with these conversations. */
export const exported = (conversations) =>
  JSON.stringify({ format: "outlier-mlx conversations", version: 1, conversations }, null, 1);

/**
 * The conversations in a file's text, with ids of their own. Only what is known is taken over.
 * @throws {Error} the file holds no such conversations.
 */
export function imported(text) {
  const file = JSON.parse(text);
  if (!Array.isArray(file?.conversations)) throw new Error("it holds no conversations");
  return file.conversations.map((conversation) => {
    if (!Array.isArray(conversation?.messages)) throw new Error("a conversation has no messages");
    return {
      id: newId(),
      title: textOr(conversation.title, "Imported"),
      changed: Number.isFinite(conversation.changed) ? conversation.changed : Date.now(),
      settings: knownSettings(conversation.settings),
      messages: conversation.messages.map(knownMessage),
    };
  });
}

const textOr = (value, other) => (typeof value === "string" ? value : other);

function knownMessage(message) {
  if (message?.role !== "user" && message?.role !== "assistant") {
    throw new Error("a message is neither a user's nor an assistant's");
  }
  const known = { role: message.role, content: textOr(message.content, "") };
  for (const name of ["reasoning", "note"]) {
    if (typeof message[name] === "string") known[name] = message[name];
  }
  const { count, first, rate } = message.stats ?? {};
  if ([count, first, rate].every(Number.isFinite)) known.stats = { count, first, rate };
  if (Array.isArray(message.tokens)) {
    const tokens = message.tokens.filter(isToken);
    if (tokens.length) known.tokens = tokens.map(({ text, experts }) => ({ text, experts }));
  }
  if (Array.isArray(message.layers) && message.layers.every(Number.isInteger)) {
    known.layers = message.layers;
    known.experts = Number.isInteger(message.experts) ? Math.min(message.experts, 1024) : 0;
  }
  return known;
}

const isToken = (token) =>
  typeof token?.text === "string" && Array.isArray(token.experts) && token.experts.every(
    (layer) => Array.isArray(layer) && layer.every(
      (use) => Array.isArray(use) && Number.isInteger(use[0]) && use[0] >= 0 &&
        Number.isFinite(use[1]) && typeof use[2] === "string",
    ),
  );

function knownSettings(settings) {
  const known = { system: textOr(settings?.system, ""), experts: settings?.experts !== false };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (Number.isFinite(settings?.[name])) known[name] = settings[name];
  }
  return known;
}
