"""The settings of the text that is trained on."""

from galore_torch.training.settings.fields import setting, settings


@settings
class DataConfig:
    """The text that it is trained on."""

    data: str = setting(
        "stdlib",
        "What to train on: stdlib (the Python standard library's own sources, no download), allenai/c4 or any other "
        "data set of the Hugging Face Hub (streamed), or a file or folder of text, CSV, TSV, JSON lines or "
        "Parquet.",
    )
    subset: str | None = setting(None, "Which configuration of a Hub data set.", default_help="en for allenai/c4")
    text_column: str = setting("text", "Which column of a Hub data set, JSON lines or Parquet holds the text.")
    tokenizer: str = setting(
        "auto",
        "train (byte-level BPE, trained on the spot and cached), or the name or folder of a ready one. auto is t5-base "
        "for a Hub data set, as in the paper, and train for local text.",
    )
    vocab: int = setting(
        32000, "Entries of a tokenizer that is trained on the spot; a ready one brings its own.", ge=260
    )
    seq: int = setting(256, "Length of a sequence, in tokens; documents are packed into sequences.", ge=2)
    eval_tokens: int = setting(10_000_000, "Held-out text for the perplexity, in tokens, at most.", ge=2)
    cache: str | None = setting(
        None, "Folder for trained tokenizers and tokenized text.", default_help="$GALORE_CACHE or ~/.cache/galore-torch"
    )

    def __post_init__(self) -> None:
        if not self.data.strip():
            raise ValueError(f"data = {self.data!r} names nothing; give stdlib, a Hub data set, a file or a folder.")
        if self.eval_tokens < self.seq:
            raise ValueError(
                f"eval_tokens = {self.eval_tokens} is less than one sequence; give at least seq = {self.seq}."
            )
