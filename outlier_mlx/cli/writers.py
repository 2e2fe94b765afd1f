"""Replies as plain text, piece by piece."""

from outlier_mlx.terminal import Output


class PlainWriter:
    """Prints pieces unchanged; on a terminal, with control characters made visible."""

    def __init__(self, output: Output) -> None:
        self.output = output

    def write(self, text: str) -> None:
        """Print the next piece of text."""
        file = self.output.file
        file.write(without_controls(text) if self.output.is_terminal else text)
        file.flush()


def without_controls(text: str) -> str:
    """The text with control characters as visible symbols, so that a terminal ignores them."""
    return "".join(_visible(c) for c in text if c != "\r")


def _visible(char: str) -> str:
    code = ord(char)
    if char in "\n\t" or 0x20 <= code < 0x7F or code >= 0xA0:
        return char
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"
