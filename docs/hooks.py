"""What `mkdocs` does beside its plugins: files from outside `docs/`, and formulas as MathML.

The site shows `benchmarks/README.md` and `CHANGELOG.md` as they are, and the pictures and results that pages link to. Each
has the address that it has in the repository, so that the links in it hold. Formulas, `$...$` and `$$...$$`, are converted
when the site is built: pages need no script for them, and a formula that cannot be read fails the build.
"""

import pathlib
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File


ROOT = pathlib.Path(__file__).parent.parent
OUTSIDE = (
    "CHANGELOG.md",
    "benchmarks/README.md",
    "benchmarks/results/*.png",
    "benchmarks/results/*.json",
    "examples/*.png",
)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


def on_files(files, config):
    """Adds the files from outside of `docs/`."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_content(html, page, config, files):
    """Converts formulas to MathML."""
    return FORMULA.sub(_as_mathml, html)


def _as_mathml(match):
    kind, _, formula = match.groups()
    for entity, character in ENTITIES.items():
        formula = formula.replace(entity, character)
    display = "block" if kind == "div" else "inline"
    return f"<{kind}>{convert(formula, display=display)}</{kind}>"
