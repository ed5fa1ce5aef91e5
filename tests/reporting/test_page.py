"""The page in a real browser: no errors, nothing fetched, tables and plots there, nothing wider than a phone."""

import re
import shutil

import pytest

from spmconvert.reporting.html import render
from spmconvert.reporting.plots import plots, timing_plot
from spmconvert.reporting.schema import FinetuneRecord, Latency, TimingRow, TrainingPoint

# one worker makes the report that two files read
pytestmark = pytest.mark.xdist_group("report")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
WIDTHS = {"desktop": 1200, "phone": 360}


def with_training(report):
    history = tuple(TrainingPoint(step=50 * i, tokens=100 * i, held_out_loss=2.0 / (i + 1)) for i in range(4))
    run = FinetuneRecord(
        steps=150,
        tokens=300,
        objective="logits",
        start_loss=2.0,
        best_loss=0.5,
        data_sha256="0" * 64,
        seed=0,
        stopped="",
        history=history,
    )
    return report.model_copy(update={"training": (run,)})


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, started once."""
    executable = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed; install one to test the page in a browser")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Open a page of reports and collect everything it complains about or asks for."""
    contexts = []

    def call(reports, width=1200, scheme="light"):
        file = tmp_path / "report.html"
        file.write_text(render(reports), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.complaints.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        return page

    yield call
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_the_page_is_whole_at_every_width(opened, quick_report, width):
    page = opened([with_training(quick_report)], width=width)
    assert [one for one in page.complaints if not one.startswith("data:")] == []
    assert page.locator("figure svg").count() == 4
    for index in range(4):
        box = page.locator("figure svg").nth(index).bounding_box()
        assert box["width"] > 200
        assert box["height"] > 100
    # nothing but the scrolling regions is wider than the window
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("dl.figures > div").count() == 4
    assert page.locator("h1").count() == 1


def test_every_plot_has_a_table_of_its_numbers(opened, quick_report):
    page = opened([with_training(quick_report)])
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    for section in page.locator("section:has(figure)").all():
        assert section.locator("table tbody tr").count() > 0
    assert page.locator("figure svg:not([aria-hidden=true])").count() == 0
    for table in page.locator("table").all():
        assert table.locator("thead th[scope=col]").count() > 1
        assert table.locator("tbody th[scope=row]").count() == table.locator("tbody tr").count()
    shown = page.inner_text("main")
    for row in quick_report.timing:
        assert f"{row.ratio:.2f}×" in shown
    for layer in quick_report.layers:
        assert layer.name in shown
        assert f"{layer.error:.4f}" in shown


def test_text_is_readable_in_light_and_dark(opened, quick_report):
    contrasts = {}
    for scheme in ("light", "dark"):
        page = opened([quick_report], scheme=scheme)
        colours = page.evaluate(
            """() => {
                const rgb = value => value.match(/[\\d.]+/g).slice(0, 3).map(Number)
                const label = document.querySelector('figure svg text')
                const soft = document.querySelector('.detail')
                const page = getComputedStyle(document.body)
                const texts = [page.color, getComputedStyle(label).fill, getComputedStyle(soft).color]
                return [page.backgroundColor, ...texts].map(rgb)
            }"""
        )
        contrasts[scheme] = [contrast(colours[0], colour) for colour in colours[1:]]
    assert min(contrasts["light"]) > 4.5
    assert min(contrasts["dark"]) > 4.5
    assert contrasts["light"] != contrasts["dark"]


def contrast(one, other):
    """Ratio of relative luminances, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [value / 255 for value in colour]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_several_reports_stand_side_by_side(opened, quick_report):
    other = quick_report.model_copy(update={"model": quick_report.model.model_copy(update={"name": "another"})})
    page = opened([quick_report, other])
    assert page.locator("h1").inner_text() == "gpt2, another"
    columns = page.locator("table").first.locator("thead th").all_inner_texts()
    assert columns[1:] == ["gpt2", "another"]
    assert page.locator("article").count() == 2
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))


def test_the_page_needs_nothing_from_elsewhere(quick_report):
    page = render([with_training(quick_report)])
    assert page.startswith("<!DOCTYPE html>")
    assert '<html lang="en">' in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert "<script" not in page
    outside = [url for url in re.findall(r'(?:src|href|url\()\s*=?\s*["\']?([^"\')\s>]+)', page) if url[0] != "#"]
    assert outside == ["data:,"]
    # the only addresses left are names of XML languages
    assert set(re.findall(r"https?://[^\"' <]+", page)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_what_a_model_or_a_file_is_called_is_not_markup(quick_report):
    name = "<img src=x onerror=alert(1)>"
    model = quick_report.model.model_copy(update={"name": name})
    quality = tuple(text.model_copy(update={"text": name}) for text in quick_report.quality)
    layers = tuple(layer.model_copy(update={"name": f"h.0.{name}"}) for layer in quick_report.layers)
    page = render([quick_report.model_copy(update={"model": model, "quality": quality, "layers": layers})])
    assert "<img" not in page
    assert "&lt;img" in page


def test_plots_take_their_colours_from_the_page(quick_report):
    drawn = plots(with_training(quick_report), "m0")
    assert list(drawn) == ["layers", "timing", "training", "pareto"]
    for svg in drawn.values():
        assert "var(--text)" in svg
        # the stand-ins of every colour are gone
        assert "#0101" not in svg
        assert "<image" not in svg
    assert plots(quick_report, "m0").keys() == {"layers", "timing", "pareto"}


def test_missing_parts_are_said_on_the_page(quick_report):
    empty = quick_report.model_copy(update={"quality": (), "timing": (), "candidates": (), "generations": ()})
    page = render([empty])
    assert page.count("Not measured; the reason is under") == 2
    assert "--baselines" in page


@pytest.mark.parametrize(("fast", "slow"), [(18.0, 600.0), (12.0, 13.0), (0.02, 0.03), (0.5, 2000.0)])
def test_numbers_beside_latencies_are_plain(fast, slow):
    rows = [
        TimingRow(what="forward", tokens=tokens, shape="", dense=latency, converted=latency)
        for tokens, latency in ((1, steady(fast)), (1024, steady(slow)))
    ]
    assert not any("$" in text.get_text() for text in labels(timing_plot(rows)))


def steady(milliseconds):
    return Latency(p20=milliseconds, p50=milliseconds, p80=milliseconds, samples=3)


def labels(figure):
    figure.canvas.draw()
    return [text for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis) for text in axis.get_ticklabels(which="both")]
