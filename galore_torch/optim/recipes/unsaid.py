"""Keys of a projected group that are a recipe's own where nobody says them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from galore_torch.group_keys import PROJECTED_DEFAULTS


def where_unsaid(group: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe for the keys that a group does not say.

    A value that is `GaLore`'s own default counts as not given: `param_groups` writes these out.

    Args:
        group: a projected one.
        values: the recipe's, by key.

    Returns:
        Those that the group is to get.

    >>> where_unsaid({"rank": 8, "scale": 0.25, "moments": "reset"}, {"scale": 0.2, "moments": "rotate"})
    {'scale': 0.2}
    """
    return {key: value for key, value in values.items() if group.get(key) in (None, PROJECTED_DEFAULTS[key])}
