"""Chat templates of a tokenizer: where they come from, what they may do, and the same text as transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moejet.chat_template import ChatTemplate
from moejet.testing.byte_tokenizer import write_tokenizer
from moejet.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


def make_tiny(root: Path) -> None:
    write_tokenizer(root)
    (root / "config.json").write_text('{"model_type": "deepseek_v3", "eos_token_id": 1}')


def test_template_sources(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools: {{ tools | tojson }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_path(tmp_path)
    assert tokenizer.apply_chat_template(CHAT) == "plain"
    assert tokenizer.apply_chat_template(CHAT, tools=[{"a": "<é>"}]) == 'tools: [{"a": "<é>"}]'
    assert tokenizer.apply_chat_template(CHAT, chat_template="tool_use") == "tools: null"
    assert tokenizer.apply_chat_template(CHAT, chat_template="{{ x }}", x=1) == "1"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert Tokenizer.from_path(tmp_path).apply_chat_template(CHAT) == "from a file"


TRICKY = [
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content | trim }}\n{% endif %}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "{{ bos_token }}{{ eos_token }}{% generation %}{{ messages[-1]['content'] }}{% endgeneration %}",
    "{% if tools is none %}none{% endif %}{% if documents %}x{% endif %}{{ thinking | default('d') }}",
    "{% if enable_thinking is defined and enable_thinking is false %}off{% else %}on{% endif %}",
    "{{ messages[0].reasoning_content }}{{ messages[0]['thinking'] }}",
    "{{ strftime_now('%Y') }}{{ range(3) | list }}{{ dict(a=1) | tojson }}",
]


@pytest.mark.parametrize("template", TRICKY)
def test_template_features_as_transformers(tmp_path: Path, template: str) -> None:
    make_tiny(tmp_path)
    ours = Tokenizer.from_path(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [
        {"role": "user", "content": " <b>é</b>\n", "name": None, "reasoning": "r"},
        {"role": "assistant", "content": "", "tool_calls": [{"x": [1, 2.5, True, None]}]},
        {"role": "user", "content": "last"},
    ]
    for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True, "thinking": "t"}):
        expected = theirs.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=True, **kwargs
        )
        assert ours.apply_chat_template(chat, chat_template=template, **kwargs) == expected


def test_content_parts(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = Tokenizer.from_path(tmp_path).apply_chat_template([{"role": "user", "content": parts}])
    assert "<|user|>one\ntwo<|assistant|>" in text


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hi", "messages must be a list"),
        ({"role": "user", "content": "x"}, "messages must be a list"),
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] must be a dict"),
        ([{"content": "x"}], r"messages\[0\].role=None"),
        ([{"role": 3, "content": "x"}], r"messages\[0\].role=3"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": None}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": 5}], "must be a string or a list of text parts, not int"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"messages\[0\].content\[0\]: type 'image_url' is not supported",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text must be a string"),
        ([{"role": "ghost", "content": "x"}], "unknown role ghost"),
    ],
)
def test_bad_messages(tmp_path: Path, messages: Any, reason: str) -> None:
    make_tiny(tmp_path)
    with pytest.raises(ValueError, match=reason):
        Tokenizer.from_path(tmp_path).apply_chat_template(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ namespace(__init__=1) }}{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ range(10000000) | list }}",
        "{% for m in messages %}",
        "{{ 1 / 0 }}",
        "{{ undefined_name.attribute }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_hostile_and_broken_templates(tmp_path: Path, template: str) -> None:
    make_tiny(tmp_path)
    with pytest.raises(ValueError, match="chat template"):
        Tokenizer.from_path(tmp_path).apply_chat_template(
            [{"role": "user", "content": "x"}], chat_template=template
        )


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in x %}{% for b in x %}{% for c in x %}{{ a }}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in x recursive %}{% for b in x %}{{ loop(x) }}{% endfor %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000 * [1] }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ 9 ** 99999999 }}",
    ],
)
def test_endless_and_huge_templates(
    tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moejet.chat_template._MAX_SECONDS", 0.2)
    with pytest.raises(ValueError, match="chat template refused"):
        ChatTemplate(template).render([{"role": "user", "content": "x"}], x="y" * 3000)


def test_loops_know_their_place() -> None:
    template = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
        "{% for k, v in m | items %}{{ k }}{% endfor %} {% endfor %}"
        "{% for n in none_such %}{% else %}none{% endfor %}{{ '%s!' % 'a' }}{{ '-' * 3 }}{{ 2 ** 5 }}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    expected = "1/2Falserolecontent 2/2Truerolecontent nonea!---32"
    assert ChatTemplate(template).render(messages) == expected


def test_objects_do_not_reach_the_template(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    tokenizer = Tokenizer.from_path(tmp_path)
    with pytest.raises(ValueError, match="type PosixPath cannot be given to a chat template"):
        tokenizer.apply_chat_template(CHAT, tools=[tmp_path])


def test_no_template(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_path(tmp_path)
    assert not tokenizer.has_chat_template
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match=r"no chat template.*generate from plain text"):
        tokenizer.apply_chat_template(CHAT)


def test_tool_calls_keep_a_none_content(tmp_path: Path) -> None:
    """DeepSeek-V3's template recognises a call by `content is none`."""
    make_tiny(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{% if m['content'] is none %}CALL:"
        "{{ m['tool_calls'][0]['function']['name'] }}{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    calls = [{"type": "function", "function": {"name": "get", "arguments": "{}"}}]
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "sunny"},
    ]
    rendered = Tokenizer.from_path(tmp_path).apply_chat_template(messages)
    assert rendered == "weather?CALL:getCALL:getsunny"
