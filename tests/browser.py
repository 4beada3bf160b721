"""A page as somebody sees it who opens it in Chromium: what it asks for, what cannot be read, what sticks out."""

from dataclasses import dataclass, field

from playwright.sync_api import Browser, Page


@dataclass
class Opened:
    """A page, its `complaints` (console errors and warnings, exceptions, dialogs) and the URLs that it `asked` for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


def open_page(browser: Browser, url: str, *, scheme: str = "light", width: int = 1280) -> Opened:
    """Opens a page in a colour scheme and width of its own; nothing is kept from page to page."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    opened = Opened(page)
    page.on("console", lambda said: said.type in ("error", "warning") and opened.complaints.append(said.text))
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (opened.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: opened.asked.append(request.url))
    page.goto(url)
    return opened


def illegible(page: Page) -> list[str]:
    """Texts whose contrast is under what WCAG 2.2 asks for (AA: 4.5, of large ones 3), from computed styles: every background
    up to the root is painted on one pixel, the text's colour over them."""
    return page.evaluate(
        """() => {
          const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const luminance = (colours) => {
            for (const colour of ["#fff", ...colours]) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
              .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const texts = [...document.querySelectorAll("input, textarea")]
            .flatMap((field) => [[field, `in the field ${field.id}`], [field, field.placeholder, "::placeholder"]]);
          const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          while (walker.nextNode()) texts.push([walker.currentNode.parentElement, walker.currentNode.data.trim()]);
          const seen = texts.filter(([element, text]) => text && element.checkVisibility());
          return seen.length ? seen.map(([element, text, part]) => {
            const style = getComputedStyle(element, part), grounds = [];
            for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
            const [dark, light] = [luminance(grounds), luminance([...grounds, style.color])].sort((a, b) => a - b);
            const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
            return [(light + 0.05) / (dark + 0.05), large ? 3 : 4.5, text];
          }).filter(([ratio, least]) => ratio < least).map(([ratio, , text]) => `${ratio.toFixed(2)}: ${text.slice(0, 60)}`)
            : ["no text is to be seen"];
        }"""
    )


def sticking_out(page: Page) -> list[str]:
    """Elements that reach past the window's right edge and are in nothing that scrolls sideways on its own."""
    return page.evaluate(
        """() => {
          const scrolls = (e) => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
          const wide = document.documentElement.scrollWidth > innerWidth ? ["the page itself"] : [];
          return wide.concat([...document.body.querySelectorAll("*")]
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e.parentElement))
            .map((e) => `${e.tagName} ${e.className} ${e.textContent.trim().slice(0, 40)}`));
        }"""
    )
