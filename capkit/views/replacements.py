"""Show what finding and replacing would change in a store."""

from __future__ import annotations

from capkit.runs import Replacement, record_text
from capkit.text import escape
from capkit.views.captions import paragraph
from capkit.views.html import CARD, HTML, MUTED, ORANGE, SKY, file_name


def show_replacement(replacement: Replacement) -> HTML:
    """Show the counts of a replacement, and in the first captions what goes, struck through, and what comes."""
    cards = [
        f"{file_name(record)}{paragraph(_changes(replacement, record_text(record)))}" for record, _ in replacement.first
    ]
    left = replacement.num_changed - len(cards)
    more = f"<p>and {left:,} more</p>" if left else ""
    note = "Nothing is written yet: <code>.write()</code> stores the new texts as hand edits." if cards else ""
    head = f'<b>{escape(replacement.summary)}</b><div style="{MUTED}">{note}</div>'
    return HTML(f'<div style="{CARD}">{head}{"<hr>".join(cards)}{more}</div>')


def _changes(replacement: Replacement, text: str) -> str:
    html, end = "", 0
    for match in replacement.pattern.finditer(text):
        old, new = escape(match[0]), escape(match.expand(replacement.replacement))
        html += escape(text[end : match.start()])
        html += f'<s style="background:{ORANGE}55">{old}</s><u style="background:{SKY}55">{new}</u>'
        end = match.end()
    return html + escape(text[end:])
