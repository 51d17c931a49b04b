/** Colours code. The highlighter and a language are loaded when an answer first has code in it. */
import { spans } from './markdown.js'

const ALIASES = {
  sh: 'bash', shell: 'bash', zsh: 'bash', console: 'bash', 'c++': 'cpp', h: 'c', hpp: 'cpp', 'c#': 'csharp', cs: 'csharp',
  docker: 'dockerfile', golang: 'go', toml: 'ini', js: 'javascript', mjs: 'javascript', jsx: 'javascript', kt: 'kotlin',
  md: 'markdown', patch: 'diff', py: 'python', python3: 'python', rb: 'ruby', rs: 'rust', ts: 'typescript',
  tsx: 'typescript', html: 'xml', svg: 'xml', yml: 'yaml', jsonc: 'json',
}
const LANGUAGES = new Set(
  ('bash c cpp csharp css diff dockerfile go ini java javascript json kotlin markdown php python ruby rust sql swift ' +
    'typescript xml yaml').split(' '),
)
/** Longer code stays as it is: colouring takes about 10 ms for 100,000 characters. */
const LONGEST = 100_000
const loaded = new Map()
let core = null

/** Colours the code in an element that is complete. Code of other languages stays as it is. */
export async function highlight(element) {
  for (const code of element.querySelectorAll('pre > code[data-language]')) {
    const language = ALIASES[code.dataset.language] ?? code.dataset.language
    if (!LANGUAGES.has(language) || code.textContent.length > LONGEST) continue
    try {
      const hljs = await withLanguage(language)
      code.replaceChildren(spans(hljs.highlight(code.textContent, { language, ignoreIllegals: true }).value))
    } catch {
      return // the service is away: code without colours
    }
  }
}

async function withLanguage(language) {
  core ??= import('../vendor/highlight/core.min.js')
  if (!loaded.has(language)) loaded.set(language, import(`../vendor/highlight/languages/${language}.min.js`))
  try {
    const [{ default: hljs }, { default: grammar }] = await Promise.all([core, loaded.get(language)])
    if (!hljs.getLanguage(language)) {
      // Markdown and HTML have code of other languages inside: without them it is plain.
      hljs.registerLanguage(language, grammar)
    }
    return hljs
  } catch (error) {
    core = null
    loaded.delete(language)
    throw error
  }
}
