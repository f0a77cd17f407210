"""evaluation/page.py in a real browser: what a person sees, clicks and types. Needs Chromium and its driver.

PAGE_SCREENSHOTS=DIR pytest tests/test_page.py also leaves pictures of the page in DIR.
"""
import html.parser
import math
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from evaluation import page

ODD = ['</script><script>document.title="owned"</script>', "<img src=x onerror=alert(1)>",
       '"><b onclick="alert(1)">', "'&amp;'", "<!--", "\r\n", "\t", "\x00", "\u202e", "\u2028",
       "\ufffd", "\ud800"]

def feature(latent, word):
    """A latent with a peak of 8 on the word, half of it before, a tenth on the odd texts."""
    tokens = ["import", " os", "\n", "a" * 90, *ODD, " half", f" {word}", " and", " on"]
    values = [0.0] * 4 + [0.8] * len(ODD) + [4.0, 8.0, 0.0, float("nan")]
    context = {"tokens": tokens, "values": values, "at": len(ODD) + 5}
    return {"latent": latent, "rate": latent / 1e4, "peak": 8.0, "raises": [f" {word}s", *ODD],
            "lowers": [" not"], "contexts": [context] * 3}

def row(run, variant, l0, fvu, words=(), dead=15):
    count = [0, 2, 10, 40, 80, 50, 9, 1]
    return {"run": run, "variant": variant, "l0": l0, "fvu": fvu,
            "density": {"edges": [-4 + i / 2 for i in range(9)], "count": count, "dead": dead},
            "features": [feature(10 + i, word) for i, word in enumerate(words)]}

ROWS = [row("runs/topk-32", "topk", 32.0, 0.0769, ("apple", "pear", "plum"), dead=1015),
        row("runs/vanilla-long-name-of-a-run-" + ODD[1], "vanilla", 9.5, 0.1813, ("fig", "Pear")),
        row("runs/topk-16", "topk", 16.0, 0.0876, ("apple", "quince", "date", "lime"))]
ROWS[2]["features"][2]["detects"] = [("role", "argument", 0.82, 0.4), ("letter", ODD[1], 0.5, 0.25)]
TOY = [row("runs/gba-toy", "gba", 5.0, 0.5), row("runs/never-fires", "other", 0.0, math.nan),
       {"run": "runs/unknown", "variant": "other", "l0": None, "fvu": None, "density": None}]
DEAD, LOST = ("0.33 %", "–", "12.1 %"), ("31.9 ± 2.1", "4.0 ± 0.3", "110.0 ± 9.0")
MAIN = [(r["run"], r["variant"], f'{r["l0"]:.2f}', f'{r["fvu"]:.4f}', *cells)
        for r, *cells in zip(ROWS, DEAD, LOST, ODD)]
GROUPS = [{"data": "smollm2 layer 6, 49,088 held-out tokens", "rows": ROWS, "tables": [
              ("Reconstruction", "On all of the tokens.",
               ["run", "variant", "l0", "fvu", "dead", "CE lost", "mark"], MAIN),
              ("Counts", "", ["run", "latents"], [("a", "4,608"), ("b", "512"), ("c", "12,288")])]},
          {"data": "toy flat", "rows": TOY, "tables": [
              ("Recovery", "", ["run", "MCC"], [("a", "0.853"), ("b", None), ("c", math.nan)])]}]

# --- the markup alone -----------------------------------------------------------------------------

class Tags(html.parser.HTMLParser):
    """Every tag with its attributes; fails on one that is not closed in order."""
    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert not self.open
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] * (tag not in ("meta", "link", "input"))
    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

def test_tags_are_balanced_and_lead_nowhere():
    text = page.render(GROUPS)
    tags = Tags(text).tags
    assert not re.search("https?://|url\\(|@import|fetch|XMLHttp", text)
    assert {a["href"] for _, a in tags if "href" in a} == {"data:,", "#data0", "#data1"}
    assert not [a for _, a in tags if "src" in a or any(name.startswith("on") for name in a)]
    assert [tag for tag, _ in tags].count("script") == 1
    assert "default-src 'none'" in text and "script-src 'sha256-" in text
    Tags(page.render([])), Tags(page.frontier_svg([])), Tags(page.density_svg([]))

def test_odd_texts_show_as_signs():
    shown = {"\n": "↵", "\r\n": "‹0D›↵", "\t": "⇥", "\x00": "‹00›", "\u202e": "‹202E›",
             "\ud800": "‹D800›", "\u2028": "‹2028›", "\ufffd": "\ufffd", "é 漢": "é 漢",
             "<b>": "&lt;b&gt;", "\"'": "&quot;&#x27;"}
    assert {text: page.visible(text) for text in shown} == shown
    page.render(GROUPS).encode()                             # half a surrogate pair would fail here

# --- the browser ----------------------------------------------------------------------------------

class Browser(webdriver.Chrome):
    def all(self, selector):
        return self.find_elements(By.CSS_SELECTOR, selector)
    def shown(self, selector, what="e"):                     # in one question: a thousand take seconds
        """Without content-visibility, which may leave out text until the frame after it was put there."""
        return self.execute_script(
            "document.querySelectorAll('details').forEach(e => e.style.contentVisibility = 'visible');"
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length && e.checkVisibility("
            f"{{opacityProperty: true, visibilityProperty: true}})).map(e => {what})", selector)
    def texts(self, selector):
        return self.shown(selector, "(e.innerText ?? e.textContent).trim()")
    def active(self):
        return self.switch_to.active_element
    def type(self, *keys):
        self.active().send_keys(*keys)
    def screen(self, width, height, mobile=False, dark=False):
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    def picture(self, name):
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            self.screenshot(Path(folder) / f"{name}.png")
    def screenshot(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert self.save_screenshot(str(path))

@pytest.fixture(scope="module")
def started():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.fail("no browser: apt-get install chromium chromium-driver", pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--force-color-profile=srgb"):
        options.add_argument(flag)
    browser = Browser(options, webdriver.ChromeService(driver))       # named: nothing is downloaded
    yield browser
    browser.quit()

@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page.render(GROUPS), encoding="utf-8")
    return path.as_uri()

@pytest.fixture
def browser(started, url):
    """The page just opened, on a desktop; afterwards: no message on the console."""
    started.screen(1280, 900)
    started.get(url)
    yield started
    assert started.get_log("browser") == []

def test_opens_and_shows_everything(browser):
    assert browser.title == "Six SAEs, evaluated"
    assert browser.texts("h2") == [group["data"] for group in GROUPS]
    assert browser.texts("h3") == ["Reconstruction", "Counts", "Latents", "Recovery"]
    cells = browser.texts("#data0 table:first-of-type td")
    assert {"31.9 ± 2.1", "0.0769", "0.33 %", "4,608"} <= set(cells)
    assert browser.texts("#data1 td") == ["0.853", "–", "–"]
    assert len(browser.shown("svg")) == 4
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    browser.screen(1280, 2100)
    browser.shown("summary")[1].click()
    browser.picture("desktop")

def test_odd_texts_never_run(browser):
    for summary in browser.shown("summary"):
        summary.click()
    assert browser.title == "Six SAEs, evaluated" and not browser.all("img, b")
    assert ODD[0] in browser.shown("li code")[0].text
    # Even a script that got into the page would be refused, and the browser says so.
    browser.execute_script("const s = document.createElement('script');"
                           "s.text = 'document.title = `owned`'; document.body.append(s)")
    assert browser.title == "Six SAEs, evaluated"
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]

@pytest.mark.parametrize("table, column, ascending", [
    (0, 2, ["9.50", "16.00", "32.00"]), (0, 4, ["0.33 %", "12.1 %", "–"]),
    (0, 5, ["4.0 ± 0.3", "31.9 ± 2.1", "110.0 ± 9.0"]), (0, 1, ["topk", "topk", "vanilla"]),
    (1, 1, ["512", "4,608", "12,288"])])
def test_a_click_on_a_header_sorts(browser, table, column, ascending):
    table = browser.all("table")[table]
    heads = table.find_elements(By.CSS_SELECTOR, "thead th")
    cells = lambda: [r.find_elements(By.CSS_SELECTOR, "th, td")[column].text
                     for r in table.find_elements(By.CSS_SELECTOR, "tbody tr")]
    missing = [c for c in ascending if c == "–"]
    known = ascending[:len(ascending) - len(missing)]
    for words, state in ((ascending, "ascending"), (known[::-1] + missing, "descending")):
        heads[column].find_element(By.TAG_NAME, "button").click()
        assert cells() == words
        assert [h.get_attribute("aria-sort") for h in heads] == [
            state if i == column else "none" for i in range(len(heads))]

def test_chooses_runs_and_filters(browser):
    latents = lambda: [t.split("\n")[0].split(" fires")[0] for t in browser.texts("summary")]
    assert latents() == ["latent 10", "latent 11", "latent 12"]
    runs, box = Select(browser.all("select")[0]), browser.all("input")[0]
    assert [o.text for o in runs.options] == [r["run"] for r in ROWS]
    runs.select_by_index(2)
    assert latents() == [f"latent {n}" for n in (10, 11, 12, 13)]
    for query, found in (("12", ["latent 12"]), ("QUINCE", ["latent 11"]), ("limes", ["latent 13"]),
                         ("role=arg", ["latent 12"]), ("onclick=", latents()), ("no such thing", [])):
        box.clear()
        box.send_keys(query)
        assert latents() == found, query
        assert browser.texts("output") == [f"{len(found)} of 4 latents"]
    box.clear()
    box.send_keys("pear")
    runs.select_by_index(1)                                   # the filter holds for the next run
    assert latents() == ["latent 11"]

def test_what_a_latent_detects(browser):
    Select(browser.all("select")[0]).select_by_index(2)
    summary = browser.shown("summary")[2]
    assert "role=argument" in summary.text and "role=" not in browser.shown("summary")[1].text
    summary.click()
    assert f"detects\nrole=argument (precision 0.82, recall 0.40), letter={ODD[1]} (precision 0.50, recall 0.25)" in (
        browser.shown("dl")[0].text)

def test_contexts_show_activations(browser):
    assert not browser.shown("ol li")
    browser.shown("summary")[1].click()
    contexts = browser.shown("ol li")
    assert len(contexts) == 3 and contexts[0].text.startswith("8\n")
    marks = contexts[0].find_elements(By.TAG_NAME, "mark")
    colour = {m.get_attribute("textContent"): m.value_of_css_property("background-color")
              for m in marks}                                 # rgba(red, green, blue, alpha)
    assert colour["⇥"].endswith(", 0.1)") and colour[" half"].endswith(", 0.5)")
    assert colour[" pear"].endswith(", 1)") and "import" not in colour
    assert len(marks) == len(ODD) + 2 and marks[-1].get_attribute("title") == "8"
    assert marks[-1].text.strip() == "pear" and "peak" in marks[-1].get_attribute("class")
    assert int(marks[-1].value_of_css_property("font-weight")) >= 700
    assert {"raises", "lowers"} <= set(browser.texts("dt")) and " pears" in [
        c.get_attribute("textContent") for c in browser.shown("dd code")]

def test_keyboard_alone(browser):
    summary = lambda: browser.active().text.split(" fires")[0]
    opened = lambda: [t.split(" fires")[0] for t in browser.texts("details[open] summary")]
    browser.type("/")
    assert browser.active().tag_name == "input"
    browser.type("apple/j")                                   # letters here are text, not commands
    assert browser.active().get_attribute("value") == "apple/j" and not browser.shown("summary")
    browser.type(Keys.BACKSPACE * 7, Keys.ESCAPE)
    assert browser.active().tag_name == "body"
    for key, name in (("j", "10"), ("j", "11"), ("j", "12"), ("j", "12"), ("k", "11")):
        browser.type(key)
        assert summary() == f"latent {name}" and opened() == [f"latent {name}"]
    browser.type("/")
    browser.type("plum", Keys.ESCAPE)
    browser.type("j")
    assert summary() == "latent 12" and browser.texts("output") == ["1 of 3 latents"]
    browser.type("/")
    browser.type(Keys.BACKSPACE * 4, Keys.TAB)                # Tab goes on to the latents, too
    assert summary() == "latent 10"
    browser.type(Keys.ENTER)
    assert "latent 10" in opened()
    browser.execute_script("arguments[0].focus()", browser.all("thead button")[2])
    browser.type(Keys.ENTER)
    assert browser.texts("tbody tr:first-child td:nth-child(3)")[0] == "9.50"

OUTSIDE = """
const wide = arguments[0];
return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility()
  && !e.closest(".scroll *") && e.getBoundingClientRect().right > wide + .5).map(e => e.tagName)"""
CROSSING = """
const found = [];
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")];
  const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
  boxes.forEach(([name, a], i) => {
    if (a.left < frame.left || a.right > frame.right || a.bottom > frame.bottom) found.push(name);
    for (const [other, b] of boxes.slice(i + 1))
      if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
        found.push([name, other]);
  });
}
return found"""

def looks_right(browser, mobile):
    """Of a page that is open: nothing was fetched, no texts of figures cross, and on a phone nothing is too wide."""
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script(CROSSING) == []
    if mobile:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        assert browser.execute_script(OUTSIDE, 390) == []

def test_fits_a_phone(browser):
    browser.screen(390, 844, mobile=True)
    for summary in browser.shown("summary")[:2]:
        summary.click()
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= 390 and browser.execute_script(OUTSIDE, 390) == []
    assert browser.execute_script("const box = document.querySelector('.scroll'); "
                                  "return box.scrollWidth > box.clientWidth")
    sizes = browser.execute_script("return [...document.querySelectorAll('svg text')].map("
                                   "t => t.getBoundingClientRect().height)")
    assert min(sizes) > 10 and browser.execute_script(CROSSING) == []
    browser.picture("phone")
    browser.screen(390, 5200, mobile=True)
    browser.picture("phone-all")

def test_plots_of_any_range_have_readable_labels(browser, tmp_path):
    spans = [(32,), (1,), (31, 34), (31.9, 32.0), (11, 90), (1, 1000), (1.5, 550), (0.2, 4000)]
    rows = [[row("r" * 40 + str(i), f"variant {i}", l0, 0.001 * l0, dead=9999)
             for i, l0 in enumerate(span)] for span in spans]
    rows.append([row(f"run {i}", f"v{i % 9}", i, 1.0) for i in range(1, 25)])
    path = tmp_path / "plots.html"
    plots = "".join(page.frontier_svg(r) + page.density_svg(r) for r in rows)
    path.write_text('<!DOCTYPE html><meta charset="utf-8"><style>svg { width: 400px; font: 13px '
                    f"system-ui }}</style>{plots}", encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.execute_script(CROSSING) == []
    counts = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(svg => ['middle', 'end'].map("
        "anchor => svg.querySelectorAll(`[text-anchor=${anchor}]`).length))")
    assert len(counts) == 2 * len(rows)
    assert all(3 <= x <= 9 and 4 <= y <= 11 for x, y in counts), counts

def luminance(colour):
    parts = [float(v) / 255 for v in re.findall(r"[\d.]+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)

@pytest.mark.parametrize("dark", (False, True))
def test_contrast(browser, dark):
    browser.screen(1280, 2100, dark=dark)
    browser.shown("summary")[0].click()
    css = lambda selector, name: browser.shown(selector)[0].value_of_css_property(name)
    ground = css("body", "background-color")
    assert (luminance(ground) < 0.1) == dark
    for selector in ("body", "td", ".note", "a", "figcaption", "summary span + span", "ol span"):
        assert contrast(css(selector, "color"), ground) >= 4.5, selector
    for selector in ("thead th", "input", "select", "dd code", "mark.peak"):
        assert contrast(css(selector, "color"), css(selector, "background-color")) >= 4.5, selector
    colours = browser.execute_script("return [...document.querySelectorAll('svg .run')].map("
                                     "e => getComputedStyle(e).color)")
    assert len(colours) == 8 and min(contrast(c, ground) for c in colours) >= 3
    for name in page.DARK if dark else page.COLOURS:
        assert contrast(str([int(name[i:i + 2], 16) for i in (1, 3, 5)]), ground) >= 3, name
    browser.picture("dark" if dark else "light")

def test_reads_without_javascript(browser, url):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(url)
        assert browser.texts("h4") == [r["run"] for r in ROWS]
        assert len(browser.shown("summary")) == 9
        assert not browser.shown("select, input, .controls")
        assert len(browser.shown("tbody tr")) == 9 and len(browser.shown("svg")) == 4
        browser.shown("summary")[8].click()                    # native: opens without a script
        assert len(browser.shown("ol li")) == 3
        browser.picture("no-javascript")
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})

def test_marks_lie_as_the_values(browser):
    marks = browser.all("#data0 .mark")
    names = [m.find_element(By.TAG_NAME, "title").get_attribute("textContent") for m in marks]
    places = [re.findall(r"[\d.]+", m.get_attribute("transform")) for m in marks]
    spots = {n.split(": L0")[0]: (float(x), float(y)) for n, (x, y) in zip(names, places)}
    assert len(marks) == len(spots) == len(ROWS)
    assert "runs/topk-32: L0 32, FVU 0.0769" in names
    by_l0 = sorted(ROWS, key=lambda r: r["l0"])
    assert [spots[r["run"]][0] for r in by_l0] == sorted(x for x, _ in spots.values())
    by_fvu = sorted(ROWS, key=lambda r: -r["fvu"])             # y counts downwards
    assert [spots[r["run"]][1] for r in by_fvu] == sorted(y for _, y in spots.values())
    low, mid, high = (spots[r["run"]][0] for r in by_l0)       # the axis is logarithmic
    assert (high - mid) / (mid - low) == pytest.approx(math.log(2) / math.log(16 / 9.5), abs=0.02)
    assert len(browser.all("#data0 polyline")) == 2 and len(browser.all("#data1 .mark")) == 1
    assert "runs/topk-32, 1,015 dead" in browser.texts("#data0 .run text")
    assert len(browser.all("#data0 .line")) == 3

def test_a_large_page_opens_quickly(browser, tmp_path):
    """24 runs of 100 latents: under 10 s here, usually under 2."""
    word = feature(1, "word")["contexts"][0]
    latents = [{**feature(n, "word"), "contexts": [word] * 10} for n in range(100)]
    rows = [{**ROWS[0], "run": f"run {i}", "features": latents} for i in range(24)]
    path = tmp_path / "large.html"
    path.write_text(page.render([{"data": "large", "tables": [], "rows": rows}]), encoding="utf-8")
    began = time.perf_counter()
    browser.get(path.as_uri())
    assert len(browser.all("details")) == 2400 and time.perf_counter() - began < 10
