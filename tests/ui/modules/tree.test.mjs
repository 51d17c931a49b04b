// Branches of a chat.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { children, conversation, newestLeaf, otherBranch, path, titleOf } from '../../../serve_app/ui/chat/tree.js'

const tree = new Map(
  [
    ['q1', null, 'user', 1, 'Hi'],
    ['a1', 'q1', 'assistant', 2, 'Hello'],
    ['a2', 'q1', 'assistant', 3, 'Good day'],
    ['q2', 'a1', 'user', 4, 'More'],
    ['a3', 'q2', 'assistant', 5, ''],
  ].map(([id, parent, role, created, content]) => [id, { id, parent, role, created, content }]),
)

test('the branch of a leaf', () => {
  assert.deepEqual(path(tree, 'a3').map(({ id }) => id), ['q1', 'a1', 'q2', 'a3'])
  assert.deepEqual(path(tree, null), [])
})

test('siblings by age, and the way between them', () => {
  assert.deepEqual(children(tree, 'q1').map(({ id }) => id), ['a1', 'a2'])
  assert.equal(newestLeaf(tree, 'a1'), 'a3')
  assert.equal(otherBranch(tree, 'a2', -1), 'a3')
  assert.equal(otherBranch(tree, 'a1', 1), 'a2')
  assert.equal(otherBranch(tree, 'a2', 5), 'a2')
})

test('what the model gets: no empty answers, the system prompt first', () => {
  assert.deepEqual(conversation(tree, 'a3', 'Be brief.'), [
    { role: 'system', content: 'Be brief.' },
    { role: 'user', content: 'Hi' },
    { role: 'assistant', content: 'Hello' },
    { role: 'user', content: 'More' },
  ])
  assert.equal(conversation(tree, 'q1', '  ').length, 1)
})

test('titles are short', () => {
  assert.equal(titleOf('  One line\nanother'), 'One line')
  assert.equal(titleOf('x'.repeat(100)).length, 48)
})
