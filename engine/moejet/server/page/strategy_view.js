// What a strategy does and did, folded above its answer: progress, votes, candidates, and the tree of a search.
//
//   node.strategy  { message, votes: {answer: weight}, steps: {number: step}, told, candidates }
//   step           { number, parent, text, score, visits, state }

import { count, el } from './dom.js';

const MAX_STEPS = 500; // of a tree; more say nothing to a reader

/** Adds a chunk's progress to what is known. */
export function takeProgress(node, { message, data, node: step }) {
  node.strategy ??= { message: '', votes: null, steps: {}, told: null, candidates: null };
  node.strategy.message = message ?? '';
  if (data?.votes) node.strategy.votes = data.votes;
  if (step && (step.number in node.strategy.steps || Object.keys(node.strategy.steps).length < MAX_STEPS)) {
    node.strategy.steps[step.number] = step;
  }
}

/** Adds what the last chunk of a choice says. */
export function takeOutcome(node, told, candidates) {
  node.strategy ??= { message: '', votes: null, steps: {}, told: null, candidates: null };
  Object.assign(node.strategy, { told, candidates: candidates ?? null, votes: told.votes ?? node.strategy.votes });
}

export class StrategyView {
  #shown = '';

  constructor() {
    this.label = el('span');
    this.body = el('div', { className: 'strategy-body' });
    this.element = el('details', { className: 'strategy', hidden: true }, el('summary', {}, this.label), this.body);
  }

  update(node, isOpen) {
    const { strategy } = node;
    this.element.hidden = !strategy;
    if (!strategy) return;
    this.label.textContent = strategy.told ? outcomeText(strategy) : isOpen ? strategy.message : `${strategy.message} · not finished`;
    // Rebuilt only when something in it is new, so that what a reader has folded out stays.
    const key = JSON.stringify([strategy.votes, strategy.steps, strategy.candidates?.length]);
    if (key === this.#shown) return;
    this.#shown = key;
    const parts = [votesOf(strategy), treeOf(strategy), candidatesOf(strategy)];
    this.body.replaceChildren(...parts.filter(Boolean));
  }
}

function outcomeText({ told, candidates, votes }) {
  const parts = [told.strategy];
  const number = told.num_candidates ?? candidates?.length;
  if (number) parts.push(count(number, 'candidate'));
  const share = votes && told.answer in votes ? ` with ${amount(votes[told.answer])} of ${amount(sum(votes))} votes` : '';
  if (told.answer !== null && told.answer !== undefined) parts.push(`${told.answer}${share}`);
  if (told.is_exhausted) parts.push('ended early');
  return parts.join(' · ');
}

const sum = (votes) => Object.values(votes).reduce((total, weight) => total + weight, 0);
const amount = (value) => value.toLocaleString('en', { maximumFractionDigits: 2 });

function votesOf({ votes }) {
  if (!votes || !Object.keys(votes).length) return null;
  const total = sum(votes) || 1;
  const rows = Object.entries(votes)
    .sort(([, a], [, b]) => b - a)
    .slice(0, 20)
    .map(([answer, weight]) => {
      const bar = el('meter', { min: 0, max: 1, value: weight / total, 'aria-hidden': 'true' });
      return el('li', {}, bar, el('span', { textContent: `${answer}: ${amount(weight)}` }));
    });
  return el('ul', { className: 'votes', 'aria-label': 'Votes' }, ...rows);
}

function candidatesOf({ candidates }) {
  if (!candidates?.length) return null;
  const items = candidates.map((candidate, i) => {
    const title = [`${i + 1}. ${candidate.answer ?? 'no answer'}`, count(candidate.tokens, 'token')];
    if (candidate.score !== null) title.push(`score ${candidate.score.toFixed(2)}`);
    if (candidate.is_chosen) title.push('chosen');
    const text = [candidate.reasoning, candidate.text].filter(Boolean).join('\n\n');
    return el(
      'details',
      { className: 'candidate' },
      el('summary', { textContent: title.join(' · ') }),
      el('div', { className: 'thought', textContent: text }),
    );
  });
  return el('div', { className: 'candidates' }, ...items);
}

function treeOf({ steps }) {
  const all = Object.values(steps);
  if (!all.length) return null;
  const children = new Map();
  for (const step of all) {
    // A step whose parent was never told hangs from the top.
    const parent = step.parent in steps && step.parent < step.number ? step.parent : -1;
    children.set(parent, [...(children.get(parent) ?? []), step]);
  }
  const branch = (parent) => {
    const found = children.get(parent) ?? [];
    return found.length ? el('ul', {}, ...found.map((step) => el('li', {}, stepOf(step), branch(step.number)))) : null;
  };
  const root = branch(-1);
  root.className = 'steps';
  root.setAttribute('aria-label', 'Search');
  return root;
}

function stepOf({ text, score, visits, state }) {
  const notes = [state];
  if (score !== null && score !== undefined) notes.push(score.toFixed(2));
  if (visits) notes.push(count(visits, 'visit'));
  const line = el('span', { className: `step ${state}` }, el('span', { textContent: text.trim() || '…' }));
  line.append(' ', el('span', { className: 'faint', textContent: notes.join(' · ') }));
  return line;
}
