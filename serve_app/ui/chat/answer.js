/**
 * What the events of a chat's stream say: an answer that grows. Knows no connection and no page.
 *
 * @typedef {{token: string, logprob: number, top: {token: string, logprob: number}[]}} Token
 * @typedef {{code: string, message: string, status: number}} Failure
 */

/** The fields of an answer before its first event. */
export function emptyAnswer() {
  return {
    content: '',
    reasoning: '',
    tokens: [],
    usage: null,
    finish: null,
    failure: null,
    streamId: '',
    lastEventId: '',
    asked: 0,
    first: 0,
    last: 0,
    notes: [],
  }
}

/** Errors within a stream after which the rest can still be read. */
const RESUMABLE = new Set(['slow_reader', 'journal_unavailable'])

/**
 * Adds one event to an answer.
 *
 * @param {ReturnType<typeof emptyAnswer>} answer changed in place
 * @param {import('./sse.js').ServerEvent} event
 * @param {number} now milliseconds
 * @returns {'more' | 'end' | 'reconnect'} whether the stream goes on
 */
export function addEvent(answer, event, now) {
  if (event.id) answer.lastEventId = event.id
  if (event.data === '[DONE]') return 'end'
  let chunk
  try {
    chunk = JSON.parse(event.data)
  } catch {
    return 'reconnect'
  }
  if (chunk.error) return addError(answer, chunk.error)
  const choice = chunk.choices?.[0]
  if (chunk.usage) answer.usage = chunk.usage
  if (!choice) return 'more'
  const delta = choice.delta ?? {}
  answer.content += delta.content ?? ''
  answer.reasoning += delta.reasoning_content ?? delta.reasoning ?? ''
  for (const token of choice.logprobs?.content ?? []) answer.tokens.push(plainToken(token))
  if (delta.content || delta.reasoning_content || delta.reasoning) {
    if (!answer.first) answer.first = now
    answer.last = now
  }
  if (choice.finish_reason) answer.finish = choice.finish_reason
  return 'more'
}

function addError(answer, error) {
  const code = error.code ?? 'error'
  if (RESUMABLE.has(code)) return 'reconnect'
  answer.failure = { code, message: error.message ?? 'The answer could not be finished.', status: 200 }
  return 'end'
}

function plainToken({ token, logprob, top_logprobs: top }) {
  return { token, logprob, top: (top ?? []).map((other) => ({ token: other.token, logprob: other.logprob })) }
}
