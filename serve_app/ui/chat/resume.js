/**
 * Follows one stream to its end, whatever happens to its connection: asks for it, reads it, and asks for the rest.
 * Knows no page and no clock of its own, so that it can be tested without them.
 */
import { EventParser } from './sse.js'

/** A stream sends something at least every 10 s (api.heartbeat_s). A connection that is silent for longer is lost. */
const SILENCE_MS = 25_000
/** An answer can be resumed for 10 minutes (streams.expiry_s). */
const GIVE_UP_MS = 600_000
const FIRST_PAUSE_MS = 100
const LONGEST_PAUSE_MS = 3_000
/** Statuses of a proxy without a server, and of a service that starts or has no place: the same request can succeed a
 * moment later. */
const TEMPORARY = new Set([502, 503])
/** How often a request that no replica has begun is sent again. A failed connection counts against `GIVE_UP_MS` only. */
const MOST_REFUSALS = 6

/** An answer of the service that is not a stream. */
export class Refusal extends Error {
  constructor(status, code, message, retryAfterMs = 0) {
    super(message)
    this.status = status
    this.code = code
    this.retryAfterMs = retryAfterMs
  }
}

/** How long to wait before the attempt with this number, from 1 on. The first one is made at once. */
export function pauseBefore(attempt, random = Math.random()) {
  if (attempt <= 1) return 0
  return Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** (attempt - 2)) * (0.75 + random / 2)
}

/**
 * @param {object} how
 * @param {{streamId: string, lastEventId: string}} how.place where the stream is; changed as it goes on
 * @param {(signal: AbortSignal) => Promise<Response>} how.begin asks for a new stream
 * @param {(place: {streamId: string, lastEventId: string}, signal: AbortSignal) => Promise<Response>} how.continued
 * @param {(event: import('./sse.js').ServerEvent) => 'more' | 'end' | 'reconnect'} how.onEvent
 * @param {(lost: {at: number, sent: boolean}) => void} how.onLost the connection is gone, and will be tried again
 * @param {(after: {ms: number, sent: boolean, first: boolean}) => void} how.onContinued it is there again. `first`: the
 *   stream was begun before
 * @param {(comment: string) => void} [how.onComment] a comment of the service, such as `ping`
 * @param {AbortSignal} how.signal stops everything
 * @param {() => number} [how.now]
 * @param {(ms: number, signal: AbortSignal) => Promise<void>} [how.sleep]
 * @param {number} [how.silenceMs]
 * @returns {Promise<void>} at the end of the stream. Throws `Refusal`, or what `signal` was aborted with.
 */
export async function follow(how) {
  const { place, signal, now = () => performance.now(), sleep = pause, silenceMs = SILENCE_MS } = how
  let resumed = Boolean(place.streamId)
  let lostAt = resumed ? now() : null
  let attempts = 0
  let refusals = 0
  for (;;) {
    attempts += 1
    await sleep(pauseBefore(attempts), signal)
    const sent = Boolean(place.streamId)
    let ending
    try {
      const response = await opened(how, sent, signal, silenceMs)
      if (response.status === 204) return
      place.streamId = response.headers.get('x-stream-id') ?? place.streamId
      ending = await read(response, how, silenceMs, () => {
        if (lostAt !== null) how.onContinued({ ms: now() - lostAt, sent, first: resumed })
        lostAt = null
        resumed = false
        attempts = 0
      })
      if (ending === 'end') return
    } catch (error) {
      signal.throwIfAborted()
      if (error instanceof Refusal) {
        refusals += 1
        if (!TEMPORARY.has(error.status) || (!sent && refusals >= MOST_REFUSALS)) throw error
        if (lostAt !== null && now() - lostAt > GIVE_UP_MS) throw error
        await sleep(error.retryAfterMs, signal)
      } else if (lostAt !== null && now() - lostAt > GIVE_UP_MS) {
        throw new Refusal(0, 'connection_lost', 'The service could not be reached for ten minutes.')
      }
    }
    if (lostAt === null) {
      lostAt = now()
      how.onLost({ at: lostAt, sent: Boolean(place.streamId) })
    }
  }
}

async function opened(how, sent, signal, silenceMs) {
  if (!sent) return checked(await how.begin(signal)) // it may wait for a place for as long as the service allows
  const late = new AbortController()
  const timer = setTimeout(() => late.abort(new Error('no answer')), silenceMs)
  try {
    return await checked(await how.continued(how.place, AbortSignal.any([signal, late.signal])))
  } finally {
    clearTimeout(timer)
  }
}

async function checked(response) {
  if (response.ok) return response
  let error = {}
  try {
    error = (await response.json()).error ?? {}
  } catch {
    // A proxy on the way answered in HTML.
  }
  const seconds = Number(response.headers.get('retry-after')) || 0
  const message = error.message ?? `The service answered with status ${response.status}.`
  throw new Refusal(response.status, error.code ?? `http_${response.status}`, message, Math.min(seconds, 30) * 1000)
}

/** The first event that arrives is told to `onFirst`: the connection works. */
async function read(response, how, silenceMs, onFirst) {
  const parser = new EventParser()
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  const stop = () => reader.cancel().catch(() => {})
  how.signal.addEventListener('abort', stop)
  let first = true
  try {
    for (;;) {
      const piece = await within(reader.read(), silenceMs)
      how.signal.throwIfAborted()
      if (piece.done) return 'reconnect'
      for (const event of parser.push(piece.value)) {
        if (event.comment) {
          how.onComment?.(event.comment)
          continue
        }
        if (first) onFirst()
        first = false
        how.signal.throwIfAborted()
        const next = how.onEvent(event)
        if (next !== 'more') return next
      }
    }
  } finally {
    how.signal.removeEventListener('abort', stop)
    stop()
  }
}

async function within(promise, ms) {
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error('the connection is silent')), ms)
  })
  try {
    return await Promise.race([promise, late])
  } finally {
    clearTimeout(timer)
  }
}

/** Waits, and ends early when the network comes back. */
function pause(ms, signal) {
  signal.throwIfAborted()
  if (ms <= 0) return Promise.resolve()
  return new Promise((resolve, reject) => {
    const end = (done) => () => {
      clearTimeout(timer)
      globalThis.removeEventListener?.('online', wake)
      signal.removeEventListener('abort', stop)
      done()
    }
    const wake = end(resolve)
    const stop = end(() => reject(signal.reason))
    const timer = setTimeout(wake, ms)
    globalThis.addEventListener?.('online', wake)
    signal.addEventListener('abort', stop)
  })
}
