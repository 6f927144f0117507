"""Weights in shards on two processes (FSDP2): the trajectory of one process, and whole models on disk."""

import pytest
from softpref.distributed.processes import StageFailed
from softpref.errors import ConfigError

# what FSDP might do otherwise: forward passes outside of the step's own, adapters, heads, sampling in rounds
WAYS = {
    "as it is": {},
    "estimates over the whole step": {
        "kl_gradient": "full",
        "weight_exponent": 0.5,
        "weight_scores": "token",
    },
    "adapter": {"use_peft": True, "lora_r": 4, "merge_adapter": True},
    "on data": {"kl_on": "data"},
    "adapter on data": {"kl_on": "data", "use_peft": True, "lora_r": 4, "merge_adapter": True},
    "full logits": {"plain_forward": True},
    "rounds": {"rounds": 2, "train_on": "samples", "judge": "bradley-terry"},
    "tied head": {},
}
# an optimizer without a state, such as the others' SGD, cannot be loaded into shards
SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}


@pytest.fixture(scope="module")
def tied(folders, make_model, tmp_path_factory):
    """Folder of a reference whose head is its embedding."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tied")
    tokenizer = AutoTokenizer.from_pretrained(folders.reference)
    make_model(tokenizer, layers=2, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sharded(in_two_processes, tmp_path_factory, tied):
    """Folder of the models of all ways, of a reference, and of a run that was cut off and continued."""
    folder = tmp_path_factory.mktemp("in-shards")
    runs = {
        **WAYS,
        "tied head": {"reference": tied},
        "reference": {"stage": "sft", "keep_reference_logps": True},
        "whole": SAVING,
        "cut": SAVING,
    }
    runs = {name: {"fsdp": True, **options} for name, options in runs.items()}
    with pytest.raises(StageFailed, match=r"exitcode *: 9"):
        in_two_processes(folder, runs, "cpus_as_accelerators")
    assert (folder / "cut" / "checkpoints" / "checkpoint-4").is_dir()
    in_two_processes(folder, {"cut": runs["cut"]}, "cpus_as_accelerators")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_sharded_weights_take_the_steps_of_one_process(
    sharded, train, same_trajectory, folders, tied, monkeypatch, way
):
    if way == "tied head":
        monkeypatch.setattr(folders, "reference", tied)
    _, whole = train("whole", **WAYS[way])
    same_trajectory(whole, sharded / way)


def test_the_reference_is_trained_in_shards_too(sharded, train_reference, same_reference):
    one, whole = train_reference("whole", keep_reference_logps=True)
    same_reference(one, whole, sharded / "reference")


def test_a_run_in_shards_continues_from_its_checkpoint(sharded, same_trajectory):
    same_trajectory(sharded / "whole", sharded / "cut", resumed=True)


def test_one_process_has_nothing_to_share_out(train):
    with pytest.raises(ConfigError, match="only one"):
        train("alone", fsdp=True)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"fsdp_config": {"version": 1}}, "version 2"),
        ({"fsdp_config": {"cpu_ram_efficient_loading": True}}, "cpu_ram_efficient_loading"),
    ],
)
def test_what_does_not_work_in_shards_is_refused(options, complaint):
    from softpref.spo import SPOConfig

    with pytest.raises(ConfigError, match=complaint):
        SPOConfig(output_dir="unused", use_cpu=True, bf16=False, fsdp=True, **options)
