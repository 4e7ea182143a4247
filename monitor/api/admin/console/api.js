// Asking the server. The cookie is the browser's affair; what changes something carries the console's own header.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let ended = () => {};

/** Called when the session is over. */
export function whenEnded(act) {
  ended = act;
}

async function send(method, path, body, headers, signal) {
  const options = { method, headers: { ...headers }, credentials: "same-origin", redirect: "error", signal };
  if (method !== "GET") options.headers["X-Midstream-Console"] = "1";
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer; is it still running?");
  }
  let content = {};
  try {
    content = await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // Of a refusal the status says enough; half an answer must not be taken for an empty one.
    if (answer.ok) throw new Refused(0, "The server's answer was cut off; try again");
  }
  if (answer.ok) return content;
  const refused = new Refused(answer.status, content?.error?.message ?? `The server answered ${answer.status}`);
  if (answer.status === 401 && !headers?.Authorization) ended();
  throw refused;
}

export const get = (path, signal) => send("GET", path, undefined, {}, signal);
export const post = (path, body) => send("POST", path, body, {});
export const signOut = () => send("DELETE", "/admin/session", undefined, {});

/** The one request that carries the key; nothing keeps it. */
export const signIn = (key, name) => send("POST", "/admin/session", name ? { name } : {}, { Authorization: `Bearer ${key}` });

/** A path with a query; empty values are left out, lists repeat the name. */
export function withQuery(path, values) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") query.append(name, one);
    }
  }
  return `${path}?${query}`;
}
