// Text as elements. A model's text is only ever put into text nodes: nothing in it becomes markup.

/** A new element: its properties, then its children (elements or texts). */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Copy a text; where the page has no right to (plain HTTP), in the old way. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { value: text, className: "hidden-text", "aria-hidden": "true" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    focused?.focus();
  }
}

/** A button that copies what `text()` gives. */
export function copyButton(text, label = "Copy") {
  const button = make("button", { type: "button", className: "quiet", textContent: label });
  button.addEventListener("click", async () => {
    await copy(text());
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

/**
 * Show a text in an element: paragraphs, headings, lists and code. What is there already and has
 * not changed stays, so that a selection and the reading position outlive the next token.
 */
export function show(element, text) {
  const blocks = blocksOf(text);
  const before = element.blocks ?? [];
  let same = 0;
  while (same < before.length && same < blocks.length && isSame(before[same], blocks[same])) same++;
  while (element.childElementCount > same) element.lastElementChild.remove();
  for (const block of blocks.slice(same)) element.append(drawn(block));
  element.blocks = blocks;
}

const isSame = (a, b) => a.kind === b.kind && a.text === b.text && a.language === b.language;

const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^\s*(?:[-*+•]|(\d{1,9})[.)])\s+(.*)$/;

function blocksOf(text) {
  const blocks = [];
  let open = null;
  let fence = null;
  const add = (kind, line, more = {}) => {
    if (open?.kind === kind) open.text += `\n${line}`;
    else blocks.push((open = { kind, text: line, ...more }));
  };
  for (const line of text.split("\n")) {
    if (fence) {
      if (line.trim().startsWith(fence) && !line.trim().slice(fence.length).trim()) fence = open = null;
      else open.text += (open.begun ? "\n" : "") + line;
      if (open) open.begun = true;
      continue;
    }
    const fenced = line.length < 200 && FENCE.exec(line);
    const heading = HEADING.exec(line);
    const item = ITEM.exec(line);
    if (fenced) {
      fence = fenced[1];
      blocks.push((open = { kind: "code", text: "", language: fenced[2] }));
    } else if (!line.trim()) open = null;
    else if (heading) {
      blocks.push({ kind: "heading", text: heading[2] });
      open = null;
    } else if (item) add(item[1] ? "ol" : "ul", item[2], { language: item[1] });
    else add("p", line);
  }
  return blocks;
}

function drawn(block) {
  if (block.kind === "code") {
    const code = make("code", { textContent: block.text });
    const head = make("div", { className: "code-head" }, block.language || "code",
      copyButton(() => code.textContent, "Copy code"));
    const pre = make("pre", { tabIndex: 0, role: "region", "aria-label": "Code" }, code);
    return make("div", { className: "code" }, head, pre);
  }
  if (block.kind === "ul" || block.kind === "ol") {
    const list = make(block.kind);
    if (block.kind === "ol") list.start = Number(block.language);
    for (const item of block.text.split("\n")) list.append(make("li", {}, ...spans(item)));
    return list;
  }
  return make(block.kind === "heading" ? "h3" : "p", {}, ...spans(block.text));
}

const SPAN = /(`+)(.+?)\1(?!`)|\*\*(\S(?:.*?\S)?)\*\*/gs;

/** Text with code and strong words in it, as nodes; a very long one as it is, which is quick. */
function spans(text) {
  if (text.length > 5000) return [text];
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(SPAN)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    nodes.push(match[1] ? make("code", { textContent: match[2] })
      : make("strong", { textContent: match[3] }));
    end = match.index + match[0].length;
  }
  nodes.push(text.slice(end));
  return nodes;
}
