/** The tokens of an answer, coloured by how sure the model was of each. */
import { h } from './dom.js'

const STEPS = 5

/** 0: certain, `STEPS` - 1: very unlikely. @param {number} logprob */
export function heat(logprob) {
  const probability = Math.exp(logprob)
  if (probability >= 0.9) return 0
  if (probability >= 0.6) return 1
  if (probability >= 0.3) return 2
  return probability >= 0.1 ? 3 : STEPS - 1
}

/** @param {{token: string, logprob: number, top: {token: string, logprob: number}[]}} token */
export function described({ token, logprob, top }) {
  const others = top.filter((other) => other.token !== token)
  const line = (one) => `${JSON.stringify(one.token)} ${percent(one.logprob)}`
  return [line({ token, logprob }), ...others.map(line)].join('\n')
}

/** Elements for the tokens: hover, or move with the arrow keys, to see what else could have come. */
export function heatMap(tokens) {
  const tip = h('output.tip', { hidden: true })
  const text = h('div.tokens', {
    tabindex: 0,
    role: 'group',
    'aria-label': 'Tokens by probability. The arrow keys move from token to token.',
  })
  text.append(...tokens.map((token, index) => h(`span.heat-${heat(token.logprob)}`, { 'data-token': index }, token.token)))
  let shown = -1
  const show = (index) => {
    text.children[shown]?.classList.remove('at')
    shown = index
    const element = text.children[index]
    tip.hidden = !element
    if (!element) return
    element.classList.add('at')
    tip.textContent = described(tokens[index])
    tip.style.left = `${Math.min(element.offsetLeft, Math.max(0, text.clientWidth - 220))}px`
    tip.style.top = `${element.offsetTop + element.offsetHeight + 4}px`
  }
  text.addEventListener('pointerover', (event) => {
    if (event.target.dataset?.token) show(Number(event.target.dataset.token))
  })
  text.addEventListener('pointerleave', () => show(-1))
  text.addEventListener('blur', () => show(-1))
  text.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key]
    if (!step) return
    event.preventDefault()
    show(Math.max(0, Math.min(tokens.length - 1, shown + step)))
  })
  return h('div.heat', {}, text, tip, legend())
}

function legend() {
  const names = ['90 % or more', '60 %', '30 %', '10 %', 'less']
  return h('p.small', {}, 'Probability: ', ...names.map((name, step) => h(`span.key.heat-${step}`, {}, name)))
}

function percent(logprob) {
  const value = Math.exp(logprob) * 100
  return `${value >= 10 ? value.toFixed(0) : value.toPrecision(2)} %`
}
