// One message of a conversation, as it is shown.

import { ExpertsPanel } from "./experts.js";
import { copyButton, make, show } from "./text.js";

/**
 * A message's element; `update()` shows what has changed in the message.
 * @param {object} message as it is kept.
 * @param {string} who wrote it.
 * @param {object} actions `edit(content, again)` and `retry()`.
 */
export class MessageView {
  constructor(message, who, actions) {
    this.message = message;
    this.actions = actions;
    const assistant = message.role === "assistant";
    this.text = make("div", { className: "text body" });
    this.thought = make("div", { className: "text" });
    this.reasoning = make("details", { className: "reasoning", hidden: true },
      make("summary", { textContent: "Reasoning" }), this.thought);
    this.note = make("p", { className: "note", hidden: true });
    this.stats = make("span", { className: "stats" });
    this.editor = make("div", { hidden: true });
    this.expertsButton = make("button", {
      type: "button", className: "quiet experts-button", textContent: "Experts", hidden: true,
      "aria-expanded": "false", onclick: () => this.toggleExperts(),
    });
    this.editButton = button("Edit", () => this.edit());
    const retry = button(assistant ? "Retry" : "Answer again", () => actions.retry());
    this.footer = make("div", { className: "actions", role: "group", "aria-label": `Actions for this message of ${who}` },
      copyButton(() => message.content), this.editButton, retry, this.expertsButton, this.stats);
    this.element = make("li", { className: `message ${message.role}` },
      make("h2", { textContent: who }), this.reasoning, this.text, this.editor, this.note, this.footer);
    this.update();
  }

  /** @param {boolean} busy whether the answer is being written. */
  update(busy = false) {
    const { content, reasoning, note, stats, tokens } = this.message;
    this.element.classList.toggle("busy", busy);
    this.element.setAttribute("aria-busy", busy);
    show(this.text, content);
    this.reasoning.hidden = !reasoning;
    if (reasoning) show(this.thought, reasoning);
    this.note.hidden = !note;
    this.note.textContent = note ?? "";
    this.stats.textContent = stats ? described(stats) : "";
    this.expertsButton.hidden = !tokens?.length;
    // It is more than an answer's text: while that is written, a few times a second are enough.
    const now = performance.now();
    if (!this.panel || this.panel.element.hidden || (busy && now - this.drawn < 300)) return;
    this.drawn = now;
    this.panel.update();
  }

  toggleExperts() {
    if (!this.panel) {
      this.panel = new ExpertsPanel(this.message);
      this.element.append(this.panel.element);
      this.panel.element.hidden = true;
      this.expertsButton.setAttribute("aria-controls", this.panel.id);
    }
    this.panel.element.hidden = !this.panel.element.hidden;
    this.expertsButton.setAttribute("aria-expanded", !this.panel.element.hidden);
    if (!this.panel.element.hidden) this.panel.update();
  }

  edit() {
    const { content, role } = this.message;
    const area = make("textarea", { value: content, rows: Math.min(12, content.split("\n").length + 1),
      "aria-label": "Text of the message" });
    const done = (again) => {
      this.close();
      this.actions.edit(area.value, again);
    };
    const save = button("Save", () => done(false));
    const send = button("Save and ask", () => done(true), "primary");
    this.editor.replaceChildren(area, make("p", { className: "buttons" },
      button("Cancel", () => this.close()), save, ...(role === "user" ? [send] : [])));
    area.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.close();
    });
    this.editor.hidden = false;
    this.text.hidden = this.footer.hidden = true;
    area.focus();
  }

  close() {
    this.editor.hidden = true;
    this.editor.replaceChildren();
    this.text.hidden = this.footer.hidden = false;
    this.editButton.focus();
  }
}

const button = (label, onclick, className = "quiet") =>
  make("button", { type: "button", className, textContent: label, onclick });

/** Numbers of an answer, such as "12.3 tokens/s · first token after 0.21 s · 57 tokens". */
function described({ count, first, rate }) {
  const parts = [];
  if (rate) parts.push(`${rate.toFixed(1)} tokens/s`);
  if (first) parts.push(`first token after ${first.toFixed(2)} s`);
  parts.push(`${count} token${count === 1 ? "" : "s"}`);
  return parts.join(" · ");
}
