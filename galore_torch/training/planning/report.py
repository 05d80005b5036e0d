"""What ``galore plan`` finds and says: a plan by method, what fits, its table, its notes, its page."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from galore_torch.memory import KINDS, MemoryPlan
from galore_torch.training.planning.cards import Cost
from galore_torch.training.planning.config import RUN
from galore_torch.training.planning.subject import Subject
from galore_torch.training.settings.methods import METHODS
from galore_torch.units import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from galore_torch.training.page.page import Page

MB, GB = 1e6, 1e9

Smaller = tuple[str, dict[str, Any], MemoryPlan]
"""A method, settings that make it smaller, and its plan with them."""

Done = Callable[[str], None]

HEADINGS = ("weights", "grads", "states", "bases", "acts", "logits", "work", "peak", "fits")
"""Of what a plan holds of each kind, in the order of `KINDS`, and of its peak."""
LEGEND = (
    "weights to bases: what there is from the first step on; grads: before a step; acts (activations), logits and "
    "work: the most of each at a time. peak: the most of all at one time, which is less than their sum. Besides, a "
    "GPU's driver and its libraries take some 0.5 GB, and torch's work space for cuBLAS 64 MiB on an H200, less on "
    "older cards."
)


SENT = ("weights", "grads", "renew")
"""What of a step is sent."""
SEVERAL = (
    "What each of several processes needs is estimated from what one needs. The second table has what it sends around "
    "a ring, at 0.1 ms a hop: GB and its link's seconds of weights, gradients and renewals; in a step's seconds passes "
    "and traffic overlap."
)


def _figure(value: float | None) -> str:
    """Three digits of a figure, and a dash for one that is not known."""
    return "-" if value is None else f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plans of a model."""

    subject: Subject  # what is planned
    found: Mapping[str, MemoryPlan]  # by method
    memory: int | None  # what there is, in bytes; None if nobody said
    costs: Mapping[str, Cost]  # by method, where they were asked for
    left_out: Mapping[str, str]  # methods that are not planned, and why

    @classmethod
    def of(
        cls, subject: Subject, methods: Sequence[str], memory: int | None, left_out: Mapping[str, str], done: Done
    ) -> Planned:
        """Plan by each method in turn, which ``done`` is told; what differs in learning rates alone is planned once."""
        known: dict[str, tuple[MemoryPlan, Cost | None]] = {}
        found: dict[str, tuple[MemoryPlan, Cost | None]] = {}
        for method in methods:
            config = subject.settings(method)
            adapter = config.adapter.adapter.removeprefix("re")
            of_memory = dataclasses.replace(config.optimizer, lr=1.0, others_lr=None)
            key = f"{of_memory}{adapter}{config.adapter.adapter_rank}{config.schedule.batch}"
            found[method] = known[key] = known.get(key) or subject.planned(method)
            done(method)
        costs = {method: price for method, (_, price) in found.items() if price is not None}
        plans = {name: one for name, (one, _) in found.items()}
        return cls(subject=subject, found=plans, memory=memory, costs=costs, left_out=left_out)

    def fits(self, one: MemoryPlan) -> bool:
        """Whether there is a memory that a plan fits."""
        return self.memory is not None and one.peak_bytes <= self.memory

    @property
    def least(self) -> str:
        """The method that needs least."""
        return min(self.found, key=lambda name: self.found[name].peak_bytes)

    @property
    def best(self) -> str | None:
        """What fits and gives up least."""
        return next((name for name in self._by_what_is_given_up if self.fits(self.found[name])), None)

    @property
    def _by_what_is_given_up(self) -> list[str]:
        """Methods, the one that gives up least first: adapters last, then weights, updates and states as they are."""

        def given_up(method: str) -> tuple[Any, ...]:
            config = self.subject.settings(method)
            return (
                config.adapter.adapter != "none",
                config.optimizer.weight_bits == 8,
                config.optimizer.update == "backward",
                "8bit" in config.optimizer.optim,
                [*METHODS, RUN].index(method),
            )

        return sorted(self.found, key=given_up)

    @cached_property
    def instead(self) -> Smaller | None:
        """Where none fits: the method that needs least, with settings by which it fits, or as small as it gets."""
        return self._smaller(self.least) if self.memory is not None and self.best is None else None

    @cached_property
    def usual(self) -> Smaller | None:
        """Where none fits: the method that gives up least of those that fit by the like settings, but for `instead`."""
        if self.instead is None or self.memory is None:
            return None
        for method in self._by_what_is_given_up:
            held = self.found[method].held
            if method == self.least:
                return None
            if sum(held[kind] for kind in ("weights", "gradients", "states", "bases")) < self.memory:
                found = self._smaller(method)
                if self.fits(found[2]):
                    return found
        return None

    def _smaller(self, method: str) -> Smaller:
        """Settings with which a method fits, and its plan with them; the smallest where none does.

        Activations are computed again, and rows are ever fewer.
        """
        config = self.subject.settings(method)
        micro_batch = self.subject.micro_batch(config)
        given: dict[str, Any] = {"gradient_checkpointing": True}
        while True:
            changed = dataclasses.replace(self.subject, given={**self.subject.given, **given})
            found, _ = changed.planned(method)
            if self.fits(found) or micro_batch == 1:
                return method, given, found
            micro_batch = next(rows for rows in range(micro_batch // 2, 0, -1) if micro_batch % rows == 0)
            given |= {"micro_batch": micro_batch}
            if method == self.least or config.optimizer.update == "backward":  # which leaves nothing to accumulate
                given |= {"batch": micro_batch * self.subject.cards.world_size}

    @property
    def title(self) -> str:
        """The model and its batch."""
        first = next(iter(self.found))
        config, one = self.subject.settings(first), self.found[first]
        rows = f"{self.subject.micro_batch(config)} sequences of {config.data.seq} tokens at once"
        cards = self.subject.cards
        each = f", in each of {cards.world_size} processes ({cards.parallel})" if cards.world_size > 1 else ""
        return f"{self.subject.name}: {one.parameters:,} parameters in {self.subject.model.dtype}, {rows}{each}"

    @property
    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Headings and rows of what each method needs, and of what a step costs, where that was asked for."""
        called, unit = self._unit
        headings = [called, *(HEADINGS if self.memory is not None else HEADINGS[:-1])]
        rows = [[name, *self._cells(one, unit)] for name, one in self.found.items()]
        if not self.costs:
            return [(headings, rows)]
        costs = []
        for name, one in self.costs.items():
            sent = ((size / GB, one.link_seconds.get(kind)) for kind, size in one.sent_bytes.items())
            costs.append([name, *map(_figure, (*itertools.chain(*sent), one.step_seconds, one.days))])
        of_costs = ["GB a step", *(name for kind in SENT for name in (kind, "s")), "step, s", "days"]
        return [(headings, rows), (of_costs, costs)]

    @property
    def _unit(self) -> tuple[str, float]:
        """In which all plans are told, and its bytes."""
        return ("GB", GB) if max(one.peak_bytes for one in self.found.values()) >= GB else ("MB", MB)

    def _cells(self, one: MemoryPlan, unit: float) -> list[str]:
        unknown = ("activations", "logits", "work") if one.untraced is not None else ()
        most = max(each.peak_bytes for each in self.found.values()) / GB
        digits = 2 if 1 <= most < 100 else 1  # of GB, and one of MB, so that names have room beside them
        held = ["?" if kind in unknown else f"{one.held[kind] / unit:.{digits}f}" for kind in KINDS]
        peak = f"{'>' if unknown else ''}{one.peak_bytes / unit:.{digits}f}"
        return [*held, peak, *([] if self.memory is None else ["yes" if self.fits(one) else "no"])]

    @property
    def texts(self) -> list[str]:
        """What is said below it."""
        lines = [LEGEND]
        full = self.found.get("full")
        for method, one in self.found.items():
            if one.untraced is not None:
                lines.append(
                    f"{method}: activations, logits and work are not known, and peak is without them, for the forward "
                    f"cannot be made without numbers: {one.untraced}"
                )
            held = one.held
            if full is not None and held["bases"] and held["states"] + held["bases"] >= full.held["states"]:
                lines.append(
                    f"{method}: its rank saves nothing; states and bases take what full's states take, or more."
                )
        shown = self.best or self.least
        peak = self.found[shown].peak
        kind = max(peak, key=lambda name: peak[name])
        lines.append(f"{shown}: the most of its peak, {readable(peak[kind])}, is {kind}.")
        if self.memory is not None:
            lines.append(self._verdict(self.memory))
        if self.subject.cards.world_size > 1:
            lines.append(SEVERAL)
        for why in dict.fromkeys(self.left_out.values()):
            names = ", ".join(name for name, one in self.left_out.items() if one == why)
            lines.append(f"Left out: {names}. {why}")
        return lines

    def _verdict(self, memory: int) -> str:
        if self.instead is None:
            taken = readable(self.found[str(self.best)].peak_bytes)
            return f"Fits {readable(memory)} and gives up least: {self.best}, {taken}."
        lines = [self._with_settings(memory, *one) for one in (self.instead, self.usual) if one is not None]
        return f"None fits {readable(memory)}. {' '.join(lines)}"

    @staticmethod
    def _with_settings(memory: int, method: str, given: Mapping[str, Any], one: MemoryPlan) -> str:
        flags = " ".join(
            f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}" for name, value in given.items()
        )
        lacks = one.peak_bytes - memory
        end = "fits" if lacks <= 0 else f"lacks {readable(lacks)}: the smallest plan there is"
        return f"{method} with {flags}: {readable(one.peak_bytes)}, {end}."

    def as_json(self) -> dict[str, Any]:
        """All of it for a script."""

        def with_settings(one: Smaller | None) -> dict[str, Any] | None:
            return None if one is None else {"method": one[0], "settings": one[1], **one[2].as_json()}

        costs = {name: {"cost": dataclasses.asdict(one)} for name, one in self.costs.items()}
        return {
            "model": self.subject.name,
            "memory_bytes": self.memory,
            "world_size": self.subject.cards.world_size,
            "parallel": self.subject.cards.parallel,
            "best": self.best,
            "instead": with_settings(self.instead),
            "usual": with_settings(self.usual),
            "left_out": self.left_out,
            "methods": {name: one.as_json() | costs.get(name, {}) for name, one in self.found.items()},
        }

    def page(self, command: str) -> Page:
        """A page with the table and a stacked bar for each method, made by a command."""
        from galore_torch.training.page.page import Page  # with matplotlib, which the table does without

        made = Page("Memory, planned", self.title)
        for columns, rows in self.tables:
            made.table(columns, rows)
        for text in self.texts:
            made.text(text)
        made.figure(self._chart(), "What there is of each kind at the moment when a method needs the most.")
        made.heading("How it was made")
        made.code(command)
        return made

    def _chart(self) -> Figure:
        from galore_torch.training.run.plots import COLORS, GRAY, new_axes

        names = list(self.found)[::-1]
        called, unit = self._unit
        figure, axes = new_axes(called, "", size=(5.8, 1.2 + 0.28 * len(names)))
        start = [0.0] * len(names)
        for kind, color in zip(KINDS, COLORS, strict=False):
            widths = [self.found[name].peak[kind] / unit for name in names]
            axes.barh(names, widths, left=start, color=color, label=kind)
            start = [one + width for one, width in zip(start, widths, strict=True)]
        if self.memory is not None:
            axes.axvline(self.memory / unit, color=GRAY, linestyle="--")
        axes.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        return figure
