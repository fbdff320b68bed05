"""What goes wrong in a request, as a sentence for the user."""

from __future__ import annotations


class Problem(ValueError):
    """A request that cannot be done: `text` says what, which value, what is allowed and what to do next.

    `status` is the HTTP status (400 the user's input, 404 no such thing, 409 not possible now, 413 too large); `errors` maps
    fields to sentences.
    """

    def __init__(self, text: str, status: int = 400, errors: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.text, self.status, self.errors = text, status, errors or {}
