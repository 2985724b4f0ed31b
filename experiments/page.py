"""The part of a page that a report writes, between two marks."""

from utils.cli import UserError

END = "<!-- to here -->\n"


def begin(script: str) -> str:
    """The mark before what `script` writes."""
    return f"<!-- written by {script} -->\n"


def with_report(page: str, script: str, parts: list[str]) -> str:
    """The page with these parts, of whole lines, between the marks.

    Raises:
      UserError: a mark is missing.
    """
    before, mark, rest = page.partition(begin(script))
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise UserError(f"the page must have the lines {begin(script).strip()} and {END.strip()}")
    return "".join([before, mark, "\n", *(f"{part}\n" for part in parts), end, after])
