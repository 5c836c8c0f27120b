"""What tests ask of a figure on disk."""

from pathlib import Path
from xml.etree import ElementTree

from repvgg.figures import DARK, LIGHT


def assert_drawn(stem: Path) -> None:
    """Both themes were written, each with marks in its main colour or a matrix of colours."""
    for name, theme in (("light", LIGHT), ("dark", DARK)):
        text = stem.with_name(f"{stem.name}-{name}.svg").read_text()
        ElementTree.fromstring(text)
        assert theme.main in text or "<image" in text
        assert "nan" not in text
