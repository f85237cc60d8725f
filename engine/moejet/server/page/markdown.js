// Markdown, code and formulas of the model, which are not to be trusted, as a part of a document.
//
//   text -> marked (HTML in it stays text) -> DOMPurify -> formulas put in, each of them sanitised on its own
//
// Nothing is loaded for it: images other than inline ones become links.

import createPurifier from './vendor/dompurify/purify.es.js';
import { Marked } from './vendor/marked/marked.esm.js';
import { copyButton } from './dom.js';
import { highlight } from './highlight.js';

const MAX_FORMULA = 4000;
const HARMLESS_TAG = /^<\/?(?:br|sub|sup|kbd|b|i|em|strong|u|s|mark|small)\s*\/?>$/i;
const INLINE_IMAGE = /^data:image\/(?:png|jpeg|gif|webp);base64,[a-z0-9+/=\s]+$/i;
const LINK = /^(?:https?:\/\/|mailto:)/i;

const escapes = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;' };
const escape = (text) => text.replace(/[&<>"']/g, (character) => escapes[character]);

// Formulas of the text that is being rendered; the HTML refers to them by number.
let formulas = [];

function formula({ text, isDisplay }) {
  formulas.push({ text, isDisplay });
  return `<span data-formula="${formulas.length - 1}"></span>`;
}

const BLOCK_MATH = /^ {0,3}(?:\$\$([^]{1,4000}?)\$\$|\\\[([^]{1,4000}?)\\\])[ \t]*(?:\n|$)/;
const INLINE_MATH = [
  [/^\$\$((?:\\[^]|[^\\$]){1,4000}?)\$\$/, true],
  [/^\\\[([^]{1,4000}?)\\\]/, true],
  [/^\\\(([^]{1,4000}?)\\\)/, false],
  // $5 and $6 are amounts: no space inside the dollars, no digit after them.
  [/^\$(?![\s$])((?:\\[^\n]|[^\\$\n]){1,1000}?)(?<!\s)\$(?!\d)/, false],
];

const blockMath = {
  name: 'blockMath',
  level: 'block',
  start: (source) => source.match(/(?:^|\n) {0,3}(?:\$\$|\\\[)/)?.index,
  tokenizer(source) {
    const match = BLOCK_MATH.exec(source);
    return match ? { type: 'blockMath', raw: match[0], text: match[1] ?? match[2], isDisplay: true } : undefined;
  },
  renderer: formula,
};

const inlineMath = {
  name: 'inlineMath',
  level: 'inline',
  start: (source) => source.match(/\$|\\[([]/)?.index,
  tokenizer(source) {
    for (const [pattern, isDisplay] of INLINE_MATH) {
      const match = pattern.exec(source);
      if (match) return { type: 'inlineMath', raw: match[0], text: match[1], isDisplay };
    }
    return undefined;
  },
  renderer: formula,
};

const marked = new Marked({
  gfm: true,
  extensions: [blockMath, inlineMath],
  renderer: {
    html: ({ text, raw }) => (HARMLESS_TAG.test(raw.trim()) ? raw : escape(text)),
    code({ text, lang }) {
      const language = /^[\w+#.-]{1,30}/.exec(lang ?? '')?.[0] ?? '';
      const html = highlight(text, language) ?? escape(text);
      return `<pre data-language="${escape(language)}"><code>${html}\n</code></pre>\n`;
    },
    image({ href, text }) {
      if (INLINE_IMAGE.test(href)) return `<img src="${escape(href)}" alt="${escape(text)}">`;
      return LINK.test(href) ? `<a href="${escape(href)}">${escape(text || href)}</a>` : escape(text);
    },
    link({ href, tokens }) {
      const inner = this.parser.parseInline(tokens);
      return LINK.test(href) ? `<a href="${escape(href)}">${inner}</a>` : inner;
    },
  },
});

const purifier = createPurifier(window);
const HTML_RULES = {
  ALLOWED_TAGS: (
    'a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i img input kbd li mark ol p pre s small span strong sub sup ' +
    'table tbody td th thead tr u ul'
  ).split(' '),
  ALLOWED_ATTR: ['align', 'alt', 'checked', 'class', 'data-formula', 'data-language', 'disabled', 'href', 'src', 'start', 'type'],
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:|data:image\/)/i,
  ADD_URI_SAFE_ATTR: ['align', 'checked', 'data-formula', 'data-language', 'disabled', 'start', 'type'],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const MATH_RULES = {
  USE_PROFILES: { mathMl: true },
  ADD_TAGS: ['math'],
  ADD_ATTR: ['style', 'form'],
  FORBID_TAGS: ['annotation-xml', 'maction', 'mglyph', 'style', 'a', 'semantics', 'annotation'],
  FORBID_ATTR: ['href', 'src', 'id', 'name', 'xlink:href', 'actiontype'],
  ALLOW_DATA_ATTR: false,
  IN_PLACE: true,
};

/** The whole text. What cannot be parsed (nested without end) is shown as it came. */
export function render(text) {
  formulas = [];
  let fragment;
  try {
    fragment = purifier.sanitize(marked.parse(text), HTML_RULES);
  } catch {
    fragment = document.createDocumentFragment();
    fragment.append(text);
    return fragment;
  }
  for (const place of fragment.querySelectorAll('span[data-formula]')) {
    const found = formulas[Number(place.dataset.formula)];
    if (found) place.replaceWith(formulaNode(found));
  }
  for (const link of fragment.querySelectorAll('a[href]')) {
    link.target = '_blank';
    link.rel = 'noopener noreferrer nofollow';
  }
  for (const box of fragment.querySelectorAll('input')) {
    if (box.type !== 'checkbox') box.remove();
    else box.disabled = true;
  }
  for (const image of fragment.querySelectorAll('img')) {
    if (!INLINE_IMAGE.test(image.getAttribute('src') ?? '')) image.remove();
  }
  for (const table of fragment.querySelectorAll('table')) wrap(table, 'table-frame');
  for (const block of fragment.querySelectorAll('pre')) addCodeHead(block);
  return fragment;
}

/** Divides a text that still grows: blocks that are finished, and the rest, which may change with the next word. */
export function finishedLength(text) {
  let tokens;
  try {
    tokens = marked.lexer(text);
  } catch {
    return 0;
  }
  // A list or table goes on until something else begins: the last two blocks are not certain.
  const blocks = tokens.map((token, i) => (token.type === 'space' ? -1 : i)).filter((i) => i >= 0);
  if (blocks.length < 3) return 0;
  return tokens.slice(0, blocks.at(-2)).reduce((length, token) => length + token.raw.length, 0);
}

function formulaNode({ text, isDisplay }) {
  const holder = document.createElement(isDisplay ? 'div' : 'span');
  holder.className = isDisplay ? 'formula display' : 'formula';
  try {
    if (text.length > MAX_FORMULA) throw new Error('too long');
    window.temml.render(text, holder, {
      displayMode: isDisplay,
      throwOnError: true,
      trust: false,
      maxSize: [20, 20],
      maxExpand: 500,
    });
    for (const node of [...holder.children]) purifier.sanitize(node, MATH_RULES);
    if (!holder.querySelector('math')) throw new Error('not a formula');
  } catch {
    holder.replaceChildren(Object.assign(document.createElement('code'), { textContent: text.trim() }));
  }
  return holder;
}

function wrap(node, className) {
  const frame = document.createElement('div');
  frame.className = className;
  node.replaceWith(frame);
  frame.append(node);
}

function addCodeHead(block) {
  const code = block.querySelector('code');
  const head = document.createElement('div');
  head.className = 'code-head';
  const name = document.createElement('span');
  name.textContent = block.dataset.language || 'text';
  head.append(name, copyButton('Copy', () => code.textContent.replace(/\n$/, '')));
  const frame = document.createElement('div');
  frame.className = 'code-frame';
  block.replaceWith(frame);
  block.tabIndex = 0;
  frame.append(head, block);
}
