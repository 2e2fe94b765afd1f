// Run in the page by tests.

const shown = (element) => element.checkVisibility({ checkVisibilityCSS: true });
const hiddenText = (element) => getComputedStyle(element).clipPath !== "none";

/** What can be operated, and has no name that a screen reader would say. */
function nameless() {
  const found = [];
  const controls = "button, input, textarea, select, summary, a[href], [tabindex], dialog, nav, [role]";
  for (const element of document.querySelectorAll(controls)) {
    if (!shown(element)) continue;
    const role = element.getAttribute("role");
    if (role === "presentation" || role === "status") continue;
    const by = element.getAttribute("aria-labelledby");
    const name = element.getAttribute("aria-label") || (by && document.getElementById(by)?.textContent) ||
      [...(element.labels ?? [])].map((label) => label.textContent).join(" ") || element.textContent;
    if (!name.trim()) found.push(element.outerHTML.slice(0, 120));
  }
  return found;
}

/** A colour as [red, green, blue, alpha], whatever way it is written. */
function channels(color) {
  const context = (channels.context ??= new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true }));
  context.clearRect(0, 0, 1, 1);
  context.fillStyle = color;
  context.fillRect(0, 0, 1, 1);
  const [red, green, blue, alpha] = context.getImageData(0, 0, 1, 1).data;
  return [red, green, blue, alpha / 255];
}

const over = ([r, g, b, a], below) => [r, g, b].map((c, n) => c * a + below[n] * (1 - a));

function background(element) {
  const layers = [];
  for (let at = element; at; at = at.parentElement) {
    const layer = channels(getComputedStyle(at).backgroundColor);
    layers.push(layer);
    if (layer[3] === 1) break;
  }
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
}

const luminance = (rgb) => rgb
  .map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);

function ratio(a, b) {
  const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (light + 0.05) / (dark + 0.05);
}

/** Texts whose contrast is below a ratio. */
function faint(least) {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !shown(element) || hiddenText(element)) continue;
    if (element.closest("button:disabled, noscript, script")) continue;
    const ground = background(element);
    const contrast = ratio(over(channels(getComputedStyle(element).color), ground), ground);
    if (contrast < least) found.push([contrast, element.className, element.textContent.slice(0, 40)]);
  }
  return found;
}

/** Whether something is wider than the window. */
const scrollsSideways = () =>
  document.documentElement.scrollWidth > innerWidth || document.querySelector("main").scrollWidth > document.querySelector("main").clientWidth;

/** What can be touched and is smaller than 24 pixels either way. */
function tiny() {
  return [...document.querySelectorAll("button, input, summary, textarea")]
    .filter((element) => shown(element) && !hiddenText(element))
    .filter((element) => {
      const { width, height } = element.getBoundingClientRect();
      return width < 24 || height < 24;
    })
    .filter((element) => element.type !== "checkbox")
    .map((element) => element.outerHTML.slice(0, 120));
}

const background_of_page = () => background(document.body);

/** All that is kept beyond the session. */
const kept = () => JSON.stringify({ ...localStorage }) + document.cookie + location.href;
