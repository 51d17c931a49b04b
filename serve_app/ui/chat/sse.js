/**
 * Reads server-sent events from text that arrives in any pieces.
 * https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
 *
 * @typedef {{id: string, event: string, data: string, comment?: string}} ServerEvent a comment is an event of its own
 */
export class EventParser {
  #rest = ''
  #data = []
  #event = ''
  #afterReturn = false

  /** Id of the newest whole event; empty before the first one that has an id. */
  lastEventId = ''
  #id = ''

  /**
   * @param {string} text
   * @returns {ServerEvent[]} the events that are complete now
   */
  push(text) {
    const events = []
    if (this.#afterReturn && text) {
      if (text.startsWith('\n')) text = text.slice(1)
      this.#afterReturn = false
    }
    const lines = (this.#rest + text).split(/\r\n|\n|\r/)
    if (text.endsWith('\r')) this.#afterReturn = true
    this.#rest = lines.pop()
    for (const line of lines) {
      const event = this.#line(line)
      if (event) events.push(event)
    }
    return events
  }

  #line(line) {
    if (line === '') return this.#dispatch()
    const colon = line.indexOf(':')
    if (colon === 0) return { id: '', event: '', data: '', comment: line.slice(1).trim() }
    const field = colon < 0 ? line : line.slice(0, colon)
    let value = colon < 0 ? '' : line.slice(colon + 1)
    if (value.startsWith(' ')) value = value.slice(1)
    if (field === 'data') this.#data.push(value)
    else if (field === 'event') this.#event = value
    else if (field === 'id' && !value.includes('\0')) this.#id = value
    return null
  }

  #dispatch() {
    this.lastEventId = this.#id
    const event = { id: this.lastEventId, event: this.#event, data: this.#data.join('\n') }
    const whole = this.#data.length > 0
    this.#data = []
    this.#event = ''
    return whole ? event : null
  }
}
