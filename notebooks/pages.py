"""A static site of the notebooks; used by build.py.

It needs no JavaScript and no network: formulas are drawn here, code is coloured here, sounds lie in the page. HTML in
Markdown cells and in outputs goes into the pages as it stands, so make a site of notebooks whose writers you trust.
"""

import html
import re
import shutil
from functools import cache

from notebooks.form import EMBEDDED, HIDDEN, Failure, tags
from notebooks.maps import maps, title

REMOTE = re.compile(r"""<(?:script|link|img|audio|source|iframe)\b[^>]*?\b(?:src|href)\s*=\s*["']?(?:https?:)?//""")
TEXT = {".py": "python", ".md": "markdown", ".toml": "toml", ".json": "json", ".js": "javascript"}
ALIASES = {"le": "leq", "ge": "geq", "ne": "neq", "tfrac": "frac", "lVert": "|", "rVert": "|"}  # TeX → mathtext


def site(root, notebooks, out):
    """Write a page for every notebook, the teaching page, every module they link to and a contents page; its path.

    Raises Failure for a page that would load something from the network.
    """
    out.mkdir(parents=True, exist_ok=True)
    sources, pages = {}, {}
    markdown = renderer(root, sources)
    names = [("index", "Contents"), *((path.stem, f"{path.stem[:2]} {title(nb)}") for path, nb in notebooks)]
    for i, (path, nb) in enumerate(notebooks, 1):
        around = [names[i - 1], *names[i + 1 : i + 2]]
        links = [anchor(f"{stem}.html", name) for stem, name in dict([names[0], *around]).items()]
        pages[path.stem] = (names[i][1], notebook_page(nb, markdown), " · ".join(links))
    home = anchor("index.html", "Contents")
    pages["index"] = ("aqaa: the notebooks", contents(root, notebooks, markdown), "")
    if (teach := root / "notebooks" / "TEACH.md").exists():
        pages["teach"] = ("Teach with this", markdown(teach.read_text(encoding="utf-8")), home)
    for page, file in sources.items():
        if file.suffix in TEXT:
            pages[page.removesuffix(".html")] = (file.relative_to(root).as_posix(), shown(file), home)
        else:
            shutil.copyfile(file, out / page)
    for name, (heading, body, links) in pages.items():
        if found := REMOTE.search(EMBEDDED.sub("", body)):
            raise Failure(f"{name}: loads something from the network: {found[0][:80]}")
        nav = f"<nav>{links}</nav>" if links else ""
        (out / f"{name}.html").write_text(
            PAGE.format(title=html.escape(heading), style=style(), nav=nav, body=body), encoding="utf-8"
        )
    return out / "index.html"


def contents(root, notebooks, markdown):
    """The map of README.md, its links turned to this site, and the way to the teaching page."""
    text = maps(root, notebooks)[0][2].replace("](notebooks/", "](")
    more = "\n\n[Teach with this](TEACH.md): sessions, and what every exercise checks."
    more *= (root / "notebooks" / "TEACH.md").exists()
    return markdown("# aqaa: the notebooks\n\nAsk a spoken question, hear a spoken answer, and see every step between. "
                    "Sounds play from this page; to run and change the cells, open the notebooks in JupyterLab.\n\n"
                    f"{text}{more}")


def notebook_page(nb, markdown):
    parts = []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            parts.append(markdown(cell.source))
            continue
        if cell.cell_type != "code":
            continue
        code = colour(cell.source)
        shown = "".join(output(out, markdown) for out in cell.outputs)
        if HIDDEN & set(tags(cell)):
            name = "Solution" if "solution" in tags(cell) else "Code"
            inside = shown if name == "Solution" else ""
            code = f"<details><summary>{name}</summary>{code}{inside}</details>"
            shown = "" if inside else shown
        kind = " exercise" * ("exercise" in tags(cell))
        parts.append(f'<section class="cell{kind}">{code}{shown}</section>')
    return "\n".join(parts)


def output(out, markdown):
    """One output of a cell as HTML: the richest form that needs no JavaScript."""
    data = out.get("data", {})
    if "text" in out or out.output_type == "error":
        return f"<pre class=out>{html.escape(out.get('text') or f'{out.ename}: {out.evalue}')}</pre>"
    if "text/html" in data:
        return f"<div class=out>{data['text/html']}</div>"
    if "image/svg+xml" in data:
        return f"<div class=out>{data['image/svg+xml']}</div>"
    if "image/png" in data:
        alt = html.escape(data.get("text/plain", ""), quote=True)
        return f'<div class=out><img alt="{alt}" src="data:image/png;base64,{data["image/png"].strip()}"></div>'
    if "text/markdown" in data:
        return f"<div class=out>{markdown(data['text/markdown'])}</div>"
    return f"<pre class=out>{html.escape(data.get('text/plain', ''))}</pre>"


def colour(code, language="python"):
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return highlight(code, lexer, HtmlFormatter(cssclass="code"))


def shown(file):
    return f"<h1>{html.escape(file.name)}</h1>" + colour(file.read_text(encoding="utf-8"), TEXT[file.suffix])


def anchor(url, name):
    return f'<a href="{url}">{html.escape(name)}</a>'


def renderer(root, sources):
    """Markdown → HTML. Links to files of the repository become pages of the site, noted in `sources`: name → file."""
    import mistune

    class Renderer(mistune.HTMLRenderer):
        def heading(self, text, level, **_):
            slug = re.sub(r"[^\w-]", "", re.sub(r"<[^>]+>", "", text).strip().replace(" ", "-"))
            return f'<h{level} id="{slug}">{text}</h{level}>\n'

        def block_code(self, code, info=None):
            return colour(code, (info or "text").split()[0])

        def inline_math(self, text):
            return formula(html.unescape(text))

        def block_math(self, text):
            return f"<p class=math>{formula(html.unescape(text).strip())}</p>\n"

        def link(self, text, url, title=None):
            if re.match(r"[a-z]+:|#", url):
                return super().link(text, url, title)
            target, _, section = url.partition("#")
            file = (root / "notebooks" / target).resolve()
            if not file.is_relative_to(root.resolve()) or not file.is_file():
                return text
            if file.suffix == ".ipynb":
                page = f"{file.stem}.html"
            elif file.name == "TEACH.md":
                page = "teach.html"
            else:
                page = file.relative_to(root.resolve()).as_posix().replace("/", "_")
                page += ".html" * (file.suffix in TEXT)
                sources[page] = file
            return super().link(text, page + (f"#{section}" if section else ""), title)

    return mistune.create_markdown(renderer=Renderer(escape=False), plugins=["table", "math", "strikethrough"])


@cache
def formula(tex):
    """A formula as one drawn shape inside the line, its TeX as the text for those who do not see it."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    source = re.sub(r"\\([a-zA-Z]+)", lambda found: "\\" + ALIASES.get(found[1], found[1]), " ".join(tex.split()))
    try:
        path = TextPath((0, 0), f"${source}$", size=100, prop=FontProperties(math_fontfamily="dejavuserif"))
    except ValueError:  # only a part of TeX is known here
        return f"<code>{html.escape(tex)}</code>"
    letters = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
    steps = (letters[code] + " ".join(f"{value:.0f}" for value in points if code != 79)  # Z goes nowhere new
             for points, code in path.iter_segments(simplify=False))
    left, bottom, width, height = (int(value) for value in path.get_extents().padded(2).bounds)
    size = f"width:{width / 100}em;height:{height / 100}em;vertical-align:{bottom / 100}em"
    box = f"{left} {-bottom - height} {width} {height}"
    return (f'<svg role="img" aria-label="{html.escape(tex, quote=True)}" viewBox="{box}" style="{size}">'
            f'<path fill="currentColor" transform="scale(1 -1)" d="{"".join(steps)}"/></svg>')


@cache
def style():
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="default").get_style_defs(".code")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".code")
    return f"{CSS}{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"


CSS = """
:root { color-scheme: light dark; --line: #ccc; --soft: #f5f5f3 }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #22252a } }
body { font: 1.05rem/1.6 Georgia, serif; max-width: 50rem; margin: 0 auto; padding: 1rem }
nav { font: .9rem sans-serif; padding: .5rem 0 } h1, h2, h3 { line-height: 1.25 }
pre, code { font: .86rem/1.45 ui-monospace, Menlo, Consolas, monospace } pre { margin: 0; white-space: pre-wrap }
.code, details { background: var(--soft) !important; border-left: .25rem solid var(--line); padding: .5rem .75rem }
.exercise .code { border-left-color: #0072b2 } summary { cursor: pointer; font-family: sans-serif }
.cell { margin: 1rem 0 } .out { margin: .5rem 0; overflow-x: auto } div.out { font-family: sans-serif }
img { max-width: 100%; height: auto } audio { max-width: 100% } figure { margin: 0 } .math { text-align: center }
p, li, h1, h2, h3, figcaption, figure div, summary, pre { overflow-wrap: anywhere } svg { max-width: 100% }
table { border-collapse: collapse; font: .92rem/1.4 sans-serif; display: block; overflow-x: auto }
td, th { border: 1px solid var(--line); padding: .25rem .5rem }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{nav}
<main>
{body}
</main>
{nav}
</body>
</html>
"""
