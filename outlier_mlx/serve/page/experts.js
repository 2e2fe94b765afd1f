// Which experts served an answer: token by token, and all tokens together.
//
// A token is {text, experts}: for each MoE layer, the experts that served it as [number, weight,
// from], where `from` is a key of FROM.

import { make } from "./text.js";

const FROM = {
  memory: "memory",
  early: "read ahead",
  disk: "read from disk",
  skipped: "left out",
  unused: "not needed",
};
const PLACES = ["first", "second", "third"];
/** Those that were computed with. */
const SERVED = new Set(["memory", "early", "disk"]);

/** All tokens of an answer together: how often each expert served, and where it was. */
export function summary(tokens, layers, experts) {
  const used = layers.map(() => new Array(experts).fill(0));
  const from = {};
  for (const token of tokens) {
    token.experts.forEach((uses, layer) => {
      for (const [expert, , place] of uses) {
        from[place] = (from[place] ?? 0) + 1;
        if (SERVED.has(place) && used[layer]?.[expert] !== undefined) used[layer][expert] += 1;
      }
    });
  }
  return { used, from };
}

const percent = (part, all) => {
  const share = (100 * part) / Math.max(1, all);
  return share > 0 && share < 1 ? "under 1 %" : `${Math.round(share)} %`;
};

/** Where experts were, such as "96 % of them in memory, 4 % read from disk". */
function places(from) {
  const all = Object.values(from).reduce((sum, count) => sum + count, 0);
  const parts = Object.keys(FROM).filter((name) => from[name]);
  if (parts.length === 1 && parts[0] === "memory") return "all of them were in memory";
  return parts
    .map((name) => `${percent(from[name], all)} ${name === "memory" ? "were in memory" : FROM[name]}`)
    .join(", ");
}

const shown = (text) => (text === "" ? "·" : text);
/** A token as a screen reader should say it. */
const spoken = (text) => text.trim() || (text.includes("\n") ? "new line" : text ? "space" : "part of a character");

let panels = 0;

/** The panel of one answer. `update` shows what came since. */
export class ExpertsPanel {
  constructor(message) {
    this.message = message;
    this.chosen = -1;
    this.pinned = false;
    this.options = [];
    this.id = `experts-${++panels}`;
    this.sum = make("p", { className: "sum" });
    this.bar = make("div", { className: "bar", "aria-hidden": "true" });
    this.strip = make("div", {
      className: "strip", role: "listbox", "aria-label": "Tokens of the answer",
      "aria-describedby": `${this.id}-help`,
    });
    this.table = make("div", { className: "scroll", tabIndex: 0, role: "region" });
    this.table.setAttribute("aria-label", "Experts of the chosen token");
    this.heat = make("div", { className: "scroll", tabIndex: 0, role: "region" });
    this.heat.setAttribute("aria-label", "How often each expert served");
    this.words = make("div", { className: "words" });
    this.element = make("section", { className: "experts", id: this.id, "aria-label": "Experts" },
      this.sum, this.bar, legend(),
      make("h3", { textContent: "Token by token" }),
      make("p", { className: "soft", id: `${this.id}-help`, textContent:
        "Point at a token, tap it, or move with the arrow keys: the table shows the experts that" +
        " it was computed with. Underlined tokens had to wait for the disk." }),
      this.strip, this.table,
      make("h3", { textContent: "All tokens" }),
      make("p", { className: "soft", textContent:
        "Each row is a layer, each column an expert: the stronger its colour, the more tokens it" +
        " served. The experts of the chosen token have a frame." }),
      this.heat,
      make("details", {}, make("summary", { textContent: "In words" }), this.words));
    this.strip.addEventListener("pointerover", (event) => this.point(event, false));
    this.strip.addEventListener("click", (event) => this.point(event, true));
    this.strip.addEventListener("focusin", (event) => this.point(event, true));
    this.strip.addEventListener("keydown", (event) => this.key(event));
  }

  /** Show the tokens that came since, and the counts of all. */
  update() {
    const { tokens, layers, experts } = this.message;
    for (let number = this.options.length; number < tokens.length; number++) {
      this.options.push(this.option(tokens[number], number, tokens.length));
    }
    this.strip.append(...this.options.slice(this.strip.childElementCount));
    const { used, from } = summary(tokens, layers, experts);
    const k = tokens[0]?.experts[0]?.length ?? 0;
    this.sum.textContent = `In each of ${count(layers.length, "layer")}, ${k} of ${experts} experts` +
      ` served each token. Of all that were asked for, ${places(from)}.`;
    this.bar.replaceChildren(...Object.keys(FROM).filter((name) => from[name]).map((name) => {
      const part = make("span", { className: name });
      part.style.setProperty("flex-grow", from[name]);
      return part;
    }));
    this.drawHeat(used, tokens.length);
    if (this.chosen < 0 && tokens.length) this.choose(0);
    else this.frame();
  }

  option(token, number) {
    const read = token.experts.flat().filter(([, , from]) => from === "disk").length;
    const option = make("span", {
      role: "option", tabIndex: number ? -1 : 0, className: "token", textContent: shown(token.text),
      "aria-selected": "false",
      "aria-label": `${spoken(token.text)}, ${read ? `${read} read from disk` : "none waited for"}`,
    });
    if (read) option.classList.add("waited");
    option.number = number;
    return option;
  }

  point(event, pins) {
    const number = event.target.number;
    if (number === undefined || (this.pinned && !pins)) return;
    if (pins) this.pinned = true;
    this.choose(number);
  }

  key(event) {
    const last = this.options.length - 1;
    const to = { ArrowRight: this.chosen + 1, ArrowDown: this.chosen + 1, ArrowLeft: this.chosen - 1,
      ArrowUp: this.chosen - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(last, to)));
    this.options[this.chosen].focus();
  }

  /** Show one token's experts. */
  choose(number) {
    const before = this.options[this.chosen];
    if (before) {
      before.tabIndex = -1;
      before.setAttribute("aria-selected", "false");
    }
    this.chosen = number;
    const option = this.options[number];
    option.tabIndex = 0;
    option.setAttribute("aria-selected", "true");
    const token = this.message.tokens[number];
    this.table.replaceChildren(tokenTable(token, number, this.message.layers));
    this.frame();
  }

  /** Frame the chosen token's experts in the map of all. */
  frame() {
    for (const cell of this.heat.querySelectorAll(".framed")) cell.classList.remove("framed", "early", "disk");
    this.message.tokens[this.chosen]?.experts.forEach((uses, layer) => {
      for (const [expert, , from] of uses) {
        if (!SERVED.has(from)) continue;
        this.cells[layer]?.[expert]?.classList.add("framed", from);
      }
    });
  }

  drawHeat(used, tokens) {
    const { layers, experts } = this.message;
    const most = Math.max(1, ...used.flat());
    this.cells = used.map((row) => row.map((served, expert) => {
      const cell = make("td", { title: `expert ${expert}: ${served} of ${count(tokens, "token")}` },
        make("span", { textContent: percent(served, tokens) }));
      cell.style.setProperty("--share", served / most);
      return cell;
    }));
    const head = make("tr", {}, make("td", { className: "corner", textContent: "layer" }),
      ...Array.from({ length: experts }, (_, expert) =>
        make("th", { scope: "col", textContent: expert, "aria-label": `expert ${expert}` })));
    const rows = this.cells.map((cells, layer) => make("tr", {},
      make("th", { scope: "row", textContent: layers[layer], "aria-label": `layer ${layers[layer]}` }),
      ...cells));
    const table = make("table", { className: experts > 12 ? "heat many" : "heat" },
      make("caption", { className: "hidden-text", textContent:
        "Share of the answer's tokens that each expert served" }),
      make("thead", {}, head), make("tbody", {}, ...rows));
    this.heat.replaceChildren(table);
    this.words.replaceChildren(...used.map((row, layer) => {
      const order = row.map((served, expert) => [served, expert]).sort((a, b) => b[0] - a[0]);
      const most = order.filter(([served]) => served).slice(0, 4)
        .map(([served, expert]) => `expert ${expert} (${percent(served, tokens)})`);
      const none = row.filter((served) => !served).length;
      return make("p", { textContent: `Layer ${layers[layer]}: most tokens were served by ` +
        `${most.join(", ")}${none ? `; ${count(none, "expert")} served none` : ""}.` });
    }));
  }
}

const count = (number, name) => `${number} ${name}${number === 1 ? "" : "s"}`;

function legend() {
  return make("p", { className: "legend" }, ...["memory", "early", "disk"].map((name) =>
    make("span", {}, make("i", { className: name, "aria-hidden": "true" }), ` ${{
      memory: "in memory", early: "read ahead of need", disk: "read from disk, and waited for",
    }[name]}`)));
}

function tokenTable(token, number, layers) {
  const k = Math.max(...token.experts.map((uses) => uses.length));
  const head = make("tr", {}, make("th", { scope: "col", textContent: "layer" }),
    ...Array.from({ length: k }, (_, place) => make("th", {
      scope: "col", textContent: `${PLACES[place] ?? `${place + 1}th`} expert` })));
  const rows = token.experts.map((uses, layer) => {
    const all = uses.reduce((sum, [, weight]) => sum + Math.abs(weight), 0) || 1;
    return make("tr", {}, make("th", { scope: "row", textContent: layers[layer] }),
      ...uses.map(([expert, weight, from]) => {
        const bar = make("span", { className: "weight", "aria-hidden": "true" });
        bar.style.setProperty("--share", Math.abs(weight) / all);
        return make("td", {},
          make("b", { textContent: expert }), " ",
          make("span", { className: "number", title: "weight", textContent: weight.toFixed(3) }), " ",
          bar, " ",
          make("span", { className: `from ${from in FROM ? from : ""}`, textContent: FROM[from] ?? from }));
      }));
  });
  const caption = make("caption", {}, `Token ${number + 1}: `,
    make("code", { textContent: token.text === "" ? "part of a character" : token.text }));
  return make("table", { className: "uses" }, caption, make("thead", {}, head), make("tbody", {}, ...rows));
}
