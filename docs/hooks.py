"""What `mkdocs` does beside its plugins: files from outside `docs/`, and formulas as MathML.

The site shows `benchmarks/README.md` and `CHANGELOG.md` as they are, and the pictures and results that pages link to. Each
has the address that it has in the repository, so that the links in it hold. Formulas, `$...$` and `$$...$$`, are converted
when the site is built: pages need no script for them, and a formula that cannot be read fails the build.
"""

import json
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
    """Adds the files from outside of `docs/`, and a list of the results."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "benchmarks/results.md", content=results()))
    return files


def results() -> str:
    """A page that lists the files of results, with the device and the version of JAX of each."""
    lines = ["# Results", "", "Every number on this site comes from one of these files.", ""]
    lines += ["| file | device | JAX |", "|---|---|---|"]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        environment = json.loads(path.read_text()).get("environment", {})
        version = environment.get("packages", {}).get("jax", "")
        lines.append(f"| [{path.name}](results/{path.name}) | {environment.get('device', '')} | {version} |")
    return "\n".join(lines) + "\n"


def on_page_content(html, page, config, files):
    """Converts formulas to MathML."""
    return FORMULA.sub(_as_mathml, html)


def _as_mathml(match):
    kind, _, formula = match.groups()
    for entity, character in ENTITIES.items():
        formula = formula.replace(entity, character)
    display = "block" if kind == "div" else "inline"
    return f"<{kind}>{convert(formula, display=display)}</{kind}>"
