"""The configuration of stage 2: every option of `transformers.TrainingArguments`, and the base model's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from softpref.errors import ConfigError
from softpref.lm.arguments import StageArguments
from softpref.lm.sources import check_model_source, check_remote_code


@dataclass
class SFTConfig(StageArguments, TrainingArguments):
    """Arguments of the SFT stage.

    Args:
        base_model: checkpoint folder or `.gguf` file, the URL of one (`s3://`, `gs://`, `abfs://`, `https://`,
            `hf://`), `models:/NAME/VERSION` or `models:/NAME@ALIAS` of the MLflow registry, or a Hub id;
            empty trains a model from nothing.
        revision: branch, tag or commit of a Hub model.
        model_config: of a model from nothing: `model_type` and its options, as in a checkpoint's
            `config.json`. Vocabulary size and special tokens come from the tokenizer.
        vocab_size: upper limit of the tokenizer (byte-level BPE) of a model from nothing; at least 258.
        max_prompt_length: tokens kept of a prompt, from its end.
        max_completion_length: tokens kept of a completion.
        dataset_num_proc: processes that tokenize rows. By default this one alone for some thousands of rows,
            else one for each CPU, four at most (each takes some 100 MB).
        keep_rows: whether to keep the tokens of the dataset's preferences beside the model (`rows/`), so that
            trainings that start from it need not tokenize them. The folder then contains the data.
        keep_reference_logps: whether to keep the model's log-probabilities of those rows with them, so that
            trainings whose loss is relative to the reference (`spo` with an `anchor`, `dpo` and most others)
            need not compute them.
        plain_forward: pad every demonstration and compute full logits. The same numbers up to rounding,
            slower and larger: for a model whose fast path you doubt.
        gpus: GPUs the job asked for; training refuses to start with fewer. 0 asks for none.
        trust_remote_code: run model code that comes with a checkpoint.

    `num_train_epochs=0` takes the base model as the reference without training.
    """

    output_dir: str | None = None
    base_model: str = ""
    revision: str = ""
    model_config: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 4096
    max_prompt_length: int = 512
    max_completion_length: int = 512
    dataset_num_proc: int | None = None
    keep_rows: bool = True
    keep_reference_logps: bool = False
    plain_forward: bool = False
    gpus: int = 0
    trust_remote_code: bool = False

    # Defaults of TrainingArguments that do not suit this stage.
    learning_rate: float = 2e-5
    logging_steps: float = 10
    bf16: bool | None = field(default=None)  # type: ignore[assignment]
    save_total_limit: int | None = 2

    def _check_own(self) -> None:
        self.base_model = str(self.base_model or "")  # a Path is taken, too
        if self.base_model:
            check_model_source(self.base_model)
            check_remote_code(self.base_model, self.trust_remote_code)
        elif "model_type" not in self.model_config:
            raise ConfigError(
                "SFTConfig needs base_model (a checkpoint folder, a .gguf file, a URL of one, "
                'models:/NAME@ALIAS or a Hub id), or a model_config with at least "model_type" to train from '
                "nothing"
            )
