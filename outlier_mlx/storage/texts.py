"""Text files that users name."""

from pathlib import Path

from outlier_mlx.errors import OutlierError


def read_utf8(path: Path) -> str:
    """The text of a file.

    Raises:
        OutlierError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OutlierError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise OutlierError(f"{path}: not UTF-8 text: byte {error.start} is no part of it") from None
