/** The sampling settings of a chat, and what they become in a request. */
import { h } from './dom.js'

/** name in the request -> [label, smallest, largest, step] */
const FIELDS = {
  temperature: ['Temperature', 0, 2, 0.05],
  top_p: ['Top p', 0, 1, 0.01],
  top_k: ['Top k', 0, 100_000, 1],
  min_p: ['Min p', 0, 1, 0.01],
  repetition_penalty: ['Repetition penalty', 0.1, 2, 0.05],
  max_tokens: ['Longest answer, tokens', 1, 1_000_000, 1],
  seed: ['Seed', 0, 2 ** 53 - 1, 1],
}

/** Shows the fields of a chat's settings. `onChange` after each change of `settings`. */
export function showSampling(place, settings, defaults, onChange) {
  const fields = Object.entries(FIELDS).map(([name, [label, min, max, step]]) => {
    const input = h('input', { type: 'number', min, max, step: 'any', inputmode: 'decimal', name })
    if (step === 1) input.step = '1'
    input.placeholder = defaults[name] ?? (name === 'seed' ? 'random' : 'default')
    input.value = settings[name] ?? ''
    input.addEventListener('change', () => {
      if (!input.reportValidity()) return
      if (input.value === '') delete settings[name]
      else settings[name] = Number(input.value)
      onChange()
    })
    return h('label.field', {}, label, input)
  })
  place.replaceChildren(...fields)
}

/** The body of a request. @param {object} settings of the chat @param {{role: string, content: string}[]} messages */
export function requestBody(settings, messages) {
  const sampling = Object.keys(FIELDS).filter((name) => settings[name] !== undefined)
  return {
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...Object.fromEntries(sampling.map((name) => [name, settings[name]])),
    ...(settings.logprobs ? { logprobs: true, top_logprobs: 4 } : {}),
  }
}
