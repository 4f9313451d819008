"""The pictures of the page in docs/images, of drawn lesions: python -m tests.web.screenshots"""

import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, sync_playwright

from app.main import create_app
from app.settings import Settings
from tests.conftest import ROOT, encode, running
from tests.web.test_page import CHROMIUM
from training.drawn import draw_lesion

# Kind and seed for training.drawn; the first is shown large
LESIONS = ((1, 16), (0, 3), (1, 2), (0, 8), (1, 5))


def drawn(kind: int, seed: int) -> FilePayload:
    image = encode(draw_lesion(kind, seed, size=(520, 300)), "JPEG", quality=92)
    return {"name": f"drawn-{kind}-{seed:02d}.jpg", "mimeType": "image/jpeg", "buffer": image}


def shoot(page: Page, path: Path, *, full_page: bool = False) -> None:
    """A PNG of 256 colours, a third of the size."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=full_page, animations="disabled"))).convert("RGB")
    colours = picture.quantize(256, Image.Quantize.FASTOCTREE)
    picture.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {picture.width}×{picture.height}, {path.stat().st_size / 1e3:.0f} KB")


def open_page(browser: Browser, url: str, *, width: int, height: int, dark: bool) -> Page:
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", has_touch=width < 500
    )
    page.goto(url)
    return page


def wait_for_evidence(page: Page) -> None:
    page.locator("#progress").wait_for(state="hidden")
    page.locator("#evidence-image[src]").wait_for()
    page.wait_for_timeout(500)  # for the thumbnails


def main() -> None:
    images = ROOT / "docs" / "images"
    app = create_app(Settings(model_store=ROOT / "model_store"))
    with running(app) as port, sync_playwright() as playwright:
        url = f"http://localhost:{port}/"
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = open_page(browser, url, width=1180, height=900, dark=False)
        page.set_input_files("#choose", [drawn(*lesion) for lesion in LESIONS])
        wait_for_evidence(page)
        shoot(page, images / "page.png", full_page=True)
        page = open_page(browser, url, width=380, height=900, dark=True)
        page.set_input_files("#choose", [drawn(*LESIONS[0])])
        wait_for_evidence(page)
        page.locator("#result-title").evaluate("title => title.scrollIntoView()")
        shoot(page, images / "page-phone.png")
        browser.close()
    print("summary: 2 pictures in docs/images")


if __name__ == "__main__":
    main()
