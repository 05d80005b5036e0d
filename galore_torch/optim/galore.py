"""`GaLore`: gradient low-rank projection around any torch optimizer.

GaLore (arXiv 2403.03507), algorithm 2, with the optimizer as a black box. Each projected weight W has an orthonormal
basis P and coordinates c, a small tensor in that basis that is zero between steps:

    c.grad = project(W.grad);  optimizer.step();  W += scale * project_back(c);  c = 0

A parameter that is not projected is moved by the same rule directly, or has the identity as its projection.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from galore_torch.optim.checkpoint import load_uncast
from galore_torch.optim.groups import check_group, is_projected, parameter_name, projection_in
from galore_torch.optim.probe import probe
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.rule import DECLARED, Lent, Rule, Traits
from galore_torch.projection import Projection, find_basis, is_due, turn_offset

CHUNK_ELEMENTS = 2**23
"""Coordinates that are stepped together: enough to keep a device busy, few enough to bound memory."""


@dataclass(slots=True)
class _Work:
    """One weight in one step. `lent_group` is its group as the rule sees it; `turn` its offset within the gap."""

    weight: Tensor
    grad: Tensor
    name: str
    group: dict[str, Any]
    lent_group: dict[str, Any]
    state: dict[str, Any]
    projection: Projection
    rule: Rule
    traits: Traits
    index: int
    turn: int = 0


class GaLore(Optimizer):
    """Trains weights of full rank with optimizer state of low rank, with any optimizer inside.

    Parameter groups with a `rank` are projected; `param_groups` makes them from a model. Their keys: `rank`;
    `update_proj_gap` (steps between two renewals of a basis, 200); `scale` (factor of the update, 0.25); `proj_type`
    (`std`, `reverse_std`, `left`, `right`, `full`); `decomposition` (`svd`, `randomized`, `warm`, `random`);
    `stagger` (layers take turns to renew, True); `layout` (of weights of more than two dimensions: `tucker`,
    `stack`, `reshape`).

    Decay acts on the weight itself, as the optimizer inside would apply it there: L2 or decoupled, before the update.

    Args:
        params: parameters or parameter groups.
        optimizer: the class of the optimizer inside. Its update must follow from gradient and state alone; one that
            reads the parameter's value is refused by name.
        others: the class for the groups without a `rank`, where `optimizer` cannot hold them (Muon and vectors). Both
            classes get those of the arguments that they name.
        state_dtype: dtype of the coordinates, and so of the state inside; the weight's own when None. With bf16
            weights, bf16 second moments stick at beta 0.999: float32 here costs two bytes more a number.
        skip_nonfinite: leave out a weight whose gradient is not finite, state and all. Costs a device synchronization
            a step. Without it the update is what the optimizer inside makes of such a gradient; a renewal is never
            made from one, and `nonfinite_counts` tells how many there were.
        seed: of the random numbers that decompositions use; they depend on it, the weight's place and the number of
            its renewal alone.
        group_defaults: further keys that every group gets.
        traits: what `optimizer` does with decay and shape, for those who know; found by a probe when None.
        **arguments: of the optimizer inside, by name.

    Raises:
        ValueError: an argument or a group that cannot be served; nothing has been changed then.

    Example:
        >>> weight = torch.nn.Parameter(torch.randn(64, 32))
        >>> optimizer = GaLore([{"params": [weight], "rank": 4}], optimizer=torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[weight]["inner"]["momentum_buffer"].shape
        torch.Size([64, 4])
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer: type[Optimizer] = torch.optim.AdamW,
        others: type[Optimizer] | None = None,
        *,
        state_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
        seed: int = 0,
        group_defaults: Mapping[str, Any] | None = None,
        traits: Traits | None = None,
        **arguments: Any,
    ) -> None:
        self._settings: dict[str, Any] = {
            "optimizer": optimizer,
            "others": others,
            "state_dtype": state_dtype,
            "skip_nonfinite": skip_nonfinite,
            "seed": seed,
            "traits": traits,
            "arguments": arguments,
        }
        self._build_rules()
        super().__init__(params, {**self._rule.defaults, **(group_defaults or {})})

    def _build_rules(self) -> None:
        """Builds the rules from the settings, at construction and after unpickling."""
        kept = self._settings
        classes = [one for one in (kept["optimizer"], kept["others"]) if one is not None]
        shares = _share(classes, kept["arguments"])
        self._rule = Rule(classes[0], shares[0])
        self._traits: Traits = kept["traits"] or DECLARED.get(self._rule.name) or probe(self._rule)
        self._others, self._others_traits = self._rule, self._traits
        if kept["others"] is not None:
            self._others, self._others_traits = Rule(classes[-1], shares[-1]), Traits()
            if kept["state_dtype"] is not None:  # then its parameters move through coordinates too
                self._others_traits = DECLARED.get(self._others.name) or probe(self._others)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_settings" in state:
            self._build_rules()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, also after steps were made.

        Args:
            param_group: with `params` and any keys; one with a `rank` is projected.

        Raises:
            ValueError: a value that cannot be served. The optimizer is unchanged then.
        """
        given = param_group["params"]
        group = {**param_group, "params": [given] if isinstance(given, Tensor) else list(given)}
        named = [entry for entry in group["params"] if isinstance(entry, tuple)]
        if named:
            group["params"] = [tensor for _, tensor in named]
            group["param_names"] = [name for name, _ in named]
        check_group(group)
        if not is_projected(group):
            _check_held(self._settings, {weight.dim() for weight in group["params"]})
            group = {**self._others.defaults, **group}
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Makes one step of every parameter that has a gradient.

        Args:
            closure: computes the loss anew, with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a sparse or complex gradient, named; no parameter has been moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self._gather()
        self._renew(work)
        for chunk in _chunks(work):
            self._move(self._finite(chunk))
        return loss

    def nonfinite_counts(self) -> dict[str, int]:
        """How many non-finite gradients each projected weight has met, for those that met any. Synchronizes."""
        counts = {}
        for group in self.param_groups:
            for index, weight in enumerate(group["params"]):
                count = int(self.state.get(weight, {}).get("nonfinite", 0))
                if count:
                    counts[parameter_name(group, index)] = count
        return counts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint, keeping every dtype as it was saved.

        Args:
            state_dict: from `state_dict()`, of an optimizer with the same groups.

        Raises:
            ValueError: another rank, `proj_type` or layout, another number of parameters, or a checkpoint of
                galore-torch 1.0. The optimizer is unchanged then.
        """
        load_uncast(self, state_dict, super().load_state_dict)

    # How a step is made

    def _gather(self) -> list[_Work]:
        """All weights that have a gradient. Everything is checked before anything moves."""
        count = sum(len(group["params"]) for group in self.param_groups if is_projected(group))
        work, place = [], 0
        for group in self.param_groups:
            projected = is_projected(group)
            rule, traits = (self._rule, self._traits) if projected else (self._others, self._others_traits)
            lent_group = self._lent(group, traits, projected=projected)
            for index, weight in enumerate(group["params"]):
                place += projected
                if weight.grad is None:
                    continue
                name = parameter_name(group, index)
                _check_gradient(weight.grad, name)
                one = _Work(
                    weight=weight,
                    grad=weight.grad,
                    name=name,
                    group=group,
                    lent_group=lent_group,
                    state=self.state[weight],
                    projection=projection_in(group, weight),
                    rule=rule,
                    traits=traits,
                    index=place - 1,
                )
                if projected and group["stagger"]:
                    one.turn = turn_offset(one.index, count, group["update_proj_gap"])
                work.append(one)
        for one in work:
            self._prepare_state(one)
        return work

    def _lent(self, group: dict[str, Any], traits: Traits, *, projected: bool) -> dict[str, Any]:
        """A group as the rule sees it: without the decay where that is served from the weight."""
        given = traits.given(group) if traits.given else {}
        if "weight_decay" in group and (projected or self._through_coordinates(traits)):
            given = {**given, "weight_decay": 0.0}
        return {**group, **given}

    def _through_coordinates(self, traits: Traits) -> bool:
        """Whether parameters that are not projected move through coordinates too (of the identity)."""
        return traits.reads_weight or self._settings["state_dtype"] is not None

    def _prepare_state(self, one: _Work) -> None:
        """All keys and shapes of the state exist from the first step on, also if its gradient is zero."""
        if "step" in one.state or not (one.projection.modes or self._through_coordinates(one.traits)):
            return
        one.state["step"] = 0
        if one.projection.modes:
            one.state["renewals"], one.state["renewed_step"] = 0, -1
            one.state["nonfinite"] = torch.zeros((), dtype=torch.int64, device=one.weight.device)
            shapes = one.projection.factor_shapes
            one.state["basis"] = {name: one.weight.new_zeros(shape) for name, shape in shapes.items()}

    def _renew(self, work: list[_Work]) -> None:
        """Finds a new basis for the weights whose turn it is, from gradients that are finite and not zero."""
        due = [
            one
            for one in work
            if one.projection.modes
            and not isinstance(one.grad, ProjectedGradient)
            and is_due(one.state["step"], one.state["renewed_step"], one.group["update_proj_gap"], one.turn)
        ]
        if not due:
            return
        for one, norm in zip(due, _norms([one.grad for one in due]).tolist()):
            if 0 < norm < float("inf"):
                self._renew_one(one)

    def _renew_one(self, one: _Work) -> None:
        state = one.state
        generator = torch.Generator(device=one.grad.device)
        seed = (self._settings["seed"] * 1_000_003 + one.index) * 1_000_003 + state["renewals"]
        generator.manual_seed(seed % 2**63)
        old = state["basis"] if state["renewals"] else None
        try:
            basis = find_basis(one.projection, one.grad, one.group["decomposition"], generator=generator, old=old)
        except torch.linalg.LinAlgError as error:
            warnings.warn(f"{one.name} keeps its basis for now: the decomposition failed ({error})", stacklevel=3)
            return
        state["basis"] = {name: factor.to(one.weight.dtype) for name, factor in basis.items()}
        state["renewals"] += 1
        state["renewed_step"] = state["step"]

    def _finite(self, chunk: list[_Work]) -> list[tuple[_Work, Tensor]]:
        """Each weight with its image (or gradient); counts those that are not finite, and drops them if asked to."""
        pairs = [(one, self._image(one)) for one in chunk]
        skip = self._settings["skip_nonfinite"]
        watched = [(one, image) for one, image in pairs if skip or one.projection.modes]
        if not watched:
            return pairs
        # A number that is not finite spoils a whole slice of the image across its projected axes: looking at the
        # first entries along them is enough.
        slices = [_across(image, one.projection) for one, image in watched]
        bad = _norms(slices).isfinite().logical_not_()
        counters, marks = [], []
        for (one, _), mark in zip(watched, bad.unbind()):
            if one.projection.modes:
                counters.append(one.state["nonfinite"])
                marks.append(mark)
        if counters:
            torch._foreach_add_(counters, marks)
        if not skip:
            return pairs
        return [pair for pair, is_bad in zip(watched, bad.tolist()) if not is_bad]

    def _image(self, one: _Work) -> Tensor:
        """The image of the weight's gradient, with L2 decay: R = P^T (G + decay * W)."""
        if not (one.projection.modes or self._through_coordinates(one.traits)):
            return one.grad
        basis = one.state.get("basis", {})
        if isinstance(one.grad, ProjectedGradient):
            image = one.grad.image_in(one.projection, basis)
        else:
            image = one.projection.project(one.grad, basis)
        image = image.to(self._settings["state_dtype"] or one.weight.dtype)
        decay = one.group.get("weight_decay", 0)
        if one.traits.decay == "l2" and decay != 0:
            sign = -1 if one.group.get("maximize") else 1
            image = image.add(one.projection.project(one.weight, basis), alpha=sign * decay)
        return image

    def _move(self, pairs: list[tuple[_Work, Tensor]]) -> None:
        """One step of a chunk: the rule moves coordinates (or parameters), which are folded into the weights."""
        lent = []
        for one, image in pairs:
            moves_weight = not (one.projection.modes or self._through_coordinates(one.traits))
            tensor = one.weight if moves_weight else torch.zeros_like(image)
            lent.append(Lent(tensor=tensor, grad=image, state=one.state.get("inner", {}), group=one.lent_group))
        if not lent:
            return
        pairs[0][0].rule.step(lent)
        for (one, _), loan in zip(pairs, lent):
            if loan.state:
                one.state["inner"] = loan.state
            if loan.tensor is not one.weight:
                one.state["step"] += 1
                self._fold(one, loan.tensor)

    def _fold(self, one: _Work, coordinates: Tensor) -> None:
        """W <- (1 - lr * decay) * W + scale * project_back(c)."""
        group, traits, step = one.group, one.traits, one.state["step"]
        alpha: Any = group["scale"] if one.projection.modes else 1.0
        beta: Any = 1.0
        if traits.decay == "decoupled" and group.get("weight_decay", 0) != 0:
            lr = traits.learning_rate(group, one.weight, step) if traits.learning_rate else group["lr"]
            beta = 1 - lr * group["weight_decay"]
        if traits.factor:
            alpha = alpha * traits.factor(group, one.weight, step, one.projection.image_shape)
        if isinstance(alpha, Tensor):
            coordinates.mul_(alpha)
            alpha = 1.0
        if isinstance(beta, Tensor):
            one.weight.mul_(beta)
            beta = 1.0
        one.projection.fold(one.weight, coordinates, one.state.get("basis", {}), alpha=alpha, beta=beta)


def _share(classes: list[type[Optimizer]], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Which of the arguments each class gets: all, if there is one class; else those that it names."""
    if len(classes) == 1:
        return [arguments]
    shares = []
    for one in classes:
        named = inspect.signature(one).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values())
        shares.append({key: value for key, value in arguments.items() if takes_any or key in named})
    unknown = arguments.keys() - shares[0].keys() - shares[1].keys()
    if unknown:
        both = " and ".join(one.__name__ for one in classes)
        raise ValueError(f"{both} have no argument named {', '.join(sorted(unknown))}; check the spelling")
    return shares


def _check_held(settings: dict[str, Any], dimensions: set[int]) -> None:
    """Checks that the rule of the groups without a rank takes parameters of so many dimensions."""
    classes = [one for one in (settings["optimizer"], settings["others"]) if one is not None]
    for count in sorted(dimensions):
        try:
            Rule(classes[-1], _share(classes, settings["arguments"])[-1], dimensions=count)
        except ValueError as error:
            raise ValueError(
                f"{classes[-1].__name__} cannot hold the parameters that are not projected: {error}. Name a class for "
                "them, for example others=torch.optim.AdamW"
            ) from error


def _check_gradient(grad: Tensor, name: str) -> None:
    if grad.layout is not torch.strided:
        raise ValueError(f"the gradient of {name} is sparse; use dense gradients (sparse=False in embeddings)")
    if grad.is_complex():
        raise ValueError(f"the gradient of {name} is complex; GaLore trains real weights")


def _norms(tensors: list[Tensor]) -> Tensor:
    """The norms of tensors on any devices, as one vector on the first one's; no short dtype overflows."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    device = tensors[0].device
    return torch.stack([norm.to(device) for norm in torch._foreach_norm(tensors, 2, dtype)])


def _across(image: Tensor, projection: Projection) -> Tensor:
    for mode in projection.modes:
        image = image.narrow(mode.axis, 0, 1)
    return image


def _chunks(work: list[_Work]) -> Iterator[list[_Work]]:
    """Consecutive weights of one rule and device, up to `CHUNK_ELEMENTS` coordinates; all of a rule if it must be."""
    chunk: list[_Work] = []
    elements = 0
    for one in sorted(work, key=lambda one: (id(one.rule), str(one.weight.device))):
        size = one.weight.numel() if not one.projection.modes else torch.Size(one.projection.image_shape).numel()
        new_kind = chunk and (chunk[-1].rule is not one.rule or chunk[-1].weight.device != one.weight.device)
        full = one.traits.many_calls and elements + size > CHUNK_ELEMENTS
        if chunk and (new_kind or full):
            yield chunk
            chunk, elements = [], 0
        chunk.append(one)
        elements += size
    if chunk:
        yield chunk
