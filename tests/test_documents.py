"""Documents as text and as HTML."""

from moe.system import documents
from moe.system.documents import Cell, Heading, Paragraph, Span, StackedBar, Table, Timeline

HOSTILE = "<img src=x onerror=y>\x1b[2J"

DOCUMENT = [
    Heading("Memory"),
    Paragraph("fits", "big"),
    Table(
        [("code", Cell("10.5", "a note"), Cell(share=2.0, colour="red")), (HOSTILE, "7", "")], ("part", "GiB", ""), (1,)
    ),
    StackedBar([Span("work", 3.0, "red"), Span("wait", 1.0, "blue")]),
    Timeline("one run", 2.0, ([Span("first", 1.0, "red")], [Span("last", 9.0, "blue", start=1.5)])),
]


def test_text_is_aligned_and_escaped():
    """Numbers end in one column; bars, notes and timelines need a page."""
    shown = r"<img src=x onerror=y>\x1b[2J"
    assert documents.text(DOCUMENT) == "\n".join(
        ["Memory", "  fits", f"    {'part':28}   GiB", f"    {'code':28}  10.5", f"    {shown}     7"]
    )
    assert len(shown) == 28


def test_a_page_holds_every_block_and_no_tag_of_the_text():
    page = documents.html(HOSTILE, DOCUMENT)
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=y&gt;") == 3  # title, heading and cell
    assert '<p class="big">fits</p>' in page
    assert '<td class="n">10.5<div class="small">a note</div></td>' in page
    assert "width:100.0%" in page  # a share above 1 fills the cell
    assert "width:75.00%" in page  # 3 of 3 + 1
    # Half of 1,400 pixels; and from 1.5 of 2, where a span that is longer than the timeline ends with it.
    assert '<rect x="0.0" y="4" width="700.0"' in page
    assert '<rect x="1050.0" y="40" width="350.0"' in page
