// The page: one conversation is open, others are in the list; at most one answer is being written.

import { Refused, answer, describe, keepKey } from "./api.js";
import { $, notice, question, say } from "./dialogs.js";
import { theme } from "./look.js";
import { MessageView } from "./message.js";
import * as store from "./store.js";
import { make } from "./text.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const SETTINGS = "outlier-mlx settings";
const WIDE = matchMedia("(min-width: 900px)");

let model = null; // what the server says of it
let conversations = [];
let open = null;
let views = [];
let writing = null; // {controller, conversation, message, view} of the answer under way

function fresh() {
  let settings = { system: "", experts: true };
  try {
    settings = { ...settings, ...JSON.parse(localStorage.getItem(SETTINGS)) };
  } catch { /* None are kept, or they are not readable. */ }
  return { id: store.newId(), title: "", changed: Date.now(), settings, messages: [] };
}

async function keep(conversation) {
  conversation.changed = Date.now();
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  conversations.sort((a, b) => b.changed - a.changed);
  list();
  try {
    await store.put(conversation);
  } catch (error) {
    notice(`This conversation could not be kept in the browser: ${error.message}`);
  }
}

const titleOf = (conversation) => conversation.title || "New conversation";

function list() {
  $("conversations").replaceChildren(...conversations.map((conversation) => {
    const title = titleOf(conversation);
    const item = make("li", {},
      make("button", { type: "button", className: "open", textContent: title, onclick: () => {
        show(conversation);
        if (!WIDE.matches) side(false);
      } }),
      make("button", { type: "button", className: "quiet", textContent: "Rename",
        "aria-label": `Rename ${title}`, onclick: () => rename(conversation) }),
      make("button", { type: "button", className: "quiet", textContent: "Delete",
        "aria-label": `Delete ${title}`, onclick: () => discard(conversation) }));
    if (conversation === open) item.firstChild.setAttribute("aria-current", "true");
    return item;
  }));
  $("title").textContent = open ? titleOf(open) : "";
  $("export").disabled = !conversations.length;
}

function show(conversation) {
  open = conversation;
  sessionStorage.setItem("outlier-mlx open", conversation.id);
  draw();
  list();
  bottom(true);
}

function draw() {
  views = open.messages.map((message) => {
    const who = message.role === "user" ? "You" : model?.id ?? "Model";
    return new MessageView(message, who, {
      edit: (content, again) => edit(message, content, again),
      retry: () => again(message),
    });
  });
  if (writing && open === writing.conversation) {
    writing.view = views[open.messages.indexOf(writing.message)];
    writing.view?.update(true);
  }
  $("messages").replaceChildren(...views.map((view) => view.element));
  $("empty").hidden = Boolean(views.length);
}

async function rename(conversation) {
  const title = await question("Rename the conversation", "", "Rename", "Title", titleOf(conversation));
  if (title === null || !title.trim()) return;
  conversation.title = title.trim().slice(0, 200);
  await keep(conversation);
}

async function discard(conversation) {
  const sure = await question("Delete this conversation?", `“${titleOf(conversation)}” is deleted from this browser.`, "Delete");
  if (sure === null) return;
  if (writing?.conversation === conversation) stop();
  conversations = conversations.filter((other) => other !== conversation);
  await store.remove(conversation.id);
  if (open === conversation) show(conversations[0] ?? fresh());
  else list();
  $("new").focus();
}

/** Change a message; its old answers go if it is answered again. */
async function edit(message, content, again_) {
  message.content = content;
  if (message.role === "assistant") {
    for (const name of ["tokens", "stats", "note"]) delete message[name];
  }
  if (again_) await again(message);
  else {
    views[open.messages.indexOf(message)]?.update();
    if (message.role === "assistant") draw();
    await keep(open);
  }
}

/** Answer once more: up to the last message of the user that this one is, or answers. */
async function again(message) {
  if (writing) await stop();
  const conversation = open;
  let end = conversation.messages.indexOf(message) + 1;
  while (end && conversation.messages[end - 1].role !== "user") end -= 1;
  if (!end) return;
  const before = conversation.messages;
  const gone = before.length - end;
  conversation.messages = before.slice(0, end);
  if (gone) {
    const told = gone > 1 ? `${gone} messages after it were removed.` : "The earlier answer was removed.";
    notice(told, "Undo", async () => {
      await stop();
      conversation.messages = before;
      await keep(conversation);
      if (open === conversation) draw();
    });
  }
  draw();
  await write(conversation);
}

function body(conversation) {
  const { system, experts, ...numbers } = conversation.settings;
  const messages = conversation.messages.map(({ role, content, reasoning }) =>
    ({ role, content, ...(reasoning ? { reasoning } : {}) }));
  if (system.trim()) messages.unshift({ role: "system", content: system });
  const asked = { model: model?.id ?? "", messages, ...numbers };
  if (experts && model?.outlier?.experts) asked.outlier = { experts: true };
  return asked;
}

async function write(conversation) {
  const asked = body(conversation);
  const message = { role: "assistant", content: "" };
  conversation.messages.push(message);
  if (asked.outlier) {
    Object.assign(message, { tokens: [], layers: model.outlier.experts.layers, experts: model.outlier.experts.experts });
  }
  const controller = new AbortController();
  const mine = { controller, conversation, message, view: null };
  writing = mine;
  draw();
  state();
  bottom(true);
  await keep(conversation);
  mine.ended = follow(mine, asked).finally(async () => {
    if (writing === mine) writing = null;
    mine.view?.update();
    state();
    bottom();
    if (conversations.includes(conversation)) await keep(conversation);
  });
  await mine.ended;
}

/** Add what comes to the message, and show it once a frame. */
async function follow(mine, asked) {
  const { message, controller } = mine;
  const begun = performance.now();
  let first = 0;
  let last = 0;
  let count = 0;
  let kept = begun;
  let drawing = 0;
  const redraw = () => {
    drawing = 0;
    mine.view?.update(writing === mine);
    bottom();
  };
  const measured = () => {
    const rate = count > 1 && last - first > 20 ? (1000 * (count - 1)) / (last - first) : 0;
    message.stats = { count, first: (first - begun) / 1000, rate };
  };
  say("Answering");
  try {
    for await (const chunk of answer(asked, controller.signal)) {
      const choice = chunk.choices?.[0];
      const { content, reasoning } = choice?.delta ?? {};
      message.content += content ?? "";
      if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
      if (message.tokens) message.tokens.push(...(chunk.outlier?.experts ?? []));
      if (content || reasoning) {
        last = performance.now();
        first ||= last;
        count += 1;
      }
      if (choice?.finish_reason === "length") message.note = "The answer ends here because it has as many tokens as allowed.";
      count = chunk.usage?.completion_tokens ?? count;
      if (first) measured();
      if (performance.now() - kept > 5000) {
        kept = performance.now();
        store.put(mine.conversation).catch(() => {});
      }
      drawing ||= requestAnimationFrame(redraw);
    }
    say(`${model?.id ?? "The model"} answered: ${message.content}`);
  } catch (error) {
    if (controller.signal.aborted) {
      message.note = "Stopped.";
      say("Stopped");
    } else {
      message.note = `There is no complete answer: ${error.message}`;
      say(message.note);
      if (error instanceof Refused && error.status === 401) {
        mine.conversation.messages = mine.conversation.messages.filter((m) => m !== message);
        if (open === mine.conversation) draw();
        if (await askKey()) queueMicrotask(() => write(mine.conversation));
      }
    }
  } finally {
    cancelAnimationFrame(drawing);
    if (message.tokens && !message.tokens.length) delete message.tokens;
  }
}

async function stop() {
  const ended = writing?.ended;
  writing?.controller.abort();
  await ended;
}

function state() {
  $("send").textContent = writing ? "Stop" : "Send";
  $("send").classList.toggle("primary", !writing);
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (writing) {
    await stop();
    return;
  }
  const content = $("message").value.trim();
  if (!content) return;
  $("message").value = "";
  $("notice").hidden = true;
  fit();
  open.messages.push({ role: "user", content });
  open.title ||= content.split("\n")[0].slice(0, 60);
  await write(open);
});

$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  if (matchMedia("(pointer: coarse)").matches) return; // on a phone, Enter begins a line
  event.preventDefault();
  if (!writing) $("ask").requestSubmit();
});
$("message").addEventListener("input", fit);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (!WIDE.matches && document.body.classList.contains("side")) side(false);
  else if (writing) stop();
});

function fit() {
  const area = $("message");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

/** Keep the end in sight, unless the reader has scrolled up. */
let follows = true;
$("main").addEventListener("scroll", () => {
  const { scrollTop, clientHeight, scrollHeight } = $("main");
  follows = scrollHeight - scrollTop - clientHeight < 80;
});
function bottom(always = false) {
  if (always || (follows && writing)) $("main").scrollTop = $("main").scrollHeight;
}

/** Ask for the key until the server takes it; resolves with whether it did. */
async function askKey() {
  let text = "This server wants an API key. It is kept until this tab is closed.";
  for (;;) {
    const key = await question("API key", text, "Use it", "Key", "", "password");
    if (key === null) return false;
    keepKey(key.trim());
    try {
      model = await describe();
      about();
      return true;
    } catch (error) {
      keepKey("");
      text = error.status === 401 ? "That is not the key of this server." : error.message;
    }
  }
}

function about() {
  const outlier = model?.outlier ?? {};
  const { experts } = outlier;
  document.title = model ? model.id : "outlier-mlx";
  $("model").textContent = model?.id ?? "";
  const parts = [];
  if (model) parts.push(`${model.id} answers.`);
  if (experts) {
    parts.push(`Experts in ${experts.layers.length} layers: ${experts.top_k} of ${experts.experts} serve each` +
      ` token${experts.paged ? ", and are read from disk when they are needed" : ", and all are in memory"}.`);
  }
  if (outlier.context) parts.push(`A conversation can have ${outlier.context} tokens.`);
  $("about").textContent = parts.join(" ");
  $("with-experts").hidden = !experts;
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    $("settings").querySelector(`[name=${name}]`).placeholder = outlier.defaults?.[name] ?? "";
  }
}

$("open-settings").addEventListener("click", () => {
  const { elements } = $("settings").querySelector("form");
  const { settings } = open;
  elements.system.value = settings.system;
  elements.experts.checked = settings.experts;
  for (const name of NUMBERS) elements[name].value = settings[name] ?? "";
  $("settings").showModal();
});
$("settings").addEventListener("close", async () => {
  const { elements } = $("settings").querySelector("form");
  const settings = { system: elements.system.value, experts: elements.experts.checked };
  for (const name of NUMBERS) {
    const number = elements[name].valueAsNumber;
    if (Number.isFinite(number)) settings[name] = number;
  }
  open.settings = settings;
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch { /* The next conversation begins without them. */ }
  if (open.messages.length) await keep(open);
});

function side(shown) {
  document.body.classList.toggle("side", shown);
  $("open-side").setAttribute("aria-expanded", shown);
  const over = shown && !WIDE.matches;
  $("shade").hidden = !over;
  $("rest").inert = over;
  if (over) $("new").focus();
  else if (!shown) $("open-side").focus();
}
$("open-side").addEventListener("click", () => side(!document.body.classList.contains("side")));
$("close-side").addEventListener("click", () => side(false));
$("shade").addEventListener("click", () => side(false));
WIDE.addEventListener("change", () => {
  side(WIDE.matches);
  document.activeElement?.blur();
});

$("new").addEventListener("click", () => {
  show(fresh());
  if (!WIDE.matches) side(false);
  $("message").focus();
});

$("export").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob([store.exported(conversations)], { type: "application/json" }));
  make("a", { href: url, download: "conversations.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
});
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  $("file").value = "";
  if (!file) return;
  try {
    const found = store.imported(await file.text());
    for (const conversation of found) await store.put(conversation);
    conversations = await store.all();
    list();
    notice(`${found.length} conversation${found.length === 1 ? " was" : "s were"} imported.`);
  } catch (error) {
    notice(`${file.name} cannot be imported: ${error.message}`);
  }
});

$("theme").addEventListener("click", () => theme(true));
theme(false);
document.body.classList.toggle("side", WIDE.matches);
$("open-side").setAttribute("aria-expanded", WIDE.matches);
conversations = await store.all();
const last = sessionStorage.getItem("outlier-mlx open");
show(conversations.find(({ id }) => id === last) ?? fresh());
$("message").focus();
if (!(await store.lasts())) notice("This browser keeps nothing: conversations end with the page.");
try {
  model = await describe();
} catch (error) {
  if (error.status === 401) await askKey();
  else notice(`The server cannot be reached: ${error.message}`);
}
about();
draw();
document.body.dataset.ready = "true";
