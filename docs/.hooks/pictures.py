"""Takes the pictures of the server's page that the docs show, from the demo: `python docs/.hooks/pictures.py`.

Needs the extras `demo` and `serve`, selenium, and Debian's chromium and chromium-driver (`.ci/chromium`).
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from selenium import webdriver

from langchain_lora_retriever.demo import demo_chat_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
PROMPT = (
    "Write SQL for this question: What is the brand of phones with seller Boris?\nSchema: phones(brand, model, seller)"
)
KEYED = """
for (const [id, value] of Object.entries(arguments[0])) document.getElementById(id).value = value;
document.getElementById("form").requestSubmit();
document.getElementById("prompt").dispatchEvent(new Event("input"));
"""


def main() -> None:
    """Ask the demo's server a prompt, and take the page in light, in dark and on a phone."""
    from servers import running  # noqa: PLC0415 - of the tests

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    browser: Any = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        llm = demo_chat_model(max_tokens=48)
        llm.runtime.ready()
        with running(llm) as address:
            browser.get(f"{address}/")
            _until(browser, "return document.getElementById('model').textContent")
            browser.execute_script(KEYED, {"prompt": PROMPT})
            _until(browser, "return document.getElementById('runs').textContent.match(/tok.s/g)?.length === 2")
            _until(browser, "return document.querySelector('#map circle.prompt')")
            time.sleep(2.5)  # a poll of the engine
            for name, scheme, size in (
                ("page-light", "light", (1400, 900, False)),
                ("page-dark", "dark", (1400, 900, False)),
                ("page-phone", "light", (390, 1000, True)),
            ):
                width, height, is_phone = size
                metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
                feature = {"name": "prefers-color-scheme", "value": scheme}
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
                browser.save_screenshot(str(ROOT / "docs" / "images" / f"{name}.png"))
    finally:
        browser.quit()


def _until(browser: Any, script: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not browser.execute_script(script):
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {seconds} s: {script}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
