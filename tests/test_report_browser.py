"""The page in a real browser: light and dark, on a telephone, on paper; and its LaTeX in an article.

Skipped where they are not installed. Debian: chromium, poppler-utils, texlive-latex-extra, texlive-science.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import fake_runs
import pytest
from fake_runs import fake_run

from ham_kernels import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
in_latex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX")
pytestmark = pytest.mark.slow
CLASSES = ["airplane", "automobile", "bird", "a class whose name goes on and on_and_on"]
LOOK = """
<script>
function rgba(text) { return text.match(/[0-9.]+/g).map(Number); }
function light(c) {
  const v = c.slice(0, 3).map(x => x / 255).map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
  return .2126 * v[0] + .7152 * v[1] + .0722 * v[2];
}
function behind(node) {
  for (let e = node; e; e = e.parentElement) {
    const c = rgba(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
}
const faint = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const text = walk.currentNode.textContent.trim(), parent = walk.currentNode.parentElement;
  if (!text || ["SCRIPT", "STYLE"].includes(parent.tagName)) continue;
  const [a, b] = [light(rgba(getComputedStyle(parent).color)), light(behind(parent))];
  const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (contrast < 4.5) faint.push(`${contrast.toFixed(2)} ${parent.tagName} ${text.slice(0, 40)}`);
}
const found = {faint, width: document.documentElement.scrollWidth, inner: innerWidth,
  page: getComputedStyle(document.body).backgroundColor};
parent.postMessage(JSON.stringify(found), "*");
</script>
"""
SCREEN = """<body style="margin: 0">
<iframe src="page.html" style="width: {width}px; height: 2000px; border: 0"></iframe>
<script>onmessage = event => {{ document.body.insertAdjacentHTML("beforeend", `<p id="found">${{event.data}}</p>`); }};
</script></body>
"""  # a window has a least width, a frame has none


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A page with all that a page can have, of long names."""
    root = tmp_path_factory.mktemp("page")
    runs = []
    for method, worst in (("pgd_at", 0.1), ("ham", 0.2), ("trades", 0.15)):
        parts = {"masking": fake_runs.masking(method == "ham", "why it is " + "so " * 40)}
        label = f"{method} with a label as long as people write them, and longer"
        accuracy = {"clean": [1.0, 0.9, 0.8, 0.9], "autoattack": [0.6, 0.5, 0.4, worst]}
        runs.append(
            fake_run(root / f"run-of-{method}-{'x' * 60}", method, accuracy=accuracy, classes=CLASSES, parts=parts,
                     settings={"run.label": label})
        )  # fmt: skip
    report.build(runs, root / "out", require=["worst_class>=20", "class bird>=30", "gini<=0.1"], pdf=True)
    return root / "out"


def browse(*flags):
    usual = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000")
    done = subprocess.run([CHROMIUM, *usual, *flags], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@in_browser
@pytest.mark.parametrize("page", ["index.html", "frontier.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 390])
def test_nothing_is_faint_or_wider_than_the_screen(out, tmp_path, page, scheme, width):
    looked_at = tmp_path / "page.html"
    looked_at.write_text((out / page).read_text().replace("</body>", f"{LOOK}</body>"))
    (tmp_path / "screen.html").write_text(SCREEN.format(width=width))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    screen = [*dark, f"--window-size={width},2000", f"file://{tmp_path / 'screen.html'}"]
    told = re.findall(r'<p id="found">(.*?)</p>', browse("--dump-dom", *screen))[-1]  # the first is in the script
    found = json.loads(html.unescape(told))
    assert (found["page"] == "rgb(255, 255, 255)") == (scheme == "light")
    assert found["inner"] == width
    assert found["width"] <= width
    assert found["faint"] == []
    browse(f"--screenshot={tmp_path / 'page.png'}", *screen)
    from PIL import Image

    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (width, 2000)
        corner = picture.convert("RGB").getpixel((1, 1))
        assert (min(corner) > 200) == (scheme == "light")


@in_browser
@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="no poppler-utils")
def test_no_heading_stands_alone_at_the_end_of_a_printed_page(out, tmp_path):
    browse("--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}", f"file://{out / 'index.html'}")
    text = subprocess.run(["pdftotext", tmp_path / "page.pdf", "-"], capture_output=True, text=True, check=True).stdout
    pages = [[line.strip() for line in page.splitlines() if line.strip()] for page in text.split("\f")]
    found = re.findall(r"<h[123]>(.*?)</h[123]>", (out / "index.html").read_text())
    headings = {html.unescape(re.sub(r"<[^>]*>", "", heading)).strip() for heading in found}
    assert len(headings) > 8
    ends = [page[-1] for page in pages if page]
    assert len(ends) > 3
    assert not headings & set(ends)


@in_latex
@pytest.mark.parametrize("width", [None, "5.5in"], ids=["article", "NeurIPS"])
def test_tables_fit_an_article(out, tmp_path, width):
    """Without an overfull box, an unknown command or a warning of siunitx."""
    geometry = rf"\usepackage[textwidth={width}]{{geometry}}" if width else ""
    tables = "\n".join(rf"\input{{{out / name}}}" for name in ("table.tex", "frontier.tex"))
    head = rf"\documentclass{{article}}\usepackage{{booktabs,tabularx,siunitx}}{geometry}"
    (tmp_path / "paper.tex").write_text(f"{head}\\begin{{document}}{tables}\\end{{document}}\n")
    said = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"], cwd=tmp_path, capture_output=True,
        text=True, errors="replace", timeout=120, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout[-2000:]
    assert not re.findall(r"Overfull.*|Package siunitx Warning.*", said.stdout)


def test_pictures_say_what_they_show_and_tables_what_they_head(out):
    page = (out / "index.html").read_text()
    texts = re.findall(r'<img alt="([^"]*)"', page)
    assert len(texts) == 5
    assert all(len(text) > 40 and re.search(r"\d", text) for text in texts)
    assert any("Worst class: " in text for text in texts)
    assert not re.search(r"<th(?![^>]* scope=)[ >]", page)


def test_figures_for_a_paper_hold_letters_not_outlines(out):
    names = sorted(path.name for path in (out / "figures").iterdir())
    assert [name for name in names if name.endswith(".pdf")] == [
        name.replace(".png", ".pdf") for name in names if name.endswith(".png")
    ]
    found = (out / "figures" / "class_accuracy.pdf").read_bytes()
    assert found.startswith(b"%PDF")
    assert b"/Type3" not in found
    assert b"/CreationDate" not in found
