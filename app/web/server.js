// The one file that talks, and only to the server that this page came from.

const ROOT = new URL("../", import.meta.url);
const KEY = "dermlens-key"; // in this tab's storage, which ends with the tab
const LONGEST_BUSY_MS = 60_000; // a server that is busy for longer is told as such

/** A problem as the server tells it (RFC 9457), or what kept its answer from coming. */
export class Refusal extends Error {
  constructor(problem) {
    super(problem.title);
    Object.assign(this, { status: 0, detail: "", ...problem });
  }
}

export const readKey = () => sessionStorage.getItem(KEY);
export const keepKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);

export const models = () => ask("models").then((answer) => answer.json());

/** The prediction of one image; `options.query` as the route takes it. */
export const predict = (file, options) => ask("predict", { ...options, body: file }).then((answer) => answer.json());

/** The prediction with its evidence. Drawn at full opacity: laid over the image at less, it is what the server draws. */
export function explain(file, { query, ...options }) {
  return ask("explain", { ...options, query: { ...query, alpha: 1 }, body: file }).then((answer) => answer.json());
}

/** A picture of a version's report, as a blob: an <img> could not send the key. */
export function reportPicture(version, file) {
  return ask(`models/${encodeURIComponent(version)}/report/${encodeURIComponent(file)}`).then((answer) => answer.blob());
}

/** Asks until it is answered otherwise than "later"; `onWait` hears for how long and why. Throws Refusal, AbortError. */
async function ask(path, { query = {}, body, background = false, signal, onWait = () => {} } = {}) {
  const url = new URL(path, ROOT);
  url.search = new URLSearchParams(query);
  const headers = { Accept: "application/json" };
  if (readKey()) headers.Authorization = `Bearer ${readKey()}`;
  if (background) headers["X-Priority"] = "batch";
  // The server looks at the bytes; a type that the browser made up from the name would only hide what they are
  if (body) headers["Content-Type"] = "application/octet-stream";
  const giveUpAt = Date.now() + LONGEST_BUSY_MS;
  for (;;) {
    const answer = await send(url, { method: body ? "POST" : "GET", headers, body, signal });
    if (answer.ok) return answer;
    const refusal = new Refusal(await problemOf(answer));
    const waitS = Number(answer.headers.get("Retry-After"));
    const patient = answer.status === 429 || (answer.status === 503 && Date.now() + 1000 * waitS < giveUpAt);
    if (!waitS || !patient) throw refusal;
    onWait(waitS, refusal);
    await later(1000 * waitS, signal);
  }
}

async function send(url, options) {
  try {
    return await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal({ title: "The server cannot be reached", detail: "see whether it runs, then try again" });
  }
}

async function problemOf(answer) {
  try {
    const { title, detail, status } = await answer.json();
    return { title: title ?? `The server answered ${answer.status}`, detail, status };
  } catch {
    return { title: `The server answered ${answer.status}`, status: answer.status }; // a proxy's own page
  }
}

function later(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
