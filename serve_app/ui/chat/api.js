/** Requests to the service that this page comes from, with the API key where one is needed. */

const KEY = 'serve_app.key'

export class Api {
  /** @param {string} root where the service is: its route prefix @param {() => Promise<void>} askForKey */
  constructor(root, askForKey) {
    this.root = root
    this.askForKey = askForKey
  }

  get key() {
    return localStorage.getItem(KEY) ?? ''
  }

  set key(value) {
    if (value) localStorage.setItem(KEY, value)
    else localStorage.removeItem(KEY)
  }

  /** The model's card, or how far it is with loading. */
  async ready() {
    const response = await this.#send('/ready', { cache: 'no-store' })
    return response.json()
  }

  /** Begins a stream that can be resumed. */
  chat(body, signal) {
    const headers = { 'content-type': 'application/json', 'x-stream-resume': '1' }
    return this.#send('/v1/chat/completions', { method: 'POST', headers, body: JSON.stringify(body), signal })
  }

  /** The rest of a stream. */
  rest({ streamId, lastEventId }, signal) {
    const headers = lastEventId ? { 'last-event-id': lastEventId } : {}
    return this.#send(`/v1/streams/${encodeURIComponent(streamId)}`, { headers, signal, cache: 'no-store' })
  }

  /** Tells the service that nobody wants the rest of a stream. */
  cancel({ streamId }) {
    return this.#send(`/v1/streams/${encodeURIComponent(streamId)}`, { method: 'DELETE', keepalive: true })
  }

  async #send(path, how) {
    for (;;) {
      const key = this.key
      const headers = { ...how.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) }
      const response = await fetch(this.root + path, { ...how, headers })
      if (response.status !== 401) return response
      await response.body?.cancel()
      if (key === this.key) await this.askForKey(Boolean(key))
      how.signal?.throwIfAborted()
    }
  }
}
