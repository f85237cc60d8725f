"""The chat page in a browser: what a person does there, and what hostile model output must not be able to do.

Needs Playwright and a Chromium: its own, or the system's. A stand-in speaks the API, so that every case of a stream can
be brought about; see test_page_and_server.py for the real server.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright.sync_api", reason="needs pip install 'moejet[browser]'")


from moejet.server import serve_in_thread
from moejet.testing.page_stand_in import StandIn
from moejet.testing.page_visit import Visit, open_browser

pytestmark = pytest.mark.slow


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
