/**
 * Markdown as elements. What a model says is hostile: raw HTML is shown as text, but for a few tags without attributes,
 * and DOMPurify lets nothing through that loads, runs or styles anything.
 */
import { Marked } from '../vendor/marked/marked.esm.js'
import '../vendor/dompurify/purify.min.js'

const TAGS =
  'p br hr h1 h2 h3 h4 h5 h6 strong em b i u s del code pre blockquote ul ol li a table thead tbody tr th td sub sup kbd'
const PLAIN_TAG = /&lt;(\/?(?:br|b|i|u|s|sub|sup|kbd|strong|em))\s*\/?&gt;/gi
const ENTITIES = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;' }
const ALLOWED = {
  ALLOWED_TAGS: TAGS.split(' '),
  ALLOWED_ATTR: ['href', 'title', 'start', 'align', 'data-language'],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ADD_URI_SAFE_ATTR: ['start', 'align', 'data-language'], // they hold no address
  RETURN_DOM_FRAGMENT: true,
}

const COLOURS = { ALLOWED_TAGS: ['span'], ALLOWED_ATTR: ['class'], RETURN_DOM_FRAGMENT: true }

const purify = globalThis.DOMPurify
const marked = new Marked({
  gfm: true,
  breaks: false,
  renderer: {
    html: ({ text }) => escaped(text).replace(PLAIN_TAG, '<$1>'),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? '☑ ' : '☐ '),
    code: ({ text, lang }) => {
      const language = (lang ?? '').trim().split(/\s/)[0].toLowerCase()
      return `<pre><code data-language="${escaped(language)}">${escaped(text)}\n</code></pre>\n`
    },
  },
})

purify.addHook('afterSanitizeAttributes', (element) => {
  if (element.tagName === 'A') {
    element.setAttribute('target', '_blank')
    element.setAttribute('rel', 'noopener noreferrer nofollow')
  }
})

/** The blocks of a text: paragraphs, lists, pieces of code. */
export function blocks(text) {
  return marked.lexer(text)
}

/** @param {string} text @returns {DocumentFragment} */
export function rendered(text) {
  return purify.sanitize(marked.parse(text), ALLOWED)
}

/** Elements for HTML that a highlighter made of text: nothing but spans with classes. */
export function spans(html) {
  return purify.sanitize(html, COLOURS)
}

function escaped(text) {
  return text.replace(/[&<>"']/g, (character) => ENTITIES[character])
}
