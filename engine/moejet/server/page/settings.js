// What is sent with every request beside the conversation, and the colours.

import { byId } from './dom.js';

const KEY = 'moejet.settings';
const NUMBERS = ['temperature', 'top_p', 'max_tokens', 'n', 'seed'];
const THEMES = { '': 'auto', light: 'light', dark: 'dark' };

export class Settings {
  #values = {};

  constructor() {
    try {
      this.#values = JSON.parse(localStorage.getItem(KEY)) ?? {};
    } catch {
      this.#values = {};
    }
    const form = byId('settings-form');
    for (const name of ['system', ...NUMBERS]) {
      const input = form.elements[name];
      input.value = this.#values[name] ?? '';
      input.addEventListener('change', () => this.#set(name, name === 'system' ? input.value.trim() : input.value));
    }
    const effort = byId('effort');
    effort.value = this.#values.reasoning_effort ?? '';
    effort.addEventListener('change', () => this.#set('reasoning_effort', effort.value));
    this.strategy = byId('strategy');
    this.strategy.addEventListener('change', () => this.#set('reasoning_strategy', this.strategy.value));
    byId('open-settings').addEventListener('click', () => byId('settings').showModal());
    byId('reset-settings').addEventListener('click', () => {
      for (const name of ['system', ...NUMBERS]) {
        form.elements[name].value = '';
        this.#set(name, '');
      }
    });
    this.#mark();
    setUpTheme();
  }

  get system() {
    return this.#values.system ?? '';
  }

  /** Shows the strategies that the server has, none if it has none. */
  offer({ names, most }) {
    for (const option of this.strategy.options) {
      const [name, numbers = '1'] = option.value.split(',')[0].split(':');
      const samples = Math.max(...numbers.split('x').map(Number));
      option.hidden = option.disabled = name !== '' && !(names.includes(name) && samples <= most);
    }
    this.strategy.closest('label').hidden = !names.length;
    const wanted = this.#values.reasoning_strategy ?? '';
    this.strategy.value = [...this.strategy.options].some((option) => option.value === wanted && !option.disabled) ? wanted : '';
  }

  get numAnswers() {
    return this.strategy.value ? 1 : (this.#number('n') ?? 1);
  }

  /** The fields that have been set. */
  fields() {
    const found = Object.fromEntries(NUMBERS.map((name) => [name, this.#number(name)]).filter(([, value]) => value !== null));
    if (this.#values.reasoning_effort) found.reasoning_effort = this.#values.reasoning_effort;
    if (!this.strategy.value) return { ...found, return_progress: true };
    // One answer comes back, and progress of another kind.
    delete found.n;
    const stream_options = { include_usage: true, include_progress: true };
    return { ...found, stream_options, reasoning_strategy: this.strategy.value, return_candidates: true };
  }

  #number(name) {
    const text = this.#values[name];
    const value = Number(text);
    return text === undefined || text === '' || !Number.isFinite(value) ? null : value;
  }

  #set(name, value) {
    if (value === '') delete this.#values[name];
    else this.#values[name] = value;
    localStorage.setItem(KEY, JSON.stringify(this.#values));
    this.#mark();
  }

  #mark() {
    byId('settings-mark').hidden = !['system', ...NUMBERS].some((name) => this.#values[name]);
  }
}

function setUpTheme() {
  const button = byId('theme');
  const show = () => {
    button.textContent = `Theme: ${THEMES[document.documentElement.dataset.theme ?? '']}`;
  };
  button.addEventListener('click', () => {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf(document.documentElement.dataset.theme ?? '') + 1) % names.length];
    if (next) document.documentElement.dataset.theme = next;
    else delete document.documentElement.dataset.theme;
    localStorage.setItem('moejet.theme', next);
    show();
  });
  show();
}
