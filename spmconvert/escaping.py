"""Text of somebody else's, on its way out: names of models, modules and files, lines of texts, words of cards.

Such a text may move the cursor, colour a terminal, turn the direction of what follows, end a table cell or begin a tag.
There is one function for each place that it goes to: ``visible`` for terminals and, since jinja escapes markup but no
control characters, for pages; ``markdown`` for running Markdown and ``code`` for names in it. The YAML of a card is written
by a YAML library from values, which escapes both.
"""

import re

_MARKUP = re.compile(r"([\\`*\[\]<>|~&])")


def visible(text: str, *, keep: str = "\n") -> str:
    """A text with escapes, as Python writes them, in the place of what shows nothing and does something.

    Args:
        text: any.
        keep: characters that stay though they show nothing.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def markdown(text: str) -> str:
    """A text in running Markdown or a cell of a table: on one line, and nothing of it is markup."""
    return _MARKUP.sub(r"\\\1", visible(text, keep=""))


def code(text: str, *, cell: bool = False) -> str:
    """A text as it is, between backticks.

    Args:
        text: any.
        cell: it is in a table, which a bar would divide.
    """
    shown = visible(text, keep="")
    shown = shown.replace("|", r"\|") if cell else shown
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    # a backtick at an end would belong to the fence
    room = " " if len(fence) > 1 else ""
    return f"{fence}{room}{shown}{room}{fence}"
