"""File formats: the only place that knows the key names and metadata of LoRA and checkpoint files.

`metadata` and `probe` load without torch. Everything here raises FormatError for a file or value that cannot be used.
"""


class FormatError(ValueError):
    """A file that is not what it should be, or content that a format cannot hold; the message is meant for people."""
