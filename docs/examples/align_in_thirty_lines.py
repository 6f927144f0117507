"""Align a language model: make one, teach it six answers, train it on pairs, compare it with theory.

    python docs/examples/align_in_thirty_lines.py      # seconds on one core; downloads nothing

Experts like some answers better than others (`REWARDS`, in nats). The model never sees the rewards, only the
share of experts who prefer one answer to another. In the end it answers as the exact optimum does.
"""

import itertools
import math
import tempfile

import torch
from softpref.objectives import exact_optimum
from softpref.spo import SPOConfig, SPOTrainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ALPHA, BETA, PROMPT = 0.5, 0.05, "I would like some"
REWARDS = {"tea": 1.0, "water": 0.7, "juice": 0.3, "milk": 0.0, "coffee": -0.4, "cola": -1.0}

vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *PROMPT.split(), *REWARDS])}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
texts = tokenizer([f"{PROMPT} {answer} <eos>" for answer in REWARDS], return_tensors="pt")["input_ids"]
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), eos_token_id=1, **sizes))


def logps() -> torch.Tensor:
    """log P(answer) of all six, their end included."""
    predicted = model(texts[:, :-1]).logits.log_softmax(-1)
    return predicted.gather(-1, texts[:, 1:, None])[:, -2:].sum((1, 2))


optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(100):  # the reference: a model that gives each answer equally often
    optimizer.zero_grad()
    (-logps().mean()).backward()
    optimizer.step()
optimum = exact_optimum(torch.tensor([*REWARDS.values()]), logps().detach(), alpha=ALPHA, beta=BETA)

rows = [
    {"prompt": PROMPT, "completions": [f" {a}", f" {b}"], "probability": 1 / (1 + math.exp(q - p))}
    for (a, p), (b, q) in itertools.permutations(REWARDS.items(), 2)
]
with tempfile.TemporaryDirectory() as folder:
    training = {"learning_rate": 5e-3, "num_train_epochs": 40, "logging_steps": 40, "save_strategy": "no"}
    config = SPOConfig(folder, alpha=ALPHA, beta=BETA, use_cpu=True, disable_tqdm=True, **training)
    SPOTrainer(model, config, train_dataset=rows, processing_class=tokenizer).train()

print(f"answer  trained   theory   (α = {ALPHA}, β = {BETA})")
for answer, trained, theory in zip(REWARDS, logps().exp().tolist(), optimum.exp().tolist(), strict=True):
    print(f"{answer:7} {trained:7.3f}  {theory:7.3f}")
