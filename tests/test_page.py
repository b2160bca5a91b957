"""The page in a real browser: Debian's chromium, driven by Playwright, against a server with the bundled model.

MESA_PAGE_PICTURES=1 writes docs/page.png anew.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import make_documents
from conftest import ROOT
from mesa_gguf.lab.documents import Document, make_document
from server_process import Server

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need Playwright: make browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the page's tests need axe: make browser")
pytest.importorskip("fastapi", reason="the server is the extra [server]")

Page = Any
expect = playwright.expect
SECONDS = 30  # that anything may take on a busy machine
expect.set_options(timeout=SECONDS * 1000)
# note: `wait_for` looks at each frame, `expect` after 0.1, 0.25, 0.5 and 1 s

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def chromium() -> str:
    for name in (os.environ.get("MESA_CHROMIUM") or "", "chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no chromium: make browser, or MESA_CHROMIUM=/path/to/it")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def port() -> int:
    """The same one when the server is started again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


class Running:
    """The server, which tests may end and start again."""

    def __init__(self, library: Path, *arguments: str) -> None:
        self._start = lambda: Server(library, "--n-ctx", "8192", *arguments)
        self.server = self._start()

    @property
    def url(self) -> str:
        return self.server.url

    def start(self) -> None:
        self.server = self._start()

    def kill(self) -> None:
        self.server.kill()

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """The server takes connections and says nothing."""
        self.server.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.server.process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def server(library: Path, port: int) -> Iterator[Running]:
    running = Running(library, "--port", str(port))
    yield running
    running.kill()


@pytest.fixture(scope="module")
def tab(browser: Any, server: Running) -> Iterator[opened]:
    found = opened(browser, server)
    with found:
        yield found


@pytest.fixture
def page(tab: opened, server: Running) -> Iterator[Page]:
    """A tab that knows nothing: the same one, as a new one takes its time. What the page logs as an error fails the test."""
    tab.page.goto(server.url)
    yield tab.page
    tab.page.unroute_all()
    tab.page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
    tab.page.goto("about:blank")
    errors, tab.errors[:] = list(tab.errors), []
    assert errors == []


class opened:
    """A tab of its own."""

    def __init__(self, browser: Any, server: Running, **options: Any) -> None:
        self._context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        self._url = server.url

    def __enter__(self) -> Page:
        self.page = self._context.new_page()
        self.page.set_default_timeout(SECONDS * 1000)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if "Security Policy" in said.text else None)
        self.page.goto(self._url)
        return self.page

    def __exit__(self, *failed: object) -> None:
        self._context.close()
        if failed[0] is None:
            assert self.errors == []


#
# documents
#


def written(seed: int, kind: str, n_tokens: int = 1500) -> Document:
    return make_document(seed, n_tokens, kind=kind, n_facts=6, depth=0.5)


def lines(text: str, width: int = 84) -> list[str]:
    return [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width)]


def as_pdf(text: str) -> bytes:
    every = lines(text)
    return make_documents.pdf([every[n : n + 44] for n in range(0, len(every), 44)])


def as_html(text: str) -> bytes:
    parts = [f"<p>{paragraph}</p>" for paragraph in text.splitlines() if paragraph]
    chapters = "".join(f"<h2>Chapter {n + 1}</h2>{part}" for n, part in enumerate(parts))
    return f"<!doctype html><title>The book</title><article><h1>The book</h1>{chapters}</article>".encode()


REPORT, BOOK, NOTES = written(1, "door code"), written(2, "price"), written(3, "platform")
FILES = {
    "report.pdf": as_pdf(REPORT.text),
    "book.html": as_html(BOOK.text),
    "notes.txt": NOTES.text.encode(),
}


def drop(page: Page, files: dict[str, bytes]) -> None:
    """Drop files on the page, as the browser tells it."""
    page.evaluate(
        """files => {
          const transfer = new DataTransfer();
          for (const [name, data] of files)
            transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name));
          for (const kind of ["dragenter", "dragover", "drop"])
            document.body.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer}));
        }""",
        [[name, base64.b64encode(data).decode()] for name, data in files.items()],
    )


def row(page: Page, name: str) -> Any:
    return page.locator(".document:not(.sending)", has=page.get_by_text(name, exact=True))


def wait_until_read(page: Page, names: Iterable[str] = tuple(FILES)) -> None:
    for name in names:
        row(page, name).filter(has_text=re.compile(r"(PDF|HTML|text|Markdown), [\d,]+ tokens")).wait_for()


def ask(page: Page, question: str) -> None:
    page.get_by_role("textbox", name="Question").fill(question)
    page.get_by_role("textbox", name="Question").press("Enter")


def last_answer(page: Page) -> Any:
    return page.locator(".turn").last.locator(".answer-text")


def only(page: Page, *names: str, of: Iterable[str] = tuple(FILES)) -> None:
    """Choose some documents and no others."""
    for name in of:
        row(page, name).get_by_role("checkbox").set_checked(name in names)


@pytest.fixture
def filled(server: Running) -> Running:
    """The server with the three documents, read."""
    there = {file["filename"] for file in server.server.json("GET", "/v1/files")["data"]}
    added = [server.server.upload(data, name) for name, data in FILES.items() if name not in there]
    for file in added:
        server.server.wait_for(file["id"])
    return server


@pytest.fixture
def with_files(filled: Running, page: Page) -> Page:
    """The page with them."""
    wait_until_read(page)
    return page


def scan(page: Page) -> list[str]:
    """The serious faults that axe finds."""
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {node['html']}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def overflow(page: Page) -> int:
    """Pixels that the page is wider than the window."""
    width: int = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return width


#
# documents are dropped, asked about, and looked into
#


def test_dropped_documents_are_read_and_answer(page: Page, server: Running) -> None:
    dropped = dict(zip(("staff.pdf", "story.html", "trip.txt"), FILES.values()))
    drop(page, dropped)
    wait_until_read(page, dropped)
    expect(page.locator("#scope")).to_have_text("Asks 3 documents")  # those that were dropped
    for name, document in (("staff.pdf", REPORT), ("story.html", BOOK), ("trip.txt", NOTES)):
        only(page, name, of=dropped)
        expect(page.locator("#scope")).to_have_text(f"Asks {name}")
        ask(page, document.target.question)
        expect(page.locator(".said").last).to_have_text(re.compile(rf"^Read \d+ of \d+ chunks of {name}\.$"))
        expect(last_answer(page)).to_contain_text(document.target.answer)
    assert page.locator(".caution").count() == 0
    for file in server.server.json("GET", "/v1/files")["data"]:
        if file["filename"] in dropped:
            server.server.json("DELETE", f"/v1/files/{file['id']}")


def test_a_citation_leads_to_its_page(with_files: Page) -> None:
    page, fact = with_files, REPORT.target
    only(page, "report.pdf")
    ask(page, fact.question)
    number = last_answer(page).get_by_role("button", name=re.compile("^Passage 1: report.pdf, page "))
    number.click()
    page.get_by_role("img", name=re.compile(r"^Page \d+ of report.pdf$")).wait_for()
    page.locator(".marks rect").first.wait_for()
    # the passage is in sight, and the same as text is marked
    assert page.locator(".marks rect").first.bounding_box()["y"] > 0
    page.get_by_role("button", name="Text", exact=True).click()
    mark = page.locator("#source mark")
    expect(mark.first).to_be_in_viewport()
    assert fact.sentence.rstrip(".") in " ".join(" ".join(mark.all_inner_texts()).split())
    page.keyboard.press("Escape")
    page.locator("#source").wait_for(state="hidden")
    expect(number).to_be_focused()


def test_a_page_is_turned_enlarged_and_read(browser: Any, filled: Running) -> None:
    """Its words lie where the picture shows them: marked, selected, and read aloud; a larger one is drawn anew."""
    with opened(browser, filled, device_scale_factor=2) as page:
        wait_until_read(page)
        row(page, "report.pdf").hover()
        page.get_by_role("button", name="Look into report.pdf").click()
        words = page.get_by_role("group", name="Text of page 1")
        picture = page.get_by_role("img", name="Page 1 of report.pdf")
        picture.wait_for()
        shown = lines(REPORT.text)
        assert words.locator("text").all_text_contents() == shown[:44]
        box, sheet = words.locator("text").first.bounding_box(), page.locator(".sheet").bounding_box()
        assert box["x"] - sheet["x"] == pytest.approx(sheet["width"] * 72 / 612, abs=2)
        words.locator("text").nth(1).dblclick(position={"x": 3, "y": 5})
        assert page.evaluate("getSelection().toString()").strip() == shown[1].split()[0]
        page.evaluate("() => getSelection().selectAllChildren(document.querySelector('.words'))")
        assert page.evaluate("getSelection().toString()").split() == " ".join(shown[:44]).split()

        sharp = "image => image.naturalWidth / image.getBoundingClientRect().width"
        width = page.locator(".sheet").bounding_box()["width"]
        for zoom in (150, 200, 300):
            page.get_by_role("button", name="Larger").click()
            expect(page.locator(".zoom")).to_have_text(f"{zoom} %")
            page.wait_for_function(
                f"() => ({sharp})(document.querySelector('.sheet img')) >= 1.99 || document.querySelector('.sheet img').naturalWidth >= 3400"
            )
        assert page.locator(".sheet").bounding_box()["width"] == pytest.approx(3 * width, abs=2)
        assert overflow(page) <= 0
        page.keyboard.press("-")
        expect(page.locator(".zoom")).to_have_text("200 %")
        page.get_by_role("button", name="Page after").press("Enter")
        expect(page.get_by_role("group", name="Text of page 2")).to_be_attached()
        expect(page.get_by_role("button", name="Page after")).to_be_focused()
        expect(page.locator(".zoom")).to_have_text("200 %")  # as it was left
        page.keyboard.press("n")
        expect(page.get_by_role("group", name="Text of page 3")).to_be_attached()
        page.keyboard.press("p")
        page.keyboard.press("p")
        expect(page.get_by_role("group", name="Text of page 1")).to_be_attached()
        expect(page.get_by_role("button", name="Page before")).to_be_disabled()


def test_the_words_under_the_mark_are_the_passage(with_files: Page) -> None:
    page, fact = with_files, REPORT.target
    only(page, "report.pdf")
    ask(page, fact.question)
    page.locator(".passage").first.click()
    expect(page.locator(".marks rect").first).to_be_in_viewport()
    under = page.evaluate(
        """() => {
          const marks = [...document.querySelectorAll(".marks rect")].map(rect => rect.getBoundingClientRect());
          const meets = (a, b) => Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.6 * Math.min(a.height, b.height);
          const words = [...document.querySelectorAll(".words text")];
          return words.filter(text => marks.some(mark => meets(mark, text.getBoundingClientRect()))).map(text => text.textContent);
        }"""
    )
    assert fact.sentence.rstrip(".") in " ".join(" ".join(under).split())


@pytest.mark.parametrize(("name", "document"), [("book.html", BOOK), ("notes.txt", NOTES)])
def test_a_citation_leads_to_its_place_in_the_text(with_files: Page, name: str, document: Document) -> None:
    page, fact = with_files, document.target
    only(page, name)
    ask(page, fact.question)
    expect(last_answer(page)).to_contain_text(fact.answer)
    page.locator(".passage").first.click()
    mark = page.locator("#source mark")
    expect(mark.first).to_be_in_viewport()
    assert fact.answer in " ".join(mark.all_inner_texts())


def test_the_whole_can_be_read_instead(with_files: Page) -> None:
    page, fact = with_files, NOTES.target
    only(page, "notes.txt", "book.html", "report.pdf")
    ask(page, fact.question)
    partly = re.compile(r"^Read (\d+) of (?!\1 )\d+ chunks")
    expect(page.locator(".said")).to_have_text(partly)
    page.get_by_role("button", name="Read all").click()
    expect(page.locator(".said")).to_have_text(re.compile(r"^Read (\d+) of \1 chunks"))
    expect(page.locator(".turn")).to_have_count(1)


def test_a_folder_becomes_a_collection(page: Page, server: Running, tmp_path: Path) -> None:
    folder = tmp_path / "harbour"
    (folder / "old").mkdir(parents=True)
    (folder / "ships.txt").write_text("The door code of Ulla Voss is 12345. It rained.\n" * 3)
    (folder / "old" / "crew.txt").write_text("The door code of Ivar Holm is 67890. It rained.\n" * 3)
    page.locator("#folder-input").set_input_files(folder)
    names = ["ships.txt", "crew.txt"]
    wait_until_read(page, names)
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Collection").select_option("harbour")
    expect(page.locator(".document")).to_have_count(2)
    expect(page.locator("#scope")).to_have_text("Asks the collection harbour")
    ask(page, "What is the door code of Ivar Holm?")
    expect(last_answer(page)).to_contain_text("67890")
    page.get_by_role("button", name="Remove this collection").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    page.locator("#collections").wait_for(state="hidden")
    for file in server.server.json("GET", "/v1/files")["data"]:
        if file["filename"] in names:
            server.server.json("DELETE", f"/v1/files/{file['id']}")


#
# conversations
#


def test_a_conversation_is_there_after_a_reload_and_goes_on(with_files: Page) -> None:
    page, facts = with_files, REPORT.facts
    only(page, "report.pdf")
    ask(page, facts[0].question)
    page.locator(".said").wait_for()
    first = last_answer(page).inner_text()
    page.reload()
    expect(page.locator(".turn")).to_have_count(1)
    assert last_answer(page).inner_text() == first
    expect(page.locator("#scope")).to_have_text("Asks report.pdf")
    expect(page.locator(".conversation a[aria-current=page]")).to_have_text(facts[0].question)
    ask(page, facts[1].question)
    expect(page.locator(".said")).to_have_count(2)
    expect(page.locator(".turn")).to_have_count(2)


def test_conversations_are_chosen_and_removed(with_files: Page) -> None:
    page = with_files
    only(page, "notes.txt")
    asked = [fact.question for fact in NOTES.facts[:2]]
    for question in asked:
        page.get_by_role("button", name="New", exact=True).click()
        ask(page, question)
        page.locator(".said").wait_for()
    page.get_by_role("link", name=asked[0]).first.click()
    expect(page.locator(".question h2")).to_have_text(asked[0])
    page.go_back()
    expect(page.locator(".question h2")).to_have_text(asked[1])
    there = page.locator(".conversation").count()
    page.locator(".conversation:has([aria-current])").hover()
    page.locator(".conversation:has([aria-current])").get_by_role("button", name=re.compile("^Remove")).click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(page.locator(".conversation")).to_have_count(there - 1)
    page.locator("#welcome").wait_for()


def test_an_answer_can_be_stopped_and_asked_again(with_files: Page, server: Running) -> None:
    page, fact = with_files, NOTES.target
    only(page, "notes.txt")
    with server.asleep():
        ask(page, fact.question)
        page.get_by_role("button", name="Stop").wait_for()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".trouble")).to_contain_text("Stopped")
        expect(page.get_by_role("textbox", name="Question")).to_be_focused()
    page.get_by_role("button", name="Ask again").click()
    expect(last_answer(page)).to_contain_text(fact.answer)
    assert page.locator(".trouble").count() == 0
    expect(page.locator(".turn")).to_have_count(1)


def test_what_was_written_stays_when_it_is_stopped(with_files: Page) -> None:
    page = with_files
    only(page)
    page.evaluate("() => history.replaceState(null, '', '/')")
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": 2000, "uploadThroughput": -1}
    network.send("Network.emulateNetworkConditions", slow)
    only(page, "notes.txt", "book.html", "report.pdf")
    ask(page, NOTES.target.question)
    page.locator(".caret").wait_for()
    page.keyboard.press("Escape")
    expect(page.locator(".trouble")).to_have_text(re.compile("Stopped before its end"))
    network.send("Network.emulateNetworkConditions", slow | {"downloadThroughput": -1})
    assert last_answer(page).inner_text() in NOTES.text.replace("\n", " ") or last_answer(page).inner_text()


def test_the_answer_is_copied(browser: Any, filled: Running) -> None:
    with opened(browser, filled, permissions=["clipboard-read", "clipboard-write"]) as page:
        wait_until_read(page)
        only(page, "report.pdf")
        ask(page, REPORT.target.question)
        page.get_by_role("button", name="Copy the answer").click()
        expect(page.get_by_role("status")).to_have_text("Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert REPORT.target.answer in copied and "[1] report.pdf, page" in copied


#
# the server goes and comes
#


def test_a_server_that_is_lost_is_found_again(with_files: Page, server: Running) -> None:
    page, fact = with_files, REPORT.target
    only(page, "report.pdf")
    ask(page, fact.question)
    page.locator(".said").wait_for()
    server.kill()
    drop(page, {"later.txt": b"The door code of Ulla Voss is 12345. It rained.\n" * 3})
    expect(page.locator("#banner")).to_contain_text("The server does not answer")
    expect(page.locator(".sending")).to_contain_text("when the server is back")
    page.get_by_role("textbox", name="Question").fill("A question that waits")
    page.get_by_role("textbox", name="Question").press("Enter")
    expect(page.get_by_role("textbox", name="Question")).to_have_value("A question that waits")
    server.start()
    page.locator("#banner").wait_for(state="hidden")
    wait_until_read(page, ["later.txt"])
    expect(page.locator(".turn")).to_have_count(1)
    only(page)
    row(page, "later.txt").get_by_role("checkbox").check()
    ask(page, "What is the door code of Ulla Voss?")
    expect(last_answer(page)).to_contain_text("12345")
    row(page, "later.txt").hover()
    page.get_by_role("button", name="Remove later.txt").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(row(page, "later.txt")).to_have_count(0)


def test_an_answer_that_is_cut_off_says_so(with_files: Page, server: Running) -> None:
    page = with_files
    only(page, "notes.txt")
    with server.asleep():
        ask(page, NOTES.target.question)
        page.get_by_role("button", name="Stop").wait_for()
        server.kill()
    expect(page.locator(".trouble")).to_contain_text("The connection was lost")
    server.start()
    page.locator("#banner").wait_for(state="hidden")
    page.get_by_role("button", name="Ask again").click()
    expect(last_answer(page)).to_contain_text(NOTES.target.answer)


def test_a_key_is_asked_for(browser: Any, tmp_path: Path) -> None:
    running = Running(tmp_path, "--api-key", "open sesame")
    try:
        with opened(browser, running) as page:
            page.get_by_role("dialog").get_by_role("textbox", name="Key").fill("wrong")
            page.get_by_role("dialog").get_by_role("button", name="Enter").click()
            expect(page.get_by_role("dialog")).to_contain_text("That key is not the one")
            page.get_by_role("dialog").get_by_role("textbox", name="Key").fill("open sesame")
            page.get_by_role("dialog").get_by_role("button", name="Enter").click()
            expect(page.locator("#served-by")).to_contain_text("mesa-reader")
            page.reload()  # kept for the tab
            expect(page.locator("#served-by")).to_contain_text("mesa-reader")
            assert page.evaluate("localStorage.getItem('mesa-key')") is None
    finally:
        running.kill()


#
# for everybody
#


def test_axe_finds_no_serious_fault(browser: Any, filled: Running) -> None:
    with opened(browser, filled) as page:

        def check() -> None:
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # colours change at once
                assert scan(page) == [], scheme

        wait_until_read(page)
        check()
        only(page, "report.pdf")
        ask(page, REPORT.target.question)
        page.locator(".passage").first.click()
        page.locator(".marks rect").first.wait_for()
        check()
        page.get_by_role("button", name="Text", exact=True).click()
        page.locator("#source mark").first.wait_for()
        check()
        row(page, "report.pdf").hover()
        page.get_by_role("button", name="Remove report.pdf").click()
        check()


def test_a_phone_has_room_for_it(browser: Any, filled: Running) -> None:
    with opened(browser, filled, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True) as page:
        assert overflow(page) <= 0
        page.get_by_role("button", name="Documents and conversations").click()
        wait_until_read(page)
        only(page, "report.pdf")
        assert overflow(page) <= 0
        page.get_by_role("button", name="Close", exact=True).click()
        ask(page, REPORT.target.question)
        page.locator(".said").wait_for()
        assert overflow(page) <= 0 and scan(page) == []
        last_answer(page).get_by_role("button").first.click()
        page.locator(".marks rect").first.wait_for()
        assert overflow(page) <= 0 and scan(page) == []
        page.get_by_role("button", name="Close the document").click()
        page.get_by_role("textbox", name="Question").wait_for()


def test_the_keyboard_is_enough(with_files: Page) -> None:
    page = with_files
    only(page, "report.pdf")
    page.keyboard.press("/")
    expect(page.get_by_role("textbox", name="Question")).to_be_focused()
    page.keyboard.type(REPORT.target.question)
    page.keyboard.press("Enter")
    page.locator(".said").wait_for()
    for _ in range(12):  # backwards from the question: the passages are on the way
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.matches('button.number')"):
            break
    page.keyboard.press("Enter")
    expect(page.locator("#source-title")).to_be_focused()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.matches('button.number')")


def test_a_theme_is_chosen_and_kept(page: Page) -> None:
    button = page.get_by_role("button", name=re.compile("^Colours"))
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(246, 242, 234)"
    button.click()
    button.click()
    expect(button).to_have_attribute("aria-label", re.compile("dark"))
    assert page.evaluate(paper) == "rgb(23, 21, 19)"
    page.reload()
    assert page.evaluate(paper) == "rgb(23, 21, 19)"


#
# what models and documents say is text
#

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>[a](javascript:alert(3))"


def test_a_document_cannot_speak_to_the_browser(page: Page) -> None:
    drop(page, {"<b>x.txt": f"{HOSTILE} The door code of Ulla Voss is 12345.\n".encode() * 3})
    name = row(page, "<b>x.txt")
    expect(name).to_contain_text("tokens")
    ask(page, "What is the door code of Ulla Voss?")
    page.locator(".passage").first.click()
    expect(page.locator("#source mark")).to_contain_text(HOSTILE)
    assert page.locator("main img, main script, main a, #source img, #source script, #source a").count() == 0
    page.keyboard.press("Escape")
    name.hover()
    name.get_by_role("button", name=re.compile("^Remove")).click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(name).to_have_count(0)


def test_an_answer_is_no_markup_and_its_doubts_are_told(with_files: Page) -> None:
    """An answer that the bundled model does not give."""
    page = with_files
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": f"**Yes.** {HOSTILE}"}, "finish_reason": None}]},
        {
            "choices": [{"index": 0, "delta": {"annotations": []}, "finish_reason": "stop"}],
            "mesa": {
                "read": {"mode": "auto", "chunks": 2, "of_chunks": 9, "documents": ["x"], "notes": [HOSTILE]},
                "said": f"read 2 of 9 chunks of {HOSTILE}",
                "stands": False,
            },
        },
    ]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, f"Is {HOSTILE} a question?")
    expect(page.locator(".caution")).to_contain_text("Most words of this answer do not occur in what was read")
    expect(last_answer(page)).to_have_text(f"Yes. {HOSTILE}")
    expect(page.locator(".said")).to_have_text(f"Read 2 of 9 chunks of {HOSTILE}.")
    assert page.locator("main img, main script, main a, main .answer a, .conversation img").count() == 0


def test_an_error_is_told_and_can_be_tried_again(with_files: Page) -> None:
    page = with_files
    only(page, "notes.txt")
    busy = {
        "error": {"message": "too many requests wait", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=busy), times=1)
    ask(page, NOTES.target.question)
    expect(page.locator(".trouble")).to_contain_text("too many requests wait")
    page.get_by_role("button", name="Ask again").click()
    expect(last_answer(page)).to_contain_text(NOTES.target.answer)


MARKDOWN = """# One

Two **three** and *four* `five`.

1. six
2. seven
   - eight

| nine | ten |
|---|---|
| eleven | twelve |

> thirteen

```
fourteen **not strong**
```
"""


def test_markdown_is_shown(page: Page) -> None:
    tags = page.evaluate(
        """async text => {
          const { markdown } = await import("/markdown.js");
          const holder = document.createElement("div");
          holder.append(...markdown(text));
          const text_of = tag => [...holder.querySelectorAll(tag)].map(e => e.textContent);
          return Object.fromEntries(
            ["h4", "strong", "em", "code", "ol > li", "ul > li", "th", "td", "blockquote"].map(t => [t, text_of(t)]));
        }""",
        MARKDOWN,
    )
    assert tags == {
        "h4": ["One"], "strong": ["three"], "em": ["four"], "code": ["five", "fourteen **not strong**"],
        "ol > li": ["six", "seveneight"], "ul > li": ["eight"], "th": ["nine", "ten"], "td": ["eleven", "twelve"],
        "blockquote": ["thirteen"],
    }  # fmt: skip


def test_no_text_becomes_markup(page: Page) -> None:
    """Random texts of all the marks: no word is lost, nothing but the few elements comes of it, and it takes no long time."""
    wrong = page.evaluate(
        """async hostile => {
          const { markdown } = await import("/markdown.js");
          const parts = ["#", "##### ", "- ", "  - ", "1. ", "12) ", "> ", "|", "|---|", "`", "```", "~~~", "**", "__", "*", "_", "\\n",
            "\\n\\n", " ", "    ", "\\t", "word", "ü", "👍🏽", "0", hostile];
          const known = "P H4 H5 H6 UL OL LI PRE CODE BLOCKQUOTE DIV TABLE THEAD TBODY TR TH TD STRONG EM BR".split(" ");
          let seed = 1;
          const random = n => (seed = (seed * 48271) % 2147483647) % n;
          const letters = text => (text.match(/[\\p{L}\\p{Extended_Pictographic}]+/gu) ?? []).join(" ");
          const wrong = [];
          for (let round = 0; round < 3000; round++) {
            const text = Array.from({ length: random(40) }, () => parts[random(parts.length)]).join("");
            const holder = document.createElement("div");
            holder.append(...markdown(text));
            const strange = [...holder.querySelectorAll("*")].filter(e => !known.includes(e.tagName));
            const pieces = [];
            const walker = document.createTreeWalker(holder, NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) pieces.push(walker.currentNode.data);
            if (strange.length || letters(pieces.join("")).replaceAll(" ", "") !== letters(text).replaceAll(" ", "")) wrong.push(text);
          }
          for (const part of parts) markdown(part.repeat(20000));
          return wrong.slice(0, 3);
        }""",
        HOSTILE,
    )
    assert wrong == []


#
# pictures for the docs
#


@pytest.mark.slow
def test_pictures_are_taken(browser: Any, filled: Running, tmp_path: Path) -> None:
    folder = ROOT / "docs" if os.environ.get("MESA_PAGE_PICTURES") else tmp_path
    with opened(browser, filled, viewport={"width": 1200, "height": 720}) as page:
        wait_until_read(page)
        only(page, "report.pdf", "book.html", "notes.txt")
        ask(page, REPORT.target.question)
        page.locator(".passage", has_text="report.pdf").first.click()
        page.locator(".marks rect").first.wait_for()
        taken = page.screenshot(animations="disabled")
    image = pytest.importorskip("PIL.Image")
    few = image.open(io.BytesIO(taken)).convert("RGB").quantize(96)  # colours: a third of the bytes
    few.save(folder / "page.png", optimize=True)
    assert 20_000 < (folder / "page.png").stat().st_size < 150_000
