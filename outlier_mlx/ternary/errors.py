"""The one error of this package."""


class TernaryError(ValueError):
    """Trits or packed bytes are not what they should be; the message says where."""
