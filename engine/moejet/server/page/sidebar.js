// The list of conversations.

import { el } from './dom.js';

/** actions: open, rename(conversation, title), remove, each with the conversation */
export function showList(container, conversations, current, actions) {
  const sorted = [...conversations].sort((a, b) => b.updated - a.updated);
  container.replaceChildren(
    ...(sorted.length
      ? sorted.map((conversation) => entry(conversation, conversation === current, actions))
      : [el('p', { className: 'faint', textContent: 'None yet.' })]),
  );
}

function entry(conversation, isCurrent, actions) {
  const title = conversation.title || 'New chat';
  const row = el('div', { className: isCurrent ? 'entry current' : 'entry' });
  const open = el('button', { className: 'quiet name', textContent: title, title, onclick: () => actions.open(conversation) });
  if (isCurrent) open.setAttribute('aria-current', 'true');
  const rename = () => {
    const input = el('input', { value: conversation.title, maxLength: 200, 'aria-label': 'Name of the conversation' });
    let isOver = false;
    const finish = (isKept) => {
      if (isOver) return;
      isOver = true;
      actions.rename(conversation, isKept ? input.value.trim() : conversation.title);
    };
    input.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && !event.isComposing) finish(true);
      if (event.key === 'Escape') {
        event.stopPropagation();
        finish(false);
      }
    });
    input.addEventListener('blur', () => finish(true));
    row.replaceChildren(input);
    input.select();
    input.focus();
  };
  const tool = (text, label, onclick) =>
    el('button', { className: 'quiet small tool', textContent: text, 'aria-label': `${label} ${title}`, onclick });
  row.append(open, tool('Rename', 'Rename', rename), tool('Delete', 'Delete', () => actions.remove(conversation)));
  return row;
}
