"""Toy language models shared by several test folders: one token per character, weights from a seed."""

import pytest


@pytest.fixture(scope="session")
def make_tokenizer():
    return _make_tokenizer


@pytest.fixture(scope="session")
def make_model():
    return _make_model


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: {{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


def _make_tokenizer(
    letters="abcdefghijklmnopqrstuvwxyz .,:?\n",
    *,
    start=True,
    closes=False,
    pad_is_eos=False,
    eos="<|im_end|>",
    chat_template=CHAT_TEMPLATE,
):
    """A tokenizer with a token per letter; `start` puts BOS before a text, `closes` puts EOS after it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    text = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    text.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    text.decoder = decoders.Fuse()
    pattern = ("<s> " if start else "") + "$A" + (f" {eos}" if closes else "")
    text.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=[("<s>", 1), (eos, vocabulary[eos])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        pad_token=eos if pad_is_eos else "<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _make_model(tokenizer, *, seed=0, width=16, layers=1, spread=0.5, **options):
    """A small Llama whose next-token odds are far from uniform (`spread` is the scale of its weights)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=spread,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return LlamaForCausalLM(config).eval()
