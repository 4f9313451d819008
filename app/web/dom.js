// Elements and words: what every part of the page is written with. Nothing here, or elsewhere, parses text as HTML.

export const byId = (id) => document.getElementById(id);

/** An element; `onclick` and the like are listeners, `--name` a property of CSS, true an attribute without a value. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** A symbol of index.html; words beside it say the same. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A share as people read it; never 0% or 100% where it is neither. */
export function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1%";
  if (share < 1 && share > 0.999) return ">99.9%";
  return `${(100 * share).toFixed(1)}%`;
}

export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** A coverage's name, "0.95" or "off", as people read it. */
export const coverageWords = (coverage) => (Number(coverage) ? `${Math.round(100 * coverage)}%` : coverage);

export function bytes(count) {
  return count < 1e6 ? `${Math.max(1, Math.round(count / 1e3))} KB` : `${(count / 1e6).toFixed(1).replace(".0", "")} MB`;
}

/** For who cannot see what changed. */
export function announce(text) {
  byId("live").textContent = text;
}
