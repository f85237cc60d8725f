// Code in the languages that answers are mostly written in; any other stays plain.

import core from './vendor/highlight/core.min.js';
import bash from './vendor/highlight/bash.min.js';
import c from './vendor/highlight/c.min.js';
import cpp from './vendor/highlight/cpp.min.js';
import csharp from './vendor/highlight/csharp.min.js';
import css from './vendor/highlight/css.min.js';
import diff from './vendor/highlight/diff.min.js';
import go from './vendor/highlight/go.min.js';
import ini from './vendor/highlight/ini.min.js';
import java from './vendor/highlight/java.min.js';
import javascript from './vendor/highlight/javascript.min.js';
import json from './vendor/highlight/json.min.js';
import latex from './vendor/highlight/latex.min.js';
import markdown from './vendor/highlight/markdown.min.js';
import python from './vendor/highlight/python.min.js';
import rust from './vendor/highlight/rust.min.js';
import shell from './vendor/highlight/shell.min.js';
import sql from './vendor/highlight/sql.min.js';
import typescript from './vendor/highlight/typescript.min.js';
import xml from './vendor/highlight/xml.min.js';
import yaml from './vendor/highlight/yaml.min.js';

const MAX_CHARS = 50_000; // of one block; longer ones would hold up the page

const languages = {
  ...{ bash, c, cpp, csharp, css, diff, go, ini, java, javascript, json, latex, markdown, python, rust, shell },
  ...{ sql, typescript, xml, yaml },
};
for (const [name, language] of Object.entries(languages)) core.registerLanguage(name, language);

/** HTML with classes hljs-…, or null if the language is not known. */
export function highlight(code, language) {
  if (code.length > MAX_CHARS || !core.getLanguage(language)) return null;
  return core.highlight(code, { language, ignoreIllegals: true }).value;
}
