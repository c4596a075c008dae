"""``report.html``: one page that stands alone, made from what ``metrics.json`` and ``model.json`` hold.

A section is a function from the `Content` to HTML and an entry of `SECTIONS`; one that has nothing to show gives "".
"""

from .sections import SECTIONS, Content, render_report

__all__ = ["SECTIONS", "Content", "render_report"]
