"""How a missing extra is installed: said here once, for every error that has to say it."""


def install(extra: str) -> str:
    """The line that installs an extra of this version, and where to give it.

    The folder is named because registries know ``galore-torch`` as version 1.0, which has no extras.

    Args:
        extra: ``bnb``, ``torchao``, ``train`` or ``all``.

    Returns:
        The end of a sentence.

    Examples:
        >>> install("bnb")
        'Install it with:  pip install ".[bnb]"  in the folder of galore-torch 2'
    """
    return f'Install it with:  pip install ".[{extra}]"  in the folder of galore-torch 2'
