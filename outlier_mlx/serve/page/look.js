// Light, dark, or as the system is.

import { $, say } from "./dialogs.js";

const THEMES = { "": "as the system", light: "light", dark: "dark" };

/** Label the theme's button; with `change`, take the next theme first. */
export function theme(change) {
  const root = document.documentElement;
  const names = Object.keys(THEMES);
  const next = (name) => names[(names.indexOf(name) + 1) % names.length];
  let now = root.dataset.theme ?? "";
  if (change) {
    now = next(now);
    if (now) root.dataset.theme = now;
    else delete root.dataset.theme;
    try {
      localStorage.setItem("outlier-mlx theme", now);
    } catch { /* It lasts as long as the page. */ }
    say(`Theme: ${THEMES[now]}`);
  }
  const label = `Theme: ${THEMES[now]}. Change it to: ${THEMES[next(now)]}`;
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
}
