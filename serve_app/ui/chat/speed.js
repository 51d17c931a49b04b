/** Time to first token and tokens per second of an answer. */

const WINDOW_MS = 2_000

/** Tokens per second over the last two seconds, for an answer that is being written. */
export class LiveRate {
  #seen = []

  /** @param {number} now milliseconds @param {number} tokens of the answer so far */
  add(now, tokens) {
    this.#seen.push([now, tokens])
    while (this.#seen.length > 2 && this.#seen[0][0] < now - WINDOW_MS) this.#seen.shift()
  }

  /** @returns {number | null} null before there are two moments to compare */
  rate() {
    const [from, to] = [this.#seen[0], this.#seen.at(-1)]
    return from && to[0] > from[0] ? ((to[1] - from[1]) * 1000) / (to[0] - from[0]) : null
  }
}

/** @param {{asked: number, first: number, last: number, usage: {completion_tokens: number} | null}} answer */
export function summary(answer) {
  const parts = []
  const tokens = answer.usage?.completion_tokens ?? 0
  if (answer.first && answer.asked) parts.push(`first token after ${seconds(answer.first - answer.asked)}`)
  const spent = answer.last - answer.first
  if (tokens > 1 && spent > 0) parts.push(`${perSecond(((tokens - 1) * 1000) / spent)}`)
  if (tokens) parts.push(`${tokens} ${tokens === 1 ? 'token' : 'tokens'}`)
  return parts.join(' · ')
}

/** @param {number} rate */
export function perSecond(rate) {
  return `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`
}

/** @param {number} ms */
export function seconds(ms) {
  return `${(ms / 1000).toFixed(ms < 100 ? 2 : 1)} s`
}
