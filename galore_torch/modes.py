"""Which ways to form gradients exist, when they can be applied, and which of these exclude each other.

The one place for these rules: `attach` calls it, and the Trainer factory and the command line call it before there is a
model. The command line does so before torch is imported, so that nothing here imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from galore_torch.group_keys import BasisBits

if TYPE_CHECKING:
    import torch

Gradients = Literal["full", "projected", "fused"]
Update = Literal["step", "backward"]
SaveInputs = Literal["full", "projected", "sampled"]

GRADIENTS: tuple[Gradients, ...] = get_args(Gradients)
UPDATES: tuple[Update, ...] = get_args(Update)
GRAD_BITS: tuple[int, ...] = get_args(BasisBits)
SAVE_INPUTS: tuple[SaveInputs, ...] = get_args(SaveInputs)
"""The values of `gradients`, of `update`, of `grad_bits` and of `save_inputs`; see `attach`."""

DEFAULT_GRADIENTS: Gradients = "fused"
DEFAULT_UPDATE: Update = "step"
DEFAULT_SAVE_INPUTS: SaveInputs = "projected"


def check_modes(
    gradients: str,
    update: str,
    *,
    grad_dtype: torch.dtype | None = None,
    grad_bits: int = 16,
    save_inputs: str = DEFAULT_SAVE_INPUTS,
    average_every: int = 1,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 0.0,
) -> None:
    """Checks that choices of `attach` are known and do not exclude each other.

    Args:
        gradients: how gradients are formed: one of `GRADIENTS`.
        update: when they are applied: one of `UPDATES`.
        grad_dtype: of projected gradients that wait for `step()`; None for the gradient's own.
        grad_bits: of projected gradients that wait for `step()`: one of `GRAD_BITS`.
        save_inputs: what fused layers save of their inputs: one of `SAVE_INPUTS`.
        average_every: steps between two averages of what several processes train; 1 averages gradients.
        gradient_accumulation_steps: micro-batches whose gradients are added before a step.
        max_grad_norm: the norm to which gradients are clipped before a step; 0 for none.

    Raises:
        ValueError: naming the choice, its value and the remedy.

    Example:
        >>> check_modes("fused", "step", grad_bits=8, max_grad_norm=1.0)
        >>> check_modes("projected", "backward")
        Traceback (most recent call last):
        ...
        ValueError: gradients='projected' keeps gradients until step() and update='backward' does not; use \
gradients='full' or 'fused' with it
    """
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients is {gradients!r}; use {_one_of(GRADIENTS)}")
    if update not in UPDATES:
        raise ValueError(f"update is {update!r}; use {_one_of(UPDATES)}")
    if isinstance(grad_bits, bool) or grad_bits not in GRAD_BITS:
        raise ValueError(f"grad_bits is {grad_bits!r}; use 16 (the gradient's dtype), 8 or 4")
    _check_save_inputs(save_inputs, gradients)
    _check_average(average_every, averages_full=gradients == "full" and update == "step")
    if gradients == "projected" and update == "backward":
        raise ValueError(
            "gradients='projected' keeps gradients until step() and update='backward' does not; use gradients='full' "
            "or 'fused' with it"
        )
    if grad_dtype is not None and grad_bits != 16:
        raise ValueError(f"grad_dtype is {grad_dtype} and grad_bits is {grad_bits}; leave out one of them")
    for name, value, default in (("grad_dtype", grad_dtype, None), ("grad_bits", grad_bits, 16)):
        if value != default and (gradients == "full" or update == "backward"):
            raise ValueError(
                f"{name} is {value}, which has no effect with gradients={gradients!r}, update={update!r}: no projected "
                "gradients wait for step(). Leave it out, or use gradients='projected' or 'fused' with update='step'"
            )
    if update == "backward" and gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {gradient_accumulation_steps} and update is 'backward', which applies "
            "each gradient at once; use update='step', with gradients='projected' or 'fused' to save memory"
        )
    if update == "backward" and max_grad_norm:
        raise ValueError(
            f"max_grad_norm is {max_grad_norm} and update is 'backward', which leaves nothing to clip; set "
            "max_grad_norm=0, or use update='step'"
        )


def _check_save_inputs(save_inputs: str, gradients: str) -> None:
    if save_inputs not in SAVE_INPUTS:
        raise ValueError(f"save_inputs is {save_inputs!r}; use {_one_of(SAVE_INPUTS)}")
    if save_inputs != DEFAULT_SAVE_INPUTS and gradients != "fused":
        raise ValueError(
            f"save_inputs is {save_inputs!r}, which has no effect with gradients={gradients!r}: only fused layers "
            "choose what they save. Leave it out, or use gradients='fused'"
        )


def _check_average(every: int, *, averages_full: bool) -> None:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"average_every is {every!r}; use a whole number of at least 1")
    if every > 1 and averages_full:
        raise ValueError(
            f"average_every is {every} and gradients is 'full', which are averaged in every step; use 'projected' or "
            "'fused'"
        )


def _one_of(choices: tuple[str, ...]) -> str:
    *first, last = map(repr, choices)
    return f"{', '.join(first)} or {last}"
