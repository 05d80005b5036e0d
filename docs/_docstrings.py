"""A docstring's `Example:` is what griffe calls `Examples:`: a section of doctests, set as code."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
