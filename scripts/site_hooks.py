"""What the documentation site adds to mkdocs: equations as MathML, and nothing from elsewhere.

A warning fails the build, which .ci/run makes strict.
"""

import html
import logging
import re

from latex2mathml.converter import convert

LOG = logging.getLogger("mkdocs.hooks")
EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)  # as pymdownx.arithmatex marks $...$ and $$...$$
LOADED = re.compile(
    r'<(?:script|img|source|iframe|link(?=[^>]*rel="(?:stylesheet|preconnect|icon)"))'
    r'[^>]*?(?:src|srcset|href)="((?:https?:)?//[^"]+)"'
)


def on_page_content(content: str, page: object, **_: object) -> str:
    """Write each equation as MathML, which browsers draw without a script."""

    def to_mathml(found: re.Match[str]) -> str:
        _, bracket, text = found.groups()
        latex = html.unescape(text)
        try:
            mathml: str = convert(latex, display="block" if bracket == "[" else "inline")
        except Exception as error:  # the errors of latex2mathml have no base of their own
            LOG.warning("%s: the equation %s: %r", page, latex, error)
            return found[0]
        if "\\" in mathml:  # where latex2mathml leaves a command that it does not know
            LOG.warning("%s: the equation %s has an unknown command", page, latex)
        return mathml

    return EQUATION.sub(to_mathml, content)


def on_post_page(output: str, page: object, **_: object) -> str:
    """Warn of what a page would load from another address."""
    for address in LOADED.findall(output):
        LOG.warning("%s loads %s: the site loads nothing from elsewhere", page, address)
    return output
