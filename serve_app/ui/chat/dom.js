/** Makes elements. Text is always text: nothing here reads HTML. */

/**
 * @param {string} name a tag, with classes after dots: `button.primary`
 * @param {Record<string, any>} [attributes] `onclick` and the like are listeners; false and null leave one out
 * @param {...(Node | string | null | false)} inside
 * @returns {any} the element
 */
export function h(name, attributes = {}, ...inside) {
  const [tag, ...classes] = name.split('.')
  const element = document.createElement(tag)
  if (classes.length) element.className = classes.join(' ')
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value)
    else element.setAttribute(key, value === true ? '' : String(value))
  }
  element.append(...inside.filter((part) => part !== null && part !== false && part !== undefined))
  return element
}

/** A random name: `crypto.randomUUID` needs https, and the page may come from an address of the local network. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12))
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('')
}

/** Saves a file to the reader's computer. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }))
  h('a', { href: url, download: name }).click()
  setTimeout(() => URL.revokeObjectURL(url), 1000)
}
