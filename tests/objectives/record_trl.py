"""Records what TRL's trainers make of a tiny model and a few rows, for test_trl.py to compare ours with.

TRL is no dependency of this project, and this script needs nothing of softpref. To record again, in an
environment of its own:

    python3 -m venv /tmp/trl
    /tmp/trl/bin/pip install trl==1.16.0 transformers==5.19.0 torch
    /tmp/trl/bin/python tests/objectives/record_trl.py

It writes trl_losses.json beside itself: versions, the weights of both models (to three digits, which text
holds exactly), the rows as TRL tokenizes them, the log-probabilities that TRL finds, and its loss of each row
under every loss type of its that is ours too. Rows go through the trainer's `compute_loss` one at a time, for
its mean over a batch is then the row's own; that makes `aot_unpaired`, which sorts the log-ratios of a batch,
the conservative DPO, for which this version of TRL has no name. Of ORPO the likelihood is left out: TRL's is
of the prompt too. KTO's rows are two at a time, each of which is the other's mismatched one: the chosen of a
row and the rejected of the next.
"""

import importlib.metadata
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

OUTPUT = Path(__file__).with_name("trl_losses.json")
ROWS = [
    ("the fox", "ran home", "sat"),
    ("the owl", "saw the fox and then slept late", "ran fast"),
    ("a fox", "slept", "ran home and then the owl sat and slept"),
    ("why not", "the owl sat", "a fox sat late"),
    ("the", "fox then ran", "fox then saw"),
    ("a fox and a owl", "ran fast fast fast fast", "slept"),
]
WORDS = sorted({word for row in ROWS for text in row for word in text.split()})
CONFIG = {
    "vocab_size": len(WORDS) + 3,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
LOSSES = [  # TRL's loss types, with β and ε
    *(("sigmoid", beta, 0.0) for beta in (0.1, 1.0)),
    *(("aot_unpaired", beta, smoothing) for beta in (0.1, 1.0) for smoothing in (0.1, 0.3)),
    *(("robust", beta, smoothing) for beta in (0.1, 1.0) for smoothing in (0.1, 0.3)),
    *((kind, beta, 0.0) for kind in ("hinge", "ipo", "sppo_hard") for beta in (0.1, 1.0)),
    *((kind, beta, 0.0) for kind in ("apo_zero", "apo_down", "sigmoid+sft") for beta in (0.1, 1.0)),
    *((kind, beta, 0.0) for kind in ("cpo", "simpo", "orpo") for beta in (0.1, 1.0)),
]


def make_tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    text = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    text.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=text, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def make_model(weights):
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    model.load_state_dict({name: torch.tensor(values) for name, values in weights.items()})
    return model.eval()


def draw_weights():
    """Weights of the policy and of a reference not far from it, to three digits."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = {}, {}
    for name, tensor in LlamaForCausalLM(LlamaConfig(**CONFIG)).state_dict().items():
        start = 0.5 * torch.randn(tensor.shape, generator=generator) + ("norm" in name)
        moved = start + 0.2 * torch.randn(tensor.shape, generator=generator)
        for weights, values in ((policy, moved), (reference, start)):
            weights[name] = values.double().numpy().round(3).tolist()
    return policy, reference


def make_trainer(policy, reference, loss_type, beta, smoothing, folder):
    rows = [  # the space is for the tokenizer, which splits words at spaces
        {"prompt": prompt + " ", "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in ROWS
    ]
    options = {
        "output_dir": folder,
        "beta": beta,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    given = {
        "model": make_model(policy),
        "train_dataset": Dataset.from_list(rows),
        "processing_class": make_tokenizer(),
    }
    if loss_type == "cpo":
        return CPOTrainer(args=CPOConfig(loss_type="sigmoid", cpo_alpha=1.0, **options), **given)
    if loss_type == "simpo":
        return CPOTrainer(
            args=CPOConfig(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5, **options), **given
        )
    if loss_type == "orpo":
        return ORPOTrainer(args=ORPOConfig(**options), **given)
    args = DPOConfig(loss_type=loss_type.split("+"), label_smoothing=smoothing, **options)
    return DPOTrainer(ref_model=make_model(reference), args=args, **given)


def loss_of(trainer, row):
    batch = trainer.data_collator([row])
    if isinstance(trainer, DPOTrainer):
        return float(trainer.compute_loss(trainer.model, batch))
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    return float(loss) - (float(metrics["nll_loss"]) if isinstance(trainer, ORPOTrainer) else 0.0)


def record_kto(policy, reference, beta, folder):
    """The mean loss of each batch of two."""
    rows = []
    for i, (prompt, chosen, _) in enumerate(ROWS):
        other, _, rejected = ROWS[(i + 1) % len(ROWS)]
        rows += [
            {"prompt": prompt + " ", "completion": chosen, "label": True},
            {"prompt": other + " ", "completion": rejected, "label": False},
        ]
    trainer = KTOTrainer(
        model=make_model(policy),
        ref_model=make_model(reference),
        args=KTOConfig(
            output_dir=folder,
            beta=beta,
            undesirable_weight=1.5,
            per_device_train_batch_size=2,
            train_sampling_strategy="sequential",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    trainer.model.eval()
    kept = list(trainer.train_dataset)
    with torch.no_grad():
        return [
            float(trainer.compute_loss(trainer.model, trainer.data_collator(kept[i : i + 2])))
            for i in range(0, len(kept), 2)
        ]


def record(folder):
    policy, reference = draw_weights()
    found = {
        "made_by": "tests/objectives/record_trl.py",
        "versions": {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")},
        "losses": [],
    }
    for loss_type, beta, smoothing in LOSSES:
        trainer = make_trainer(policy, reference, loss_type, beta, smoothing, folder)
        trainer.model.eval()
        with torch.no_grad():
            losses = [loss_of(trainer, row) for row in trainer.train_dataset]
        found["losses"].append(
            {"type": loss_type, "beta": beta, "label_smoothing": smoothing, "of_rows": losses}
        )
        if loss_type == "sigmoid":
            dpo = trainer
    found["kto"] = [
        {"beta": beta, "of_batches": record_kto(policy, reference, beta, folder)} for beta in (0.1, 1.0)
    ]
    trainer, rows = dpo, list(dpo.train_dataset)
    batch = trainer.data_collator(rows)
    found["rows"] = [{name: row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")} for row in rows]
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        chosen, rejected = trainer.compute_ref_log_probs(model, batch)
        found[f"{name}_logps"] = {"chosen": chosen.tolist(), "rejected": rejected.tolist()}
    chosen, rejected = batch["completion_mask"].sum(1).chunk(2)
    found["completion_lengths"] = {"chosen": chosen.tolist(), "rejected": rejected.tolist()}
    found["model"] = {"config": CONFIG, "policy": policy, "reference": reference}
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        recorded = record(temporary)
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in recorded.items()]
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
