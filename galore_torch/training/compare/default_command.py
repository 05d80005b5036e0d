"""A group of commands of which one is meant when none is named, as ``galore compare --method lora`` means pretrain."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class FirstByDefault(TyperGroup):
    """Puts the first command's name before flags that follow none; ``--help`` remains the group's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what was typed after the group's name."""
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = [next(iter(self.commands)), *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed
