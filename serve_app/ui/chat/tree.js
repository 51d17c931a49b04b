/**
 * A chat as a tree of messages: an edited message and a regenerated answer are siblings of the old ones.
 *
 * @typedef {{id: string, parent: string | null, role: 'user' | 'assistant', created: number, content: string}} Message
 * @typedef {Map<string, Message>} Tree
 */

/** The messages from the first one to `leaf`. @param {Tree} tree @param {string | null} leaf */
export function path(tree, leaf) {
  const found = []
  for (let id = leaf; id && tree.has(id); id = tree.get(id).parent) found.unshift(tree.get(id))
  return found
}

/** The messages with the same parent, the oldest first. @param {Tree} tree @param {string | null} parent */
export function children(tree, parent) {
  return [...tree.values()].filter((message) => message.parent === parent).sort(byAge)
}

/** The end of the newest branch below a message. @param {Tree} tree @param {string} id */
export function newestLeaf(tree, id) {
  let found = id
  for (let below = children(tree, id); below.length; below = children(tree, found)) found = below.at(-1).id
  return found
}

/** The leaf of the branch that is `step` siblings away. @param {Tree} tree @param {string} id @param {number} step */
export function otherBranch(tree, id, step) {
  const siblings = children(tree, tree.get(id).parent)
  const place = siblings.findIndex((message) => message.id === id) + step
  const other = siblings[Math.max(0, Math.min(place, siblings.length - 1))]
  return newestLeaf(tree, other.id)
}

/** What the model gets for an answer below `leaf`. @param {Tree} tree @param {string | null} leaf */
export function conversation(tree, leaf, system = '') {
  const said = path(tree, leaf)
    .filter((message) => message.role === 'user' || message.content)
    .map(({ role, content }) => ({ role, content }))
  return system.trim() ? [{ role: 'system', content: system }, ...said] : said
}

/** A short title from the first message. @param {string} text */
export function titleOf(text) {
  const line = text.trim().split('\n')[0]
  return line.length > 48 ? `${line.slice(0, 47).trimEnd()}…` : line || 'New chat'
}

function byAge(one, other) {
  return one.created - other.created || (one.id < other.id ? -1 : 1)
}
