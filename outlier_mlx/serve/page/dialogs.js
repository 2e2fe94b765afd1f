// What the page tells, and what it asks.

export const $ = (id) => document.getElementById(id);

export const say = (text) => ($("spoken").textContent = text);

/** Tell it above the field for messages, with a button for an action. */
export function notice(text, action = "", act = null) {
  $("notice-text").textContent = text;
  $("notice-action").hidden = !action;
  $("notice-action").textContent = action;
  $("notice-action").onclick = () => {
    $("notice").hidden = true;
    act?.();
  };
  $("notice").hidden = false;
}
$("notice-close").addEventListener("click", () => ($("notice").hidden = true));

/** Ask in a dialog: resolves with the answer (empty without a field), or null. */
export function question(title, text, yes, field = "", value = "", type = "text") {
  const dialog = $("question");
  const input = dialog.querySelector("input");
  $("question-title").textContent = title;
  $("question-text").textContent = text;
  $("question-text").hidden = !text;
  $("question-yes").textContent = yes;
  $("question-field").hidden = !field;
  $("question-field").firstElementChild.textContent = field;
  Object.assign(input, { type, value });
  if (dialog.open) dialog.close("");
  dialog.returnValue = "";
  dialog.showModal();
  if (field) input.select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = input.value;
      input.value = "";
      resolve(dialog.returnValue === "yes" ? given : null);
    }, { once: true });
  });
}
$("question-no").addEventListener("click", () => $("question").close(""));
