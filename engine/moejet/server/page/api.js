// Speaks to the server. Addresses are relative to the page, wherever the application is mounted.

const KEY = 'moejet.api_key';

export class ApiError extends Error {
  constructor(message, status, code = null, retryAfter = null) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY),
  set: (key) => sessionStorage.setItem(KEY, key),
  forget: () => sessionStorage.removeItem(KEY),
};

function headers(extra = {}) {
  const key = apiKey.get();
  return key ? { ...extra, authorization: `Bearer ${key}` } : extra;
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers), credentials: 'omit' });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError('The server cannot be reached.', 0);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let message = `The server answered ${response.status}.`;
  let code = null;
  try {
    const { error } = await response.json();
    message = error?.message || message;
    code = error?.code ?? null;
  } catch {
    // No JSON, as from a proxy: the status is all there is to say.
  }
  return new ApiError(message, response.status, code, response.headers.get('retry-after'));
}

export async function models() {
  const body = await (await request('v1/models')).json();
  return (body.data ?? []).map((model) => model.id);
}

/** Names of the strategies by which the server can answer, and how many samples one may ask for. */
export async function strategies() {
  try {
    const { strategies: names, limits } = await (await request('props')).json();
    return { names: Array.isArray(names) ? names : [], most: limits?.strategy_samples ?? 0 };
  } catch {
    return { names: [], most: 0 }; // as with a server of another kind
  }
}

/** Makes a running request answer now; false if it does not think any more. */
export async function endThinking(id) {
  try {
    await request(`v1/requests/${encodeURIComponent(id)}/end_thinking`, { method: 'POST' });
    return true;
  } catch (error) {
    if (error.status === 404) return false;
    throw error;
  }
}

/** The chunks of a streamed chat completion. Throws ApiError, also for one that comes within the stream. */
export async function* streamChat(body, signal) {
  const response = await request('v1/chat/completions', {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of eventData(response.body)) {
    if (data === '[DONE]') return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError('The server sent something that is no JSON.', response.status);
    }
    if (chunk.error) throw new ApiError(chunk.error.message ?? 'The server failed.', 200, chunk.error.code);
    yield chunk;
  }
  throw new ApiError('The connection ended before the answer did.', 0);
}

/** The data of server-sent events, however the bytes are divided; comments and other fields are passed over. */
export async function* eventData(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = '';
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // A carriage return at the end may be the first half of a line break.
      const end = rest.endsWith('\r') && !done ? rest.length - 1 : rest.length;
      const lines = rest.slice(0, end).split(/\r\n|\n|\r/);
      rest = lines.pop() + rest.slice(end);
      for (const line of lines) {
        if (line === '') {
          if (data.length) yield data.join('\n');
          data = [];
        } else if (line.startsWith('data:')) {
          data.push(line.slice(line[5] === ' ' ? 6 : 5));
        }
      }
      if (done) return;
    }
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError('The connection to the server was lost.', 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}
