/**
 * Writes answers: follows their streams, saves what arrives, and lets one tab at a time do so for each answer.
 * Knows no page: its listener shows what changes.
 */
import { addEvent, emptyAnswer } from './answer.js'
import { follow } from './resume.js'
import { LiveRate, seconds } from './speed.js'

/** An answer is saved this often while it grows, or less often: what comes after the last save is read again after a
 * reload. */
const SAVE_MS = 300
/** Saving a long answer with logprobs takes tens of milliseconds. It may take at most this share of the time. */
const SAVE_SHARE = 0.05

export class Runner {
  #running = new Map()

  /**
   * @param {import('./api.js').Api} api
   * @param {import('./store.js').Store} store
   * @param {(message: any, change: 'grew' | 'state') => void} onChange
   */
  constructor(api, store, onChange) {
    this.api = api
    this.store = store
    this.onChange = onChange
    addEventListener('pagehide', () => this.saveAll())
  }

  /** Whether this tab writes the answer. */
  writes(id) {
    return this.#running.get(id)?.holds ?? false
  }

  /** Tokens per second at the moment, or null. */
  rate(id) {
    return this.#running.get(id)?.rate.rate() ?? null
  }

  /** The answer as this tab writes it; undefined if it does not. */
  message(id) {
    return this.#running.get(id)?.message
  }

  /** Stops, and saves the answer no more: its chat is deleted. */
  forget(id) {
    const run = this.#running.get(id)
    if (!run) return
    run.forgotten = true
    run.stop.abort(new DOMException('deleted', 'AbortError'))
  }

  stop(id) {
    const run = this.#running.get(id)
    if (!run) return
    if (run.holds) run.stop.abort(new DOMException('stopped', 'AbortError'))
    else this.api.cancel(run.message).catch(() => {}) // another tab writes it, and sees that it ends
  }

  saveAll() {
    for (const run of this.#running.values()) if (run.holds) this.#save(run)
  }

  async #save(run) {
    if (!run.forgotten) await this.store.saveMessage(run.message)
  }

  /**
   * Writes an answer to its end, or waits until the tab that does is gone.
   *
   * @param {any} message the answer: changed as it grows
   * @param {() => object} body of the request, where it was not sent yet
   */
  async run(message, body) {
    if (this.#running.has(message.id)) return
    const run = { message, stop: new AbortController(), rate: new LiveRate(), holds: false, nextSave: 0 }
    this.#running.set(message.id, run)
    try {
      await alone(`serve_app.answer.${message.id}`, run.stop.signal, async (waited) => {
        if (waited) Object.assign(message, await this.store.message(message.id))
        if (message.status !== 'running') return
        run.holds = true
        await this.#write(run, body)
      })
    } catch (error) {
      if (error.name !== 'AbortError') throw error
    } finally {
      this.#running.delete(message.id)
      this.onChange(message, 'state')
    }
  }

  async #write(run, body) {
    const { message } = run
    const reloaded = Boolean(message.streamId)
    message.asked ||= Date.now()
    const note = (text) => {
      message.notes.push(text)
      message.waiting = ''
      this.onChange(message, 'state')
    }
    try {
      await follow({
        place: message,
        signal: run.stop.signal,
        begin: (signal) => this.api.chat(body(), signal),
        continued: (place, signal) => this.api.rest(place, signal),
        onEvent: (event) => this.#add(run, event),
        onComment: (comment) => {
          if (comment.startsWith('continued ')) note(`${comment[0].toUpperCase()}${comment.slice(1)}.`)
        },
        onLost: ({ sent }) => {
          message.waiting = sent ? 'Connection lost. Reconnecting…' : 'The service does not answer. Trying again…'
          this.onChange(message, 'state')
        },
        onContinued: ({ ms, sent, first }) => {
          if (first && reloaded) note(`Page opened again: continued after ${seconds(ms)}.`)
          else if (sent) note(`Connection lost: continued after ${seconds(ms)}.`)
          else note(`The service did not answer: asked again, and it went on after ${seconds(ms)}.`)
        },
      })
      const stopped = message.failure?.code === 'cancelled'
      if (stopped) message.failure = null
      message.status = stopped ? 'stopped' : message.failure ? 'failed' : 'done'
    } catch (error) {
      if (error.code === 'stream_changed' && !run.again) {
        run.again = true
        Object.assign(message, emptyAnswer(), { notes: ['Part of the answer was lost with its replica: written again.'] })
        return this.#write(run, body)
      }
      if (run.stop.signal.aborted) {
        message.status = 'stopped'
        if (message.streamId) this.api.cancel(message).catch(() => {}) // it ends by itself when nobody reads it
      } else {
        message.status = 'failed'
        message.failure = { code: error.code ?? 'error', message: error.message, status: error.status ?? 0 }
      }
    }
    message.waiting = ''
    await this.#save(run)
  }

  #add(run, event) {
    const { message } = run
    const now = Date.now()
    const next = addEvent(message, event, now)
    message.waiting = ''
    run.rate.add(now, message.usage?.completion_tokens ?? 0)
    if (now > run.nextSave) {
      const begun = performance.now()
      this.#save(run) // copies the message at once, and writes it later
      run.nextSave = now + Math.max(SAVE_MS, (performance.now() - begun) / SAVE_SHARE)
    }
    this.onChange(message, 'grew')
    return next
  }
}

/** Runs `work` while no other tab does. `waited`: another one did before. */
async function alone(name, signal, work) {
  if (!navigator.locks) return work(false) // pages from an address without https have no locks
  const done = await navigator.locks.request(name, { ifAvailable: true }, async (lock) => {
    if (!lock) return false
    await work(false)
    return true
  })
  if (!done) await navigator.locks.request(name, { signal }, () => work(true))
}
