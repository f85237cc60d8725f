// One request to the model, from sending to the last token. It goes on while another conversation is looked at.

import { ApiError, endThinking, streamChat } from './api.js';
import { takeOutcome, takeProgress } from './strategy_view.js';

const now = () => performance.now() / 1e3;

export class Run {
  #controller = new AbortController();
  #clocks; // per answer: when thinking and answering began, in seconds
  #sentAt = 0;

  /** nodes: the answers, one per choice · onChange(nodes): after every step */
  constructor(nodes, onChange) {
    this.nodes = nodes;
    this.onChange = onChange;
    this.id = null;
    this.isEnding = false;
    this.#clocks = nodes.map(() => ({}));
  }

  get isThinking() {
    return !this.isEnding && this.nodes.some((node) => node.state === 'streaming' && (node.reasoning || node.strategy) && !node.content);
  }

  stop() {
    this.#controller.abort();
  }

  async answerNow() {
    if (!this.id) return;
    this.isEnding = true;
    try {
      await endThinking(this.id);
    } finally {
      this.isEnding = false;
    }
  }

  /** Resolves to null, or to the error that ended it; the nodes have been marked accordingly. */
  async go(body) {
    this.#sentAt = now();
    const ticker = setInterval(() => this.#tick(), 250);
    let failure = null;
    try {
      for await (const chunk of streamChat(body, this.#controller.signal)) this.#take(chunk);
      this.#close('done');
    } catch (error) {
      if (error.name === 'AbortError') {
        this.#close('stopped');
      } else {
        failure = error instanceof ApiError ? error : new ApiError(`The page failed: ${error.message}`, -1);
        if (!(error instanceof ApiError)) console.error(error);
        this.#close('error', failure);
      }
    } finally {
      clearInterval(ticker);
    }
    this.onChange(this.nodes);
    return failure;
  }

  #take(chunk) {
    this.id ??= chunk.id ?? null;
    const changed = new Set();
    if (chunk.prompt_progress) {
      for (const node of this.nodes) node.progress = chunk.prompt_progress;
      this.nodes.forEach((node) => changed.add(node));
    }
    for (const choice of chunk.choices ?? []) {
      const node = this.nodes[choice.index];
      if (!node) continue;
      node.model = chunk.model ?? node.model;
      if (chunk.moejet?.progress) takeProgress(node, chunk.moejet.progress);
      if (choice.delta?.reasoning_strategy) takeOutcome(node, choice.delta.reasoning_strategy, choice.reasoning_candidates);
      this.#grow(node, this.#clocks[choice.index], choice.delta ?? {});
      if (choice.finish_reason) {
        node.finish = choice.finish_reason;
        node.state = 'done';
        this.#measure(node, this.#clocks[choice.index]);
      }
      changed.add(node);
    }
    if (chunk.usage && this.nodes.length === 1) this.#count(this.nodes[0], chunk);
    else if (chunk.usage) this.#share(chunk.usage);
    this.onChange([...changed]);
  }

  #grow(node, clock, delta) {
    const reasoning = delta.reasoning_content ?? delta.reasoning ?? '';
    const content = (delta.content ?? '').replaceAll('\r\n', '\n');
    if (!reasoning && !content) return;
    const time = now();
    clock.first ??= time;
    clock.last = time;
    node.stats.firstSeconds ??= time - this.#sentAt;
    node.stats.completionTokens = (node.stats.completionTokens ?? 0) + 1;
    if (reasoning) {
      clock.thinking ??= time;
      node.reasoning += reasoning;
      node.stats.reasoningTokens = (node.stats.reasoningTokens ?? 0) + 1;
    }
    if (content) {
      // Thinking is often followed by empty lines, which are no part of an answer.
      node.content += node.content ? content : content.trimStart();
      if (node.content) clock.answering ??= time;
    }
    this.#measure(node, clock);
  }

  #measure(node, clock) {
    const time = node.state === 'streaming' ? now() : (clock.last ?? now());
    if (clock.thinking) node.stats.thinkingSeconds = (clock.answering ?? time) - clock.thinking;
    const span = (clock.last ?? 0) - (clock.first ?? 0);
    if (span > 0.2) node.stats.rate = (node.stats.completionTokens - 1) / span;
  }

  #count(node, { usage, timings }) {
    node.stats.isExact = true;
    node.stats.promptTokens = usage.prompt_tokens;
    node.stats.completionTokens = usage.completion_tokens;
    node.stats.reasoningTokens = usage.completion_tokens_details?.reasoning_tokens ?? node.stats.reasoningTokens;
    node.stats.cachedTokens = usage.prompt_tokens_details?.cached_tokens ?? 0;
    if (timings?.predicted_per_second > 0) node.stats.rate = timings.predicted_per_second;
  }

  /** Divides the tokens of several answers by the pieces in which each of them came, some of which held many. */
  #share({ completion_tokens: total }) {
    const sum = this.nodes.reduce((before, { stats }) => before + (stats.completionTokens ?? 0), 0);
    if (!sum) return;
    for (const [i, node] of this.nodes.entries()) {
      for (const name of ['completionTokens', 'reasoningTokens']) {
        if (node.stats[name]) node.stats[name] = Math.round((node.stats[name] * total) / sum);
      }
      this.#measure(node, this.#clocks[i]);
    }
  }

  #tick() {
    const thinking = this.nodes.filter((node) => node.state === 'streaming' && (node.reasoning || node.strategy) && !node.content);
    for (const node of thinking) this.#measure(node, this.#clocks[this.nodes.indexOf(node)]);
    if (thinking.length) this.onChange(thinking);
  }

  #close(state, failure = null) {
    for (const node of this.nodes) {
      delete node.progress;
      if (node.state !== 'streaming') continue;
      node.state = state;
      this.#measure(node, this.#clocks[this.nodes.indexOf(node)]);
      if (failure) {
        const stop = /[.!?]$/.test(failure.message) ? '' : '.';
        const again = failure.retryAfter ? `${stop} Try again in ${failure.retryAfter} s.` : '';
        node.error = failure.message + again;
      }
    }
  }
}
