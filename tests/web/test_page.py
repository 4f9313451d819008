"""The page as its users find it: real Chromium, the real server, and axe-core's rules of accessibility."""

import csv
import io
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect, sync_playwright

from app.engines.base import Output
from app.main import create_app
from app.model import store
from app.model.architecture import IMAGENET_MEAN, IMAGENET_STD
from app.model.manifest import Metric, Preprocessing
from app.security import new_key
from app.settings import Settings
from tests.conftest import NAME, Quick, encode, make_manifest, make_rule, running
from training.drawn import draw_lesion

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
AXE = (files("axe_playwright_python") / "axe.min.js").read_text()
NOTICE = "Research use only. Not a medical device."
# What is shown of an image lives at an address that must end with it
COUNT_ADDRESSES = """window.addresses = new Set();
const [make, end] = [URL.createObjectURL, URL.revokeObjectURL];
URL.createObjectURL = (blob) => { const url = make.call(URL, blob); addresses.add(url); return url; };
URL.revokeObjectURL = (url) => { addresses.delete(url); end.call(URL, url); };"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


def picture(name: str = "lesion.png", *, kind: int = 1, size: tuple[int, int] = (320, 240)) -> FilePayload:
    image = encode(draw_lesion(kind, 3, size=size))
    return {"name": name, "mimeType": "image/png", "buffer": image}


def text_file(name: str = "notes.pdf") -> FilePayload:
    return {"name": name, "mimeType": "application/pdf", "buffer": b"%PDF-1.7 no image"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reported_store(tmp_path_factory: pytest.TempPathFactory, random_weights: bytes) -> Path:
    """As `careful_store`, with figures and a report."""
    root = tmp_path_factory.mktemp("reported_store")
    manifest = make_manifest(
        preprocessing=Preprocessing(size=64, resize="squash-bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD),
        abstention={"0.90": make_rule(0.2, 0.3), "0.95": make_rule(1, 1)},
        metrics={"roc_auc": Metric(value=0.91, low=0.88, high=0.94)},
        external_metrics={"clinics": {"roc_auc": Metric(value=0.72, low=0.61, high=0.8)}},
    )
    report = {
        "report/roc.png": encode(Image.new("RGB", (300, 200), "white")),
        "report/report.html": b'<!doctype html><html lang="en"><style>p{color:#111}</style><p>whole</p>'
        b'<img src="roc.png" alt="ROC">',
    }
    store.publish(root, manifest, {store.WEIGHTS: random_weights} | report)
    store.promote(root, NAME, "1")
    return root


@pytest.fixture(scope="module")
def url(reported_store: Path) -> Iterator[str]:
    settings = Settings(model_store=reported_store, max_upload_bytes=400_000, precision="float32", reload_ms=0)
    with running(create_app(settings)) as port:
        yield f"http://127.0.0.1:{port}/"


Visit = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Opens the page; whatever its policy blocks, an error of a script or a request elsewhere fails the test."""
    contexts, wrong = [], []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(15_000)
        context.add_init_script(COUNT_ADDRESSES)
        contexts.append(context)
        context.on("request", lambda request: wrong.append(request.url) if not is_ours(request.url, url) else None)
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        context.on("console", lambda message: wrong.append(message.text) if is_wrong(message) else None)
        page = context.new_page()
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def is_ours(requested: str, url: str) -> bool:
    return requested.startswith((url.partition("#")[0], "blob:", "data:"))


def is_wrong(message: Any) -> bool:
    # Chromium tells every answer that is a problem; the page shows them, and that is what is tested
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


def give(page: Page, *given: FilePayload) -> None:
    page.set_input_files("#choose", list(given))


def answered(page: Page) -> None:
    expect(page.locator(".verdict .headline")).to_be_visible()
    expect(page.locator("#progress")).to_be_hidden()


def seen(page: Page) -> None:
    """The evidence is on the screen."""
    expect(page.locator("#evidence-image")).not_to_have_js_property("naturalWidth", 0)


def violations(page: Page) -> list[str]:
    """What axe-core objects to: rule and elements."""
    page.evaluate(AXE)
    found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    return [f"{v['id']}: {[node['html'] for node in v['nodes']]}" for v in found]


def test_one_image_is_judged_with_its_reasons_and_evidence(visit: Visit, url: str) -> None:
    page = visit(url)
    image = picture(size=(180, 180))
    give(page, image)
    answered(page)
    seen(page)
    answer = httpx2.post(f"{url}predict", content=image["buffer"]).json()
    chance = answer["probabilities"]["malignant"]
    verdict = page.locator("#verdict")
    expect(verdict.locator("h3")).to_have_text("Refer to a person")
    expect(verdict.locator(".reasons")).to_contain_text(answer["decision"]["reasons"][0][1:])
    expect(verdict.locator(".warnings")).to_contain_text("ow resolution")
    expect(verdict.locator(".number")).to_contain_text(f"{chance:.1%}")
    expect(verdict.get_by_role("img")).to_have_accessible_name(
        f"Probability of malignant {chance:.1%}; threshold 40.0%; between 0.0% and 100.0% the model abstains."
    )
    for said in ("lesion.png", "180 × 180, PNG", "asff-resnet50, version 1", "balanced", NOTICE):
        expect(verdict).to_contain_text(said)
    expect(page.locator("#live")).to_contain_text("lesion.png: Refer to a person")
    expect(page.locator("header .notice")).to_be_in_viewport()
    expect(page.locator("#many")).to_be_hidden()


def test_the_rule_is_the_readers_choice(visit: Visit, url: str) -> None:
    page = visit(url)
    expect(page.locator("#operating-point option")).to_have_text(["balanced", "sensitivity-95", "specificity-95"])
    give(page, picture())
    answered(page)
    page.select_option("#coverage", "off")
    page.select_option("#operating-point", "specificity-95")
    expect(page.locator("#verdict h3")).to_have_text("Benign")
    expect(page.locator("#verdict .headline")).to_contain_text("below the threshold of the operating point")
    page.select_option("#operating-point", "sensitivity-95")
    expect(page.locator("#verdict h3")).to_have_text("Malignant")


def test_the_evidence_is_the_servers_at_every_opacity(visit: Visit, url: str) -> None:
    page = visit(url)
    image = picture()
    give(page, image)
    seen(page)
    page.locator("#opacity").fill("30")
    assert page.locator("#evidence-image").evaluate("image => getComputedStyle(image).opacity") == "0.3"

    def pixels(data: bytes) -> NDArray[np.float64]:
        return np.asarray(Image.open(io.BytesIO(data)), dtype=np.float64)

    drawn, full = (
        pixels(httpx2.post(f"{url}explain", params={"alpha": alpha}, content=image["buffer"]).content)
        for alpha in (0.3, 1)
    )
    assert np.abs(drawn - (0.7 * pixels(image["buffer"]) + 0.3 * full)).max() <= 2
    page.locator("#targets").get_by_text("Malignant").click()
    expect(page.locator("#evidence-caption")).to_have_text("Evidence for malignant")
    with page.expect_request(lambda request: "target=malignant&style=heatmap&alpha=1" in request.url):
        page.locator("#styles").get_by_text("Heat map").click()
    seen(page)
    expect(page.locator("#original")).to_be_visible()
    page.get_by_label("Original beside it").uncheck()
    expect(page.locator("#original")).to_be_hidden()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_images_are_dropped_and_pasted(visit: Visit, url: str, way: str) -> None:
    page = visit(url)
    page.evaluate(
        """([way, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "given.png", {type: "image/png"}));
            const event = way === "drop"
                ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
                : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
            document.body.dispatchEvent(event);
        }""",
        [way, list(picture()["buffer"])],
    )
    answered(page)
    expect(page.locator("#result-title")).to_have_text("given.png")


def test_many_images_are_a_table_that_sorts_exports_and_forgets(visit: Visit, url: str, tmp_path: Path) -> None:
    page = visit(url)
    names = ["=HYPERLINK(1).png", "b.png", "c.png", "<img src=x onerror=alert(1)>.png", "e.png"]
    give(page, *(picture(name, kind=kind) for kind, name in enumerate(names)), text_file())
    answered(page)
    expect(page.locator("#progress-words")).to_have_text("6 of 6 answered, 5 to refer, 1 failed")
    expect(page.locator("#live")).to_have_text("6 of 6 answered, 5 to refer, 1 failed")
    failed = page.locator("#rows tr", has_text="notes.pdf")
    expect(failed).to_contain_text("The image format is not served: PDF is not served")

    expect(page.get_by_role("button", name=names[3], exact=True)).to_be_visible()
    expect(page.locator("#rows img")).to_have_count(0)

    page.get_by_role("button", name="Probability").click()
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    shown = [float(text.split("%")[0]) for text in page.locator("td.chance").all_inner_texts() if text.strip()]
    assert shown == sorted(shown, reverse=True)

    with page.expect_download() as download:
        page.get_by_role("button", name="Export CSV").click()
    download.value.save_as(tmp_path / "out.csv")
    rows = {row["file"]: row for row in csv.DictReader((tmp_path / "out.csv").read_text("utf-8-sig").splitlines())}
    assert set(rows) == {f"'{names[0]}", *names[1:], "notes.pdf"}
    answer = httpx2.post(f"{url}predict", content=picture("b.png", kind=1)["buffer"]).json()
    assert float(rows["b.png"]["probability_malignant"]) == pytest.approx(answer["probabilities"]["malignant"])
    assert (rows["b.png"]["refer"], rows["b.png"]["notice"]) == ("true", NOTICE)
    assert "PDF is not served" in rows["notes.pdf"]["problem"]

    page.get_by_role("button", name="c.png", exact=True).click()
    expect(page.locator("#result-title")).to_have_text("c.png")
    expect(page.locator("#result-title")).to_be_focused()
    seen(page)
    assert page.evaluate("addresses.size") == 2  # the image and, for a minute, the CSV
    page.get_by_role("button", name="Remove c.png").click()
    expect(page.locator("#rows tr")).to_have_count(5)
    page.get_by_role("button", name="Remove all").click()
    expect(page.locator("#result")).to_be_hidden()
    expect(page.locator("#choose")).to_be_focused()
    assert page.evaluate("addresses.size") == 1


def test_what_the_server_refuses_is_told_in_its_words(visit: Visit, url: str) -> None:
    page = visit(url)
    give(page, {"name": "large.png", "mimeType": "image/png", "buffer": b"\x89PNG" + bytes(3_000_000)})
    answered(page)
    expect(page.locator("#verdict")).to_contain_text("The upload has too many bytes")
    expect(page.locator("#print")).to_be_hidden()
    give(page, {"name": "cut.jpg", "mimeType": "image/jpeg", "buffer": b"\xff\xd8\xff\xe0 cut"})
    expect(page.locator("#verdict")).to_contain_text("Not an image, or a damaged one")
    expect(page.locator(".viewer")).to_be_hidden()


class Gated(Quick):
    """Answers when it is let."""

    gate = threading.Event()

    def run(self, images: NDArray[np.uint8]) -> Output:
        assert self.gate.wait(60)
        return super().run(images)


@contextmanager
def gated(root: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[str]:
    monkeypatch.setattr("app.main.build_engine", lambda _, version, **__: Gated(version))
    store.promote(root, NAME, "1")
    Gated.gate.set()
    with running(create_app(Settings(model_store=root, reload_ms=0, **settings))) as port:
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            Gated.gate.set()


class Three(Quick):
    """Tells three classes, the last one the likeliest."""

    def run(self, images: NDArray[np.uint8]) -> Output:
        rows = np.tile(np.array([0, 1, 3], dtype=np.float32), (len(images), 1))
        return Output(rows, np.zeros((len(images), 3, 4, 4), dtype=np.float32))


def test_a_model_of_three_classes_is_a_ranking(visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.main.build_engine", lambda _, version, **__: Three(version))
    manifest = make_manifest(classes=("naevus", "keratosis", "melanoma"), operating_points={})
    store.publish(tmp_path, manifest, {store.WEIGHTS: safetensors.numpy.save({"w": np.zeros(4, dtype=np.float32)})})
    store.promote(tmp_path, NAME, "1")
    with running(create_app(Settings(model_store=tmp_path, reload_ms=0))) as port:
        page = visit(f"http://127.0.0.1:{port}/")
        give(page, picture())
        expect(page.locator("#verdict h3")).to_have_text("Melanoma")
        ranked = page.locator(".ranking li span:first-child").all_inner_texts()
        assert ranked == ["melanoma", "keratosis", "naevus"]
        expect(page.locator("#evidence-state")).to_have_text("No evidence for melanoma anywhere")
        expect(page.locator("#operating-point")).to_be_disabled()
        assert violations(page) == []


def test_a_busy_server_is_asked_again_and_what_was_cancelled_can_go_on(
    visit: Visit, small_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with gated(small_store("1"), monkeypatch, max_queue=2, max_batch=1) as url:
        page = visit(url)
        Gated.gate.clear()
        give(page, *(picture(f"{n}.png", size=(64, 64)) for n in range(6)))
        expect(page.locator("#problem")).to_contain_text("The server is busy")
        expect(page.locator("#problem")).to_contain_text("Trying again in 1 s")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#progress-words")).to_contain_text("6 cancelled")
        expect(page.locator("#problem")).to_be_hidden()
        page.get_by_role("button", name="Try 6 again").click()
        expect(page.locator("#problem")).to_contain_text("The server is busy")
        Gated.gate.set()
        expect(page.locator("#progress-words")).to_have_text("6 of 6 answered", timeout=30_000)
        expect(page.locator("#problem")).to_be_hidden()


def test_a_key_is_asked_for_used_and_kept_in_the_tab_alone(
    visit: Visit, small_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = {
        "predict": new_key("predict", ["predict"]),
        "metrics": new_key("metrics", ["metrics"]),
        "slow": new_key("slow", ["predict"], per_minute=2),
    }
    (tmp_path / "keys.toml").write_text("".join(key.toml for key in keys.values()))
    with gated(small_store("1"), monkeypatch, api_keys=tmp_path / "keys.toml") as url:
        page = visit(url)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("An API key is needed")
        for secret, said in (("dl_wrong", "The API key is not known"), (keys["metrics"].secret, "lacks the scope")):
            page.get_by_label("Key", exact=True).fill(secret)
            page.get_by_role("button", name="Use this key").click()
            expect(dialog).to_contain_text(said)
        assert violations(page) == []
        page.get_by_label("Key", exact=True).fill(keys["predict"].secret)
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        give(page, picture())
        answered(page)
        assert page.evaluate("[localStorage.length, document.cookie, Object.keys(sessionStorage)]") == [
            *(0, ""),
            ["dermlens-key"],
        ]
        page.get_by_role("button", name="API key").click()
        page.get_by_role("button", name="Forget the key").click()
        give(page, picture("second.png"))
        expect(dialog).to_contain_text("An API key is needed")
        page.get_by_label("Key", exact=True).fill(keys["slow"].secret)
        page.keyboard.press("Enter")
        expect(page.locator("#result-title")).to_have_text("second.png")
        answered(page)  # what wanted a key was sent again
        give(page, picture("third.png"))
        expect(page.locator("#problem")).to_contain_text("Too many requests with this key")


def test_the_keyboard_does_it_all(visit: Visit, url: str) -> None:
    page = visit(url)

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} is not reached")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    tab_to("#choose")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files([picture("a.png"), picture("b.png")])
    answered(page)
    seen(page)
    tab_to("button.name")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the name of the second
    expect(page.locator("#result-title")).to_have_text("b.png")
    tab_to("#targets input")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#evidence-caption")).to_have_text("Evidence for benign")
    tab_to("#opacity")
    page.keyboard.press("End")
    expect(page.locator("#opacity-now")).to_have_text("100%")
    tab_to("#panes")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"
    page.keyboard.press("+")
    expect(page.locator("#zoom-now")).to_have_text("1.5×")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#panes").evaluate("panes => panes.style.getPropertyValue('--x')") == "0.1"
    page.keyboard.press("0")
    expect(page.locator("#zoom-now")).to_have_text("1×")


LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark phone": {
        "color_scheme": "dark",
        "viewport": {"width": 360, "height": 740},
        "has_touch": True,
        "reduced_motion": "reduce",
    },
}


@pytest.mark.parametrize("look", LOOKS)
def test_axe_objects_to_nothing_in_any_state(visit: Visit, url: str, look: str) -> None:
    page = visit(url, **LOOKS[look])
    found = {}

    def check(state: str) -> None:
        found[state] = violations(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{state} is wider than the screen"

    check("empty")
    give(page, picture())
    answered(page)
    seen(page)
    check("refer")
    page.select_option("#coverage", "off")
    expect(page.locator("#verdict h3")).not_to_have_text("Refer to a person")
    seen(page)
    check("answer")
    give(page, text_file())
    expect(page.locator(".verdict.failed")).to_be_visible()
    check("table and error")
    page.get_by_role("link", name="Model").click()
    expect(page.locator(".plots img")).to_have_js_property("naturalWidth", 300)
    check("model")
    assert {state: objections for state, objections in found.items() if objections} == {}


def test_the_model_page_has_the_figures_with_intervals_and_the_report(visit: Visit, url: str) -> None:
    page = visit(f"{url}#model")
    expect(page.locator("#model-body")).to_contain_text("0.910")
    expect(page.locator("#model-body")).to_contain_text("0.880 to 0.940")
    elsewhere = page.get_by_role("table", name="Elsewhere: clinics")
    expect(elsewhere).to_contain_text("0.610 to 0.800")
    expect(page.get_by_role("img", name="ROC curve on the held-out images")).to_have_js_property("naturalWidth", 300)
    page.get_by_role("link", name="The whole report").click()
    assert page.locator("p").evaluate("p => getComputedStyle(p).color") == "rgb(17, 17, 17)"
    expect(page.get_by_role("img", name="ROC")).to_have_js_property("naturalWidth", 300)


def test_the_report_is_one_sheet_with_all_that_a_reader_needs(visit: Visit, url: str) -> None:
    page = visit(url)
    give(page, picture())
    answered(page)
    seen(page)
    assert page.pdf(prefer_css_page_size=True).count(b"/Type /Page\n") == 1
    page.emulate_media(media="print")
    sheet = page.locator("#report")
    for said in (NOTICE, "Refer to a person", "version 1", "balanced", "Limits", "ROC-AUC is 0.720", "lesion.png"):
        expect(sheet).to_contain_text(said)
    expect(page.locator("main")).to_be_hidden()
    widths = sheet.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert widths == [320, 320, 320]
    expect(sheet.locator("header")).to_contain_text(str(page.evaluate("new Date().getFullYear()")))
