"""The report in a headless Chromium: no request, no error, no overflow, readable in the dark, at home on a phone."""

import base64
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.worldmodel.report.samples import (
    make_episodes,
    make_factors,
    make_history,
    make_illustrations,
    make_metrics,
    make_planning,
)
from worldmodel.report.comparison import RunScores, flat_numbers
from worldmodel.report.comparison_page import write_comparison_page
from worldmodel.report.run_page import write_report
from worldmodel.runs.metrics import value_at

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver: apt install chromium chromium-driver"
)

# WCAG 2.2, success criterion 1.4.3: relative luminance and contrast of each text with what is behind it.
CONTRASTS = """
const lum = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return null; };
return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() &&
  [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
  const [a, b] = [lum(rgb(getComputedStyle(e).color).slice(0, 3)), lum(behind(e))];
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + " " + e.textContent.slice(0, 40)]; });
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(
        path,
        title="demo",
        metrics=make_metrics(4) | {"planning": make_planning()},
        config_yaml="seed: 17\n" + "a_long_key: " + "x" * 300,
        history=make_history(),
        illustrations=make_illustrations(queries=1, num_steps=4, size_px=32),
        versions={"torch": "2.13.0"},
        episodes=make_episodes(2),
    )
    return path


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("comparison") / "compare.html"
    runs = [
        RunScores(objective, latent, seed, flat_numbers(make_metrics(4)))
        for objective, latent in (("byol", "none"), ("infonce_with_a_long_name", "gaussian"))
        for seed in (0, 1)
    ]
    write_comparison_page(path, title="grid", runs=runs, histories=[make_history()] * len(runs))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    # In containers Chromium's sandbox and shared memory are often missing; the page is our own.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def visit(browser: Any, path: Path, *, width_px: int = 1280, scheme: str = "light", motion: str = "") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": motion}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    screen = {"width": width_px, "height": 800, "deviceScaleFactor": 1, "mobile": width_px < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(path.as_uri())
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")


def test_no_complaint_and_no_request_beyond_the_file(browser: Any, page: Path) -> None:
    browser.get_log("performance")
    visit(browser, page)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls
    assert [url for url in urls if url != page.as_uri() and not url.startswith("data:")] == []


def test_figures_are_loaded_and_have_words(browser: Any, page: Path) -> None:
    visit(browser, page)
    pictures = browser.execute_script(
        "return [...document.querySelectorAll('img, svg')].map(i => [i.naturalWidth, i.alt || i.ariaLabel || ''])"
    )
    assert len(pictures) > 20
    assert all(width > 0 and len(alt) > 20 for width, alt in pictures)


def test_numbers_are_those_of_the_metrics(browser: Any, page: Path) -> None:
    visit(browser, page)
    shown = browser.execute_script(
        "return [...document.querySelectorAll('[data-metric]')].map(e => [e.dataset.metric, e.textContent])"
    )
    metrics = make_metrics(4) | {"planning": make_planning()}
    assert len(shown) > 100 and any(path.startswith("planning.curve.") for path, _ in shown)
    for path, text in shown:
        plain = text.replace(",", "")
        assert f"{value_at(metrics, path):.{len(plain.partition('.')[2])}f}" == plain, path


@pytest.mark.parametrize("width_px", [360, 1280])
def test_the_page_does_not_scroll_sideways(browser: Any, page: Path, width_px: int) -> None:
    visit(browser, page, width_px=width_px)
    assert browser.execute_script("return document.documentElement.scrollWidth") == width_px


def test_a_name_of_a_row_uses_the_width_of_a_phone(browser: Any, page: Path) -> None:
    visit(browser, page, width_px=360)
    widths = browser.execute_script(
        "return [...document.querySelectorAll('tbody th')].map(e => [e.clientWidth, getComputedStyle(e).maxWidth])"
    )
    assert widths and all(width > 0.6 * 360 and most == "none" for width, most in widths)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, page: Path, scheme: str) -> None:
    visit(browser, page, scheme=scheme)
    contrasts = browser.execute_script(CONTRASTS)
    assert len(contrasts) > 100
    assert [found for found in contrasts if found[0] < 4.5] == []
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(15, 19, 23)" if scheme == "dark" else "rgb(250, 250, 249)")


def test_the_dark_page_and_less_motion_get_pictures_of_their_own(browser: Any, page: Path) -> None:
    script = "const i = document.querySelectorAll('.pair img'); return [i[0].currentSrc, i[1].currentSrc]"
    visit(browser, page)
    moving, light = browser.execute_script(script)
    visit(browser, page, scheme="dark", motion="reduce")
    still, dark = browser.execute_script(script)
    assert light != dark
    moves = [b"ANIM" in base64.b64decode(uri.split(",")[1])[:64] for uri in (moving, still)]
    assert moves == [True, False]


def test_the_comparison_keeps_the_same_promises(browser: Any, comparison: Path) -> None:
    for scheme in ("light", "dark"):
        browser.get_log("browser")
        visit(browser, comparison, scheme=scheme)
        assert browser.get_log("browser") == []
        assert [found for found in browser.execute_script(CONTRASTS) if found[0] < 4.5] == []
    pictures = browser.execute_script("return [...document.images].map(i => [i.naturalWidth, i.alt])")
    assert len(pictures) == 2 + 2 + 2 + 4  # over the horizon, calibration, ranks of each, learning curves
    assert all(width > 0 and len(alt) > 20 for width, alt in pictures)
    cells = browser.execute_script(
        "return [...document.querySelectorAll('#runs ~ .scroll td')].map(e => e.textContent)"
    )
    assert cells[:3] == ["2", "0.659 ± 0.000", "1.549 ± 0.000"]
    for width_px in (360, 1280):
        visit(browser, comparison, width_px=width_px)
        assert browser.execute_script("return document.documentElement.scrollWidth") == width_px


def test_it_is_whole_without_javascript(browser: Any, page: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page.as_uri())
        seen = browser.execute_cdp_cmd("DOMSnapshot.captureSnapshot", {"computedStyles": []})
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    strings, document = seen["strings"], seen["documents"][0]
    assert any("Forecasts reach an Energy Score" in text for text in strings)
    layout, names = document["layout"], document["nodes"]["nodeName"]
    boxes = zip(layout["nodeIndex"], layout["bounds"], strict=True)
    sizes = [bounds[2:] for node, bounds in boxes if strings[names[node]] == "IMG"]
    assert any(width > 100 and height > 100 for width, height in sizes)


EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">' autofocus x=\""


def test_names_of_strangers_are_text(browser: Any, tmp_path: Path) -> None:
    """In every place that a stranger's run folder fills: names of forecasts, probes, video, run, planning, config."""
    metrics = make_metrics(2)
    metrics["forecasts"][EVIL] = metrics["forecasts"]["persistence"]
    metrics["probes"][EVIL] = {EVIL: {"linear": 0.5}}
    metrics["embedding"][EVIL] = EVIL
    metrics["readout"][EVIL] = [EVIL]
    metrics |= {
        "run": EVIL,
        "seed": EVIL,
        EVIL: EVIL,
        "quantity": {"name": EVIL, "unit": EVIL, "dimensions": [EVIL] * 2},
    }
    planning = make_planning()
    planning["factors"] = make_factors(EVIL)
    planning["protocol"] |= {"env": EVIL, EVIL: EVIL, "env_kwargs": {EVIL: EVIL}}
    drawn = make_illustrations(queries=1, num_steps=2, size_px=32)
    assert drawn.timeline is not None and drawn.latents is not None
    write_report(
        tmp_path / "report.html",
        title=EVIL,
        metrics=metrics | {"planning": planning},
        config_yaml=f"run_dir: {EVIL}\n",
        history=make_history(),
        illustrations=dataclasses.replace(
            drawn,
            timeline=dataclasses.replace(drawn.timeline, video=EVIL, unit=EVIL),
            latents=dataclasses.replace(drawn.latents, change_name=EVIL),
        ),
        versions={EVIL: EVIL},
        episodes=make_episodes(1),
    )
    runs = [RunScores(EVIL, EVIL, seed, flat_numbers(metrics)) for seed in (0, 1)]
    write_comparison_page(tmp_path / "compare.html", title=EVIL, runs=runs, histories=[make_history()] * 2)
    for name in ("report.html", "compare.html"):
        visit(browser, tmp_path / name)
        assert browser.execute_script("return document.title").startswith("<script>")
        inside = "return document.querySelectorAll('script, img:not([src^=\"data:\"]), [onerror], [autofocus]').length"
        assert browser.execute_script(inside) == 0
        assert EVIL in browser.execute_script("return document.body.textContent")
