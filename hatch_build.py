"""Metadata of the wheel and the sdist: the README, with links that a package index can follow."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Code first, which is left alone; then a picture or a link, whose text may hold a picture or a pair of brackets.
_LINK = re.compile(
    r"(?P<code>^```.*?^```[ \t]*$|`[^`\n]*`)"
    r"|(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\](?:\([^()\s]*\))?)*)\]\((?P<target>[^()\s]+)(?P<title>\s+\"[^\"]*\")?\)",
    re.MULTILINE | re.DOTALL,
)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)


def with_absolute_links(text: str, repository: str) -> str:
    """Markdown whose links and pictures relative to the repository's root lead to the branch `HEAD` of `repository`.

    Without a `repository` a link is replaced by its text and a picture is left out: neither would lead anywhere.
    """

    def replaced(found: re.Match[str]) -> str:
        if found["code"]:
            return found[0]
        label, target = _LINK.sub(replaced, found["text"]), found["target"]
        if not _ELSEWHERE.match(target):
            if not repository:
                return "" if found["mark"] else label
            kind = "raw" if found["mark"] else "blob"
            target = f"{repository.rstrip('/')}/{kind}/HEAD/{target.removeprefix('./').lstrip('/')}"
        return f"{found['mark']}[{label}]({target}{found['title'] or ''})"

    return _LINK.sub(replaced, text)


class ReadmeHook(MetadataHookInterface):
    """Fills `project.readme`; `project.urls.Repository` says where the repository lies."""

    def update(self, metadata: dict) -> None:
        """Add the README to the `project` table."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository", "")
        metadata["readme"] = {"content-type": "text/markdown", "text": with_absolute_links(text, repository)}
