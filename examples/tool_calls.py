"""A tool call and back, with OpenAI's client: the model calls, this program answers, the model goes on.

Needs `pip install 'moejet[server]' openai`. The tiny reasoner was taught no tools, so here it gets a chat template that
knows them, and `tool_choice="required"` makes it call; a model that was taught tools needs neither.
"""

import json
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from openai import OpenAI

from moejet import LLM
from moejet.server import asgi_app, serve_in_thread

TEMPLATE = """{{ bos_token }}<|user|>{{ messages[-1].content }}<|assistant|><think>{{ "\\n" }}
{#- It calls by <tool_call>{"name": ..., "arguments": ...}</tool_call>, and reads the last message only. #}"""
NOTES = {1: "Start with 17, add 25.", 2: "Take 80 and subtract 23."}
TOOL = {
    "name": "read_note",
    "description": "Reads one of my notes.",
    "parameters": {
        "type": "object",
        "properties": {"number": {"type": "integer", "enum": list(NOTES)}},
        "required": ["number"],
        "additionalProperties": False,
    },
}


def with_tools(directory: Path) -> Path:
    """The embedded checkpoint with that template."""
    with as_file(files("moejet") / "assets" / "tiny_reasoner") as source:
        for file in source.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory


with tempfile.TemporaryDirectory() as directory:
    app = asgi_app(LLM(with_tools(Path(directory))), model_name="tiny-reasoner")
    with serve_in_thread(app) as url, OpenAI(base_url=f"{url}/v1", api_key="-") as client:
        messages = [{"role": "user", "content": "What does my note say?"}]
        tools = [{"type": "function", "function": TOOL}]
        create = client.chat.completions.create
        asked = create(
            model="tiny-reasoner", messages=messages, tools=tools, tool_choice="required", seed=1
        )
        call = asked.choices[0].message.tool_calls[0]
        number = json.loads(call.function.arguments)["number"]
        note = NOTES[number]
        print(f"{call.function.name}(number={number}) -> {note}")

        messages.append({"role": "assistant", "tool_calls": [call.model_dump()]})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": note})
        answered = create(model="tiny-reasoner", messages=messages, tools=tools, temperature=0)
        print(answered.choices[0].message.content)
