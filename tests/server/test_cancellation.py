"""Clients that leave or read slowly: what they asked for ends within one step, and nobody else notices."""

import asyncio
import gc
import json
import socket
import threading
import time

import httpx
import pytest

from moejet import AsyncLLM, QueueFullError
from moejet.server import asgi_app

CHAT = "/v1/chat/completions"
ENDLESS = {"messages": [{"role": "user", "content": "Start with 17."}], "ignore_eos": True}
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def narrow(serve):
    """One request runs at a time, and its prompt is computed 16 tokens a step."""
    llm = AsyncLLM(max_num_requests=1, max_batch_tokens=16, prefix_caching=False)
    server = serve(asgi_app(llm))
    yield llm, server
    asyncio.run(llm.close(drain=False))


async def _leave(url, body, wait):
    """Sends a request and hangs up once wait() says so."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        request = asyncio.ensure_future(client.post(CHAT, json=body))
        await wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)


async def _until(holds):
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true in time")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["queued", "prefill", "decode"])
def test_what_a_leaving_client_asked_for_ends(narrow, phase, stream):
    llm, server = narrow
    free = llm.health()["free_blocks"]
    long = {**ENDLESS, "messages": [{"role": "user", "content": "Start with 17. " * 150}]}
    body = {**(long if phase == "prefill" else ENDLESS), "stream": stream}

    async def main():
        steps = llm.counters()["steps"]
        if phase == "queued":
            first = llm.generate([1, 2, 3])
            await first.start()
            await _leave(server.url, body, lambda: _until(lambda: llm.health()["requests"] == 2))
            await _until(lambda: llm.health()["requests"] == 1)
            await first.aclose()
        else:
            needed = steps + (2 if phase == "prefill" else 20)
            await _leave(server.url, body, lambda: _until(lambda: llm.counters()["steps"] > needed))
        await _until(lambda: llm.health()["requests"] == 0)

    asyncio.run(main())
    assert llm.health()["free_blocks"] == free
    assert httpx.post(server.url + CHAT, json=HELLO, timeout=30).status_code == 200


def test_a_client_that_leaves_while_its_prompt_is_scored_ends_that(narrow):
    llm, server = narrow
    body = {"prompt": [[7] * 1500] * 4, "echo": True, "logprobs": 1, "max_tokens": 1}

    async def main():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            request = asyncio.ensure_future(client.post("/v1/completions", json=body))
            await _until(lambda: llm.health()["requests"] == 1)
            request.cancel()
            await _until(lambda: llm.health()["requests"] == 0)

    asyncio.run(main())
    assert httpx.post(server.url + CHAT, json=HELLO, timeout=30).status_code == 200


def test_hundreds_of_leaving_clients_leave_nothing_behind(llm, served, eventually):
    free = llm.health()["free_blocks"]

    async def main():
        limits = httpx.Limits(max_connections=20)
        async with httpx.AsyncClient(base_url=served.url, timeout=60, limits=limits) as client:

            async def one(i):
                body = {**ENDLESS, "stream": i % 2 == 0, "n": 1 + i % 3, "max_tokens": 400}
                try:
                    await asyncio.wait_for(client.post(CHAT, json=body), 0.01 + i % 7 * 0.01)
                except TimeoutError:
                    return 1
                return 0

            left = 0
            for start in range(0, 300, 20):
                left += sum(await asyncio.gather(*[one(i) for i in range(start, start + 20)]))
            assert left > 200

    asyncio.run(main())
    eventually(lambda: llm.health()["requests"] == 0)
    health = llm.health()
    assert (health["running"], health["waiting"], health["queued_tokens"]) == (0, 0, 0)
    assert health["free_blocks"] == free
    gc.collect()
    assert httpx.post(served.url + CHAT, json=HELLO, timeout=30).status_code == 200


def test_a_slow_reader_gets_everything_and_holds_up_nobody(llm, served):
    """It reads a few bytes at a time from a small socket buffer, while others are answered."""
    body = b'{"messages": [{"role": "user", "content": "hi"}], "ignore_eos": true, "stream": true, '
    body += b'"max_tokens": 900, "n": 4}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect(("127.0.0.1", served.port))
    slow.settimeout(30)
    slow.sendall(head + body)
    text = [slow.recv(1)]
    others = []

    def ask():
        begin = time.monotonic()
        assert httpx.post(served.url + CHAT, json=HELLO, timeout=30).status_code == 200
        others.append(time.monotonic() - begin)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        text.append(slow.recv(10))
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert len(others) == 5
    while part := slow.recv(65536):
        text.append(part)
    slow.close()
    whole = b"".join(text).decode()
    assert whole.count('"finish_reason":"length"') == 4
    assert whole.count("data: [DONE]") == 1
    assert llm.health()["requests"] == 0


@pytest.mark.parametrize("strategy", [None, "vote:2"])
@pytest.mark.parametrize("end", ["answered", "refused"])
def test_whoever_leaves_at_the_very_end_is_counted_once(llm, strategy, end, monkeypatch):
    """As answered, or as rejected, even if the last bytes have not been read."""
    app = asgi_app(llm)
    if end == "refused":

        async def refuse(job):
            raise QueueFullError("the queue is full", 1.0)

        monkeypatch.setattr(app.state.server.backend, "start", refuse)
        monkeypatch.setattr(app.state.server.backend, "solve", refuse)
    body = {**HELLO, "stream": True} | ({"reasoning_strategy": strategy} if strategy else {})

    async def main():
        has_ended = asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive():
            if messages:
                return messages.pop()
            await has_ended.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if b"[DONE]" in message.get("body", b"") or message.get("status") == 503:
                has_ended.set()
                await asyncio.sleep(30)  # nobody reads it any more

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
        scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""}
        scope |= {"server": ("localhost", 80), "client": ("127.0.0.1", 5)}
        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(main())
    registry = app.state.server.observer.registry
    sums = dict.fromkeys(("request_success", "admission_rejections", "cancelled_requests"), 0.0)
    for family in registry.collect():
        if (name := family.name.removeprefix("moejet:")) in sums:
            found = [sample.value for sample in family.samples if sample.name.endswith("_total")]
            sums[name] = sum(found)
    is_answered = end == "answered"
    assert sums == {
        "request_success": is_answered,
        "admission_rejections": not is_answered,
        "cancelled_requests": 0,
    }
