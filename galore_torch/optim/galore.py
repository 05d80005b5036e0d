"""`GaLore`: gradient low-rank projection around any torch optimizer.

GaLore (arXiv 2403.03507), algorithm 2, with the optimizer as a black box. Each projected weight W has an orthonormal
basis P and coordinates c, a small tensor in that basis that is zero between steps:

    c.grad = project(W.grad);  optimizer.step();  W += scale * project_back(c);  c = 0

A parameter that is not projected is moved by the same rule directly, or has the identity as its projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from galore_torch.lowbit import Rounding
from galore_torch.optim.arguments import check_hyperparameters, checked_settings, listed, name_all, prepared
from galore_torch.optim.checkpoint import load_uncast, require_held
from galore_torch.optim.chunks import step_chunk
from galore_torch.optim.gradient_checks import StepsWithoutGradients, check_gradients, report_waiting
from galore_torch.optim.group_warnings import report_all, report_each
from galore_torch.optim.groups import check_group, is_projected, parameter_name, projection_in, require_current
from galore_torch.optim.inner_group import GroupWrites, inner_group, set_inner_groups
from galore_torch.optim.outcomes import Outcomes
from galore_torch.optim.positions import Position, positions
from galore_torch.optim.precision import check_rounding, report_precision
from galore_torch.optim.processes import SHARD, Alone, is_sharded
from galore_torch.optim.renewals import renew
from galore_torch.optim.rule import Traits
from galore_torch.optim.rules import Rules
from galore_torch.optim.state_checks import StateChecks
from galore_torch.optim.state_keys import NONFINITE, RENEWALS
from galore_torch.optim.state_size import report_unquantized
from galore_torch.optim.subspaces import Subspace, subspaces_of
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.optim.weight_cache import WeightCache
from galore_torch.projection import turn_offset


class GaLore(Optimizer):
    """Trains weights of full rank with optimizer state of low rank, with any optimizer inside.

    Parameter groups with a `rank` are projected; `param_groups` makes them from a model. Their other keys are those of
    `KEYS` in `galore_torch/group_keys.py`: `update_proj_gap`, `scale`, `proj_type` and more. Weight decay, L2 or
    decoupled as the optimizer inside has it, acts on the weight itself, before the update.

    Args:
        params: parameters or parameter groups.
        optimizer_class: of the optimizer inside. Its update must follow from gradient and state, not from the value.
        fallback_class: the class for groups without a `rank`, where `optimizer_class` cannot take them (Muon and
            vectors). Each class gets those of the arguments that it names.
        state_dtype: dtype of the coordinates, and so of the state inside; the weight's own when None. With bf16
            weights, bf16 second moments stick at beta 0.999: float32 here costs two bytes more a number.
        rounding: how updates are rounded into weights of 16 bits. `nearest` loses what is less than half of a weight's
            last digit; `stochastic` goes up or down at random, right on average, by draws that depend on the seed, the
            weight's place and the number of its step alone; `compensated` keeps what was cut off, two bytes a number.
            The latter two make all weights of 16 bits move through coordinates. None: as the
            arguments of `optimizer_class` ask (`bf16_stochastic_round`, `kahan_sum`), else to the nearest.
        skip_nonfinite: leave out a weight whose gradient is not finite, state and all. Costs a device synchronization
            a step. Without it the update is what the optimizer inside makes of such a gradient; a renewal is never
            made from one, and `nonfinite_counts` returns how many there were.
        seed: of the random numbers that decompositions use; they depend on it, the weight's place and the number of
            its renewal alone.
        group_defaults: further keys that every group gets.
        traits: what `optimizer_class` does with decay and shape, for those who know; found by a probe when None.
        **arguments: of the optimizer inside, by name.

    Attributes:
        state: a dictionary for each weight, empty before its first step. m x n is the weight, r the rank:

            * `step`: int, steps made; without it where the optimizer inside updates the weight itself.
            * `inner`: dict, the state of the optimizer inside, of tensors of r x n (m x r on the right, r x r on both
              sides), in `state_dtype` or as that optimizer keeps it.
            * `basis`: dict of factors by side (`left` m x r, `right` n x r; `mode0`, ... of a convolution), in the
              weight's dtype, or their codes and scales with `basis_bits` of 8 or 4.
            * `renewals`, `renewed_step`: int, bases found, and the step of the last.
            * `lacking`: int, columns of the basis that are zeros, for want of directions in the gradients so far;
              negative if they are looked for at the next renewal only.
            * `gap`: int, steps between two renewals of a layer with `cos_threshold`.
            * `overlaps`: float32, (queue_size,), the overlap of each new basis with the one before, newest last.
            * `captured`: float32, (), share of the gradient's energy that the last basis but one held at its end.
            * `nonfinite`: int64, (), gradients that were not finite.
            * `compensation`: of the weight's shape and dtype, what rounding has cut off; `rounding="compensated"`.
            * `residual_norm`: float32, (), the last residual's norm, which limits the next; `residual` of fira, apollo
              and alice. Of a stack of matrices, one number for each.
            * `residual_energy`: float32, (1, n) or (m, 1), mean energy outside the subspace; `residual="alice"`.

            All but `step`, `inner` and `compensation` are of projected weights alone. `optim/state_keys.py` has the
            names as constants.

    Raises:
        ValueError: an argument or a group that does not fit; nothing has been changed then.

    Example:
        >>> weight = torch.nn.Parameter(torch.randn(64, 32))
        >>> optimizer = GaLore([{"params": [weight], "rank": 4}], optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[weight]["inner"]["momentum_buffer"].shape
        torch.Size([64, 4])
    """

    _further_keys: ClassVar[frozenset[str]] = frozenset()  # that a recipe reads of a projected group
    _is_built = True

    def __init__(  # noqa: PLR0913 (each is one choice, and all but the first are named)
        self,
        params: Iterable[Any],
        optimizer_class: type[Optimizer] = torch.optim.AdamW,
        fallback_class: type[Optimizer] | None = None,
        *,
        state_dtype: torch.dtype | None = None,
        rounding: Rounding | None = None,
        skip_nonfinite: bool = False,
        seed: int = 0,
        group_defaults: Mapping[str, Any] | None = None,
        traits: Traits | None = None,
        **arguments: Any,
    ) -> None:
        params = listed(params)
        choices: dict[str, Any] = {
            "optimizer_class": optimizer_class,
            "fallback_class": fallback_class,
            "rounding": rounding,
            "state_dtype": state_dtype,
            "skip_nonfinite": skip_nonfinite,
            "seed": seed,
            "traits": traits,
        }
        check_rounding(rounding)
        self._settings = checked_settings(arguments=arguments, **choices)
        self._build_rules()
        self._is_built = False  # so that warnings about all groups come once
        super().__init__(params, {**self._rules.rule.defaults, **(group_defaults or {})})
        report_all(self.param_groups)
        report_precision(self._rules.rule, self.param_groups, rounding, state_dtype)
        self._is_built = True
        self._report(self.param_groups)

    def _build_rules(self) -> None:
        """Builds the rules from the settings, at construction and after unpickling."""
        self._cache = WeightCache()
        self._state_checks = StateChecks()
        self._written = GroupWrites()
        self._outcomes = Outcomes()
        self._rules = Rules(self._settings)
        self._without_gradients = StepsWithoutGradients()
        self._processes = Alone()  # `distributed/` puts those of the job here

    def __getstate__(self) -> dict[str, Any]:
        self._outcomes.settle_all()
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
            ValueError: a value that is not supported. The optimizer is unchanged then.
        """
        group = prepared(param_group, self.param_groups)
        if not is_projected(group):
            group = {**self._rules.fallback.defaults, **group}
        check_hyperparameters(group, self.defaults, " in a parameter group")
        self._rules.check(group, group["params"])
        if "param_names" in group:
            name_all(self.param_groups)
        super().add_param_group(group)
        self._report([group] if self._is_built else [])

    def _report(self, groups: list[dict[str, Any]]) -> None:
        report_each(groups, {*self.defaults, *self._rules.fallback.defaults, *self._further_keys}, self._rules.classes)
        report_unquantized([sized for group in groups for sized in self._sizes(group)])

    # A compiler would look into gradients that are no plain tensors. torch.compiler.disable would import it at once.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step of every parameter that has a gradient.

        Args:
            closure: computes the loss anew, with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a sparse or complex gradient, named, or a weight that `quantize_weights` has replaced; no
                parameter has been moved then.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        all_trained = self._checked_weights()
        for one in all_trained:
            require_current(one.weight)
        self._apply([one for one in all_trained if one.weight.grad is not None])
        self._without_gradients.close_step(all_trained)
        self._state_checks.note_all([one for one in all_trained if one.state])
        self._written.close(self.param_groups, self._rules.of)
        return loss

    def nonfinite_counts(self) -> dict[str, int]:
        """How many non-finite gradients each projected weight has met, for those that met any. Synchronizes."""
        held = [
            (place, int(self.state.get(place.weight, {}).get(NONFINITE, 0))) for place in positions(self.param_groups)
        ]
        return {parameter_name(place.group, place.index): count for place, count in held if count}

    def subspaces(self) -> dict[str, Subspace]:
        """How often each projected weight that has made a step renewed its basis, its gap, and how far it last moved.

        Returns:
            By the weight's name. Synchronizes.
        """
        self._outcomes.settle_all()
        held = (place.weight for place in positions(self.param_groups))
        return subspaces_of([self._trained_weight(weight) for weight in held if RENEWALS in self.state.get(weight, {})])

    def state_dict(self) -> dict[str, Any]:
        """State and groups as `torch.optim.Optimizer` has them when a GPU has told what became of the last renewals.

        Raises:
            ValueError: state of a weight that is in no group any more, and has no place among those that are saved.
        """
        self._outcomes.settle_all()
        require_held(self.state, self.param_groups, self._cache.known)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint: by name where all parameters have names on both sides, in the dtypes asked for now.

        Args:
            state_dict: from `state_dict()`, of an optimizer with the same weights in the same groups.

        Raises:
            ValueError: other shapes, another rank, `proj_type` or layout, other weights, another optimizer's state,
                or a checkpoint of galore-torch 1.0. The optimizer is unchanged then.
        """
        load_uncast(self, state_dict, super().load_state_dict, self._blank_weights)
        self._state_checks, self._written, self._cache = StateChecks(), GroupWrites(), WeightCache()
        known = self._cache.all(self.param_groups, self.state, self._new_trained_weight)
        self._state_checks.note([one for one in known if one.state])
        report_waiting(known)

    def _blank_weights(self, groups: list[dict[str, Any]]) -> list[TrainedWeight]:
        return [self._new_trained_weight(place, {}) for place in positions(groups)]

    def _checked_weights(self) -> list[TrainedWeight]:
        """All weights as the next step would see them: whatever a user may have changed is noticed or refused here."""
        all_trained = self._cache.all(self.param_groups, self.state, self._new_trained_weight)
        self._prepare([one for one in all_trained if one.state])
        return all_trained

    def _prepare(self, trained: list[TrainedWeight]) -> None:
        if self._state_checks.prepare(trained):
            self._cache.changed()  # layers that know a basis of another dtype look again

    def _known_weight(self, weight: Tensor) -> TrainedWeight:
        """What `_trained_weight` returns, for those who have called `_checked_weights` in this pass over the model."""
        trained = self._cache.known(self._processes.held(weight))
        return trained if trained is not None and trained.state else self._trained_weight(weight)

    def _trained_weight(self, weight: Tensor) -> TrainedWeight:
        """One weight as the next step would see it, its state prepared: for those who form a gradient before `step()`.

        Raises:
            ValueError: the optimizer does not hold the weight.
        """
        weight = self._processes.held(weight)
        trained = self._cache.on(weight, self.param_groups, self.state, self._new_trained_weight)
        if trained is None:
            raise ValueError(
                f"the optimizer does not hold this parameter of shape {tuple(weight.shape)}. If it was taken out of a "
                "group, set its requires_grad to False; if fully_shard, quantize_weights or load_state_dict(assign=True"
                ') put it in another\'s place, build and attach after that (gradients="full" where a trainer shards)'
            )
        self._prepare([trained])  # the gradient may still be thrown away: `_apply` alone keeps a new state
        return trained

    def _apply(self, trained: list[TrainedWeight]) -> None:
        """Renews the bases that are due, and moves the weights by their gradients. `step` closes the step.

        Args:
            trained: weights that have a gradient, checked in this pass over the model.

        Raises:
            ValueError: a sparse or complex gradient, named; no weight has been moved then.
        """
        self._processes.require(self._settings["seed"])
        check_gradients(trained)
        self._without_gradients.note(trained)
        new = [one for one in trained if not one.is_kept]
        for one in new:
            self.state[one.weight], one.is_kept = one.state, True
        chunks = self._cache.chunks(trained)
        set_inner_groups(one for chunk in chunks for one in chunk.firsts)
        self._state_checks.prepare([one for one in trained if not one.state])
        renew(trained, self._processes)
        for chunk in chunks:
            step_chunk(chunk, self._written, self._processes.agree, skip_nonfinite=self._settings["skip_nonfinite"])
        self._state_checks.note(new)  # a state that has just been made fits, and need not be tried
        self._cache.changed()

    def _sizes(self, group: dict[str, Any]) -> Iterator[tuple[str, int, Traits]]:
        """Of each weight in a group its name, how many numbers the rule moves for it, and the rule's traits."""
        _, traits = self._rules.of(group)
        for index, weight in enumerate(group["params"]):
            yield parameter_name(group, index), math.prod(projection_in(group, weight).projected_shape), traits

    def _new_trained_weight(self, place: Position, state: dict[str, Any] | None = None) -> TrainedWeight:
        group, weight = place.group, place.weight
        projected = is_projected(group)
        if projected and "stagger" not in group:
            check_group(group)  # a plain group that was given a rank
        rule, traits, through_coordinates = self._rules.of_weight(weight, group)
        held = self.state.get(weight) if state is None else state
        staggered = projected and group["stagger"]
        trained = TrainedWeight(
            weight=weight,
            name=parameter_name(group, place.index),
            group=group,
            state={} if held is None else held,
            is_kept=held is not None,
            inner_group=inner_group(group, traits) if through_coordinates else group,
            projection=projection_in(group, weight),
            rule=rule,
            traits=traits,
            through_coordinates=through_coordinates,
            dtype=self._settings["state_dtype"] or weight.dtype,
            rounding=self._rules.rounding(weight, group) if through_coordinates else "nearest",
            seed=self._settings["seed"],
            place=place.among_all,
            index=place.among_projected,
            outcomes=self._outcomes,
            turn=turn_offset(place.among_projected, place.projected, group["update_proj_gap"]) if staggered else 0,
        )
        return SHARD[0](trained, self) if is_sharded(weight) else trained
