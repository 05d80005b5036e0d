"""The settings of a pre-training: a frozen dataclass a section, for flags, ``--config`` and run folder alike."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from galore_torch.training.run.model_files import require_causal, require_length, require_weights
from galore_torch.training.run.names import model_of_run, require_model
from galore_torch.training.settings.config import TrainConfig
from galore_torch.training.settings.fields import (
    DType,
    Parallel,
    Purpose,
    RunConfig,
    require_defaults,
    setting,
    settings,
)
from galore_torch.training.settings.optimizer import MATRICES
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.files import require_readable
from galore_torch.training.text.rows import is_hub_name

SIZES = ("hidden", "intermediate", "layers", "heads")
"""The settings of a LLaMA's sizes, which every preset of one gives."""


@settings
class ModelConfig:
    """The model that is trained: a LLaMA of some sizes unless another is named."""

    model: str | None = setting(
        None,
        "A causal model to go on from, with its own tokenizer: its name on the Hugging Face Hub, its folder, or the "
        "folder of a run, whose finished model is meant.",
    )
    gguf_file: str | None = setting(None, "A GGUF file in the model's folder, which holds the weights.")
    config_of: str | None = setting(
        None,
        "Train another architecture than LLaMA from scratch: name or folder of a causal model, or its config.json. "
        "The vocabulary is the tokenizer's.",
    )
    hidden: int | None = setting(None, "Width of the residual stream.", ge=1)
    intermediate: int | None = setting(None, "Width inside the MLPs.", ge=1)
    layers: int | None = setting(None, "Number of layers.", ge=1)
    heads: int | None = setting(None, "Number of attention heads; must divide hidden into even parts.", ge=1)
    dtype: DType = setting("bfloat16", "What weights and activations are stored in.")

    def __post_init__(self) -> None:
        if self.model is not None:
            object.__setattr__(self, "model", model_of_run("model", self.model))
        require_defaults(self, "model", dict.fromkeys(("config_of", *SIZES), (None,)))
        require_defaults(self, "config_of", dict.fromkeys(SIZES, (None,)))
        if self.gguf_file and self.model is None:
            raise ValueError(f"gguf_file = {self.gguf_file!r} has no effect with model = None; give the model.")
        if self.hidden and self.heads and self.hidden % (2 * self.heads):
            raise ValueError(
                f"heads = {self.heads} does not divide hidden = {self.hidden} into heads of even width; "
                "choose hidden as a multiple of 2 * heads."
            )


@settings
class ScheduleConfig(RunConfig):
    """How long, in which portions, what is recorded on the way, and what becomes of the model."""

    steps: int = setting(10_000, "Optimizer steps.", ge=1)
    batch: int = setting(512, "Sequences a step.", ge=1)
    micro_batch: int = setting(32, "Sequences at once; bounds memory and changes nothing else.", ge=1)
    parallel: Parallel = setting(
        "ddp",
        "What several processes share: ddp, each batch; fsdp, weights and the optimizer's state as well. A run of one "
        "process has them all.",
    )
    shard_bases: bool = setting(
        False, "With parallel = 'fsdp' each process keeps its part of every basis, and gathers the rest for its use."
    )
    warmup: float = setting(0.1, "Share of the steps over which the learning rate rises from 0.", ge=0, lt=1)
    final_lr: float = setting(0.1, "Where the cosine ends, as a share of the peak.", ge=0, le=1)
    seed: int = setting(0, "Seed of the weights, of the order of the text and of random bases.", ge=0, le=2**32 - 1)
    eval_every: int = setting(1000, "Steps between two evaluations; 0 evaluates at the end only.", ge=0)
    save_every: int = setting(1000, "Steps between two resumable checkpoints; 0 saves at the end and on Ctrl-C.", ge=0)

    def __post_init__(self) -> None:
        require_defaults(self, "parallel", {"shard_bases": ("fsdp",)})


@settings
class PretrainConfig(TrainConfig):
    """All that decides a pre-training's outcome. Made by `configure`, kept in the run folder as ``config.toml``."""

    model: ModelConfig
    data: DataConfig
    schedule: ScheduleConfig

    doing: ClassVar[str] = "a pre-training"

    def __post_init__(self) -> None:
        model = self.model
        if model.model is not None and self.data.tokenizer != "auto":
            raise ValueError(
                f"tokenizer = {self.data.tokenizer!r} has no effect with model = {model.model!r}, which brings its "
                "own; leave it out."
            )
        if model.model is not None and self.adapter.adapter == "low-rank":
            raise ValueError("adapter = 'low-rank' throws away what a model has learnt; choose lora, or none.")
        super().__post_init__()

    def require_there(self, to: Purpose = "train") -> None:
        """Refuse a LLaMA without sizes, and a model, text or library that is not there."""
        super().require_there(to)
        model = self.model
        missing = [name for name in SIZES if getattr(model, name) is None]
        if model.model is None and model.config_of is None and missing:
            raise ValueError(f"model = None, and {missing[0]} is not given; give --model, or a preset with sizes.")
        if model.model is not None:  # before the text, of which evaluate asks other things where it is no run
            require_model("model", model.model, model.gguf_file or "config.json")
            require_length("seq", self.data.seq, model.model)
            require_causal(model.model)
            if model.gguf_file is None:
                require_weights(model.model, MATRICES, self.optimizer.ranks)
        require_readable(self.data)
        data, subset = self.data.data, self.data.subset
        if subset is not None and (data == "stdlib" or not is_hub_name("data", data)):
            raise ValueError(f"subset = {subset!r} has no effect with data = {data!r}, which is here; leave it out.")
        if model.config_of is not None and not model.config_of.endswith(".json"):
            require_model("config_of", model.config_of)
        if self.data.tokenizer not in ("auto", "train"):
            require_model("tokenizer", self.data.tokenizer, "tokenizer_config.json")

    def going_on_from(self, weights: Path) -> "PretrainConfig":
        """The same from other weights than its own: a model's folder, with its tokenizer."""
        model = ModelConfig(model=str(weights), dtype=self.model.dtype)
        return replace(self, model=model, data=replace(self.data, tokenizer="auto"))

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.schedule.batch * self.data.seq
