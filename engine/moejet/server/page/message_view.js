// Messages as they are shown. A view is updated in place while its answer grows: thinking is appended to, finished
// blocks of the answer are left alone, and only its end is rendered anew.

import { copyButton, count, el, seconds } from './dom.js';
import { finishedLength, render } from './markdown.js';
import { StrategyView } from './strategy_view.js';

/** Buttons that lead to the other branches of a node. */
function switcher(nodes, node, onSelect) {
  if (nodes.length < 2) return null;
  const at = nodes.indexOf(node);
  const step = (by, label, text) =>
    el('button', {
      type: 'button',
      className: 'quiet small',
      'aria-label': label,
      textContent: text,
      disabled: !nodes[at + by],
      onclick: () => onSelect(nodes[at + by]),
    });
  const place = el('span', { className: 'faint', textContent: `${at + 1}/${nodes.length}` });
  place.setAttribute('aria-label', `version ${at + 1} of ${nodes.length}`);
  return el('span', { className: 'switcher' }, step(-1, 'Earlier version', '‹'), place, step(1, 'Later version', '›'));
}

const button = (text, onclick, title = null) =>
  el('button', { type: 'button', className: 'quiet small', textContent: text, title, onclick });

export class UserView {
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.body = el('div', { className: 'bubble', textContent: node.content });
    this.foot = el('footer');
    this.element = el('article', { className: 'message user', 'aria-label': 'You' }, this.body, this.foot);
  }

  place(siblings) {
    const { node, actions } = this;
    this.foot.replaceChildren(
      ...[
        switcher(siblings, node, actions.select),
        button('Edit', () => this.edit()),
        copyButton('Copy', () => node.content),
      ].filter(Boolean),
    );
  }

  update() {}

  edit() {
    const area = el('textarea', { value: this.node.content, rows: 3, 'aria-label': 'Edit the message' });
    const close = () => {
      form.replaceWith(this.body);
      this.foot.hidden = false;
    };
    const save = (event) => {
      event.preventDefault();
      const text = area.value.trim();
      close();
      if (text) this.actions.edit(this.node, text);
    };
    const form = el(
      'form',
      { className: 'edit', onsubmit: save },
      area,
      el('div', { className: 'row' }, el('span', { className: 'spring' }), button('Cancel', close), el('button', { className: 'primary small', textContent: 'Send' })),
    );
    area.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) save(event);
      if (event.key === 'Escape') {
        event.stopPropagation();
        close();
      }
    });
    this.body.replaceWith(form);
    this.foot.hidden = true;
    area.style.height = `${Math.min(area.scrollHeight + 4, 360)}px`;
    area.focus();
  }
}

export class AssistantView {
  #shown = { reasoning: 0, finished: 0, content: -1, isFinal: false };
  #touched = false; // the user has opened or closed the thinking, which is not undone then
  #nextRender = 0;
  #timer = null;

  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.label = el('span');
    this.thought = el('div', { className: 'thought' });
    const summary = el('summary', { onclick: () => (this.#touched = true) }, this.label);
    this.thinking = el('details', { className: 'thinking', hidden: true }, summary, this.thought);
    this.strategy = new StrategyView();
    this.done = el('div');
    this.tail = el('div');
    this.answer = el('div', { className: 'answer' }, this.done, this.tail);
    this.note = el('div', { className: 'note', hidden: true });
    this.foot = el('footer');
    this.stats = el('span', { className: 'stats faint' });
    this.element = el('article', { className: 'message assistant', 'aria-label': 'Model' }, this.strategy.element, this.thinking, this.answer, this.note, this.foot);
    this.update();
  }

  place(siblings, group) {
    const { node, actions } = this;
    this.element.classList.toggle('chosen', group.length > 0 && node === group.chosen);
    const pick = el('button', { type: 'button', className: 'small', textContent: 'Use this one', onclick: () => actions.pick(node) });
    const isEmpty = !node.content && node.state === 'error';
    const buttons = [
      group.length ? pick : switcher(siblings, node, actions.select),
      isEmpty ? null : copyButton('Copy', () => node.content),
      group.length || isEmpty ? null : button('Regenerate', () => actions.regenerate(node)),
      this.stats,
    ];
    this.foot.replaceChildren(...buttons.filter(Boolean));
    this.update();
  }

  update() {
    const { node } = this;
    const isOpen = node.state === 'streaming';
    this.element.classList.toggle('streaming', isOpen);
    this.element.setAttribute('aria-busy', String(isOpen));
    this.strategy.update(node, isOpen);
    this.#updateThinking(isOpen);
    this.#updateAnswer(isOpen);
    this.#updateNote(isOpen);
    this.foot.classList.toggle('waiting', isOpen);
    this.stats.textContent = statsText(node);
  }

  #updateThinking(isOpen) {
    const { node } = this;
    const { reasoning } = node;
    this.thinking.hidden = !reasoning;
    if (!reasoning) return;
    const isThinking = isOpen && !node.content;
    if (reasoning.length > this.#shown.reasoning) {
      const isAtEnd = this.thought.scrollTop + this.thought.clientHeight > this.thought.scrollHeight - 30;
      this.thought.append(reasoning.slice(this.#shown.reasoning));
      this.#shown.reasoning = reasoning.length;
      if (isAtEnd) this.thought.scrollTop = this.thought.scrollHeight;
    }
    if (!this.#touched) this.thinking.open = isThinking;
    const { thinkingSeconds, reasoningTokens, isExact } = node.stats;
    const parts = [isThinking ? 'Thinking' : 'Thought'];
    if (thinkingSeconds) parts[0] += ` for ${seconds(thinkingSeconds)}`;
    if (reasoningTokens) parts.push(`${isExact ? '' : 'about '}${count(reasoningTokens, 'token')}`);
    this.label.textContent = parts.join(' · ');
  }

  #updateAnswer(isOpen) {
    const { content } = this.node;
    const shown = this.#shown;
    if (shown.content === content.length && shown.isFinal === !isOpen) return;
    if (isOpen) {
      // A frame may not be spent on rendering alone: the longer it took, the longer until the next.
      const wait = this.#nextRender - performance.now();
      if (wait > 0) {
        this.#timer ??= setTimeout(() => {
          this.#timer = null;
          this.update();
        }, wait);
        return;
      }
    }
    const begin = performance.now();
    if (isOpen) {
      const finished = shown.finished + finishedLength(content.slice(shown.finished));
      if (finished > shown.finished) this.done.append(render(content.slice(shown.finished, finished)));
      shown.finished = finished;
      this.tail.replaceChildren(render(content.slice(finished)));
    } else {
      // Links to definitions further down and lists that were divided are only right as a whole.
      shown.finished = 0;
      this.done.replaceChildren(render(content));
      this.tail.replaceChildren();
    }
    shown.content = content.length;
    shown.isFinal = !isOpen;
    const now = performance.now();
    this.#nextRender = now + Math.max(40, 4 * (now - begin));
  }

  #updateNote(isOpen) {
    const { node, actions } = this;
    let text = '';
    let action = null;
    if (isOpen && !node.reasoning && !node.content) text = node.strategy ? '' : waitingText(node);
    else if (node.state === 'stopped') text = 'Stopped.';
    else if (node.state === 'cut') [text, action] = ['Cut off: the page was left while this was written.', 'Regenerate'];
    else if (node.state === 'error') [text, action] = [node.error, 'Retry'];
    else if (node.finish === 'length') text = 'Ends here because the limit of tokens was reached.';
    else if (!isOpen && !node.content) text = 'The model gave no answer.';
    this.note.hidden = !text;
    this.note.classList.toggle('error', node.state === 'error');
    const key = `${text}|${action}`;
    if (this.note.dataset.key === key) return;
    this.note.dataset.key = key;
    this.note.replaceChildren(el('span', { textContent: text }));
    if (action) this.note.append(button(action, () => actions.retry(node)));
  }
}

function waitingText(node) {
  const progress = node.progress;
  if (!progress) return 'Waiting for the model…';
  const cached = progress.cache ? `, ${progress.cache.toLocaleString('en')} of them known already` : '';
  return `Reading the prompt: ${progress.processed.toLocaleString('en')} of ${count(progress.total, 'token')}${cached}`;
}

function statsText({ state, stats }) {
  const parts = [];
  if (stats.completionTokens) parts.push(`${stats.isExact ? '' : 'about '}${count(stats.completionTokens, 'token')}`);
  if (stats.rate) parts.push(`${stats.rate < 100 ? stats.rate.toFixed(1) : Math.round(stats.rate)} tokens/s`);
  if (stats.firstSeconds && state !== 'streaming') parts.push(`first after ${seconds(stats.firstSeconds)}`);
  return parts.join(' · ');
}
