"""Anthropic's client: a streamed answer with its thinking, and a budget for that.

Needs `pip install 'moejet[server]' anthropic`. With `moejet serve` running, its address is all the client needs.
"""

from anthropic import Anthropic

from moejet import LLM
from moejet.server import asgi_app, serve_in_thread

question = [{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}]
with serve_in_thread(asgi_app(LLM())) as url, Anthropic(base_url=url, api_key="-") as client:
    body = {"model": "tiny-reasoner", "messages": question, "max_tokens": 400}
    body["extra_body"] = {"temperature": 0}
    with client.messages.stream(**body) as stream:
        for event in stream:
            if event.type == "thinking":
                print(event.thinking, end="", flush=True)
            elif event.type == "text":
                print(event.text, end="", flush=True)
            elif event.type == "content_block_stop":
                print("\n--")
    short = client.messages.create(**body, thinking={"type": "enabled", "budget_tokens": 8})
    print([block.type for block in short.content], short.usage.output_tokens, "tokens")
