/**
 * Chats and messages in this browser (IndexedDB), and word of their changes to other tabs.
 * Without IndexedDB (private windows of some browsers) chats last as long as the page.
 */
const NAME = 'serve_app'

export class Store {
  #memory = { chats: new Map(), messages: new Map() }
  #database = null
  #channel = 'BroadcastChannel' in globalThis ? new BroadcastChannel(NAME) : null

  /** False: nothing outlives the page. */
  get lasting() {
    return this.#database !== null
  }

  async open() {
    try {
      this.#database = await new Promise((resolve, reject) => {
        const request = indexedDB.open(NAME, 1)
        request.onupgradeneeded = () => {
          request.result.createObjectStore('chats', { keyPath: 'id' })
          request.result.createObjectStore('messages', { keyPath: 'id' }).createIndex('chat', 'chat')
        }
        request.onsuccess = () => resolve(request.result)
        request.onerror = () => reject(request.error)
        request.onblocked = () => reject(new Error('blocked'))
      })
    } catch {
      this.#database = null
    }
    return this
  }

  /** @param {(change: {kind: string, value: any}) => void} listener for what other tabs save and remove */
  listen(listener) {
    if (this.#channel) this.#channel.onmessage = (event) => listener(event.data)
  }

  /** All chats, the newest first. */
  async chats() {
    const found = await this.#all('chats')
    return found.sort((one, other) => other.updated - one.updated)
  }

  /** The messages of a chat by their ids, in the order in which they were made. */
  async messages(chat) {
    const found = this.#database
      ? await this.#ask('messages', 'readonly', (store) => store.index('chat').getAll(chat))
      : [...this.#memory.messages.values()].filter((message) => message.chat === chat)
    found.sort((one, other) => one.created - other.created || Number(one.parent === other.id) - Number(other.parent === one.id))
    return new Map(found.map((message) => [message.id, message]))
  }

  async message(id) {
    if (!this.#database) return this.#memory.messages.get(id)
    return this.#ask('messages', 'readonly', (store) => store.get(id))
  }

  saveChat(chat) {
    return this.#put('chats', chat)
  }

  saveMessage(message) {
    return this.#put('messages', message)
  }

  async removeChat(id) {
    const messages = await this.messages(id)
    for (const key of messages.keys()) await this.#remove('messages', key)
    await this.#remove('chats', id)
    this.#channel?.postMessage({ kind: 'removed', value: { id } })
  }

  async #all(name) {
    if (!this.#database) return [...this.#memory[name].values()]
    return this.#ask(name, 'readonly', (store) => store.getAll())
  }

  async #put(name, value) {
    if (this.#database) await this.#ask(name, 'readwrite', (store) => store.put(value))
    else this.#memory[name].set(value.id, value)
    this.#channel?.postMessage({ kind: name, value })
  }

  async #remove(name, id) {
    if (this.#database) await this.#ask(name, 'readwrite', (store) => store.delete(id))
    else this.#memory[name].delete(id)
  }

  #ask(name, mode, question) {
    return new Promise((resolve, reject) => {
      const request = question(this.#database.transaction(name, mode).objectStore(name))
      request.onsuccess = () => resolve(request.result)
      request.onerror = () => reject(request.error)
    })
  }
}
