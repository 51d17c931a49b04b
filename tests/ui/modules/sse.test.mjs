// However a stream is cut into pieces, its events are the same.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { EventParser } from '../../../serve_app/ui/chat/sse.js'

const STREAM = 'retry: 1000\nid: s:1:aa\ndata: {"a":1}\n\n: ping\nid: s:2:bb\r\ndata: x\r\ndata: y\r\n\r\nevent: done\ndata:z\n\n'

function read(pieces) {
  const parser = new EventParser()
  return pieces.flatMap((piece) => parser.push(piece))
}

test('every cut gives the same events', () => {
  const whole = read([STREAM])
  assert.deepEqual(whole.filter((event) => !event.comment).map(({ id, event, data }) => [id, event, data]), [
    ['s:1:aa', '', '{"a":1}'],
    ['s:2:bb', '', 'x\ny'],
    ['s:2:bb', 'done', 'z'],
  ])
  assert.deepEqual(whole.filter((event) => event.comment).map((event) => event.comment), ['ping'])
  for (let cut = 1; cut < STREAM.length; cut += 1) {
    assert.deepEqual(read([STREAM.slice(0, cut), STREAM.slice(cut)]), whole, `cut at ${cut}`)
  }
  assert.deepEqual(read([...STREAM]), whole)
})

test('an event that was cut off is none', () => {
  assert.deepEqual(read(['id: s:1:aa\ndata: x\n']), [])
})
