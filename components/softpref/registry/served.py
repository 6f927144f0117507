"""What is served of a model folder: files, generation settings, and whose code MLflow runs.

How a registered model answers (`mlflow models serve`, measured with MLflow 3.17 and transformers 5.19):

- It samples at temperature 1 without top-k and top-p, ends where training ended completions and after at
  most `max_completion_length` tokens. This is written into the version's model configuration because
  transformers' text pipeline otherwise fills a missing temperature with 0.7, which is another softness.
- `temperature` and `max_tokens` in a request are honoured. `temperature: 0` is refused by transformers; use
  a small one such as 0.001 for the likeliest answer. The chat form also honours `top_k` and `top_p`; the
  completions form has no such fields and drops them.
- A chat prompt is rendered by the chat template and tokenized without further special tokens; MLflow alone
  would add the start token a second time.
- `stop`, `n` and `stream` are refused with an error: MLflow looks for the stop words' tokenizer in the folder
  the model was logged from, and transformers' pipeline knows neither of the others.
- A model with code of its own (registered only with `trust_remote_code`) runs it where it is served, without
  further questions.
- White space before the answer is stripped. Where the tokenizer has a start token, the completions form
  counts it in `completion_tokens` and therefore reports a cut answer as finished (`stop`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpref.errors import ConfigError
from softpref.judges.texts import as_text
from softpref.lm.loading import load_tokenizer
from softpref.lm.sources import check_model_source
from softpref.records.dataset import Text
from softpref.records.model import METADATA_FILE, ModelMetadata
from softpref.registry.config import RegistryConfig
from softpref.tracking import in_short

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py", "README.md", "LICENSE*")
_SERVED_BY = ("mlflow", "torch", "transformers", "accelerate", "safetensors", "tokenizers")


def served_model_config(
    model_dir: Path, metadata: ModelMetadata, task: str, *, trust_remote_code: bool = False
) -> dict[str, object]:
    """Generation settings of the served model: the distribution that was trained, not a sharper one."""
    tokenizer = load_tokenizer(str(model_dir), trust_remote_code=trust_remote_code)
    generation = _generation_config(model_dir)
    ends = generation.get("eos_token_id")
    ends = {ends} if isinstance(ends, int) else set(ends or [])
    settings: dict[str, object] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "eos_token_id": sorted({*ends, tokenizer.eos_token_id}),
        "pad_token_id": tokenizer.pad_token_id,
    }
    length = metadata.get("max_completion_length") or generation.get("max_new_tokens")
    if length:
        settings["max_new_tokens"] = int(length)
    if task == "llm/v1/chat":
        settings["add_special_tokens"] = False
    return settings


def model_hash(model_dir: Path) -> str:
    """Sha256 over the files that make the model: weights, configuration, tokenizer; not its metadata."""
    digest = hashlib.sha256()
    for path in sorted(path for path in model_dir.iterdir() if _is_served(path) and path.name != "README.md"):
        if path.name == METADATA_FILE:  # names the run, which differs between attempts
            continue
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def whole_checkpoint(model_dir: Path, trust_remote_code: bool) -> Iterator[Path]:
    """A folder with just what serving needs: no training leftovers, adapters merged."""
    adapter = (model_dir / "adapter_config.json").is_file()
    if not adapter:
        check_model_source(f"{model_dir.absolute()}")
    with tempfile.TemporaryDirectory(prefix="softpref-register-") as temporary:
        checkpoint = Path(temporary) / "model"
        checkpoint.mkdir()
        if adapter:
            _merge_adapter(model_dir, checkpoint, trust_remote_code)
        for path in sorted(model_dir.iterdir()):
            merged = adapter and (path.name == "config.json" or path.suffix == ".safetensors")
            if _is_served(path) and not merged and path.name != "adapter_config.json":
                (checkpoint / path.name).unlink(missing_ok=True)
                (checkpoint / path.name).symlink_to(path.resolve())
        yield checkpoint


def _is_served(path: Path) -> bool:
    training = path.name.startswith(
        ("trainer_state", "tracking", "timings", "train_results", "eval_results", "all_results")
    )
    return path.is_file() and not training and any(path.match(pattern) for pattern in _FILES)


def _merge_adapter(model_dir: Path, checkpoint: Path, trust_remote_code: bool) -> None:
    """Write the base model with the adapter merged in, so that serving needs neither peft nor the base."""
    try:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(
            str(model_dir), dtype="auto", trust_remote_code=trust_remote_code
        )
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"{model_dir} holds an adapter whose base model cannot be loaded ({in_short(error)}); make the "
            "base named in its adapter_config.json available, install peft, or give the merged model"
        ) from error
    merged = model.merge_and_unload()
    merged.save_pretrained(checkpoint)


def passed_over(checkpoint: Path) -> list[str]:
    """A warning where MLflow ignores the model's own code, for transformers' class of the same name.

    Raises:
        ConfigError: transformers' class is of another architecture.
    """
    import transformers

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (name, *_) = config.get("architectures") or [""]
    own = (config.get("auto_map") or {}).get("AutoModelForCausalLM", "")
    if not own.endswith(f".{name}") or not hasattr(transformers, name):
        return []
    if config.get("model_type") in transformers.CONFIG_MAPPING:
        return [
            f"MLflow serves transformers' own {name}, not the code that comes with the checkpoint ({own})"
        ]
    raise ConfigError(
        f"the model's own class {own} has the name of one in transformers, which MLflow would serve instead; "
        "rename it in the model's code and in config.json (architectures, auto_map)"
    )


def serving_task(config: RegistryConfig, checkpoint: Path) -> str:
    """How the model is served: MLflow's name of the task."""
    tokenizer = load_tokenizer(str(checkpoint), trust_remote_code=config.trust_remote_code)
    has_template = bool(tokenizer.chat_template)
    if config.task == "chat" and not has_template:
        raise ConfigError("RegistryConfig.task is chat, but the model's tokenizer has no chat template")
    chat = has_template if config.task == "auto" else config.task == "chat"
    return "llm/v1/chat" if chat else "llm/v1/completions"


def request_example(task: str, prompt: Text | None) -> dict[str, Any] | None:
    """A request that the served model answers, with this prompt; None where none is known."""
    if prompt is None:
        return None
    if task == "llm/v1/chat":
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return {"messages": [dict(message) for message in messages]}
    return {"prompt": as_text(prompt)}


def _generation_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "generation_config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values


def generation_warnings(model_dir: Path) -> list[str]:
    """Where the checkpoint's generation config, which other servers read, differs from the training."""
    generation = _generation_config(model_dir)
    trained = {"do_sample": (True,), "temperature": (1.0,), "top_k": (0, None), "top_p": (1.0, None)}
    departs = [
        f"{key} = {generation.get(key)}"
        for key, right in trained.items()
        if generation.get(key, {"do_sample": False, "top_k": 50}.get(key, right[0])) not in right
    ]
    if not departs:
        return []
    return [
        f"generation_config.json says {', '.join(departs)}; MLflow serves the trained softness all the same, "
        "another server may not"
    ]


def model_card(checkpoint: Path, title: str) -> ModelCard:
    """The checkpoint's own card, or a minimal one: without any, MLflow would ask the Hub."""
    from huggingface_hub import ModelCard

    path = checkpoint / "README.md"
    text = (
        path.read_text(encoding="utf-8")
        if path.is_file()
        else f"---\nlibrary_name: transformers\n---\n# {title}\n"
    )
    return ModelCard(text, ignore_metadata_errors=True)


def requirements() -> list[str]:
    """The installed versions of what serving imports, pinned; a local build's suffix (`+cpu`) left out."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in _SERVED_BY]
