/** The chat page: what is shown, and what the reader can do. */
import { emptyAnswer } from './answer.js'
import { Api } from './api.js'
import { facts, showCard } from './card.js'
import { download, h, newId } from './dom.js'
import { asJson, asMarkdown, fileName } from './export.js'
import { MessageView } from './message_view.js'
import { Runner } from './runner.js'
import { requestBody, showSampling } from './settings.js'
import { Store } from './store.js'
import { children, conversation, newestLeaf, otherBranch, path, titleOf } from './tree.js'

const CURRENT = 'serve_app.chat'
/** How near the end the reader must be for the page to follow the text. */
const NEAR_PX = 80
const ASK_READY_MS = 2_000

const $ = (id) => document.getElementById(id)
const root = document.documentElement.dataset.root

const api = new Api(root, askForKey)
const store = await new Store().open()
const runner = new Runner(api, store, changed)
const views = new Map()
let chats = await store.chats()
let chat = null
let tree = new Map()
let ready = null
let following = true

// ---- chats

function newChat() {
  return { id: newId(), title: 'New chat', created: Date.now(), updated: Date.now(), leaf: null, settings: {} }
}

let opening = null

/** Shows a chat. `messages`: of a new one, which has none. */
async function open(next, messages = null) {
  opening = next
  const found = messages ?? (await store.messages(next.id))
  if (opening !== next) return
  chat = next
  tree = found
  sessionStorage.setItem(CURRENT, chat.id)
  for (const id of tree.keys()) if (runner.message(id)) tree.set(id, runner.message(id)) // it knows more than the store
  if (chat.leaf && !tree.has(chat.leaf)) chat.leaf = [...tree.keys()].at(-1) ?? null
  following = true
  show()
  closeSidebar()
  for (const message of tree.values()) if (message.status === 'running') write(message)
}

async function saveChat() {
  chat.updated = Date.now()
  chats = [chat, ...chats.filter((other) => other.id !== chat.id)]
  showChats()
  await store.saveChat(chat)
}

function showChats() {
  $('title').textContent = chat.title
  document.title = `${chat.title} – serve_app`
  $('chats').replaceChildren(
    ...chats.map((one) =>
      h(
        'li',
        {},
        h(
          'button',
          { type: 'button', 'aria-current': one.id === chat.id ? 'page' : null, onclick: () => open(one) },
          one.title,
        ),
      ),
    ),
  )
}

// ---- messages

function show() {
  showChats()
  const branch = path(tree, chat.leaf)
  views.clear()
  const elements = branch.map((message) => {
    const siblings = children(tree, message.parent)
    const view = new MessageView(message, actions)
    views.set(message.id, view)
    view.show({ place: siblings.indexOf(message), count: siblings.length })
    return view.element
  })
  $('messages').replaceChildren(...elements)
  $('hello').hidden = branch.length > 0
  showControls()
  follow()
}

function running() {
  return path(tree, chat.leaf).find((message) => message.status === 'running')
}

function showControls() {
  const busy = Boolean(running())
  $('stop').hidden = !busy
  $('send').hidden = busy
}

async function ask(text, parent) {
  const question = { id: newId(), chat: chat.id, parent, role: 'user', created: Date.now(), content: text }
  tree.set(question.id, question)
  if (!parent && chat.title === 'New chat') chat.title = titleOf(text)
  await store.saveMessage(question)
  await answer(question.id)
}

async function answer(parent) {
  const message = {
    id: newId(),
    chat: chat.id,
    parent,
    role: 'assistant',
    created: Date.now(),
    status: 'running',
    waiting: '',
    ...emptyAnswer(),
  }
  tree.set(message.id, message)
  chat.leaf = message.id
  following = true
  show()
  write(message)
  await Promise.all([store.saveMessage(message), saveChat()])
  announce('The answer has begun.')
}

function write(message) {
  const [of, all] = [chat, tree]
  runner.run(message, () => requestBody(of.settings, conversation(all, message.parent, of.settings.system)))
}

const actions = {
  edit: (id, text) => ask(text, tree.get(id).parent),
  regenerate: (id) => answer(tree.get(id).parent),
  resume: (id) => {
    const message = tree.get(id)
    Object.assign(message, { status: 'running', failure: null })
    show()
    write(message)
  },
  branch: (id, step) => {
    chat.leaf = otherBranch(tree, id, step)
    show()
    saveChat()
  },
  rate: (id) => runner.rate(id),
  onShown: follow,
}

/** An answer of this tab has changed. */
function changed(message, how) {
  const view = views.get(message.id)
  if (!view || view.message !== message) return
  if (how === 'grew') {
    view.grew()
    return
  }
  view.state()
  showControls()
  follow()
  if (message.status === 'done') announce(`The answer is complete. ${message.content.slice(0, 500)}`)
  else if (message.status === 'failed') announce(`The answer failed. ${message.failure.message}`)
  else if (message.status === 'stopped') announce('Stopped.')
  else announce(message.waiting || message.notes.at(-1) || '')
}

/** Another tab has changed something. */
function heard({ kind, value }) {
  if (kind === 'removed') {
    chats = chats.filter((other) => other.id !== value.id)
    if (chat.id === value.id) open(chats[0] ?? newChat())
    else showChats()
  } else if (kind === 'chats') {
    const known = chats.find((other) => other.id === value.id)
    // Which branch is shown is each tab's own, unless it shows the end of an older one.
    if (known) Object.assign(known, value, known === chat && tree.has(chat.leaf) ? { leaf: chat.leaf } : {})
    else chats.unshift(value)
    if (chat.id === value.id && !known) chat = value
    showChats()
  } else if (kind === 'messages' && value.chat === chat.id) {
    const known = tree.get(value.id)
    if (known && runner.writes(value.id)) return
    if (!known) {
      tree.set(value.id, value)
      if (value.parent === chat.leaf || tree.get(value.parent)?.parent === chat.leaf) {
        chat.leaf = newestLeaf(tree, value.id)
      }
      show()
      if (value.status === 'running') write(value)
      return
    }
    const grew = known.status === value.status && known.notes?.length === value.notes?.length
    Object.assign(known, value)
    const view = views.get(value.id)
    if (!view) return
    if (grew && value.status === 'running') view.grew()
    else {
      view.show(view.branch)
      showControls()
    }
  }
}

// ---- scrolling and announcements

function follow() {
  if (following) $('scroll').scrollTop = $('scroll').scrollHeight
}

$('scroll').addEventListener('scroll', () => {
  const { scrollTop, clientHeight, scrollHeight } = $('scroll')
  following = scrollTop + clientHeight >= scrollHeight - NEAR_PX
})

function announce(text) {
  $('status').textContent = text
}

// ---- writing a message

function fit() {
  const question = $('question')
  question.style.height = 'auto'
  question.style.height = `${Math.min(question.scrollHeight, innerHeight / 3)}px`
}

$('question').addEventListener('input', fit)
$('question').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return
  event.preventDefault()
  $('ask').requestSubmit()
})
$('ask').addEventListener('submit', (event) => {
  event.preventDefault()
  const text = $('question').value.trim()
  if (!text || running()) return
  $('question').value = ''
  fit()
  ask(text, chat.leaf)
})

function stop() {
  const message = running()
  if (!message) return
  runner.stop(message.id)
  $('question').focus()
}

$('stop').addEventListener('click', stop)
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || document.querySelector('dialog[open]')) return
  if (document.body.classList.contains('menu')) closeSidebar()
  else stop()
})

// ---- the list of chats

function closeSidebar() {
  document.body.classList.remove('menu')
  $('menu').setAttribute('aria-expanded', 'false')
}

$('menu').addEventListener('click', () => {
  const opened = document.body.classList.toggle('menu')
  $('menu').setAttribute('aria-expanded', String(opened))
  if (opened) $('new-chat').focus()
})
$('scroll').addEventListener('click', closeSidebar)
$('new-chat').addEventListener('click', () => {
  open(newChat(), new Map())
  $('question').focus()
})

// ---- settings, card and key

$('show-settings').addEventListener('click', () => {
  const { settings } = chat
  $('system').value = settings.system ?? ''
  $('logprobs').checked = Boolean(settings.logprobs)
  showSampling($('sampling'), settings, ready?.generation ?? {}, saveChat)
  $('key-row').hidden = !api.key
  $('settings').showModal()
})
$('system').addEventListener('change', () => {
  chat.settings.system = $('system').value
  saveChat()
})
$('logprobs').addEventListener('change', () => {
  chat.settings.logprobs = $('logprobs').checked
  saveChat()
})
$('export-markdown').addEventListener('click', () =>
  download(fileName(chat.title, 'md'), asMarkdown(chat, tree), 'text/markdown'),
)
$('export-json').addEventListener('click', () =>
  download(fileName(chat.title, 'json'), asJson(chat, tree), 'application/json'),
)
$('remove-chat').addEventListener('click', async () => {
  if (!confirm(`Delete the chat "${chat.title}"?`)) return
  for (const id of tree.keys()) runner.forget(id)
  $('settings').close()
  chats = chats.filter((other) => other.id !== chat.id)
  await store.removeChat(chat.id)
  await open(chats[0] ?? newChat())
})
$('forget-key').addEventListener('click', () => {
  api.key = ''
  $('key-row').hidden = true
  announce('The key is forgotten.')
})
$('show-card').addEventListener('click', () => {
  showCard($('card-facts'), ready)
  $('card').showModal()
})

let asking = null

/** Asks for the key once, however many requests want one. */
function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $('key')
    $('key-wrong').hidden = !wrong
    $('key-form').onsubmit = (event) => {
      event.preventDefault()
      api.key = $('key-value').value.trim()
      $('key-value').value = ''
      dialog.close()
    }
    dialog.onclose = () => {
      if (!api.key) {
        dialog.showModal()
        return
      }
      asking = null
      resolve()
    }
    dialog.oncancel = (event) => event.preventDefault()
    dialog.showModal()
  })
  return asking
}

/** Asks for the model's card until a model can serve, and then once a minute. */
async function watchModel() {
  for (;;) {
    try {
      ready = await api.ready()
    } catch {
      ready = null
    }
    const serves = ready?.status === 'ready'
    $('model').textContent = serves ? ready.model.name : (ready?.status ?? 'unreachable')
    const problem = serves ? '' : facts(ready)[0][1]
    if ($('banner').textContent !== problem) $('banner').textContent = problem
    $('banner').hidden = serves
    await new Promise((resolve) => setTimeout(resolve, serves ? 60_000 : ASK_READY_MS))
  }
}

// ---- begin

store.listen(heard)
await open(chats.find((one) => one.id === sessionStorage.getItem(CURRENT)) ?? chats[0] ?? newChat())
if (!store.lasting) announce('This browser keeps no chats: they last as long as this page.')
watchModel()
if (matchMedia('(pointer: fine)').matches) $('question').focus()
