"""Chat templates as the served families write them: rendered as transformers does, thinking recognised.

Each template here is our own short text with the constructs, markers and endings of the family's published one.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from moejet.chat_template import ChatTemplate
from moejet.thinking import detect_think_tags, prompt_opens_thinking, split_reasoning

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

# Namespaces set in loops, past reasoning cut off, `thinking` as a switch, tool calls with arguments as text.
DEEPSEEK_V31 = """
{%- if not thinking is defined -%}{%- set thinking = false -%}{%- endif -%}
{%- set ns = namespace(system='', from_user=false, first=true) -%}
{%- for m in messages if m['role'] == 'system' -%}
  {%- set ns.system = ns.system + ('' if loop.first else '\n\n') + m['content'] -%}
{%- endfor -%}{{ bos_token }}{{ ns.system }}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}{%- set ns.from_user = true -%}{{ '<｜User｜>' + m['content'] }}
  {%- elif m['role'] == 'assistant' and m['tool_calls'] is defined and m['tool_calls'] is not none -%}
    {%- if ns.from_user -%}{{ '<｜Assistant｜></think>' }}{%- endif -%}
    {%- set ns.from_user = false -%}
    {%- if m['content'] is not none -%}{{ m['content'] }}{%- endif -%}{{ '<｜tool▁calls▁begin｜>' }}
    {%- for t in m['tool_calls'] -%}
      {{ '<｜tool▁call▁begin｜>' + t['function']['name'] + '<｜tool▁sep｜>' + t['function']['arguments'] }}
      {{- '<｜tool▁call▁end｜>' }}
    {%- endfor -%}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
  {%- elif m['role'] == 'assistant' -%}
    {%- if ns.from_user -%}{{ '<｜Assistant｜></think>' }}{%- endif -%}
    {%- set ns.from_user = false -%}
    {%- set text = m['content'] -%}
    {%- if '</think>' in text -%}{%- set text = text.split('</think>', 1)[1] -%}{%- endif -%}
    {{ text + '<｜end▁of▁sentence｜>' }}
  {%- elif m['role'] == 'tool' -%}
    {%- set ns.from_user = false -%}
    {{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.from_user -%}
  {{ '<｜Assistant｜>' }}{{ '<think>' if thinking else '</think>' }}
{%- endif %}"""

# Markers around role names, a default system message, tools as compact JSON, lists of content parts.
KIMI_K2 = """
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
  {%- if loop.first and messages[0]['role'] != 'system' -%}
    <|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>
  {%- endif -%}
  {%- set name = message.get('name') or message['role'] -%}
  {%- if message['role'] == 'user' -%}<|im_user|>{%- elif message['role'] == 'assistant' -%}<|im_assistant|>
  {%- else -%}<|im_system|>{%- endif -%}{{ name }}<|im_middle|>
  {%- if message['role'] == 'tool' -%}## Return of {{ message.tool_call_id }}
{% endif -%}
  {%- if message['content'] is string -%}{{ message['content'] }}
  {%- elif message['content'] is not none -%}
    {%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}
  {%- endif -%}
  {%- for call in message['tool_calls'] or [] -%}
    <|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>{{ call['function']['arguments'] }}
    {{- '<|tool_call_end|>' }}
  {%- endfor -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif %}"""

# Macros, a loop backwards with break, slices of the conversation, past reasoning kept only in the last turns.
KIMI_K2_THINKING = """
{%- macro text(m) -%}{%- set c = m.get('content') -%}
  {%- if c is string -%}{{ c }}{%- elif c is not none -%}{%- for p in c -%}{{ p['text'] }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- macro calls(m) -%}<|tool_calls_section_begin|>
  {%- for call in m['tool_calls'] -%}
    <|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>
    {%- if call['function']['arguments'] is string -%}{{ call['function']['arguments'] }}
    {%- else -%}{{ call['function']['arguments'] | tojson }}{%- endif -%}<|tool_call_end|>
  {%- endfor -%}<|tool_calls_section_end|>
{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for i in range(messages | length - 1, -1, -1) -%}
  {%- if messages[i]['role'] == 'assistant' and not messages[i].get('tool_calls') -%}
    {%- set ns.last = i -%}{%- break -%}
  {%- endif -%}
{%- endfor -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson() }}<|im_end|>{%- endif -%}
{%- for part in [messages[:ns.last + 1], messages[ns.last + 1:]] -%}
  {%- set is_past = loop.first -%}
  {%- for m in part -%}<|im_{{ m['role'] }}|>{{ m.get('name') or m['role'] }}<|im_middle|>
    {%- if m['role'] == 'assistant' -%}
      <think>{{ '' if is_past else m.get('reasoning_content', '') }}</think>{{ text(m) }}
      {%- if m.get('tool_calls') -%}{{ calls(m) }}{%- endif -%}
    {%- else -%}{{ text(m) }}{%- endif -%}<|im_end|>
  {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""

# Text outside blocks, tojson(ensure_ascii=False), chained string methods, arguments as a mapping, a date.
GLM = """[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools {{ strftime_now('%Y') }}
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif -%}
{%- macro visible(content) -%}
  {%- if content is string -%}{{- content }}
  {%- elif content is iterable and content is not mapping -%}
    {%- for item in content -%}
      {%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{% set ns.last_user = loop.index0 -%}{%- endif %}{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>{{ visible(m.content) }}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- set reasoning = '' %}{%- set content = visible(m.content) %}
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
  {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
  {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last_user and reasoning -%}<think>{{ reasoning.strip() }}</think>
{%- else -%}</think>{%- endif -%}
{{ content.strip() }}
{%- for tc in m.tool_calls or [] %}
{%- set tc = tc.function if tc.function else tc %}
{{- '<tool_call>' + tc.name }}
{%- for k, v in (tc.arguments or {}).items() -%}
<arg_key>{{ k }}</arg_key><arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{%- endfor %}</tool_call>{% endfor %}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
{{- '<tool_response>' }}{{- m.content }}{{- '</tool_response>' }}
{%- elif m.role == 'system' -%}<|system|>{{ visible(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{- '</think>' if (enable_thinking is defined and not enable_thinking) else '<think>' -}}
{%- endif -%}
"""
TEMPLATES = {"v31": DEEPSEEK_V31, "k2": KIMI_K2, "k2_thinking": KIMI_K2_THINKING, "glm": GLM}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Das Wetter — 天气 <b>&'\"",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def conversations(*, arguments_as_text: bool) -> list[list[dict[str, Any]]]:
    arguments: Any = {"city": "Zürich 北京", "days": 2, "exact": True}
    if arguments_as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    call = {"id": "functions.weather:0", "type": "function"}
    call["function"] = {"name": "weather", "arguments": arguments}  # type: ignore[assignment]
    ask = {"role": "user", "content": "Wie ist das Wetter? 天气 <b>"}
    return [
        [ask],
        [{"role": "system", "content": "Be brief."}, ask],
        [ask, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfine "}, ask],
        [ask, {"role": "assistant", "content": "fine", "reasoning_content": "let me see"}, ask],
        [
            {"role": "system", "content": "A"},
            {"role": "system", "content": "B"},
            ask,
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "ask",
                "tool_calls": [call, call],
            },
            {"role": "tool", "tool_call_id": "functions.weather:0", "content": '{"t": 3}'},
            {"role": "tool", "tool_call_id": "functions.weather:1", "content": "snow"},
        ],
    ]


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("variables", [{}, {"thinking": True}, {"enable_thinking": False}])
@pytest.mark.parametrize("family", TEMPLATES)
def test_renders_as_transformers(
    family: str, variables: dict[str, Any], tools: Any, add: bool
) -> None:
    template = TEMPLATES[family]
    for messages in conversations(arguments_as_text=family != "glm"):
        given = {"bos_token": "<bos>", **variables}
        ours = ChatTemplate(template).render(
            messages, add_generation_prompt=add, tools=tools, **given
        )
        [theirs], _ = chat_template_utils.render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=add,
            **given,
        )
        assert ours == theirs


class Vocabulary:
    """A tokenizer as `detect_think_tags` sees it."""

    def __init__(self, template: str, tokens: tuple[str, ...] = ()):
        self.chat_template = template
        self._tokens = tokens

    def token_to_id(self, token: str) -> int | None:
        return self._tokens.index(token) if token in self._tokens else None


@pytest.mark.parametrize(
    ("family", "variables", "opens"),
    [
        ("v31", {}, False),
        ("v31", {"thinking": False}, False),
        ("v31", {"thinking": True}, True),
        ("k2_thinking", {}, False),
        ("glm", {}, True),
        ("glm", {"enable_thinking": False}, False),
    ],
)
def test_thinking_is_recognised(family: str, variables: dict[str, Any], opens: bool) -> None:
    template = TEMPLATES[family]
    tags = detect_think_tags(Vocabulary(template))
    assert tags == ("<think>", "</think>") == detect_think_tags(template)
    prompt = ChatTemplate(template).render([{"role": "user", "content": "<think>"}], **variables)
    assert prompt_opens_thinking(prompt, *tags) == opens
    if opens:
        reply, expected = "so\n</think>\n\n4", ("so", "4")
    elif family == "k2_thinking":  # the model writes the opening tag itself
        reply, expected = "<think>so</think>4", ("so", "4")
    else:  # the prompt closed the thinking: what comes is the answer, whatever it holds
        reply, expected = "4 </think> 5", (None, "4 </think> 5")
    assert split_reasoning(reply, opens, open=tags[0], close=tags[1]) == expected


def test_kimi_k2_thinks_only_if_its_vocabulary_has_the_tags() -> None:
    assert detect_think_tags(Vocabulary(KIMI_K2)) is None
    assert detect_think_tags(Vocabulary(KIMI_K2, ("<think>", "</think>"))) is not None


def test_a_prompt_after_tool_output_opens_nothing() -> None:
    messages = conversations(arguments_as_text=True)[-1]
    prompt = ChatTemplate(DEEPSEEK_V31).render(messages, thinking=True, bos_token="")
    assert prompt.endswith("<｜tool▁output▁end｜>")
    assert not prompt_opens_thinking(prompt)
