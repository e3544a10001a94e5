"""Pages of the site that stand at the repository's root: README.md is its home, and no text stands twice.

Links are written for the repository, where docs/x.md is a file, and are turned here into links of the site.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
ROOT_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=from_root((ROOT / name).read_text(encoding="utf-8"))))
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        files.append(File.generated(config, f"examples/{notebook.name}", abs_src_path=str(notebook)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """In docs/x.md, ../CHANGELOG.md is changelog.md, and ../examples/ lies beside it."""
    markdown = markdown.replace("](../examples/", "](examples/")
    return re.sub(r"(\]\()\.\./([A-Z]+\.md)", lambda found: found[1] + ROOT_PAGES.get(found[2], f"../{found[2]}"), markdown)


def from_root(markdown: str) -> str:
    """In README.md, docs/x.md is x.md, and CONTRIBUTING.md is contributing.md."""
    markdown = re.sub(r"(\]\()docs/", r"\1", markdown)
    return re.sub(r"(\]\()([A-Z]+\.md)", lambda found: found[1] + ROOT_PAGES.get(found[2], found[2]), markdown)
