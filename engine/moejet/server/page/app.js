// The page as a whole: which conversation is shown, what runs, what is kept.

import { apiKey, models, strategies } from './api.js';
import { byId, el, newId } from './dom.js';
import { AssistantView, UserView } from './message_view.js';
import { Run } from './run.js';
import { Settings } from './settings.js';
import { showList } from './sidebar.js';
import { Store } from './store.js';
import * as tree from './tree.js';

const CURRENT = 'moejet.current';
const SAVE_MS = 600; // while an answer comes in

const input = byId('input');
const scroller = byId('scroller');

class App {
  constructor(store, settings) {
    this.store = store;
    this.settings = settings;
    this.conversations = new Map();
    this.current = tree.newConversation();
    this.runs = new Map(); // by conversation id
    this.views = new Map(); // of the conversation that is shown, by node id
    this.changes = new Set(); // ids of nodes that the next frame shows
    this.saves = new Map(); // timers, by conversation id
    this.model = '';
    this.isFollowing = true; // the end of the conversation is kept in view
    this.actions = {
      select: (node) => this.select(node),
      pick: (node) => this.pick(node),
      edit: (node, text) => this.send(text, node.parent),
      regenerate: (node) => this.generate(this.current, this.current.nodes[node.parent]),
      retry: (node) => this.retry(node),
    };
  }

  async begin() {
    for (const conversation of await this.store.all()) {
      if (tree.markCut(conversation)) this.store.put(conversation);
      this.conversations.set(conversation.id, conversation);
    }
    if (!this.store.isLasting) this.notify('This browser does not let the page keep conversations: they end with the tab.');
    this.open(this.conversations.get(localStorage.getItem(CURRENT)) ?? this.current);
    await this.connect();
  }

  async connect() {
    try {
      [this.model = ''] = await models();
      byId('model').textContent = this.model;
      strategies().then((found) => this.settings.offer(found));
      this.notify('');
    } catch (error) {
      if (error.status === 401) this.askKey(error.message, () => this.connect());
      else this.notify(error.message, ['Retry', () => this.connect()]);
    }
  }

  // What is shown

  open(conversation) {
    this.current = conversation;
    localStorage.setItem(CURRENT, conversation.id);
    this.views.clear();
    this.isFollowing = true;
    document.body.classList.remove('with-sidebar');
    byId('scrim').hidden = true;
    this.showThread();
    this.showList();
  }

  startNew() {
    if (tree.path(this.current).length) this.open(tree.newConversation());
    else this.open(this.current);
    input.focus();
  }

  showList() {
    showList(byId('conversations'), this.conversations.values(), this.current, {
      open: (conversation) => this.open(conversation),
      rename: (conversation, title) => {
        conversation.title = title || conversation.title;
        this.save(conversation);
        this.showList();
        this.showTitle();
      },
      remove: (conversation) => this.remove(conversation),
    });
  }

  showTitle() {
    const title = this.current.title || 'New chat';
    byId('title').textContent = title;
    document.title = this.current.title ? `${title} · moejet` : 'moejet';
  }

  /** Lays the messages of the path out; views that exist are used again. */
  showThread() {
    const conversation = this.current;
    const shown = [];
    for (const node of tree.path(conversation)) {
      const group = tree.openGroup(conversation, node);
      group.chosen = node;
      if (group.length) {
        const columns = group.map((other) => this.viewOf(other, group).element);
        shown.push(el('div', { className: 'group', role: 'group', 'aria-label': `${group.length} answers` }, ...columns));
      } else {
        shown.push(this.viewOf(node, group).element);
      }
    }
    byId('thread').replaceChildren(...shown);
    byId('thread').classList.toggle('wide', shown.at(-1)?.className === 'group');
    byId('empty').hidden = shown.length > 0;
    this.showTitle();
    this.showControls();
    this.follow();
  }

  viewOf(node, group) {
    let view = this.views.get(node.id);
    if (!view) {
      view = new (node.role === 'user' ? UserView : AssistantView)(node, this.actions);
      this.views.set(node.id, view);
    }
    view.place(tree.siblings(this.current, node), group);
    return view;
  }

  showControls() {
    const run = this.runs.get(this.current.id);
    byId('send').hidden = Boolean(run);
    byId('stop').hidden = !run;
    byId('answer-now').hidden = !run?.isThinking;
    byId('answer-now').disabled = Boolean(run?.isEnding);
    byId('forget-key').hidden = !apiKey.get();
  }

  follow() {
    if (this.isFollowing) scroller.scrollTop = scroller.scrollHeight;
    byId('to-end').hidden = this.isFollowing || isAtEnd();
  }

  notify(text, action = null) {
    const notice = byId('notice');
    notice.hidden = !text;
    notice.replaceChildren(el('span', { textContent: text }));
    const close = { className: 'quiet small', type: 'button', textContent: 'Dismiss', onclick: () => this.notify('') };
    if (action) notice.append(el('button', { className: 'small', type: 'button', textContent: action[0], onclick: action[1] }));
    notice.append(el('button', close));
  }

  say(text) {
    byId('status').textContent = text;
  }

  // What is asked

  send(text, parentId = null) {
    const conversation = this.current;
    if (this.runs.has(conversation.id)) return false;
    const parent = parentId ?? tree.last(conversation).id;
    if (parentId === null && conversation.nodes[parent].group) conversation.nodes[parent].isPicked = true;
    if (!conversation.title) conversation.title = tree.titleOf(text);
    this.conversations.set(conversation.id, conversation);
    const node = tree.addNode(conversation, parent, { role: 'user', content: text });
    this.generate(conversation, node);
    return true;
  }

  async generate(conversation, userNode) {
    if (this.runs.has(conversation.id)) return;
    const numAnswers = this.settings.numAnswers;
    const group = numAnswers > 1 ? newId() : null;
    const nodes = Array.from({ length: numAnswers }, () =>
      tree.addNode(conversation, userNode.id, {
        ...{ role: 'assistant', content: '', reasoning: '', state: 'streaming', error: null },
        ...{ group, isPicked: false, model: this.model, finish: null, stats: {} },
      }),
    );
    tree.select(conversation, nodes[0]);
    const run = new Run(nodes, (changed) => this.changed(conversation, changed));
    this.runs.set(conversation.id, run);
    conversation.updated = Date.now();
    this.isFollowing = true;
    this.save(conversation);
    this.showThread();
    this.showList();
    this.say('The model is at work.');
    const failure = await run.go({
      ...(this.model ? { model: this.model } : {}),
      messages: tree.messages(conversation, userNode, this.settings.system),
      stream: true,
      stream_options: { include_usage: true },
      ...this.settings.fields(),
    });
    this.runs.delete(conversation.id);
    if (failure && nodes.every((node) => !node.content && !node.reasoning)) {
      // One error for all of them.
      for (const node of nodes.slice(1)) tree.removeNode(conversation, node.id);
      nodes[0].group = null;
    }
    this.save(conversation);
    if (conversation === this.current) this.showThread();
    this.say(failure ? failure.message : nodes[0].state === 'stopped' ? 'Stopped.' : 'The answer is complete.');
    if (failure?.status === 401) this.askKey(failure.message, () => this.retry(nodes[0]));
  }

  /** Shows what has come once per frame, however many tokens those were. */
  changed(conversation, nodes) {
    this.saveSoon(conversation);
    if (conversation !== this.current) return;
    const isWaiting = this.changes.size > 0;
    for (const node of nodes) this.changes.add(node.id);
    if (isWaiting) return;
    requestAnimationFrame(() => {
      for (const id of this.changes) this.views.get(id)?.update();
      this.changes.clear();
      this.showControls();
      this.follow();
    });
  }

  select(node) {
    tree.select(this.current, node);
    this.isFollowing = false;
    this.save(this.current);
    this.showThread();
    this.views.get(node.id)?.element.scrollIntoView({ block: 'nearest' });
  }

  pick(node) {
    node.isPicked = true;
    this.select(node);
    input.focus();
  }

  /** Asks again; an answer that failed before it began makes room. */
  retry(node) {
    const conversation = this.current;
    const parent = conversation.nodes[node.parent];
    if (!parent || this.runs.has(conversation.id)) return;
    for (const other of tree.siblings(conversation, node)) {
      const isSame = other === node || (node.group && other.group === node.group);
      if (isSame && other.state === 'error' && !other.content && !other.reasoning) tree.removeNode(conversation, other.id);
    }
    this.generate(conversation, parent);
  }

  stop() {
    this.runs.get(this.current.id)?.stop();
  }

  async answerNow() {
    const run = this.runs.get(this.current.id);
    if (!run) return;
    try {
      const ending = run.answerNow();
      this.showControls();
      await ending;
    } catch (error) {
      this.notify(error.message);
    }
    this.showControls();
  }

  // What is kept

  async save(conversation) {
    clearTimeout(this.saves.get(conversation.id));
    this.saves.delete(conversation.id);
    if (!this.conversations.has(conversation.id)) return;
    try {
      await this.store.put(structuredClone(conversation));
    } catch (error) {
      this.notify(`The conversation could not be saved: ${error?.message ?? 'the browser refused'}.`);
    }
  }

  saveSoon(conversation) {
    if (this.saves.has(conversation.id)) return;
    this.saves.set(conversation.id, setTimeout(() => this.save(conversation), SAVE_MS));
  }

  saveAll() {
    for (const id of [...this.saves.keys()]) this.save(this.conversations.get(id));
  }

  remove(conversation) {
    this.runs.get(conversation.id)?.stop();
    this.conversations.delete(conversation.id);
    this.store.remove(conversation.id);
    if (conversation === this.current) this.open(tree.newConversation());
    this.showList();
    this.notify(`Deleted “${conversation.title}”.`, [
      'Undo',
      () => {
        this.conversations.set(conversation.id, conversation);
        this.save(conversation);
        this.open(conversation);
        this.notify('');
      },
    ]);
  }

  exportAll() {
    const data = { format: 'moejet-conversations', version: 1, conversations: [...this.conversations.values()] };
    const url = URL.createObjectURL(new Blob([JSON.stringify(data, null, 1)], { type: 'application/json' }));
    el('a', { href: url, download: `moejet-${new Date().toISOString().slice(0, 10)}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  async importFile(file) {
    try {
      const data = JSON.parse(await file.text());
      if (data?.format !== 'moejet-conversations' || !Array.isArray(data.conversations)) {
        throw new Error('it was not exported from this page');
      }
      const found = data.conversations.map(tree.parseConversation);
      for (const conversation of found) {
        tree.markCut(conversation);
        this.conversations.set(conversation.id, conversation);
        await this.save(conversation);
      }
      this.showList();
      this.notify(found.length === 1 ? 'One conversation imported.' : `${found.length} conversations imported.`);
    } catch (error) {
      this.notify(`${file.name} cannot be imported: ${error.message}.`);
    }
  }

  askKey(message, then) {
    const dialog = byId('key-dialog');
    if (dialog.open) return;
    byId('key-message').textContent = `${message} The key is kept until this tab is closed.`;
    byId('key').value = '';
    dialog.showModal();
    dialog.onclose = () => {
      const key = byId('key').value.trim();
      byId('key').value = '';
      if (dialog.returnValue === 'ok' && key) {
        apiKey.set(key);
        if (!this.model) this.connect();
        then();
      } else {
        this.notify('Without an API key this server does not answer.', ['Enter one', () => this.askKey(message, then)]);
      }
      dialog.returnValue = '';
      this.showControls();
    };
  }
}

const isAtEnd = () => scroller.scrollTop + scroller.clientHeight > scroller.scrollHeight - 60;

function fitInput() {
  input.style.height = 'auto';
  input.style.height = `${Math.min(input.scrollHeight + 2, window.innerHeight * 0.4)}px`;
}

function setUp(app) {
  const submit = () => {
    const text = input.value.trim();
    if (!text || !app.send(text)) return;
    input.value = '';
    fitInput();
  };
  byId('composer').addEventListener('submit', (event) => {
    event.preventDefault();
    submit();
  });
  input.addEventListener('input', fitInput);
  input.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  document.addEventListener('keydown', (event) => {
    if (document.querySelector('dialog[open]')) return;
    if (event.key === 'Escape') app.stop();
    if (event.key.toLowerCase() === 'k' && (event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey) {
      event.preventDefault();
      app.startNew();
    }
  });
  const toggleSidebar = (isOpen) => {
    document.body.classList.toggle('with-sidebar', isOpen);
    byId('scrim').hidden = !isOpen;
    (isOpen ? byId('close-sidebar') : byId('open-sidebar')).focus();
  };
  const clicks = {
    stop: () => app.stop(),
    'answer-now': () => app.answerNow(),
    'new-chat': () => app.startNew(),
    export: () => app.exportAll(),
    import: () => byId('import-file').click(),
    'open-sidebar': () => toggleSidebar(true),
    'close-sidebar': () => toggleSidebar(false),
    scrim: () => toggleSidebar(false),
    'cancel-key': () => byId('key-dialog').close(''),
    'forget-key': () => {
      apiKey.forget();
      app.showControls();
    },
    'to-end': () => {
      app.isFollowing = true;
      app.follow();
    },
  };
  for (const [id, action] of Object.entries(clicks)) byId(id).addEventListener('click', action);
  byId('import-file').addEventListener('change', async ({ target }) => {
    for (const file of target.files) await app.importFile(file);
    target.value = '';
  });
  scroller.addEventListener('scroll', () => {
    app.isFollowing = isAtEnd();
    byId('to-end').hidden = app.isFollowing;
  });
  window.addEventListener('pagehide', () => app.saveAll());
}

const app = new App(await Store.open(), new Settings());
setUp(app);
await app.begin();
fitInput();
if (matchMedia('(min-width: 48rem)').matches) input.focus();
