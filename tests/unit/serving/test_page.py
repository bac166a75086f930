"""The page in a real browser: Debian's Chromium without a screen, against a real server whose engine has no model."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from langchain_lora_retriever.errors import EngineError
from langchain_lora_retriever.serving.config import ServeConfig
from langchain_lora_retriever.serving.explorer import Explorer
from makers import wait_until
from servers import running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from langchain_lora_retriever import ChatLoraRetriever

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: run .ci/chromium as root"),
]

SQL = "How many users are in the table?"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title = 2</script> & <b>bold</b>'
KEY = "key-0123456789abcdef"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a screen."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1400,1000"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


class Page:
    """The page as who sits before it sees it."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        browser.get(f"{address}/")

    def at(self, selector: str) -> Any:
        """The first element of a CSS selector."""
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What it reads."""
        return str(self.at(selector).text)

    def wait(self, selector: str, text: str) -> None:
        """Wait until an element reads some text."""
        wait_until(lambda: text in self.browser.execute_script(
            "return document.querySelector(arguments[0])?.textContent ?? ''", selector), 15)  # fmt: skip

    def press(self, *keys: str) -> None:
        """Press keys together, wherever the focus is."""
        chain = webdriver.ActionChains(self.browser)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in keys[:-1]:
            chain.key_up(key)
        chain.perform()

    def ask(self, text: str) -> None:
        """Ask as by keyboard alone."""
        self.press("/")
        self.press(Keys.CONTROL, "a")
        self.press(text)
        self.press(Keys.CONTROL, Keys.ENTER)

    def complaints(self) -> list[str]:
        """What the console says, but for the statuses that a test has provoked."""
        said = [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] != "INFO"]
        return [message for message in said if "the server responded with a status of" not in message]


@pytest.fixture
def page(chromium: Any, llm: ChatLoraRetriever) -> Iterator[Page]:
    """The page of a server, once it has read the pool; its console stays silent to the end."""
    with running(llm) as address:
        page = Page(chromium, address)
        page.wait("#model", "3 adapters")
        yield page
        assert page.complaints() == []
        chromium.get("about:blank")


def test_a_prompt_by_keyboard(page: Page, engine: Any) -> None:
    """The adapters it finds, the routed answer beside the base model's, and the prompt on the map."""
    engine.answers = lambda prompt, names: f"by {','.join(names[:1]) or 'the base model'}"
    page.ask(SQL)
    page.wait(".pair > div:first-child .answer", "by sql")
    page.wait(".pair > div:last-child .answer", "by the base model")
    page.wait(".pair > div:first-child", "tok/s")
    page.wait(".pair > div:last-child", "no adapter")
    page.wait("#route tbody tr:first-child", "sql")
    assert float(page.text("#route tbody tr:first-child td:nth-child(2)")) > 0.1
    wait_until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#map circle.prompt"))
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "#map circle.used")) == 3
    assert page.text("#engine dd").startswith("0 of 8")


def test_pinning_and_excluding(page: Page, engine: Any) -> None:
    """Buttons of each adapter; what was run with which settings stays to compare."""
    page.at("[aria-label='pin french']").send_keys(Keys.SPACE)
    assert page.browser.switch_to.active_element.get_attribute("aria-label") == "pin french"
    page.ask(SQL)
    page.wait("#runs article > p", "pinned: french")
    page.wait("#runs article .pair > div:first-child", "french")
    wait_until(lambda: len(engine.requests) == 2)
    page.at("[aria-label='exclude french']").click()
    page.at("[aria-label='exclude sql']").click()
    Select(page.at("#composition")).select_by_visible_text("selection")
    page.ask(SQL)
    page.wait("#runs article:first-child > p", "without french, sql")
    wait_until(lambda: len(engine.requests) == 4)
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "#runs article")) == 2
    assert ["dates"] in [request.names for request in engine.requests[2:]]


def test_a_sample_fills_the_prompt(page: Page) -> None:
    """And is looked up at once."""
    Select(page.at("#sample")).select_by_visible_text("How do you say good morning in French?")
    page.wait("#route tbody tr:first-child", "french")
    assert page.at("#prompt").get_attribute("value") == "How do you say good morning in French?"


def test_what_is_said_is_text(page: Page, engine: Any, llm: ChatLoraRetriever, write_adapter: Any) -> None:
    """Markup in an answer, a prompt, a sample or an error is shown, never run."""
    engine.answers = [HOSTILE]
    llm.pool.add("odd", write_adapter("odd"), samples=[HOSTILE, "Odd markup."])
    page.browser.refresh()
    page.wait("#model", "4 adapters")
    page.ask(HOSTILE)
    page.wait(".pair > div:first-child .answer", HOSTILE)
    page.wait(".pair > div:last-child", "tok/s")

    def fail(prompt: str, names: list[str]) -> str:
        raise EngineError(HOSTILE)

    engine.answers = fail
    page.ask(HOSTILE)
    page.wait("#runs article:first-child .pair", HOSTILE)
    assert page.browser.execute_script("return document.querySelectorAll('main img, main script, main b').length") == 0
    assert page.browser.title == "lora-retriever"


def test_stopping_frees_the_requests(page: Page, engine: Any) -> None:
    """By Escape."""
    engine.delay = 60.0
    page.ask(SQL)
    wait_until(lambda: len(engine.requests) == 2)
    page.press(Keys.ESCAPE)
    wait_until(lambda: engine.num_aborted == 2)
    assert not page.at("#stop").is_enabled()


def test_faults_are_told_in_the_servers_words(page: Page) -> None:
    """A setting that is out of range, and an adapter that is gone."""
    page.ask("x" * 5000)
    page.wait(".pair > div:first-child", "tokens")


def test_near_duplicates_and_rejected(page: Page, llm: ChatLoraRetriever) -> None:
    """Opened when wanted."""
    page.at("#twins-box summary").click()
    page.wait("#twins-state", "the samples of")
    pairs = [f"{pair['first']} and {pair['second']}" for pair in Explorer(llm).twins()["twins"]]
    shown = [item.text.partition(" (")[0] for item in page.browser.find_elements(By.CSS_SELECTOR, "#twins li")]
    assert shown == pairs
    page.at("#rejected-box summary").send_keys(Keys.ENTER)
    page.wait("#rejected", "None")


def test_no_name_on_the_map_covers_another(page: Page, llm: ChatLoraRetriever, write_adapter: Any) -> None:
    """Of adapters that lie together as many are named as there is room for; all have their name at their point."""
    checkpoint = write_adapter("x")
    for index in range(12):
        llm.pool.add(f"a_long_name_{index}", checkpoint, samples=["How many users signed up in May?"])
    page.browser.refresh()
    page.wait("#model", "15 adapters")
    wait_until(lambda: len(page.browser.find_elements(By.CSS_SELECTOR, "#map circle title")) == 15)
    boxes = [text.rect for text in page.browser.find_elements(By.CSS_SELECTOR, "#map text")]
    assert 5 < len(boxes) < 15
    covering = [
        (one, other)
        for at, one in enumerate(boxes)
        for other in boxes[at + 1 :]
        if abs(one["x"] - other["x"]) < min(one["width"], other["width"]) / 2
        and abs(one["y"] - other["y"]) < min(one["height"], other["height"]) / 2
    ]
    assert covering == []


def test_a_phone_and_the_dark(page: Page) -> None:
    """Nothing is wider than the screen; colours follow the system."""
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        wide = page.browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1] == 360
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    colours = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        colours.append(page.browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colours == ["rgb(251, 251, 249)", "rgb(20, 23, 26)"]


def test_everything_can_be_reached_and_has_a_name(page: Page) -> None:
    """By Tab, in order, each control with a label; nothing is fetched from elsewhere."""
    seen = []
    page.at("body").send_keys(Keys.TAB)
    for _ in range(12):
        element = page.browser.switch_to.active_element
        seen.append(element.get_attribute("id") or element.get_attribute("aria-label") or element.text)
        assert element.accessible_name, element.get_attribute("outerHTML")
        page.press(Keys.TAB)
    assert seen[1:9] == ["sample", "prompt", "composition", "top_k", "temperature", "max_tokens", "send", seen[8]]
    origins = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin)"
    )
    assert set(origins) == {page.browser.execute_script("return location.origin")}


def test_the_key_is_asked_for(chromium: Any, llm: ChatLoraRetriever, tmp_path: Path) -> None:
    """Once, again if it is wrong, and it is gone with the tab."""
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    with running(llm, ServeConfig(api_key_file=keys)) as address:
        page = Page(chromium, address)
        wait_until(lambda: page.at("#key-dialog").is_displayed())
        page.press("wrong-0123456789")
        page.press(Keys.ENTER)
        page.wait("#key-title", "wrong")
        page.press(KEY)
        page.press(Keys.ENTER)
        page.wait("#model", "3 adapters")
        page.ask(SQL)
        page.wait(".pair > div:first-child .answer", "The answer.")
        assert not page.at("#key-dialog").is_displayed()
        assert page.browser.execute_script("return localStorage.length") == 0
        assert page.complaints() == []
        page.browser.execute_script("sessionStorage.clear()")
        chromium.get("about:blank")
