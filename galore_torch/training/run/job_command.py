"""The command of a job: what tells ``galore pretrain`` from ``galore finetune``, to a user and to a comparison."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from galore_torch.training.run.command import Config, Json, Out, Resume, option, run_command
from galore_torch.training.run.records import Record
from galore_torch.training.settings.config import PresetTable, sections_of
from galore_torch.training.settings.fields import given_settings, with_settings
from galore_torch.training.settings.methods import METHODS, help_text

if TYPE_CHECKING:
    from galore_torch.training.run.job import Job

_OF_ALL = """
Ctrl-C finishes the step, saves a checkpoint and says how to go on.
It runs on a GPU if there is one; CUDA_VISIBLE_DEVICES chooses which, and is empty for the CPU.
"""


@dataclass(frozen=True)
class Amount:
    """How much a run sees: equal for all runs of a comparison.

    >>> str(Amount(409_600, "tokens")), str(Amount(1, "epochs"))
    ('409,600 tokens', '1 epoch')
    """

    count: float
    unit: str

    def __str__(self) -> str:
        count = f"{self.count:,.0f}" if self.count == int(self.count) else f"{self.count:g}"
        return f"{count} {self.unit[:-1] if self.count == 1 else self.unit}"


@dataclass(frozen=True, kw_only=True)
class JobCommand:
    """A command of ``galore`` that trains."""

    name: str
    help: str  # what it does and leaves behind
    examples: str
    presets: PresetTable[Any]  # by which every configuration is made
    preset_help: str
    help_preset: str  # the preset whose values ``--help`` shows
    offered: Sequence[str] = tuple(METHODS)  # methods to choose from
    methods: tuple[str, ...]  # what is compared by default
    load: "Callable[[], type[Job]]"  # imports what the runs are of, with Transformers
    prepare: Callable[[Any, Console], None] | None = None  # reads and caches the data for all runs, if that takes long
    advise: Callable[[str, Any, Mapping[str, Any]], None] = lambda *_: None  # of a preset, a configuration and flags
    unit: str  # what its records count: tokens or examples
    held_out: str  # what it is evaluated on, in a word
    libraries: tuple[str, ...]  # whose versions a report names, beside torch's and Transformers'
    amount: Callable[[Any], Amount]  # how much a run with a configuration sees
    scores: Callable[[Record], Mapping[str, Any]]  # a final record's scores by name, the main one first

    @property
    def epilog(self) -> str:
        """The end of ``--help``."""
        return f"[bold]Examples[/]\n\n{self.examples}\n{help_text(self.offered)}"

    def command(self) -> Callable[..., None]:
        """The command itself, with a flag for each setting."""
        presets = option(f"Recipe to start from: {', '.join(self.presets.presets)}. {self.preset_help}")
        methods = option(
            f"What is trained, and how: {', '.join(self.offered)}. Overrides preset and --config; flags override it. "
            r"[dim]\[default: galore][/]"
        )
        prepares = option("Only read, tokenize and cache the text, for runs to come.", "--prepare")

        def command(
            *,
            preset: Annotated[str | None, presets] = None,
            method: Annotated[str | None, methods] = None,
            config: Config = None,
            out: Out = None,
            resume: Resume = False,
            prepare: Annotated[bool, prepares] = False,
            json: Json = False,
            **given: Any,
        ) -> None:
            given = given_settings(given)

            def configured() -> tuple[Any, str]:
                settings = self.presets.configure(preset, config, method=method, **given)
                start = preset or (self.presets.default(given) if config is None else config.stem)
                self.advise(start, settings, given)
                return settings, f"{getattr(settings.data, 'task', start)}-{method or settings.title}"

            options = {"preset": preset, "method": method, "config": config, **given}
            instead = self.prepare if prepare else None
            run_command(self.load, self.name, configured, options, out=out, resume=resume, json=json, instead=instead)

        command.__doc__ = self.help + _OF_ALL
        return self.with_settings(command, () if self.prepare else ("prepare",))

    def with_settings(self, command: Callable[..., None], hidden: Sequence[str] = ()) -> Callable[..., None]:
        """A command with a flag for each setting of the job, but for options of its own that are hidden."""
        sections = sections_of(self.presets.config)
        return with_settings(command, sections, self.presets.presets, self.help_preset, hidden)
