"""A hook of MkDocs: the page of `halfbyte explain` becomes a file of the site, computed anew in every build."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from halfbyte import explain


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page, which stands complete in one file, beside the pages made of Markdown."""
    files.append(File.generated(config, "explain.html", content=explain.html()))
    return files
