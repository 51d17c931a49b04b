/**
 * Shows a markdown text that grows. Blocks that are complete are rendered once; only the last one is rendered again,
 * so that an answer of 8,000 tokens costs no more for each token than a short one.
 */
import { h } from './dom.js'
import { highlight } from './highlight.js'
import { blocks, rendered } from './markdown.js'

/** The page renders for at most this share of the time, also where one block is very long. */
const BUSY_SHARE = 0.25

export class GrowingText {
  #text = ''
  #kept = 0
  #last = null
  #scheduled = false
  #notBefore = 0

  /** @param {() => void} onShown after each change of what is seen */
  constructor(onShown = () => {}) {
    this.element = h('div.text')
    this.onShown = onShown
  }

  /** Shows the whole text once more: references of links may stand after their use. */
  finish(text) {
    this.#text = text
    this.#kept = text.length
    this.#last = null
    this.element.replaceChildren(rendered(text))
    tidy(this.element)
    highlight(this.element)
    this.onShown()
  }

  /** Shows more, at the next frame that has time for it. */
  grow(written) {
    const text = written.includes('\r') ? written.replace(/\r\n?/g, '\n') : written // as the lexer does
    if (!text.startsWith(this.#text.slice(0, this.#kept))) {
      this.element.replaceChildren()
      this.#kept = 0
      this.#last = null
    }
    this.#text = text
    if (this.#scheduled) return
    this.#scheduled = true
    const wait = this.#notBefore - performance.now()
    const frame = () => (document.hidden ? setTimeout(() => this.#show(), 250) : requestAnimationFrame(() => this.#show()))
    if (wait > 4) setTimeout(frame, wait)
    else frame()
  }

  #show() {
    this.#scheduled = false
    if (this.#kept === this.#text.length && !this.#last) return
    const begun = performance.now()
    const tail = this.#text.slice(this.#kept)
    const found = blocks(tail)
    let last = found.length - 1
    while (last > 0 && found[last].type === 'space') last -= 1 // a list goes on after an empty line
    const whole = found.slice(0, Math.max(0, last))
    this.#last?.remove()
    for (const block of whole) {
      if (block.type === 'space') {
        this.#kept += block.raw.length
        continue
      }
      const part = this.#part(block.raw)
      this.element.append(part)
      highlight(part)
      this.#kept += block.raw.length
    }
    this.#last = this.#part(this.#text.slice(this.#kept))
    this.element.append(this.#last)
    const now = performance.now()
    this.#notBefore = now + (now - begun) * (1 / BUSY_SHARE - 1)
    this.onShown()
  }

  #part(markdown) {
    const part = h('div.part')
    part.append(rendered(markdown))
    tidy(part)
    return part
  }
}

/** Code gets a button to copy it; what is wide can be scrolled with the keyboard. */
function tidy(element) {
  for (const pre of element.querySelectorAll('pre')) {
    pre.tabIndex = 0
    const language = pre.firstElementChild?.dataset.language
    pre.setAttribute('role', 'group')
    pre.setAttribute('aria-label', language ? `Code: ${language}` : 'Code')
    const copy = h('button.copy', { type: 'button', onclick: () => copyText(pre.textContent, copy) }, 'Copy')
    const frame = h('div.code', {}, h('div.code-head', {}, h('span', {}, language || 'text'), copy))
    pre.replaceWith(frame)
    frame.append(pre)
  }
  for (const table of element.querySelectorAll('table')) {
    const frame = h('div.wide', { tabindex: 0, role: 'group', 'aria-label': 'Table' })
    table.replaceWith(frame)
    frame.append(table)
  }
}

/** @param {string} text @param {HTMLElement} button says that it is done */
export async function copyText(text, button) {
  const before = button.textContent
  try {
    await navigator.clipboard.writeText(text)
    button.textContent = 'Copied'
  } catch {
    button.textContent = 'Not allowed'
  }
  setTimeout(() => (button.textContent = before), 1500)
}
