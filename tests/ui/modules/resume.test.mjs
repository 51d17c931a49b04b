// The rest of a stream is asked for until it is there, and nothing is read twice.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { addEvent, emptyAnswer } from '../../../serve_app/ui/chat/answer.js'
import { follow, pauseBefore, Refusal } from '../../../serve_app/ui/chat/resume.js'

const WORDS = ['One', ' two', ' three', ' four']

function events(from = 0, to = WORDS.length, end = true) {
  const lines = WORDS.slice(from, to).map(
    (word, index) => `id: s:${from + index + 1}:00\ndata: ${JSON.stringify({ choices: [{ delta: { content: word } }] })}\n\n`,
  )
  return lines.join('') + (end ? 'data: [DONE]\n\n' : '')
}

function stream(text) {
  return new Response(text, { headers: { 'x-stream-id': 's' } })
}

function refusal(status, code, headers = {}) {
  return new Response(JSON.stringify({ error: { code, message: code } }), { status, headers })
}

/** Follows a service that gives these answers, one after the other. */
async function run(answers, { place = emptyAnswer(), now = () => 0, ...more } = {}) {
  const asked = []
  const told = []
  const slept = []
  const next = async (what) => {
    asked.push(what)
    const answer = answers.shift()
    if (answer instanceof Error) throw answer
    return typeof answer === 'function' ? answer() : answer
  }
  const done = follow({
    place,
    signal: new AbortController().signal,
    begin: () => next('begin'),
    continued: ({ lastEventId }) => next(lastEventId),
    onEvent: (event) => addEvent(place, event, 1),
    onLost: () => told.push('lost'),
    onContinued: () => told.push('continued'),
    sleep: async (ms) => void slept.push(ms),
    now,
    ...more,
  })
  let error = null
  await done.catch((caught) => (error = caught))
  return { place, asked, told, slept, error }
}

test('an undisturbed stream', async () => {
  const { place, asked, told } = await run([stream(events())])
  assert.deepEqual([place.content, asked, told], ['One two three four', ['begin'], []])
})

test('a stream that ends early is continued after the last whole event', async () => {
  const cut = `${events(0, 2, false)}id: s:3:00\ndata: {"cho`
  const { place, asked, told } = await run([stream(cut), stream(events(2))])
  assert.deepEqual([place.content, asked], ['One two three four', ['begin', 's:2:00']])
  assert.deepEqual(told, ['lost', 'continued'])
})

test('lost connections and refusals for the moment are tried again', async () => {
  const answers = [
    new TypeError('failed'),
    refusal(503, 'not_ready', { 'retry-after': '2' }),
    stream(events(0, 1, false)),
    new TypeError('failed'),
    refusal(502, 'x'),
    stream(events(1)),
  ]
  const { place, asked, slept } = await run(answers)
  assert.equal(place.content, 'One two three four')
  assert.deepEqual(asked, ['begin', 'begin', 'begin', 's:1:00', 's:1:00', 's:1:00'])
  assert.ok(slept.includes(2000))
})

test('a stream of an earlier page is continued', async () => {
  const place = { ...emptyAnswer(), content: 'One two', streamId: 's', lastEventId: 's:2:00' }
  const { asked, told } = await run([stream(events(2))], { place })
  assert.deepEqual([place.content, asked, told], ['One two three four', ['s:2:00'], ['continued']])
})

test('204 ends it', async () => {
  const place = { ...emptyAnswer(), streamId: 's', lastEventId: 's:4:00' }
  const { asked, error } = await run([new Response(null, { status: 204 })], { place })
  assert.deepEqual([asked, error], [['s:4:00'], null])
})

test('what can not be continued is said', async () => {
  for (const [status, code] of [[410, 'stream_gone'], [410, 'stream_changed'], [404, 'stream_not_found'], [400, 'x']]) {
    const { error, asked } = await run([stream(events(0, 1, false)), refusal(status, code)])
    assert.ok(error instanceof Refusal)
    assert.deepEqual([error.code, asked.length], [code, 2])
  }
})

test('an overloaded service is not asked for ever', async () => {
  const { error, asked } = await run(Array.from({ length: 20 }, () => () => refusal(503, 'overloaded')))
  assert.deepEqual([error.code, asked.length], ['overloaded', 6])
})

test('it gives up when the stream has expired', async () => {
  let time = 0
  const answers = [stream(events(0, 1, false)), ...Array.from({ length: 50 }, () => new TypeError('failed'))]
  const { error } = await run(answers, { now: () => (time += 60_000) })
  assert.equal(error.code, 'connection_lost')
})

test('a silent connection is given up', async () => {
  const silent = new Response(new ReadableStream({ start: (controller) => controller.enqueue(new TextEncoder().encode(events(0, 1, false))) }), {
    headers: { 'x-stream-id': 's' },
  })
  const { place, asked } = await run([silent, stream(events(1))], { silenceMs: 20 })
  assert.deepEqual([place.content, asked], ['One two three four', ['begin', 's:1:00']])
})

test('stopping ends it at once', async () => {
  const stop = new AbortController()
  const onEvent = () => {
    stop.abort(new DOMException('stopped', 'AbortError'))
    return 'more'
  }
  const { error, asked } = await run([stream(events(0, 2, false))], { signal: stop.signal, onEvent })
  assert.deepEqual([error.name, asked], ['AbortError', ['begin']])
})

test('pauses grow to a limit', () => {
  const pauses = [1, 2, 3, 4, 9, 99].map((attempt) => pauseBefore(attempt, 0.5))
  assert.deepEqual(pauses, [0, 100, 200, 400, 3000, 3000])
})
