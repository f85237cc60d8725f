"""The chat page in a browser: what a person does there, and what hostile model output must not be able to do.

Needs Playwright and a Chromium: its own, or the system's. A stand-in speaks the API, so that every case of a stream can
be brought about; see test_page_and_server.py for the real server.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright.sync_api", reason="needs pip install 'moejet[browser]'")

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from moejet.server import ServerConfig, serve_in_thread
from moejet.server.page import page_router
from moejet.testing.page_visit import Visit, open_browser

pytestmark = pytest.mark.slow

SHOWCASE = """Here is the **derivative** of a product, with `code` and a [link](https://example.org/a).

$$\\frac{d}{dx}\\bigl(u\\,v\\bigr) = u'v + uv', \\qquad \\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$

Inline $e^{i\\pi} + 1 = 0$ and \\(a_n \\to \\infty\\), but $5 and $6 are amounts.

| method | time | error |
|---|--:|--:|
| direct | 12.1 s | 0.3 % |
| iterative | 3.4 s | 1.2 % |

```python
def gcd(a: int, b: int) -> int:
    while b:  # Euclid
        a, b = b, a % b
    return a
```

1. First, *this*.
2. Then that:
   - [x] done
   - [ ] open

> A quotation.
"""
ATTACKS = """<img src=x onerror="window.hacked=1"> <script>window.hacked=2</script>

[a](javascript:window.hacked=3) [b](JaVaScRiPt&colon;window.hacked=4)
[c](data:text/html,<script>window.hacked=5</script>)

![beacon](http://beacon.test/pixel.png) ![x](x" onerror="window.hacked=6)  ![own](/v1/models)

<a href="java&#x0A;script:window.hacked=7">d</a>

<svg onload="window.hacked=8"><style><img src=x onerror=window.hacked=9>

<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.hacked=10&gt;">

$\\href{javascript:window.hacked=11}{x}$ $\\htmlId{a}{b}$ $\\text{<img src=x onerror=window.hacked=12>}$
$\\includegraphics{http://beacon.test/y.png}$ $\\color{red;background:url(http://beacon.test/z)}{x}$
$\\style{background:url(http://beacon.test/w)}{x}$ $\\class{a}{x}$ $\\def\\x{\\x\\x}\\x$

```html"><img src=x onerror=window.hacked=13>
<iframe src="http://beacon.test/"></iframe>
```

<form action="http://beacon.test/"><input type="image" src="http://beacon.test/i.png"><button>go</button></form>
<link rel=stylesheet href=http://beacon.test/s.css><base href=http://beacon.test/><meta http-equiv=refresh content="0;url=http://beacon.test/">
<span style="background:url(http://beacon.test/b)">styled</span> <a id=forms name=body>clobber</a> http://beacon.test/auto

| <img src=x onerror=window.hacked=14> | b |
|---|---|
| <b onclick=window.hacked=15>c</b> | d<br>e |

last line"""


class StandIn:
    """Answers as the last message says, in the form of the server's streams."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.ended: set[str] = set()
        self.num_left = 0  # streams that the client left before their end
        self.key: str | None = None
        self.app = FastAPI()
        self.app.include_router(page_router(ServerConfig()))
        self.app.add_api_route("/v1/models", self._models)
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        path = "/v1/requests/{request_id}/end_thinking"
        self.app.add_api_route(path, self._end_thinking, methods=["POST"])

    def _refused(self, request: Request) -> JSONResponse | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return _error(401, "this server needs an API key")

    async def _models(self, request: Request) -> Response:
        refused = self._refused(request)
        return refused or JSONResponse({"object": "list", "data": [{"id": "tiny-reasoner"}]})

    async def _end_thinking(self, request_id: str) -> Response:
        self.ended.add(request_id)
        return JSONResponse({"id": request_id, "object": "request", "ok": True})

    async def _chat(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        body = await request.json()
        self.bodies.append(body)
        text = body["messages"][-1]["content"]
        if text == "overload" and sum(b == body for b in self.bodies) % 2:
            return _error(503, "the queue is full: 8 requests wait", {"retry-after": "2"})
        events = self._events(text, body, f"chatcmpl-{len(self.bodies)}")
        return StreamingResponse(self._counted(events), media_type="text/event-stream")

    async def _counted(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.num_left += 1
            raise

    async def _events(self, text: str, body: dict[str, Any], id: str) -> AsyncIterator[bytes]:
        n = body.get("n", 1)

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
            choice = {"index": index, "delta": delta, "finish_reason": reason}
            return _event({"id": id, "model": "tiny-reasoner", "choices": [choice]})

        for i in range(n):
            yield chunk(i, {"role": "assistant", "content": ""})
        yield b": keep-alive\n\n"
        num_reasoning = num_content = 0
        while num_reasoning < (10_000 if "ponder" in text else 8) and id not in self.ended:
            for i in range(n):
                thought = f"step {num_reasoning} "
                yield chunk(i, {"reasoning_content": thought, "reasoning": thought})
            num_reasoning += 1
            await asyncio.sleep(0.03)
        answers = [_answer(text, i, len(self.bodies)) for i in range(n)]
        for words in zip(*(a.split(" ") for a in answers), strict=True):
            for i, word in enumerate(words):
                yield chunk(i, {"content": word if num_content == 0 else " " + word})
            num_content += 1
            await asyncio.sleep(0.002 if "story" not in text else 0.02)
            if "break" in text and num_content == 3:
                yield _event({"error": {"message": "the engine stopped", "code": "engine_dead"}})
                yield b"data: [DONE]\n\n"
                return
        for i in range(n):
            yield chunk(i, {}, "stop")
        usage = {
            "prompt_tokens": 12,
            "completion_tokens": n * (num_reasoning + num_content) * (10 if n > 1 else 1),
            "completion_tokens_details": {"reasoning_tokens": n * num_reasoning},
        }
        timings = {"predicted_per_second": 123.4}
        yield _event({"id": id, "choices": [], "usage": usage, "timings": timings})
        yield b"data: [DONE]\n\n"


def _answer(text: str, index: int, number: int) -> str:
    if text == "showcase":
        return SHOWCASE
    if text == "attack":
        return ATTACKS
    if "story" in text:
        return "word " * 500
    return f"Answer {number}.{index} to: {text}"


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": None}}, status, headers)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        with open_browser() as browser:
            yield browser
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture
def url(stand_in: StandIn) -> Iterator[str]:
    with serve_in_thread(stand_in.app) as url:
        yield f"{url}/"


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Visit]:
    visit = Visit(browser, url)
    yield visit
    visit.check()
    visit.context.close()


def test_conversation_thinking_folds_and_reload_keeps_it(visit: Visit, stand_in: StandIn) -> None:
    visit.ask("hello", is_waited_for=False)
    visit.page.wait_for_selector(".thinking[open]")
    visit.wait()
    assert visit.texts(".answer") == ["Answer 1.0 to: hello"]
    assert visit.page.locator(".thinking[open]").count() == 0
    assert "8 tokens" in visit.texts(".thinking summary")[0]
    assert "about" not in visit.texts(".thinking summary")[0]
    assert "123 tokens/s" in visit.texts(".stats")[0]
    visit.page.click(".thinking summary")
    assert visit.texts(".thought")[0].startswith("step 0 step 1")
    visit.ask("and more")
    assert [m["role"] for m in stand_in.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert stand_in.bodies[1]["messages"][1] == {
        "role": "assistant",
        "content": "Answer 1.0 to: hello",
    }
    assert visit.texts("#title") == ["hello"]
    visit.page.reload()
    visit.page.wait_for_selector(".answer")
    assert visit.texts(".answer") == ["Answer 1.0 to: hello", "Answer 2.0 to: and more"]
    assert visit.texts(".bubble") == ["hello", "and more"]
    assert "8 tokens" in visit.texts(".thinking summary")[0]


def test_answer_now_ends_the_thinking(visit: Visit, stand_in: StandIn) -> None:
    visit.ask("ponder this", is_waited_for=False)
    visit.page.click("#answer-now")
    visit.wait()
    assert stand_in.ended == {"chatcmpl-1"}
    assert visit.texts(".answer") == ["Answer 1.0 to: ponder this"]


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_what_has_come(visit: Visit, stand_in: StandIn, how: str) -> None:
    visit.ask("tell a story", is_waited_for=False)
    visit.wait_for_answer(60)
    if how == "button":
        visit.page.click("#stop")
    else:
        visit.page.keyboard.press("Escape")
    visit.wait()
    assert "Stopped." in visit.texts(".note")
    assert visit.texts(".answer")[0].startswith("word word")
    deadline = time.monotonic() + 5
    while not stand_in.num_left and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stand_in.num_left == 1


def test_regenerate_and_edit_make_branches(visit: Visit, stand_in: StandIn) -> None:
    visit.ask("first")
    visit.click("Regenerate")
    visit.wait()
    assert visit.texts(".answer") == ["Answer 2.0 to: first"]
    assert visit.place_of_answer() == ["‹2/2›"]
    visit.click("Earlier version", inside=".assistant")
    assert visit.texts(".answer") == ["Answer 1.0 to: first"]
    visit.ask("follow-up")
    assert stand_in.bodies[2]["messages"][1]["content"] == "Answer 1.0 to: first"
    visit.page.locator(".user").first.get_by_role("button", name="Edit").click()
    visit.page.fill(".edit textarea", "second")
    visit.page.press(".edit textarea", "Enter")
    visit.wait()
    assert visit.texts(".bubble") == ["second"]
    assert visit.texts(".answer") == ["Answer 4.0 to: second"]
    assert stand_in.bodies[3]["messages"] == [{"role": "user", "content": "second"}]
    visit.click("Earlier version", inside=".user")
    visit.page.reload()
    visit.page.wait_for_selector(".answer")
    assert visit.texts(".bubble") == ["first", "follow-up"]


def test_parallel_answers_stand_side_by_side_until_one_is_picked(
    visit: Visit, stand_in: StandIn
) -> None:
    visit.page.click("#open-settings")
    visit.page.fill("input[name=n]", "3")
    visit.page.fill("input[name=temperature]", "0.7")
    visit.page.fill("#system", "Be brief.")
    visit.click("Done")
    visit.page.select_option("#effort", "low")
    visit.ask("choose")
    body = stand_in.bodies[0]
    assert (body["n"], body["temperature"], body["reasoning_effort"]) == (3, 0.7, "low")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "seed" not in body
    assert visit.texts(".group .answer") == [f"Answer 1.{i} to: choose" for i in range(3)]
    # What the server counts for all of them together, divided by the pieces that came of each.
    assert [t.split(" · ")[0] for t in visit.texts(".group .stats")] == ["about 120 tokens"] * 3
    tops = [b["y"] for b in (e.bounding_box() for e in visit.page.locator(".group .message").all())]
    assert len(set(tops)) == 1
    visit.page.locator(".group .message").nth(1).get_by_role("button", name="Use this one").click()
    assert visit.texts(".answer") == ["Answer 1.1 to: choose"]
    assert visit.place_of_answer() == ["‹2/3›"]
    visit.ask("go on")
    assert stand_in.bodies[1]["messages"][2]["content"] == "Answer 1.1 to: choose"


def test_errors_show_the_servers_message_and_can_be_retried(
    visit: Visit, stand_in: StandIn
) -> None:
    visit.ask("overload")
    assert "the queue is full: 8 requests wait" in visit.texts(".note.error")[0]
    visit.click("Retry")
    visit.wait()
    assert visit.texts(".answer") == ["Answer 2.0 to: overload"]
    assert visit.place_of_answer() == []
    visit.click("New chat")
    visit.ask("break it please now")
    assert visit.texts(".note.error span") == ["the engine stopped"]
    assert visit.texts(".answer") == ["Answer 3.0 to:"]


def test_error_of_several_answers_is_shown_once(visit: Visit) -> None:
    visit.set_options(n=2)
    visit.ask("overload")
    assert len(visit.texts(".message.assistant")) == 1
    visit.click("Retry")
    visit.wait()
    assert len(visit.texts(".group .message.assistant")) == 2


def test_key_is_asked_for_and_not_kept(browser: Any, url: str, stand_in: StandIn) -> None:
    stand_in.key = "secret"
    visit = Visit(browser, url)
    assert "this server needs an API key" in visit.texts("#key-message")[0]
    visit.page.fill("#key", "wrong")
    visit.page.press("#key", "Enter")
    visit.page.wait_for_selector("dialog[open]")
    visit.page.fill("#key", "secret")
    visit.page.press("#key", "Enter")
    visit.page.wait_for_selector("#model:not(:empty)")
    visit.ask("hi")
    assert visit.texts(".answer") == ["Answer 1.0 to: hi"]
    assert visit.page.evaluate("JSON.stringify({...localStorage})").count("secret") == 0
    visit.check()
    visit.context.close()


def test_reply_cut_off_by_a_reload_is_marked(visit: Visit) -> None:
    visit.ask("tell a story", is_waited_for=False)
    visit.wait_for_answer(300)
    visit.page.reload()
    visit.page.wait_for_selector(".note:visible")
    assert "Cut off" in visit.texts(".note")[0]
    assert visit.texts(".answer")[0].startswith("word word")


def test_conversations_are_listed_renamed_deleted_and_restored(visit: Visit) -> None:
    visit.ask("one")
    visit.page.keyboard.press("Control+k")
    assert visit.page.evaluate("document.activeElement.id") == "input"
    visit.ask("two")
    assert visit.texts(".entry .name") == ["two", "one"]
    visit.page.locator(".entry").nth(1).hover()
    visit.page.get_by_role("button", name="Rename one").click()
    visit.page.keyboard.type("uno")
    visit.page.keyboard.press("Enter")
    assert sorted(visit.texts(".entry .name")) == ["two", "uno"]
    visit.page.locator(".entry").nth(0).hover()
    visit.page.get_by_role("button", name="Delete two").click()
    assert visit.texts(".entry .name") == ["uno"]
    assert visit.texts(".bubble") == []
    visit.click("Undo")
    assert visit.texts(".bubble") == ["two"]
    visit.page.reload()
    visit.page.wait_for_selector(".entry")
    assert sorted(visit.texts(".entry .name")) == ["two", "uno"]


def test_export_and_import(browser: Any, visit: Visit, url: str, tmp_path: Path) -> None:
    visit.ask("keep me")
    visit.click("Regenerate")
    visit.wait()
    with visit.page.expect_download() as download:
        visit.click("Export")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    other = Visit(browser, url)
    other.page.set_input_files("#import-file", file)
    other.page.get_by_role("button", name="keep me", exact=True).click()
    assert other.texts(".answer") == ["Answer 2.0 to: keep me"]
    assert other.place_of_answer() == ["‹2/2›"]
    data = json.loads(file.read_text())
    data["conversations"][0]["nodes"]["root"]["children"].append("root")
    file.write_text(json.dumps(data))
    other.page.set_input_files("#import-file", file)
    other.page.wait_for_selector("#notice:has-text('cannot be imported')")
    file.write_text('{"a": 1}')
    other.page.set_input_files("#import-file", file)
    other.page.wait_for_selector("#notice:has-text('not exported from this page')")
    assert other.page.locator(".entry").count() == 1
    other.check()
    other.context.close()


def test_markdown_code_and_formulas(visit: Visit) -> None:
    visit.ask("showcase")
    page = visit.page
    assert page.locator(".answer math").count() == 3
    assert page.locator(".answer table td").count() == 6
    assert page.locator(".answer pre .hljs-keyword").count() >= 3
    assert page.locator(".answer li input[type=checkbox]:disabled").count() == 2
    assert "$5 and $6 are amounts" in visit.texts(".answer")[0]
    link = page.locator(".answer a").first
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    height = page.locator(".formula.display").bounding_box()["height"]
    assert 25 < height < 120


def test_hostile_output_does_nothing(visit: Visit) -> None:
    visit.ask("attack")
    page = visit.page
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert "last line" in visit.texts(".answer")[0]
    found = page.evaluate(
        """() => [...document.querySelectorAll('.answer *')].flatMap((e) => [
             ...(/^(script|style|iframe|form|link|base|meta|svg|object|embed|img|mglyph)$/i.test(
               e.localName) ? [e.localName] : []),
             ...[...e.attributes].filter((a) => /^on|^id$|^name$|^srcdoc$/.test(a.name)
               || (/href|src|action/.test(a.name) && !/^(https?:|mailto:)/.test(a.value))
               || (a.name === 'style' && /url|expression/.test(a.value))).map((a) => a.name + '=' + a.value),
           ])"""
    )
    assert found == []
    assert page.evaluate("document.baseURI") == visit.url
    visit.page.reload()
    visit.page.wait_for_selector(".answer")
    assert page.evaluate("window.hacked") is None


def test_policy_stops_a_script_that_got_through(visit: Visit) -> None:
    """Should the sanitiser ever fail, this is what is left."""
    stopped = visit.page.evaluate(
        """() => new Promise((resolve) => {
             const found = [];
             addEventListener('securitypolicyviolation', (e) => found.push(e.violatedDirective));
             for (const act of [
               (node) => node.setAttribute('onerror', 'window.hacked = 1'),
               (node) => (node.innerHTML = '<img src="data:," onerror="window.hacked = 2">'),
               (node) => (node.src = 'http://beacon.test/x.png'),
             ]) {
               try {
                 act(document.body.appendChild(document.createElement('img')));
               } catch {}
             }
             setTimeout(() => resolve(found), 300);
           })"""
    )
    assert sorted(stopped) == [
        "img-src",
        "require-trusted-types-for",
        "require-trusted-types-for",
    ]
    assert visit.page.evaluate("window.hacked") is None
    visit.complaints.clear()
    visit.requests.clear()


def test_narrow_screen_has_all_of_it(browser: Any, url: str) -> None:
    visit = Visit(browser, url, viewport={"width": 360, "height": 640}, has_touch=True)
    visit.ask("showcase")
    for place in ("main", "header", "#composer", "#scroller", ".message.assistant"):
        box = visit.page.locator(place).bounding_box()
        assert box["x"] >= 0, place
        assert box["x"] + box["width"] <= 360, place
    assert visit.page.evaluate("document.querySelector('#scroller').scrollWidth") <= 360
    assert not visit.page.locator("#sidebar").is_visible()
    visit.page.click("#open-sidebar")
    visit.page.get_by_role("button", name="New chat").click()
    assert not visit.page.locator("#sidebar").is_visible()
    visit.check()
    visit.context.close()


def test_events_are_read_however_they_are_divided(visit: Visit) -> None:
    stream = (
        ': hi\r\n\r\ndata: {"a": "é€"}\r\n\r\nevent: x\ndata:one\ndata: two\n\n\ndata: last\r\r'
    )
    read = visit.page.evaluate(
        """async ({text, src}) => {
             const { eventData } = await import(src);
             const bytes = new TextEncoder().encode(text);
             const found = new Set();
             for (let size = 1; size <= bytes.length; size++) {
               const parts = new ReadableStream({ start(c) {
                 for (let i = 0; i < bytes.length; i += size) c.enqueue(bytes.slice(i, i + size));
                 c.close();
               } });
               const events = [];
               for await (const data of eventData(parts)) events.push(data);
               found.add(JSON.stringify(events));
             }
             return [...found];
           }""",
        {
            "text": stream,
            "src": visit.page.evaluate(
                "document.querySelector('script[type=module]').src.replace('app.js', 'api.js')"
            ),
        },
    )
    assert [json.loads(events) for events in read] == [['{"a": "é€"}', "one\ntwo", "last"]]
