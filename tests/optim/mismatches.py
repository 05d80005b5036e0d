"""Random checkpoints that do not fit, each loaded and judged: in a process of its own, for loading one might end it.

`main` prints a line for each, and "done" at the end. Every one must be refused with a ValueError that names a weight
and leaves everything as it was, or be loaded right: the state of each weight is the saved one, in the dtypes asked for.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from galore_torch.projection import subspace
from tests.optim.recipes import RECIPES
from tests.optim.small import copied, snapshot, walk

SHAPES = {"a": (24, 16), "b": (16, 24), "c": (24, 16), "d": (16, 8), "e": (40, 12), "f": (16,), "g": (8, 6, 5)}
PROJECTED = ("a", "b", "c", "g")
DTYPES = (torch.float32, torch.bfloat16)
ANY_DTYPE = (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.cfloat,
)

_SAVED: dict[tuple[Any, ...], list[dict[str, Any]]] = {}


class Case:
    """A saved state, and the optimizer that it is to be loaded into; mutations change one of them."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.recipe = self.dice.choice(list(RECIPES))
        if "Muon" in self.recipe:  # it takes no tensor of one dimension and none of three
            self.shapes = {name: shape for name, shape in SHAPES.items() if len(shape) < 3}
        else:
            self.shapes = dict(SHAPES)
        self.keys = {"update_proj_gap": 2, "rank": 4, "basis_bits": self.dice.choice([16, 16, 8, 4])}
        self.dtype, self.arguments = self.dice.choice(DTYPES), {}
        self.is_named = self.dice.random() < 0.7
        self.order = list(self.shapes)
        self.swap_groups = False
        self.saved = self._saved(self.dice.choice([1, 2, 3]))
        self.names = dict(enumerate(name for group in self.split() for name in group))
        self.meant = set(self.saved["state"])

    def _saved(self, steps: int) -> dict[str, Any]:
        """What is saved after one, two or three steps. Cases that begin alike differ in what is wrong alone."""
        alike = (self.recipe, self.keys["basis_bits"], self.dtype)
        if alike not in _SAVED:
            weights, optimizer = self.made()
            _SAVED[alike] = []
            for step in range(3):
                walk(optimizer, [weights[name] for name in self.order], range(step, step + 1))
                _SAVED[alike].append(copied(optimizer.state_dict()))
        saved: dict[str, Any] = copied(_SAVED[alike][steps - 1])
        for group, names in zip(saved["param_groups"], self.split(), strict=True):
            group.pop("param_names", None)
            if self.is_named:
                group["param_names"] = names
        return saved

    def split(self) -> list[list[str]]:
        groups = [[n for n in self.order if n in PROJECTED], [n for n in self.order if n not in PROJECTED]]
        return groups[::-1] if self.swap_groups else groups

    def made(self) -> tuple[dict[str, nn.Parameter], Optimizer]:
        weights = {
            name: nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.dtype))
            for name, shape in self.shapes.items()
        }
        groups = []
        for names in self.split():
            group: dict[str, Any] = {"params": [weights[name] for name in names]}
            if names and names[0] in PROJECTED:
                group |= self.keys
            if self.is_named:
                group["param_names"] = names
            groups.append(group)
        return weights, RECIPES[self.recipe](groups, **self.arguments)

    # What may be wrong ---------------------------------------------------------------------------------------------

    def a_tensor(self) -> tuple[dict[str, Any], str]:
        """Where one tensor of the saved state is."""
        found: list[tuple[dict[str, Any], str]] = []

        def look(tree: dict[str, Any]) -> None:
            for key, value in tree.items():
                if isinstance(value, dict):
                    look(value)
                elif isinstance(value, Tensor):
                    found.append((tree, key))

        look(self.saved["state"])
        return self.dice.choice(found)

    def a_dictionary(self) -> dict[str, Any]:
        tree = self.saved["state"][self.dice.choice(list(self.saved["state"]))]
        while self.dice.random() < 0.6 and (inner := [value for value in tree.values() if isinstance(value, dict)]):
            tree = self.dice.choice(inner)
        return tree  # type: ignore[no-any-return]

    def shape_of_a_tensor(self) -> None:
        tree, key = self.a_tensor()
        value = tree[key]
        changes: list[Callable[[Tensor], Tensor]] = [
            lambda t: t.flatten()[:-1], lambda t: torch.cat((t.flatten(), t.flatten()[:1])), lambda t: t[None],
            lambda t: t.reshape(-1, 1), lambda t: t.new_zeros(0), lambda t: t.new_zeros(100, 7),
            lambda t: t.new_zeros(()),
        ]  # fmt: skip
        if value.dim() > 1:
            changes += [lambda t: t.transpose(0, 1).contiguous(), lambda t: t[:-1], lambda t: torch.cat((t, t[:1]))]
        tree[key] = self.dice.choice(changes)(value)

    def dtype_of_a_tensor(self) -> None:
        tree, key = self.a_tensor()
        tree[key] = tree[key].to(self.dice.choice(ANY_DTYPE))

    def no_tensor(self) -> None:
        tree, key = self.a_tensor()
        tree[key] = self.dice.choice([None, "codes", 3, 2.5, True, [1.0], {}, {"codes": torch.zeros(3)}])

    def a_missing_key(self) -> None:
        tree = self.a_dictionary()
        if tree:
            tree.pop(self.dice.choice(list(tree)))

    def a_foreign_key(self) -> None:
        name = self.dice.choice(["extra", "exp_avg", "momentum_buffer", "basis", "inner", "slice0", "state1"])
        self.a_dictionary()[name] = self.dice.choice(
            [torch.zeros(4), torch.zeros(24, 4), 7, {}, {"exp_avg": torch.zeros(2)}]
        )

    def a_missing_state(self) -> None:
        self.saved["state"].pop(self.dice.choice(list(self.saved["state"])))

    def another_ones_state(self) -> None:
        one, other = self.dice.sample(sorted(self.saved["state"]), 2)
        state = self.saved["state"]
        state[one], state[other] = state[other], state[one]

    def an_unknown_parameter(self) -> None:
        self.saved["state"][99] = copied(self.saved["state"][0])

    def a_parameter_less_or_twice(self) -> None:
        listed = self.dice.choice(self.saved["param_groups"])["params"]
        listed.append(listed[0]) if self.dice.random() < 0.5 else listed.pop()

    def order_of_weights(self) -> None:
        self.dice.shuffle(self.order)

    def order_of_groups(self) -> None:
        self.swap_groups = True

    def shape_of_a_weight(self) -> None:
        name = self.dice.choice(list(self.shapes))
        shape = list(self.shapes[name])
        shape[self.dice.randrange(len(shape))] = self.dice.choice([1, 3, 30, 1000])
        self.shapes[name] = tuple(shape)

    def keys_of_a_group(self) -> None:
        self.keys |= self.dice.choice(
            [{"rank": 2}, {"rank": 9}, {"proj_type": "std", "layout": "reshape"}, {"layout": "stack"},
             {"basis_bits": 8}, {"basis_bits": 4}, {"basis_group_size": 64}, {"queue_size": 3}]
        )  # fmt: skip

    def dtype_of_weights(self) -> None:
        self.dtype = DTYPES[self.dtype == DTYPES[0]]

    def dtype_of_state(self) -> None:
        self.arguments = {"state_dtype": self.dice.choice([torch.float32, torch.bfloat16, torch.float64])}

    def recipe_itself(self) -> None:
        names = [name for name in RECIPES if "Muon" not in name]
        self.recipe = self.dice.choice(names)

    def names_of_weights(self) -> None:
        for group in self.saved["param_groups"]:
            if "param_names" in group:
                group["param_names"] = [self.dice.choice(["", "", "x"]) + name for name in group["param_names"]]


MUTATIONS = [
    value for name, value in vars(Case).items() if callable(value) and name[0] != "_"
    and name not in ("split", "made", "a_tensor", "a_dictionary")
]  # fmt: skip


def judge(seed: int) -> str:
    """Loads one such checkpoint.

    Returns:
        What happened; it begins with "wrong" if it should not have.
    """
    case = Case(seed)
    said = []
    for mutate in case.dice.sample(MUTATIONS, case.dice.choice([1, 1, 2])):
        mutate(case)
        said.append(mutate.__name__)
    told = f"{seed} {case.recipe}: {', '.join(said)}:"
    weights, optimizer = case.made()
    walk(optimizer, [weights[name] for name in case.order], range(case.dice.choice([0, 1])))
    before = snapshot(optimizer)
    given = copied(case.saved)
    try:
        optimizer.load_state_dict(given)
    except ValueError as error:
        names = [f"{name}" for name in case.shapes] if case.is_named else ["parameter"]
        if not any(f" {name}" in f" {error}" for name in [*names, "parameter"]):
            return f"wrong {told} names no weight: {error}"
        if not _equal(before, snapshot(optimizer)):
            return f"wrong {told} refused, and something has changed: {error}"
        walk(optimizer, [weights[name] for name in case.order], [1])
        return f"refused {told} {error}"
    except Exception as error:
        return f"wrong {told} {type(error).__name__}: {error}"
    different = _difference(case, weights, optimizer)
    if different:
        return f"wrong {told} {different}"
    walk(optimizer, [weights[name] for name in case.order], range(3, 5))  # in which each basis is renewed
    return f"loaded {told}"


def _judged(seed: int) -> str:
    try:
        return judge(seed)
    except Exception as error:
        return f"wrong {seed}: {type(error).__name__}: {error}"


def _difference(case: Case, weights: dict[str, nn.Parameter], optimizer: Optimizer) -> str:
    """Where a loaded state is not the saved one of its weight."""
    ours = [name for group in case.split() for name in group]
    by_name = case.is_named and all("param_names" in group for group in case.saved["param_groups"])
    for at, name in case.names.items():
        mine = name if by_name else ours[at]
        wanted, found = case.saved["state"].get(at, {}), optimizer.state.get(weights[mine], {})
        if at in case.meant and wanted:
            wrong = _unlike(wanted, found, mine)
            if wrong:
                return wrong
    return ""


def _unlike(wanted: Any, found: Any, path: str) -> str:
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return f"{path} is gone"
        pairs = ((key, value) for key, value in wanted.items() if key not in ("overlaps", "step") or key in found)
        return next((said for key, value in pairs if (said := _unlike(value, found.get(key), f"{path}.{key}"))), "")
    if isinstance(wanted, Tensor) and isinstance(found, Tensor) and path.endswith("overlaps"):
        return ""  # may be cut to the group's queue_size
    as_tensors = [torch.as_tensor(value) for value in (wanted, found)]
    wanted, found = (value.to(torch.float64) if not value.is_complex() else value for value in as_tensors)
    same = wanted.shape == found.shape and torch.allclose(wanted, found, rtol=2**-7, atol=1e-30, equal_nan=True)
    return "" if same else f"{path} is {found.shape}, not as it was saved"


def _equal(one: Any, other: Any) -> bool:
    """Whether two snapshots are."""
    try:
        torch.testing.assert_close(one[:2], other[:2], rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return bool(one[2] == other[2])


def main(first: int, count: int) -> None:
    """Judges some, one line each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    subspace.TUCKER_SWEEPS = 1  # the others would do the same again
    for seed in range(first, first + count):
        print(_judged(seed), flush=True)
    print("done", flush=True)
