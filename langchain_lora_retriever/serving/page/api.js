// Talks to the server. Paths are relative, so that the page works below a prefix too.

let askForKey = null; // how the page asks, set by `onKeyWanted`

export function onKeyWanted(ask) {
  askForKey = ask;
}

export class ServerError extends Error {}

async function request(path, options) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    if (response.status === 401 && askForKey) {
      sessionStorage.setItem("key", await askForKey(key !== null));
      continue;
    }
    const told = await response.json().catch(() => null);
    throw new ServerError(told?.error?.message ?? `The server answered ${response.status}.`);
  }
}

function asJson(body, signal) {
  if (body === undefined) return { signal };
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
}

export async function json(path, body, signal) {
  return (await request(path, asJson(body, signal))).json();
}

// Server-sent events of a chat completion, one by one, until the stream says that it is done.
export async function* events(path, body, signal) {
  const response = await request(path, asJson(body, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
