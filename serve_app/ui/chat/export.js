/** A chat as a file. */
import { path } from './tree.js'

/** The branch that is shown, as Markdown. */
export function asMarkdown(chat, tree) {
  const parts = [`# ${chat.title}`]
  if (chat.settings.system) parts.push(`## System\n\n${chat.settings.system}`)
  for (const message of path(tree, chat.leaf)) {
    parts.push(`## ${message.role === 'user' ? 'User' : 'Assistant'}\n\n${message.content}`)
  }
  return `${parts.join('\n\n')}\n`
}

/** All branches. The key and the ids of streams are not in it. */
export function asJson(chat, tree) {
  const messages = [...tree.values()].map((message) => {
    const { streamId, lastEventId, chat: of, waiting, ...kept } = message
    return kept
  })
  const { id, title, created, leaf, settings } = chat
  return JSON.stringify({ format: 'serve_app chat 1', id, title, created, leaf, settings, messages }, null, 2)
}

/** A title as the name of a file. */
export function fileName(title, suffix) {
  return `${title.replace(/[^\p{L}\p{N} _-]/gu, '').trim().slice(0, 60) || 'chat'}.${suffix}`
}
