/** What the service says of its model. */
import { h } from './dom.js'

/** @param {HTMLElement} place a <dl> @param {any} ready the answer of /ready */
export function showCard(place, ready) {
  place.replaceChildren()
  for (const [name, value] of facts(ready)) place.append(h('dt', {}, name), h('dd', {}, value))
}

/** @returns {[string, string][]} */
export function facts(ready) {
  const card = ready?.model
  if (!card) {
    const { status = 'unreachable', stage, fraction, error } = ready ?? {}
    const done = fraction === null || fraction === undefined ? '' : ` (${Math.round(fraction * 100)} %)`
    return [['State', [status, stage && `${stage}${done}`, error].filter(Boolean).join(': ')]]
  }
  const found = [
    ['Name', card.name],
    ['Exact', card.batch_invariant ? EXACT : NOT_EXACT],
    ['Context', `${number(card.context_tokens)} tokens, prompt and answer together`],
    ['Memory', `weights ${bytes(card.weights_bytes)}, KV cache ${bytes(card.kv_cache_bytes)}`],
    ['KV cache', `${number(card.kv_capacity_tokens)} tokens in each replica`],
    ['Device', `${card.device}, ${card.dtype}, attention: ${card.attention_backend}`],
    ['Vocabulary', `${number(card.vocab_size)} tokens`],
  ]
  for (const note of card.notes ?? []) found.push(['Note', note])
  if (ready.access?.warning) found.push(['Access', ready.access.warning])
  return found
}

const EXACT = 'yes: the same request with the same seed gives the same text, also when a replica dies in the middle'
const NOT_EXACT = 'no: after a replica dies, the rest of an answer may differ from what it would have been'

/** @param {number} count */
function number(count) {
  return count.toLocaleString('en')
}

/** @param {number} count */
export function bytes(count) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB']
  let unit = 0
  let value = count
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024
    unit += 1
  }
  return `${value >= 10 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`
}
