// The server's API: what its model is, and answers as they are generated.

const KEY = "outlier-mlx key";

/** The server refused: its message, and the HTTP status. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Keep the API key for this tab, and for this session only. */
export function keepKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** What the server tells about its model: its name, and its fields `outlier`. */
export async function describe() {
  const response = await ask("v1/models", {});
  const { data } = await response.json();
  return data[0];
}

/**
 * The chunks of an answer, as they come.
 * @param {object} body of the request.
 * @param {AbortSignal} signal ends it.
 */
export async function* answer(body, signal) {
  const sent = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(sent),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(response.status, chunk.error.message);
    yield chunk;
  }
  throw new Refused(response.status, "the connection ended before the answer was complete");
}

async function ask(path, options) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Refused(response.status, told?.error?.message ?? `status ${response.status}`);
}

/** The data of server-sent events; each of this server's is one line. */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += decoder.decode(value ?? new Uint8Array(), { stream: !done });
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6).trimEnd();
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
