"""The chat page and `moejet serve` with the embedded reasoner: the whole way from a key in a browser to a token.

Needs Playwright and a Chromium, see test_page_browser.py. A model that writes what it is told to stands behind the same
application where its words matter.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright.sync_api", reason="needs pip install 'moejet[browser]'")

from moejet.reasoning.result import Candidate, Node, Progress, Result
from moejet.resolve import TINY_REASONER, resolve_model
from moejet.server import asgi_app
from moejet.server.strategies import Outcome
from moejet.testing.page_visit import Visit, open_browser
from moejet.testing.scripted_backend import ScriptedBackend
from moejet.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

QUESTION = "Start with 17, add 25, then multiply by 3."
TOKENIZER = Tokenizer.from_path(resolve_model(TINY_REASONER))
LONG = 1500  # tokens: seconds of a stream, if nobody stops it
# Markup as a model might be talked into writing it: in its thinking, which the template has opened, then in HTML,
# Markdown and formulas.
HOSTILE = """<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>
</think>

<img src=x onerror="window.hacked=3"> <script>window.hacked=4</script><svg/onload=window.hacked=5>

[a](javascript:window.hacked=6) ![b](http://beacon.test/pixel.png) <http://beacon.test/auto>

$\\href{javascript:window.hacked=7}{x}$ $$\\text{<img src=x onerror=window.hacked=8>}$$

```html
<iframe src="http://beacon.test/"></iframe>
```

<details open ontoggle=window.hacked=9><style>@import url(http://beacon.test/s.css)</style></details>

The end."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        with open_browser() as browser:
            yield browser
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a server that runs as users start it, with the engine in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "moejet", "serve", "--port", "0", "--seed", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        try:
            yield server.stdout.readline().split()[-1] + "/"
        finally:
            server.terminate()
            assert server.wait(30) == 0


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Visit]:
    visit = Visit(browser, url)
    yield visit
    visit.check()
    visit.context.close()


def shows_thinking(visit: Visit) -> bool:
    return visit.page.locator(".thinking[open]").count() > 0


def test_conversation_thinking_and_reload(visit: Visit) -> None:
    visit.set_options(temperature=0)
    visit.ask(QUESTION)
    assert visit.texts(".answer") == ["The answer is 126."]
    [summary] = visit.texts(".thinking summary")
    assert summary.startswith("Thought for ")
    assert summary.endswith(" · 44 tokens")
    assert not shows_thinking(visit)
    assert visit.texts(".stats")[0].startswith("55 tokens · ")
    assert "tokens/s" in visit.texts(".stats")[0]
    visit.page.click(".thinking summary")
    assert visit.texts(".thought")[0].endswith("B: 042 * 003 = 126")
    visit.ask("Take 40, subtract 15.")
    visit.page.reload()
    visit.page.wait_for_selector(".answer")
    assert visit.texts(".bubble") == [QUESTION, "Take 40, subtract 15."]
    assert visit.texts(".answer")[0] == "The answer is 126."
    assert len(visit.texts(".answer")) == 2
    assert "44 tokens" in visit.texts(".thinking summary")[0]
    assert not visit.page.locator("#to-end").is_visible()


def test_regenerate_edit_and_branches(visit: Visit) -> None:
    visit.ask("Take 40, subtract 15.")
    visit.click("Regenerate")
    visit.wait()
    assert visit.place_of_answer() == ["‹2/2›"]
    visit.page.locator(".user").get_by_role("button", name="Edit").click()
    visit.page.fill(".edit textarea", QUESTION)
    visit.page.press(".edit textarea", "Enter")
    visit.wait()
    assert visit.texts(".bubble") == [QUESTION]
    visit.set_options(n=3, temperature=1)
    visit.click("Regenerate")
    visit.wait()
    assert len(visit.texts(".group .answer")) == 3
    assert all("Thought for" in text for text in visit.texts(".group .thinking summary"))
    visit.page.locator(".group .message").nth(2).get_by_role("button", name="Use this one").click()
    assert visit.place_of_answer() == ["‹4/4›"]
    assert not visit.page.locator("#to-end").is_visible()  # all of it fits into the window
    visit.click("Earlier version", inside=".user")
    assert visit.texts(".bubble") == ["Take 40, subtract 15."]


def engine_is_idle(url: str) -> bool:
    health = httpx.get(f"{url}health").json()
    return health["running"] == 0 and health["waiting"] == 0


def wait_until(holds: Callable[[], bool], timeout_s: float = 8.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_work(visit: Visit, url: str, how: str) -> None:
    _make_endless(visit)
    visit.ask(QUESTION, is_waited_for=False)
    visit.wait_for_answer(40, ".thought, .answer")
    if how == "button":
        visit.page.click("#stop")
    else:
        visit.page.keyboard.press("Escape")
    visit.wait()
    assert "Stopped." in visit.texts(".note")
    wait_until(lambda: engine_is_idle(url), 2.0)


def test_answer_now(visit: Visit) -> None:
    _make_endless(visit, only_thinking=True)
    visit.ask(QUESTION, is_waited_for=False)
    visit.page.click("#answer-now")
    visit.page.wait_for_selector(".answer:not(:empty) p")
    visit.wait()
    assert not shows_thinking(visit)


def _make_endless(visit: Visit, *, only_thinking: bool = False) -> None:
    """The next answers do not end by themselves, or their thinking does not."""
    more: dict[str, Any] = {"ignore_eos": not only_thinking, "max_tokens": LONG}
    if only_thinking:
        [end] = TOKENIZER.encode("</think>", add_special_tokens=False)
        more["logit_bias"] = {str(end): -100}

    def change(route: Any) -> None:
        body = json.loads(route.request.post_data)
        route.continue_(post_data=json.dumps({**body, **more}))

    visit.page.route("**/v1/chat/completions", change)


def test_export_and_import(browser: Any, visit: Visit, url: str, tmp_path: Path) -> None:
    visit.set_options(temperature=0)
    visit.ask(QUESTION)
    with visit.page.expect_download() as download:
        visit.click("Export")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    other = Visit(browser, url)
    other.page.set_input_files("#import-file", file)
    other.page.get_by_role("button", name=QUESTION, exact=True).click()
    assert other.texts(".answer") == ["The answer is 126."]
    other.ask("Take 40, subtract 15.")
    assert len(other.texts(".answer")) == 2
    other.check()
    other.context.close()


def test_keyboard_alone(visit: Visit) -> None:
    press = visit.page.keyboard.press
    assert visit.page.evaluate("document.activeElement.id") == "input"
    visit.page.keyboard.type("Take 40,")
    press("Shift+Enter")
    visit.page.keyboard.type("subtract 15.")
    press("Enter")
    visit.wait()
    assert visit.texts(".bubble") == ["Take 40,\nsubtract 15."]
    press("Tab")
    assert visit.page.evaluate("document.activeElement.id") == "effort"
    press("Tab")
    assert visit.page.evaluate("document.activeElement.id") == "strategy"
    press("Tab")
    press("Enter")
    assert visit.page.evaluate("document.activeElement.closest('dialog')?.id") == "settings"
    press("Escape")
    assert visit.page.locator("dialog[open]").count() == 0
    assert visit.page.evaluate("document.activeElement.id") == "open-settings"
    visit.page.locator(".thinking summary").focus()
    press("Enter")
    assert shows_thinking(visit)
    press("Control+k")
    assert visit.texts(".bubble") == []
    # Every control can be reached, says what it is, and shows that it has the focus.
    reached = {}
    for _ in range(20):
        press("Tab")
        name, outline = visit.page.evaluate(
            "[document.activeElement.ariaLabel ?? document.activeElement.innerText, "
            "getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached[name] = outline
    for name in ("New chat", "Export", "Import", "Theme: auto", "Effort", "Settings", "Send"):
        assert reached[name] == "solid", name


def luminance(colour: str) -> float:
    """WCAG 2's, of 'rgb(r, g, b)'."""
    values = [int(v) / 255 for v in colour[4:-1].split(",")]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_colours_and_widths(browser: Any, url: str, scheme: Any, width: int) -> None:
    viewport = {"width": width, "height": 700}
    visit = Visit(browser, url, viewport=viewport, color_scheme=scheme)
    visit.set_options(n=2)
    visit.ask(QUESTION)
    visit.page.locator(".thinking summary").first.click()
    page_width = visit.page.evaluate("document.documentElement.scrollWidth")
    assert page_width <= width
    back = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(back) < 0.1) == (scheme == "dark")
    for selector in (".answer", ".thought", ".stats", "#title", "#model", ".bubble", "#send"):
        text, behind = visit.page.locator(f"{selector}:visible").first.evaluate(
            """(e) => { let b = e, c;
                 while (/, 0\\)$/.test(c = getComputedStyle(b).backgroundColor)) b = b.parentElement;
                 return [getComputedStyle(e).color, c]; }"""
        )
        light, dark = sorted((luminance(text), luminance(behind)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, selector
    visit.check()
    visit.context.close()


def test_hostile_words_of_a_model_do_nothing(browser: Any, serve: Callable[[Any], Any]) -> None:
    app = asgi_app(ScriptedBackend([HOSTILE], TOKENIZER))
    visit = Visit(browser, serve(app).url + "/")
    for is_again in (False, True):
        if is_again:
            visit.page.reload()
            visit.page.wait_for_selector(".answer p")
        else:
            visit.ask("attack")
        visit.page.locator(".thinking summary").click()
        visit.page.wait_for_timeout(200)
        assert "onerror" in visit.texts(".thought")[0]  # as text
        assert visit.texts(".answer p")[-1] == "The end."
        assert visit.page.evaluate("window.hacked") is None
        assert visit.page.locator(".answer :is(script, iframe, style, svg, img)").count() == 0
        assert visit.page.locator(".thought *").count() == 0
        links = visit.page.locator(".answer a").evaluate_all("(all) => all.map((a) => a.href)")
        assert all(link.startswith("http://beacon.test/") for link in links)
    visit.check()
    visit.context.close()


def test_a_strategy_shows_its_progress_votes_and_candidates(visit: Visit) -> None:
    visit.page.select_option("#strategy", "vote:4")
    assert visit.page.locator("#strategy option:not([disabled])").count() >= 4
    visit.ask(QUESTION, is_waited_for=False)
    visit.page.wait_for_selector(".strategy:visible")
    visit.wait()
    assert visit.texts(".answer") == ["The answer is 126."]
    [label] = visit.texts(".strategy > summary")
    assert label.startswith("vote:4 · 4 candidates · 126 with ")
    visit.page.click(".strategy > summary")
    assert visit.texts(".votes li")[0].startswith("126: ")
    candidates = visit.texts(".candidate > summary")
    assert len(candidates) == 4
    assert sum(text.endswith("chosen") for text in candidates) == 1
    visit.page.click(".candidate > summary >> nth=0")
    assert "Plan:" in visit.texts(".candidate[open] .thought")[0]
    visit.page.reload()
    visit.page.wait_for_selector(".strategy:visible")
    assert visit.texts(".strategy > summary") == [label]
    visit.page.wait_for_selector("#strategy:visible")
    assert visit.page.input_value("#strategy") == "vote:4"


STEPS = [
    Progress("step", "looked at 1", {}, Node(0, -1, "<img src=x onerror=window.hacked=1>", 0.5)),
    Progress("step", "looked at 2", {}, Node(1, 0, "second step", 0.25, 3, "kept")),
    Progress("step", "<b>looked</b> at 3", {}, Node(2, 0, "third step", None, 0, "pruned")),
    Progress("step", "looked at 4", {}, Node(1, 0, "second step", 0.75, 4, "chosen")),
    Progress("vote", "the end", {"votes": {"<script>window.hacked=2</script>": 1.0}}),
]


def test_a_search_is_drawn_as_a_tree(browser: Any, serve: Callable[[Any], Any]) -> None:
    chosen = Candidate("t", "why", "the **answer**", "<i>7</i>", 5)
    outcome = Outcome(Result(chosen, (chosen,)), 4.0)
    scripted = ScriptedBackend(["-"], TOKENIZER, events=[*STEPS, outcome], delay_s=0.1)
    scripted.card = replace(scripted.card, strategies=("vote", "mcts"))
    visit = Visit(browser, serve(asgi_app(scripted)).url + "/")
    visit.page.select_option("#strategy", "mcts:16,parallel=4")
    visit.ask("search", is_waited_for=False)
    visit.page.wait_for_selector(".strategy:visible")
    visit.page.click(".strategy > summary")
    visit.wait()
    steps = visit.texts(".steps .step")
    assert [step.split("  ")[0].replace("\n", " ") for step in steps] == [
        "<img src=x onerror=window.hacked=1> open · 0.50",
        "second step chosen · 0.75 · 4 visits",
        "third step pruned",
    ]
    assert visit.page.locator(".steps > li > ul > li").count() == 2
    assert visit.texts(".votes li") == ["<script>window.hacked=2</script>: 1"]
    assert visit.texts(".answer") == ["the answer"]
    assert visit.page.locator(".strategy img, .strategy script, .strategy i").count() == 0
    assert scripted.runs[0].job.strategy == "mcts:16,parallel=4"
    visit.check()
    visit.context.close()
