"""Small models of many architectures, random weights and a tokenizer of their kind; what each must show.

    PYTHONPATH=components python tests/lm/architectures.py [NAME …]

measures all of them (some minutes on one core), or those named, and writes
`ARCHITECTURES.md` beside this file.
The right values come from transformers: one forward pass for each sequence alone, without padding or cache,
and a log-softmax in float64; its own joint tokenization and chat templates, and its loading.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

RESULTS = Path(__file__).with_name("ARCHITECTURES.md")
LOGPS_LIMIT = 1e-4  # nats per sequence
ESS_LIMIT = 0.999

TEXTS = [
    "The fox ran over the hill and said: what a fine day!",
    "Write a very short story about a brave dog.\nThe dog swam to the island, and it was glad.",
    "2+2=4, and 3+4=7; numbers add up. café, naïve — 日本",
    "A question: which animal is the largest? The answer is the whale, the blue whale.",
    "He said nothing.  Two spaces, then a line break:\n\nand the end.",
]
PROMPTS = [
    "2+2=",
    "Write a story.\n",
    "A question: which animal is the largest? The answer is",
    "The",
    "x y ",
]
ANSWERS = ["4", " The dog swam.", "the whale", " fox ran over the hill and said"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def byte_level(*, template: str | None = None, bos: bool = False) -> Any:
    """As GPT-2's, Qwen's and Llama 3's: bytes, no text changed; `bos` puts a token before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    text = Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text.train_from_iterator(TEXTS, trainer)
    if bos:
        text.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text,
        bos_token="<|begin|>",
        eos_token="<|im_end|>" if template else "<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def _pieces(special: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE over `▁` words with bytes to fall back on, as SentencePiece has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.Metaspace()
    text.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    import json

    trained = json.loads(text.to_str())["model"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [token for token in trained["vocab"] if token not in names]
    return {token: i for i, token in enumerate(names)}, [tuple(pair) for pair in trained["merges"]]


def sentencepiece(*, legacy: bool, template: str | None = INST) -> Any:
    """As Llama 2's and Mistral's: a space before each text, and `legacy` after each special token too."""
    from transformers import LlamaTokenizer

    vocabulary, merges = _pieces(["<unk>", "<s>", "</s>"])
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy, add_bos_token=True)
    tokenizer.pad_token = "<unk>"
    tokenizer.chat_template = template
    return tokenizer


def gemma_pieces() -> Any:
    """As Gemma's: `▁` for a space, none added; turns end with a token of their own."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    vocabulary, merges = _pieces(special)
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = TURNS
    return tokenizer


class Architecture(NamedTuple):
    """A model type of transformers with options for a small model, and the tokenizer of its kind."""

    model_type: str
    options: dict[str, Any]
    tokenizer: Callable[[], Any]


_WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
_SHORT_WINDOW = {"sliding_window": 6}


def _plain() -> Any:
    return byte_level()


def _chat() -> Any:
    return byte_level(template=CHATML)


def _begun() -> Any:
    return byte_level(bos=True)


ARCHITECTURES: dict[str, Architecture] = {
    "Llama 3": Architecture("llama", _WIDE, lambda: byte_level(template=CHATML, bos=True)),
    "Llama 2, legacy": Architecture("llama", _WIDE, lambda: sentencepiece(legacy=True)),
    "Llama 2, not legacy": Architecture("llama", _WIDE, lambda: sentencepiece(legacy=False)),
    "Mistral, window 6": Architecture(
        "mistral", {**_WIDE, **_SHORT_WINDOW}, lambda: sentencepiece(legacy=True)
    ),
    "Qwen 2": Architecture("qwen2", _WIDE, _chat),
    "Qwen 3": Architecture("qwen3", {**_WIDE, "head_dim": 8}, _chat),
    "Qwen 2 MoE": Architecture("qwen2_moe", {**_WIDE, **_QWEN_EXPERTS}, _chat),
    "Qwen 3 MoE, router logits": Architecture(
        "qwen3_moe", {**_WIDE, **_QWEN_EXPERTS, "head_dim": 8, "output_router_logits": True}, _chat
    ),
    "Qwen 3 Next": Architecture(
        "qwen3_next",
        {
            **_WIDE,
            **_QWEN_EXPERTS,
            "head_dim": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        _chat,
    ),
    "Gemma": Architecture("gemma", {**_WIDE, "head_dim": 8}, gemma_pieces),
    "Gemma 2, window 6": Architecture("gemma2", {**_WIDE, **_SHORT_WINDOW, "head_dim": 8}, gemma_pieces),
    "Gemma 3, window 6": Architecture(
        "gemma3_text",
        {**_WIDE, **_SHORT_WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        gemma_pieces,
    ),
    "Phi": Architecture("phi", _WIDE, _plain),
    "Phi 3": Architecture("phi3", _WIDE, lambda: sentencepiece(legacy=True)),
    "GPT-2": Architecture("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, _plain),
    "GPT-J": Architecture(
        "gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8}, _plain
    ),
    "GPT-NeoX": Architecture("gpt_neox", _WIDE, _plain),
    "GPT-BigCode": Architecture(
        "gpt_bigcode",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "multi_query": True},
        _plain,
    ),
    "OPT": Architecture("opt", {**_WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1}, _begun),
    "BLOOM": Architecture("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, _plain),
    "Falcon": Architecture(
        "falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": True,
            "max_position_embeddings": 128,
        },
        _plain,
    ),
    "StableLM": Architecture("stablelm", _WIDE, _plain),
    "StarCoder 2, window 6": Architecture("starcoder2", {**_WIDE, **_SHORT_WINDOW}, _plain),
    "Mixtral": Architecture("mixtral", {**_WIDE, **_EXPERTS}, lambda: sentencepiece(legacy=True)),
    "Mixtral, router logits": Architecture(
        "mixtral", {**_WIDE, **_EXPERTS, "output_router_logits": True}, lambda: sentencepiece(legacy=False)
    ),
    "GPT-OSS": Architecture(
        "gpt_oss",
        {
            **_WIDE,
            **_EXPERTS,
            **_SHORT_WINDOW,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        _chat,
    ),
    "Granite": Architecture("granite", {**_WIDE, "logits_scaling": 2.0}, _chat),
    "Granite MoE hybrid": Architecture(
        "granitemoehybrid",
        {
            **_WIDE,
            **_EXPERTS,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
        },
        _chat,
    ),
    "OLMo 2": Architecture("olmo2", _WIDE, _plain),
    "OLMoE": Architecture("olmoe", {**_WIDE, "num_experts": 4, "num_experts_per_tok": 2}, _plain),
    "SmolLM 3": Architecture("smollm3", {**_WIDE, "no_rope_layers": [1, 0]}, _chat),
    "Cohere": Architecture("cohere", {**_WIDE, "logit_scale": 0.25}, _begun),
    "Cohere 2, window 6": Architecture(
        "cohere2",
        {**_WIDE, **_SHORT_WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        _begun,
    ),
    "DeepSeek V3": Architecture(
        "deepseek_v3",
        {
            **_WIDE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        _chat,
    ),
    "Mamba": Architecture("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, _plain),
    "Mamba 2": Architecture(
        "mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
        _plain,
    ),
    "Falcon Mamba": Architecture(
        "falcon_mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, _plain
    ),
    "RWKV": Architecture(
        "rwkv",
        {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 128},
        _plain,
    ),
    "xLSTM": Architecture(
        "xlstm",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "chunkwise_kernel": "chunkwise--native_autograd",
            "sequence_kernel": "native_sequence__native",
            "step_kernel": "native",
        },
        _plain,
    ),
    "RecurrentGemma": Architecture(
        "recurrent_gemma",
        {
            **_WIDE,
            "num_hidden_layers": 3,
            "lru_width": 32,
            "attention_window_size": 6,
            "head_dim": 8,
        },
        gemma_pieces,
    ),
    "Jamba": Architecture(
        "jamba",
        {
            **_WIDE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        lambda: sentencepiece(legacy=True),
    ),
    "Bamba": Architecture(
        "bamba",
        {
            **_WIDE,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        _plain,
    ),
    "Zamba 2": Architecture(
        "zamba2",
        {
            **_WIDE,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "hybrid_layer_ids": [1],
        },
        lambda: sentencepiece(legacy=True),
    ),
    "LFM 2": Architecture(
        "lfm2", {**_WIDE, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48}, _chat
    ),
}

FAST = (
    "Llama 2, legacy",
    "Mistral, window 6",
    "Qwen 3 MoE, router logits",
    "Gemma 3, window 6",
    "GPT-2",
    "BLOOM",
    "Granite",
    "Mamba",
    "RWKV",
    "RecurrentGemma",
    "Bamba",
)
"""What the suite runs: each is a kind of its own."""


def build(name: str) -> tuple[Any, Any]:
    """The model and its tokenizer, the same at each call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    one = ARCHITECTURES[name]
    tokenizer = one.tokenizer()
    config = AutoConfig.for_model(
        one.model_type,
        **one.options,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # odds far from uniform, so that what goes wrong shows
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not parameter_name.endswith("A_log"):
                parameter.mul_(0.25 / float(parameter.std().clamp_min(1e-6)))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if "<end_of_turn>" in tokenizer.get_vocab():
        model.generation_config.eos_token_id = [
            tokenizer.eos_token_id,
            tokenizer.convert_tokens_to_ids("<end_of_turn>"),
        ]
    return model, tokenizer


@torch.no_grad()
def plain_logps(model: Any, sequences: Iterable[tuple[list[int], list[int]]]) -> torch.Tensor:
    """log P(completion | prompt) in nats, `[n]` float64: each sequence alone in one forward pass."""
    sums = []
    for prompt, completion in sequences:
        ids = torch.tensor([[*prompt, *completion]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
        sums.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum())
    return torch.stack(sums)


def sequences_of(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Prompts of several lengths, each with several completions, as ids."""
    pairs = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        for answer in ANSWERS:
            pairs.append(
                (ids, [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
            )
    return pairs


def training_difference(model: Any, tokenizer: Any) -> float:
    """(a) How far the product's sequence log-probabilities lie from the plain ones, at most, nats."""
    from softpref.lm.packing import pack_sequences
    from softpref.lm.scoring import score_sequences, sequence_logps
    from softpref.spo.given import switch_dropout_off

    sequences = sequences_of(tokenizer)
    expected = plain_logps(model, sequences)
    switch_dropout_off(model)
    model.train()  # as in a training step
    stepped = sequence_logps(model, pack_sequences(sequences)).detach()
    model.eval()
    ways = (stepped, score_sequences(model, sequences), score_sequences(model, sequences, plain=True))
    return max(float((found.double() - expected).abs().max()) for found in ways)


def sampling_agreement(model: Any, tokenizer: Any, count: int = 48, length: int = 16) -> tuple[float, float]:
    """(b) Effective sample size of fresh samples, and a sample's largest difference, nats."""
    from softpref.lm.sampling import sample_completions, sampling_noise

    prompts = [tokenizer(PROMPTS[i % len(PROMPTS)])["input_ids"] for i in range(count)]
    samples = sample_completions(
        model,
        prompts,
        noise=sampling_noise(count, length, seed=3),
        stop_ids=[tokenizer.eos_token_id],
        batch_size=20,
    )
    own = torch.tensor([sample.logp for sample in samples], dtype=torch.float64)
    right = plain_logps(model, [(sample.prompt, sample.completion) for sample in samples])
    weights = (right - own).exp()
    return float(weights.sum() ** 2 / (weights**2).sum() / count), float((right - own).abs().max())


def token_differences(tokenizer: Any, model: Any) -> list[str]:
    """(c) Rows whose ids are not those of joint tokenization, or of the chat template to the turn's end."""
    from softpref.lm.tokenization import stop_token_ids, tokenize_row

    stops = stop_token_ids(tokenizer, model)
    wrong = []
    for prompt in PROMPTS:
        for answer in ANSWERS:
            [found] = tokenize_row(tokenizer, prompt, [answer])
            expected = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
            if [*found.prompt, *found.completion] != expected:
                wrong.append(f"{prompt!r} + {answer!r}")
            if not tokenizer.chat_template:
                continue
            asked = [{"role": "user", "content": prompt}]
            said = [{"role": "assistant", "content": answer}]
            [found] = tokenize_row(tokenizer, asked, [said])
            whole = tokenizer.apply_chat_template([*asked, *said], tokenize=True, return_dict=False)
            while whole[-1] not in stops:  # what a template writes after the turn's end
                whole.pop()
            if [*found.prompt, *found.completion] != whole:
                wrong.append(f"chat {prompt!r} + {answer!r}")
    return wrong


def trained_and_loaded(model: Any, tokenizer: Any, folder: Path) -> tuple[float, float]:
    """(d) The largest difference of what transformers loads after training, nats; and the log's fresh ESS."""
    from softpref.lm.loading import save_model_folder
    from softpref.spo import SPOConfig, SPOTrainer
    from transformers import AutoModelForCausalLM
    from transformers.trainer_callback import PrinterCallback

    rows = [{"prompt": prompt, "completions": [ANSWERS[2], ANSWERS[0]]} for prompt in PROMPTS]
    sequences = sequences_of(tokenizer)
    before = plain_logps(model, sequences)
    config = SPOConfig(
        output_dir=str(folder / "out"),
        learning_rate=1e-3,
        max_steps=2,
        per_device_train_batch_size=4,
        samples_per_refresh=16,
        sampling_interval=2,
        max_prompt_length=64,
        max_completion_length=12,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
    )
    trainer = SPOTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    fresh = next(logged["sampling/ess"] for logged in trainer.state.log_history if "sampling/ess" in logged)
    model.eval()
    trained = plain_logps(model, sequences)
    if not float((trained - before).abs().max()) > 1e-3:
        raise AssertionError("training moved nothing")
    save_model_folder(model, tokenizer, folder / "saved", {"name": "trained"})
    differences = []
    for saved in (folder / "saved", folder / "out" / "checkpoint-2"):
        loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
        differences.append(float((plain_logps(loaded, sequences) - trained).abs().max()))
    return max(differences), float(fresh)


class Result(NamedTuple):
    """One line of the table."""

    name: str
    training: float
    ess: float
    sampling: float
    cached: bool
    packed: bool
    tokens: list[str]
    loaded: float
    fresh_ess: float
    refusal: str = ""


def measure(name: str) -> Result:
    """All that one architecture shows; a refusal of the product is a result."""
    from softpref.errors import SoftprefError
    from softpref.lm import decoding, packing

    model, tokenizer = build(name)
    try:
        training = training_difference(model, tokenizer)
        ess, sampling = sampling_agreement(model, tokenizer)
        cached = decoding.decodes(model)
        packed = packing._verdicts.get(model, "?") == ""
        wrong = token_differences(tokenizer, model)
        with tempfile.TemporaryDirectory() as folder:
            loaded, fresh = trained_and_loaded(model, tokenizer, Path(folder))
    except SoftprefError as error:
        return Result(name, *[float("nan")] * 3, False, False, [], *[float("nan")] * 2, str(error))
    return Result(name, training, ess, sampling, cached, packed, wrong, loaded, fresh)


def holds(result: Result) -> bool:
    """Whether everything but the tokens is as it must be."""
    return not result.refusal and (
        result.training <= LOGPS_LIMIT
        and result.ess >= ESS_LIMIT
        and result.loaded <= LOGPS_LIMIT
        and result.fresh_ess >= ESS_LIMIT
    )


def table(results: Sequence[Result]) -> str:
    """The Markdown page."""
    lines = [
        "# Small models of many architectures",
        "",
        "Random weights, two or three layers of width 32, a tokenizer of the architecture's kind. Made by",
        "",
        "    PYTHONPATH=components python tests/lm/architectures.py",
        "",
        f"on {datetime.date.today().isoformat()} with Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}, transformers {transformers.__version__}, on a CPU in fp32.",
        "",
        "- *training*: sequence log-probabilities as the trainer computes them (packed, padded, in training "
        "and in scoring, fast and plain) against one forward pass of transformers for each sequence; the "
        f"largest difference in nats, at most {LOGPS_LIMIT:g}.",
        "- *sampling*: log-probabilities that come with samples against such a pass: effective sample size "
        f"(at least {ESS_LIMIT:g}) and largest difference of a sample, nats; *log*: `sampling/ess` of "
        "the first step.",
        "- *tokens*: rows whose ids are those of transformers' joint tokenization, or of its chat template "
        "up to the end of the turn.",
        "- *loaded*: after two steps of training, what transformers loads from the model folder and from the "
        "checkpoint against the model in memory, nats.",
        "- *packed*: prompts are shared and nothing is padded; *cache*: samples are drawn with a cache. What "
        "cannot is found out by trying, and computed the slow way: padded, or a whole forward pass for "
        "each token.",
        "",
        "| architecture | type | training | sampling, ESS | nats | log | tokens | loaded | packed | cache |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: | :-: | :-: |",
    ]
    rows = len(PROMPTS) * len(ANSWERS)
    for result in results:
        one = ARCHITECTURES[result.name]
        if result.refusal:
            lines.append(f"| {result.name} | {one.model_type} | refused: {result.refusal} | | | | | | | |")
            continue
        total = rows * (2 if one.tokenizer().chat_template else 1)
        lines.append(
            f"| {result.name} | {one.model_type} | {result.training:.1e} | {result.ess:.6f} | "
            f"{result.sampling:.1e} | {result.fresh_ess:.6f} | {total - len(result.tokens)}/{total} | "
            f"{result.loaded:.1e} | {'yes' if result.packed else 'no'} | {'yes' if result.cached else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all, and the page, if none")
    parser.add_argument("--traceback", action="store_true")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="    %(message)s")
    results, failed = [], []
    for name in options.names or ARCHITECTURES:
        started = time.perf_counter()
        try:
            result = measure(name)
        except Exception as error:
            if options.traceback:
                raise
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        results.append(result)
        if not holds(result):
            failed.append(name)
        print(
            f"{'ok  ' if holds(result) else 'FAIL'} {result} {time.perf_counter() - started:.1f} s",
            flush=True,
        )
    if not options.names:
        RESULTS.write_text(table(results), encoding="utf-8")
    print(f"{len(results)} measured; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
