// Conversations in IndexedDB; in memory only where the browser offers none (some private windows).

const NAME = 'moejet';
const STORE = 'conversations';

export class Store {
  #database;
  #memory = new Map();

  static async open() {
    const store = new Store();
    store.#database = await new Promise((resolve) => {
      try {
        const opening = indexedDB.open(NAME, 1);
        opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: 'id' });
        opening.onsuccess = () => resolve(opening.result);
        opening.onerror = opening.onblocked = () => resolve(null);
      } catch {
        resolve(null);
      }
    });
    return store;
  }

  get isLasting() {
    return this.#database !== null;
  }

  async all() {
    if (!this.#database) return [...this.#memory.values()];
    return this.#run('readonly', (table) => table.getAll());
  }

  async put(conversation) {
    if (!this.#database) this.#memory.set(conversation.id, conversation);
    else await this.#run('readwrite', (table) => table.put(conversation));
  }

  async remove(id) {
    if (!this.#database) this.#memory.delete(id);
    else await this.#run('readwrite', (table) => table.delete(id));
  }

  #run(mode, action) {
    return new Promise((resolve, reject) => {
      const transaction = this.#database.transaction(STORE, mode);
      const request = action(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = transaction.onerror = () => reject(transaction.error ?? request.error);
    });
  }
}
