"""The settings of a pre-training: a frozen dataclass a section, for flags, ``--config`` and run folder alike."""

from typing import ClassVar

from galore_torch.training.settings.config import TrainConfig, sections_of
from galore_torch.training.settings.fields import DType, setting, settings
from galore_torch.training.text.config import DataConfig


@settings
class ModelConfig:
    """The LLaMA that is trained."""

    hidden: int = setting(512, "Width of the residual stream.", ge=1)
    intermediate: int = setting(1376, "Width inside the MLPs.", ge=1)
    layers: int = setting(8, "Number of layers.", ge=1)
    heads: int = setting(8, "Number of attention heads; must divide hidden into even parts.", ge=1)
    dtype: DType = setting("bfloat16", "What weights and activations are stored in.")

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"heads = {self.heads} does not divide hidden = {self.hidden} into heads of even width; "
                "choose hidden as a multiple of 2 * heads."
            )


@settings
class ScheduleConfig:
    """How long, in which portions, and what is recorded on the way."""

    steps: int = setting(10_000, "Optimizer steps.", ge=1)
    batch: int = setting(512, "Sequences a step.", ge=1)
    micro_batch: int = setting(32, "Sequences at once; bounds memory and changes nothing else.", ge=1)
    gradient_checkpointing: bool = setting(
        False, "Keep no activations inside the layers: the backward computes them again, in a third more time."
    )
    warmup: float = setting(0.1, "Share of the steps over which the learning rate rises from 0.", ge=0, lt=1)
    final_lr: float = setting(0.1, "Where the cosine ends, as a share of the peak.", ge=0, le=1)
    seed: int = setting(0, "Seed of the weights, of the order of the text and of random bases.", ge=0, le=2**32 - 1)
    eval_every: int = setting(1000, "Steps between two evaluations; 0 evaluates at the end only.", ge=0)
    save_every: int = setting(1000, "Steps between two resumable checkpoints; 0 saves at the end and on Ctrl-C.", ge=0)
    report_to: str = setting(
        "none", "Trackers to report to, as Trainer names them (wandb, tensorboard, ...), by comma."
    )


@settings
class PretrainConfig(TrainConfig):
    """All that decides a pre-training's outcome. Made by `configure`, kept in the run folder as ``config.toml``."""

    model: ModelConfig
    data: DataConfig
    schedule: ScheduleConfig

    doing: ClassVar[str] = "a pre-training"

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.schedule.batch * self.data.seq


SECTIONS = sections_of(PretrainConfig)
"""Every section by its name in TOML and in `PretrainConfig`."""
