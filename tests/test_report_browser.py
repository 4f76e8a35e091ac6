"""The page in a real browser: nothing in the console, no request, usable on a narrow screen, by
keyboard and in the dark."""

import pytest
from browser import Browser, find_browser
from synthetic_campaign import synthetic_campaign, table

from magus_anharmonic.report import write_report

FOUND = find_browser()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        FOUND is None,
        reason="no Chromium here (apt-get install chromium, or set BROWSER_FOR_TESTS to one)",
    ),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from matplotlib.figure import Figure

    folder = synthetic_campaign(tmp_path_factory.mktemp("report") / "h3s", 110, pressures=(50, 100))
    figures = folder / "campaign" / "figures"
    figures.mkdir()
    for name in ("parity", "dispersion-Im-3m-60GPa"):
        figure = Figure()
        figure.add_subplot().plot([1, 2])
        figure.savefig(figures / f"{name}.svg")
        table(figures / f"{name}.csv", "distance frequency_cm1", [(0, -50), (1, 1200)])
    return write_report(folder)


@pytest.fixture(scope="module")
def browser():
    with Browser(str(FOUND)) as one:
        yield one


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True), (320, False)])
def test_the_page_is_quiet_asks_for_nothing_and_fits_the_screen(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, (
        "the page scrolls sideways"
    )
    wide = (
        "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right >"
        " innerWidth + 1"
    )
    assert (
        browser.evaluate(
            f"{wide} && !e.closest('.scroll, .gallery, .paper, pre')).map(e => e.outerHTML.slice(0,"
            " 80))"
        )
        == []
    )


def test_every_picture_is_drawn_and_has_a_text(browser, page):
    browser.open(page)
    found = browser.evaluate(
        "[...document.images].map(image => [image.naturalWidth > 100, image.alt.length > 20])"
    )
    assert len(found) >= 3 and found == [[True, True]] * len(found)


def test_a_heading_sorts_by_number_both_ways_and_blank_cells_come_last(browser, page):
    browser.open(page)
    column = (
        "[...document.querySelector('table.ranking').tBodies[0].rows].map(row =>"
        " row.cells[6].dataset.v)"
    )
    click = (
        "document.querySelector('table.ranking thead').rows[0].cells[6].firstElementChild.click()"
    )
    for sign, word in ((1, "ascending"), (-1, "descending")):
        browser.evaluate(click)
        cells = browser.evaluate(column)
        values = [float(cell) for cell in cells if cell]
        assert len(values) > 100 and values == sorted(values, key=lambda value: sign * value)
        assert all(cell == "" for cell in cells[len(values) :]) and cells[-1] == ""
        assert (
            browser.evaluate("document.querySelector('table.ranking th:nth-child(7)').ariaSort")
            == word
        )


def pixels(browser):
    """The picture that the viewer shows."""
    browser.evaluate(
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
    )
    return browser.evaluate("document.querySelector('#canvas canvas').toDataURL()")


def test_the_viewer_shows_what_is_chosen_and_turns_by_keyboard_and_by_buttons(browser, page):
    browser.open(page)
    assert browser.evaluate("document.querySelectorAll('#canvas canvas').length") == 1
    first = pixels(browser)
    colors = """(async () => { const image = new Image(); image.src = document.querySelector('#canvas canvas').toDataURL();
        await image.decode(); const c = document.createElement('canvas'); c.width = image.width; c.height = image.height;
        const x = c.getContext('2d'); x.drawImage(image, 0, 0); const d = x.getImageData(0, 0, c.width, c.height).data;
        let n = 0;
        for (let i = 0; i < d.length; i += 4) n += d[i] > 150 && d[i + 1] > 150 && d[i + 2] < 90 && d[i + 3] > 0; return n; })()"""
    assert browser.evaluate(colors) > 500, "sulfur is yellow"
    key = (
        "document.getElementById('canvas').dispatchEvent(new KeyboardEvent('keydown', {key: '%s',"
        " bubbles: true}))"
    )
    browser.evaluate(key % "ArrowLeft")
    turned = pixels(browser)
    assert turned != first
    browser.evaluate(key % "Home")
    assert pixels(browser) == first
    browser.evaluate("document.querySelector('[data-zoom]').click()")
    assert pixels(browser) != first
    label = browser.evaluate("document.getElementById('canvas').ariaLabel")
    browser.evaluate(
        "document.querySelector('table.ranking tbody tr:nth-child(3) [data-show]').click()"
    )
    assert browser.evaluate("document.getElementById('canvas').ariaLabel") != label
    assert browser.complaints() == []


def test_without_webgl_the_still_picture_stands_in(browser, page):
    text = page.read_text(encoding="utf-8")
    cut = page.with_name("without.html")
    # the policy would refuse the changed script: it goes too
    cut.write_text(
        text.replace("http-equiv", "data-was").replace("if (!webgl())", "if (true)"),
        encoding="utf-8",
    )
    browser.open(cut)
    assert browser.evaluate("document.querySelectorAll('#canvas svg circle').length") > 5
    assert browser.evaluate("document.querySelector('.controls').hidden") is True
    assert browser.complaints() == []


def test_a_script_that_is_not_ours_does_not_run(browser, page):
    changed = page.with_name("changed.html")
    changed.write_text(
        page.read_text(encoding="utf-8").replace(
            "<main>", "<main><script>window.broken = 1</script>"
        ),
        encoding="utf-8",
    )
    browser.open(changed)
    assert browser.evaluate("typeof window.broken") == "undefined"
    assert any("Content Security Policy" in one for one in browser.complaints())


def test_text_can_be_read_in_the_light_and_in_the_dark(browser, page):
    """Contrast of text to its background of at least 4.5 (WCAG 2.1, AA)."""
    ratio = """(() => {
        const parse = (c) => c.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = (e) => { for (let at = e; at; at = at.parentElement) { const c = parse(getComputedStyle(at).backgroundColor);
            if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
        const low = [];
        for (const e of document.querySelectorAll('p, li, td, th button, h1, h2, h3, a, code, dt, dd, figcaption span, caption, .reason, .count, .state')) {
            if (!e.textContent.trim() || e.closest('.skip')) continue;
            const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
            if ((a + 0.05) / (b + 0.05) < 4.5) low.push(e.outerHTML.slice(0, 60) + ((a + 0.05) / (b + 0.05)).toFixed(2));
        }
        return low; })()"""  # noqa: E501
    for dark in (False, True):
        browser.open(page, dark=dark)
        assert browser.evaluate(ratio) == []
