"""The configuration of a reward model's training: `transformers.TrainingArguments`, and its own options."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from softpref.errors import ConfigError
from softpref.lm.arguments import StageArguments
from softpref.lm.sources import check_model_source, check_remote_code


@dataclass
class RewardModelConfig(StageArguments, TrainingArguments):
    """Arguments of the training of a judge.

    Args:
        base_model: the language model that gets reward heads: checkpoint folder or `.gguf` file, the URL of
            one (`s3://`, `gs://`, `abfs://`, `https://`, `hf://`), `models:/NAME/VERSION` or
            `models:/NAME@ALIAS` of the MLflow registry, or a Hub id.
        revision: branch, tag or commit of a Hub model.
        split: split of the dataset to learn from: `judge` (see `judge_fraction` of the data stage), or
            `train`, of a dataset that no policy learns from.
        heads: reward heads. Each learns from prompts of its own, drawn with replacement, so that where they
            differ the preferences leave open what is better. The score is their mean. 1 takes every prompt
            once.
        max_length: tokens read of a prompt with its completion; longer ones lose their beginning.
        layers: the lowest layers of the model, which are kept; the others are left out. 0 keeps all. Half of
            them cost half, and often tell better texts from worse ones better: the last layers serve the next
            token.
        frozen_layers: the lowest layers that stay as they are, with the embeddings: less to compute, and less
            to learn from few preferences. Where it is the number of all layers kept, only the heads are
            trained: each text is read once, whatever the number of its pairs and epochs. Heads alone want a
            learning rate of 1e-3 to 1e-2.
        use_peft: train a LoRA adapter beside the heads, and save the merged model.
        lora_r, lora_alpha, lora_target_modules: the adapter's rank, scale, and layers (comma-separated, or
            `all-linear`).
        gpus: GPUs the job asked for; training refuses to start with fewer. 0 asks for none.
        trust_remote_code: run model code that comes with a checkpoint.
    """

    output_dir: str | None = None
    base_model: str = ""
    revision: str = ""
    split: str = "judge"
    heads: int = 8
    max_length: int = 1024
    layers: int = 0
    frozen_layers: int = 0
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: str = "all-linear"
    gpus: int = 0
    trust_remote_code: bool = False

    # Defaults of TrainingArguments that do not suit this stage.
    learning_rate: float = 1e-5
    num_train_epochs: float = 1.0
    logging_steps: float = 10
    remove_unused_columns: bool = False
    bf16: bool | None = field(default=None)  # type: ignore[assignment]
    save_total_limit: int | None = 2

    plain_forward = True  # no option: reward heads read padded batches

    def _check_own(self) -> None:
        self.base_model = str(self.base_model or "")  # a Path is taken, too
        if not self.base_model:
            raise ConfigError(
                "RewardModelConfig needs base_model: a checkpoint folder, a .gguf file, a URL of one, "
                "models:/NAME@ALIAS or a Hub id"
            )
        if self.use_peft and self.frozen_layers:
            raise ConfigError(
                "RewardModelConfig.use_peft trains an adapter in all layers, and frozen_layers is "
                f"{self.frozen_layers}; give one of them"
            )
        check_model_source(self.base_model)
        check_remote_code(self.base_model, self.trust_remote_code)
