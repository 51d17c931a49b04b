/** Shows one message, and the buttons that belong to it. */
import { h } from './dom.js'
import { copyText, GrowingText } from './growing_text.js'
import { heatMap } from './heat.js'
import { perSecond, summary } from './speed.js'

/** What to do about an error that says nothing of it itself. */
const ADVICE = {
  connection_lost: 'The part that arrived is kept.',
  stream_gone: 'The rest of this answer is no longer kept by the service.',
  wrong_weights: 'The model was replaced in the middle of this answer.',
}

export class MessageView {
  #heat = false

  /**
   * @param {any} message
   * @param {{edit: (id: string, text: string) => void, regenerate: (id: string) => void, resume: (id: string) => void,
   *   branch: (id: string, step: number) => void, rate: (id: string) => number | null, onShown: () => void}} actions
   */
  constructor(message, actions) {
    this.message = message
    this.actions = actions
    const mine = message.role === 'user'
    this.body = mine ? h('div.text.mine') : h('div.body')
    this.foot = h('div.foot')
    this.element = h(`li.message.${message.role}`, {})
    this.article = h('article', { 'aria-label': mine ? 'You' : 'Answer' }, this.body, this.foot)
    this.element.append(this.article)
    if (!mine) {
      this.growing = new GrowingText(actions.onShown)
      this.reasoning = h('details.reasoning', { hidden: true }, h('summary', {}, 'Reasoning'), h('div'))
      this.notes = h('ul.notes', { hidden: true })
      this.failure = h('div.failure', { role: 'alert', hidden: true })
      this.wait = h('p.wait', { hidden: true })
      this.body.append(this.reasoning, this.growing.element, this.wait, this.failure, this.notes)
      this.speed = h('span.speed')
    }
  }

  /** @param {{place: number, count: number}} branch which of its siblings it is */
  show(branch) {
    this.branch = branch
    if (this.message.role === 'user') {
      this.body.textContent = this.message.content
      this.#showFoot()
      return
    }
    this.state()
  }

  /** The text has become longer. */
  grew() {
    const { message } = this
    this.wait.hidden = Boolean(message.content || message.reasoning) && !message.waiting
    this.#showReasoning()
    this.growing.grow(message.content)
    const rate = this.actions.rate(message.id)
    const parts = [summary({ ...message, first: message.first, last: 0 }), rate && perSecond(rate)]
    this.speed.textContent = parts.filter(Boolean).join(' · ')
  }

  /** Begun, waiting, continued, ended. */
  state() {
    const { message } = this
    const running = message.status === 'running'
    this.article.setAttribute('aria-busy', String(running))
    this.wait.textContent = message.waiting || 'Waiting for the first token…'
    this.wait.hidden = !running || (Boolean(message.content || message.reasoning) && !message.waiting)
    this.notes.hidden = !message.notes.length
    this.notes.replaceChildren(...message.notes.map((note) => h('li', {}, note)))
    this.#showReasoning()
    if (running) this.growing.grow(message.content)
    else this.#showWhole()
    this.#showFailure()
    this.speed.textContent = summary(message)
    this.#showFoot()
  }

  #showWhole() {
    if (this.#heat && this.message.tokens.length) this.growing.element.replaceChildren(heatMap(this.message.tokens))
    else this.growing.finish(this.message.content)
  }

  #showReasoning() {
    const { reasoning } = this.message
    this.reasoning.hidden = !reasoning
    const place = this.reasoning.lastElementChild
    if (place.textContent !== reasoning) place.textContent = reasoning
  }

  #showFailure() {
    const { failure, id } = this.message
    this.failure.hidden = !failure
    if (!failure) return
    const lost = failure.code === 'connection_lost'
    const retry = lost
      ? h('button', { type: 'button', onclick: () => this.actions.resume(id) }, 'Go on')
      : h('button', { type: 'button', onclick: () => this.actions.regenerate(id) }, 'Try again')
    const text = [failure.message, ADVICE[failure.code]].filter(Boolean).join(' ')
    this.failure.replaceChildren(h('p', {}, text), h('p.small', {}, `Code: ${failure.code}`), retry)
  }

  #showFoot() {
    const { message, actions } = this
    const button = (label, action, more = {}) => h('button', { type: 'button', onclick: action, ...more }, label)
    const parts = []
    if (this.branch.count > 1) {
      const { place, count } = this.branch
      const text = h('span', { role: 'img', 'aria-label': `Version ${place + 1} of ${count}` }, `${place + 1}/${count}`)
      parts.push(
        button('‹', () => actions.branch(message.id, -1), { 'aria-label': 'Earlier version', disabled: place === 0 }),
        text,
        button('›', () => actions.branch(message.id, 1), { 'aria-label': 'Later version', disabled: place === count - 1 }),
      )
    }
    if (message.role === 'user') parts.push(button('Edit', () => this.#edit()))
    else {
      if (message.status !== 'running') {
        parts.push(button('Regenerate', () => actions.regenerate(message.id)))
        const copy = button('Copy', () => copyText(message.content, copy))
        parts.push(copy)
        if (message.tokens.length) {
          const label = this.#heat ? 'Show as text' : 'Show probabilities'
          parts.push(button(label, () => this.#toggleHeat()))
        }
      }
      if (message.status === 'stopped') parts.push(h('span', {}, 'Stopped.'))
      if (message.finish === 'length') parts.push(h('span', {}, 'Cut at the longest length.'))
      parts.push(this.speed)
    }
    this.foot.replaceChildren(...parts)
  }

  #toggleHeat() {
    this.#heat = !this.#heat
    this.#showWhole()
    this.#showFoot()
  }

  #edit() {
    const text = h('textarea', { 'aria-label': 'Edit the message', rows: 4 })
    text.value = this.message.content
    const close = () => {
      form.replaceWith(this.body)
      this.#showFoot()
    }
    const submit = (event) => {
      event.preventDefault()
      const changed = text.value.trim()
      close()
      if (changed) this.actions.edit(this.message.id, changed)
    }
    const form = h(
      'form.edit',
      { onsubmit: submit },
      text,
      h('div.row.end', {}, h('button', { type: 'button', onclick: close }, 'Cancel'), h('button.primary', {}, 'Send')),
    )
    text.addEventListener('keydown', (event) => {
      if (event.key === 'Escape') {
        event.stopPropagation()
        close()
      }
    })
    this.body.replaceWith(form)
    this.foot.replaceChildren()
    text.focus()
  }
}
