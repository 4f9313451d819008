// The image and the evidence over it: target, style, opacity, zoom.

import { announce, byId, capital, el } from "./dom.js";

const STYLES = { overlay: "Overlay", heatmap: "Heat map" }; // of the server's /explain
const LARGEST_ZOOM = 8;
const STEP = 1.5; // a press of zoom
const MOVE = 0.1; // a press of an arrow, in widths of the picture

/**
 * Shows one image at a time. `evidence(item, {target, style, signal})` gives the server's explanation, kept on the item
 * or asked for. Returns {chosen, show, refresh, clear, pictures}; `refresh` when
 * what is known of the item has changed.
 */
export function createViewer(evidence) {
  let item = null;
  let url = null;
  let asking = new AbortController();
  let zoom = { scale: 1, x: 0, y: 0 };
  const chosen = { target: "predicted", style: "overlay" };

  const panes = byId("panes");
  const picture = byId("evidence-image");
  const originals = [byId("original-image"), byId("under-image")];

  function show(next) {
    clear();
    item = next;
    url = URL.createObjectURL(item.file);
    for (const image of originals) image.src = url;
    originals[0].alt = `The image ${item.file.name}`;
    setZoom({ scale: 1, x: 0, y: 0 });
  }

  /** Draw what is known of the item; ask for its evidence where it has been answered without. */
  async function refresh() {
    asking.abort();
    asking = new AbortController();
    picture.removeAttribute("src");
    picture.alt = "";
    byId("legend-words").textContent = "";
    byId("evidence-caption").textContent = "Evidence";
    panes.dataset.style = chosen.style;
    say("");
    if (item?.status !== "done") return;
    const classes = Object.keys(item.answer.probabilities);
    segments("targets", { predicted: "Predicted", ...Object.fromEntries(classes.map((name) => [name, capital(name)])) }, "target");
    const [shown, signal] = [item, asking.signal];
    say("Looking for the evidence …");
    try {
      const explanation = await evidence(shown, { ...chosen, signal });
      if (!signal.aborted) draw(explanation);
    } catch (error) {
      if (!signal.aborted) say(`${error.title ?? "This page failed"}. ${capital(error.detail ?? "")}`);
    }
  }

  function draw({ overlay_png: png, target, peak, empty }) {
    say(empty ? `No evidence for ${target} anywhere` : "");
    picture.src = `data:image/png;base64,${png}`;
    picture.alt = empty ? `No evidence for ${target}` : `Where the evidence for ${target} lies`;
    byId("evidence-caption").textContent = `Evidence for ${target}`;
    byId("legend-words").textContent = `From none to the most in this image. Peak ${peak.toPrecision(2)} in logits; a colour means nothing across images.`;
  }

  function say(words) {
    byId("evidence-state").textContent = words;
  }

  function clear() {
    asking.abort();
    if (url) URL.revokeObjectURL(url);
    url = null;
    item = null;
    for (const image of [...originals, picture]) image.removeAttribute("src");
  }

  /** Copies of what is seen, for paper; they live as long as the image is shown. */
  function pictures() {
    const over = picture.cloneNode();
    over.removeAttribute("id");
    const figure = (caption, ...images) => el("figure", {}, el("div", { class: "layers" }, images), el("figcaption", {}, caption));
    const image = () => el("img", { src: url, alt: "" });
    const evidenceSeen = picture.src && figure(byId("evidence-caption").textContent, image(), over);
    return el("div", { class: "pair", "--opacity": opacity(), "--ratio": panes.style.getPropertyValue("--ratio") }, figure("Image", image()), evidenceSeen);
  }

  const opacity = () => (chosen.style === "heatmap" ? 1 : byId("opacity").value / 100);

  function segments(id, choices, name) {
    const box = byId(id);
    if (box.dataset.choices === Object.keys(choices).join()) return; // or whoever is choosing would lose the focus
    box.dataset.choices = Object.keys(choices).join();
    box.querySelectorAll("label").forEach((label) => label.remove());
    for (const [value, words] of Object.entries(choices)) {
      const input = el("input", { type: "radio", name, value, checked: chosen[name] === value });
      box.append(el("label", {}, input, el("span", {}, words)));
    }
  }

  function setZoom({ scale, x, y }) {
    scale = Math.min(LARGEST_ZOOM, Math.max(1, scale));
    const most = (scale - 1) / 2; // the picture never leaves its frame
    const within = (shift) => Math.min(most, Math.max(-most, shift));
    zoom = { scale, x: within(x), y: within(y) };
    panes.style.setProperty("--zoom", zoom.scale);
    panes.style.setProperty("--x", zoom.x);
    panes.style.setProperty("--y", zoom.y);
    panes.toggleAttribute("data-zoomed", scale > 1);
    byId("zoom-now").textContent = `${scale.toFixed(1).replace(".0", "")}×`;
    byId("zoom-in").disabled = scale === LARGEST_ZOOM;
    byId("zoom-out").disabled = scale === 1;
  }

  const scaled = (factor) => setZoom({ scale: zoom.scale * factor, x: zoom.x * factor, y: zoom.y * factor });
  const moved = (x, y) => setZoom({ ...zoom, x: zoom.x + x, y: zoom.y + y });

  function setOpacity() {
    panes.style.setProperty("--opacity", opacity());
    byId("opacity").disabled = chosen.style === "heatmap";
    byId("opacity-now").textContent = `${byId("opacity").value}%`;
  }

  function choose(event) {
    chosen[event.target.name] = event.target.value;
    setOpacity();
    refresh().then(() => picture.alt && announce(picture.alt));
  }

  const KEYS = {
    "+": () => scaled(STEP),
    "=": () => scaled(STEP),
    "-": () => scaled(1 / STEP),
    0: () => setZoom({ scale: 1, x: 0, y: 0 }),
    ArrowLeft: () => moved(MOVE, 0),
    ArrowRight: () => moved(-MOVE, 0),
    ArrowUp: () => moved(0, MOVE),
    ArrowDown: () => moved(0, -MOVE),
  };

  originals[0].addEventListener("load", () => {
    panes.style.setProperty("--ratio", originals[0].naturalWidth / originals[0].naturalHeight);
    panes.closest(".viewer").hidden = false;
  });
  originals[0].addEventListener("error", () => (panes.closest(".viewer").hidden = true));
  segments("styles", STYLES, "style");
  byId("targets").addEventListener("change", choose);
  byId("styles").addEventListener("change", choose);
  byId("opacity").addEventListener("input", setOpacity);
  byId("beside").addEventListener("change", (event) => panes.toggleAttribute("data-alone", !event.target.checked));
  byId("zoom-in").addEventListener("click", () => scaled(STEP));
  byId("zoom-out").addEventListener("click", () => scaled(1 / STEP));
  panes.addEventListener("keydown", (event) => {
    const move = event.ctrlKey || event.metaKey || event.altKey ? null : KEYS[event.key];
    if (!move || (zoom.scale === 1 && event.key.startsWith("Arrow"))) return;
    event.preventDefault();
    move();
  });
  panes.addEventListener("dblclick", () => (zoom.scale > 1 ? KEYS[0]() : scaled(STEP * STEP)));
  panes.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return; // the wheel alone scrolls the page; with control, or a pinch, it zooms
      event.preventDefault();
      scaled(Math.exp(-event.deltaY / 200));
    },
    { passive: false },
  );
  panes.addEventListener("pointerdown", (event) => zoom.scale > 1 && panes.setPointerCapture(event.pointerId));
  panes.addEventListener("pointermove", (event) => {
    if (!panes.hasPointerCapture(event.pointerId)) return;
    const { width, height } = byId("evidence").querySelector(".stage").getBoundingClientRect();
    moved(event.movementX / width, event.movementY / height);
  });
  setOpacity();
  return { chosen, show, refresh, clear, pictures };
}
