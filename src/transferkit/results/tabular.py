"""Tables as text and as HTML."""

import html
from collections.abc import Sequence


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a line for the head and for each row below it; the first column is aligned left, the others right.

    Example:
        >>> print(text_table([["class", "recall"], ["cat", "1.0000"], ["eagle", "0.5000"]]))
        class  recall
        cat    1.0000
        eagle  0.5000
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for first, *rest in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def html_table(lines: Sequence[Sequence[str]], *, bold: int | None = None) -> str:
    """Return a table of a head and the rows below it, one in bold; the cells are text, not markup.

    Example:
        >>> html_table([["class"], ["<cat>"]], bold=0)
        '<table><thead><tr><th>class</th></tr></thead><tbody><tr><td><b>&lt;cat&gt;</b></td></tr></tbody></table>'
    """
    head, body = "".join(f"<th>{html.escape(title)}</th>" for title in lines[0]), ""
    for number, row in enumerate(lines[1:]):
        opening, closing = ("<td><b>", "</b></td>") if number == bold else ("<td>", "</td>")
        body += f"<tr>{''.join(opening + html.escape(cell) + closing for cell in row)}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
