// A conversation is a tree: every edit and every new answer is a branch, and one path through it is shown.
//
//   conversation  { id, title, created, updated, nodes: { root, <id>: node } }
//   node          { id, parent, children: [id], selected: id | null, role, content }
//   assistant     + { reasoning, state, error, group, isPicked, model, finish, stats }
//
// state: streaming, done, stopped (by the user), cut (the page was left), error.
// group: answers to one request with n > 1 have the same one, and stand side by side until one is picked.

import { newId } from './dom.js';

export const ROOT = 'root';

export function newConversation() {
  const now = Date.now();
  const root = { id: ROOT, parent: null, children: [], selected: null, role: 'root', content: '' };
  return { id: newId(), title: '', created: now, updated: now, nodes: { [ROOT]: root } };
}

export function addNode(conversation, parentId, fields) {
  const node = { id: newId(), parent: parentId, children: [], selected: null, ...fields };
  const parent = conversation.nodes[parentId];
  conversation.nodes[node.id] = node;
  parent.children.push(node.id);
  parent.selected = node.id;
  return node;
}

export function removeNode(conversation, id) {
  const node = conversation.nodes[id];
  const parent = conversation.nodes[node.parent];
  for (const child of [...node.children]) removeNode(conversation, child);
  parent.children = parent.children.filter((child) => child !== id);
  if (parent.selected === id) parent.selected = parent.children.at(-1) ?? null;
  delete conversation.nodes[id];
}

/** The nodes from the first message down to the last, along what is selected. */
export function path(conversation, untilId = null) {
  const nodes = [];
  if (untilId !== null) {
    for (let id = untilId; id !== ROOT; id = conversation.nodes[id].parent) nodes.unshift(conversation.nodes[id]);
    return nodes;
  }
  for (let id = conversation.nodes[ROOT].selected; id; id = conversation.nodes[id].selected) {
    nodes.push(conversation.nodes[id]);
  }
  return nodes;
}

export const last = (conversation) => path(conversation).at(-1) ?? conversation.nodes[ROOT];

export function siblings(conversation, node) {
  return conversation.nodes[node.parent].children.map((id) => conversation.nodes[id]);
}

/** Answers to the same request that are to be shown side by side; none if there is one, or one has been picked. */
export function openGroup(conversation, node) {
  if (!node.group) return [];
  const group = siblings(conversation, node).filter((other) => other.group === node.group);
  return group.length > 1 && !group.some((other) => other.isPicked || other.children.length) ? group : [];
}

export function select(conversation, node) {
  conversation.nodes[node.parent].selected = node.id;
}

/** What the model is sent. Thinking is left out where there is an answer: templates drop it. */
export function messages(conversation, node, system) {
  const turns = path(conversation, node.id)
    .filter((turn) => turn.role === 'user' || turn.content || turn.reasoning)
    .map(({ role, content, reasoning }) =>
      role === 'assistant' && !content ? { role, content, reasoning_content: reasoning } : { role, content },
    );
  return system ? [{ role: 'system', content: system }, ...turns] : turns;
}

export function titleOf(text) {
  const line = text.trim().split('\n')[0];
  return line.length > 60 ? `${line.slice(0, 57).trimEnd()}…` : line || 'New chat';
}

const STATES = ['streaming', 'done', 'stopped', 'cut', 'error'];
const text = (value) => (typeof value === 'string' ? value : '');
const number = (value) => (Number.isFinite(value) && value >= 0 ? value : null);

/** A conversation from a file, of which nothing is taken for granted. Throws if it is none. */
export function parseConversation(raw) {
  const source = raw?.nodes;
  if (typeof source !== 'object' || source === null || !Array.isArray(source[ROOT]?.children)) {
    throw new Error('it has no conversation of this page in it');
  }
  const conversation = newConversation();
  conversation.title = text(raw.title).slice(0, 200);
  conversation.created = number(raw.created) ?? conversation.created;
  conversation.updated = number(raw.updated) ?? conversation.updated;
  const seen = new Set([ROOT]);
  const queue = [[ROOT, ROOT]];
  while (queue.length) {
    const [oldId, id] = queue.shift();
    let selected = null;
    for (const childId of source[oldId].children) {
      const child = Object.hasOwn(source, childId) ? source[childId] : null;
      if (!child || seen.has(childId) || !Array.isArray(child.children)) throw new Error('its branches do not fit');
      seen.add(childId);
      const added = addNode(conversation, id, parseFields(child));
      if (source[oldId].selected === childId) selected = added.id;
      queue.push([childId, added.id]);
    }
    if (selected) conversation.nodes[id].selected = selected;
  }
  return conversation;
}

function parseFields(raw) {
  if (raw.role === 'user') return { role: 'user', content: text(raw.content) };
  if (raw.role !== 'assistant') throw new Error(`it has a message of role ${JSON.stringify(raw.role)}`);
  const stats = raw.stats && typeof raw.stats === 'object' ? raw.stats : {};
  return {
    role: 'assistant',
    content: text(raw.content),
    reasoning: text(raw.reasoning),
    state: STATES.includes(raw.state) ? raw.state : 'done',
    error: raw.error ? text(raw.error) : null,
    group: text(raw.group) || null,
    isPicked: raw.isPicked === true,
    model: text(raw.model),
    finish: text(raw.finish) || null,
    stats: Object.fromEntries(
      Object.entries(stats).filter(([name, value]) => /^\w{1,32}$/.test(name) && ['number', 'boolean'].includes(typeof value)),
    ),
  };
}

/** Marks answers that were being written when the page was left. True if there were any. */
export function markCut(conversation) {
  const open = Object.values(conversation.nodes).filter((node) => node.state === 'streaming');
  for (const node of open) node.state = 'cut';
  return open.length > 0;
}
