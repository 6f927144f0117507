"""Heads and hidden states of real architectures, wrapped in all ways, against their own full logits."""

import copy
import gc
import logging
import subprocess
import sys
import weakref
from types import MethodType

import pytest
import torch
from softpref.lm.head import completion_hidden, output_head
from softpref.lm.padding import completion_logits, pad_sequences
from softpref.lm.scoring import gather_logps
from softpref.objectives import kl_per_token
from torch import nn

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# architecture, configuration, and the factor, the cap and whether there is a bias
ARCHITECTURES = {
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}, (1.0, None, False)),
    "Llama, untied": ("Llama", {"tie_word_embeddings": False}, (1.0, None, False)),
    "Phi": ("Phi", {}, (1.0, None, True)),
    "Gemma 2": ("Gemma2", {"final_logit_softcapping": 3.0}, (1.0, 3.0, False)),
    "Gemma 2 without a cap": ("Gemma2", {"final_logit_softcapping": None}, (1.0, None, False)),
    "Granite divides": ("Granite", {"logits_scaling": 6.0}, (1 / 6, None, False)),
    "HyperCLOVA X multiplies": ("HyperCLOVAX", {"logits_scaling": 6.0}, (6.0, None, False)),
    "Cohere": ("Cohere", {"logit_scale": 0.25}, (0.25, None, False)),
    "Recurrent Gemma": ("RecurrentGemma", {"logits_soft_cap": 2.0, "lru_width": 16}, (1.0, 2.0, False)),
    "GPT-2": ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2}, (1.0, None, False)),
}


def make(architecture="Llama", seed=0, **options):
    """A tiny random model, far from uniform; its weights are drawn anew, for some begin all alike."""
    import transformers

    known = {} if architecture == "GPT2" else SIZES
    config = getattr(transformers, f"{architecture}Config")(**{"vocab_size": 40, **known, **options})
    name = f"{architecture}LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.3, generator=generator))
    return model


@pytest.fixture
def batch():
    return pad_sequences([([5, 6, 7], [8, 9, 11, 2]), ([5, 6], [7, 8]), ([3], [4])], 0)


def gradients(model, value):
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-6)


def agree(model, batch):
    """Values and every parameter's gradient are those of full logits."""
    logits, targets = completion_logits(model, batch)
    logps = gather_logps(logits, targets)
    upstream = torch.linspace(-1, 2, len(logps))
    states = completion_hidden(model, batch)
    found = states.logps()
    assert torch.equal(states.targets, targets)
    close(found, logps)
    expected = gradients(model, (upstream * logps).sum())
    actual = gradients(model, (upstream * found).sum())
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        close(actual[name], gradient)
    return states


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_agree_with_their_own_logits(name, batch):
    architecture, options, (scale, softcap, bias) = ARCHITECTURES[name]
    model = make(architecture, **options)
    head = output_head(model)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.scale, head.softcap, head.bias is not None) == (
        pytest.approx(scale, rel=1e-11),
        softcap,
        bias,
    )
    states = agree(model, batch)
    assert states.hidden.shape == (7, 16)
    reference = make(architecture, seed=1, **options)
    logits, ref_logits = (completion_logits(each, batch).logits for each in (model, reference))
    with torch.no_grad():
        theirs = completion_hidden(reference, batch)
    for reverse, expected in (
        (False, kl_per_token(logits, ref_logits)),
        (True, kl_per_token(ref_logits, logits)),
    ):
        found = states.kl(theirs, reverse=reverse)
        close(found.kl, expected)
        close(found.ref_logps, gather_logps(ref_logits, states.targets))
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_policy_and_reference_may_differ_in_architecture(batch):
    policy, reference = make("Gemma2", final_logit_softcapping=3.0), make("Phi")
    found = completion_hidden(policy, batch).kl(completion_hidden(reference, batch)).kl
    close(found, kl_per_token(*(completion_logits(each, batch).logits for each in (policy, reference))))


def test_the_model_is_left_as_it_was(batch):
    model = make(attention_dropout=0.5).train()
    before = torch.get_rng_state()
    output_head(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    completion_hidden(model, batch)
    assert "forward" not in vars(model.lm_head)
    assert model(batch.input_ids).logits.shape == (*batch.input_ids.shape, 40)
    with pytest.raises(IndexError):  # a forward that fails
        completion_hidden(model, batch._replace(input_ids=batch.input_ids + 1000))
    assert "forward" not in vars(model.lm_head)


def test_the_head_is_computed_for_one_position_only(batch):
    from torch.utils.flop_counter import FlopCounterMode

    model = make()
    output_head(model)
    flops = []
    for run in (completion_hidden, completion_logits):
        with FlopCounterMode(display=False) as counter:
            run(model, batch)
        flops.append(counter.get_total_flops())
    positions = batch.input_ids.numel()
    assert flops[1] - flops[0] == 2 * 16 * 40 * (positions - 1)


# ------------------------------------------------------------------ what falls back to full logits


def test_weights_keep_being_the_models_own(batch):
    model = make()
    first = output_head(model)
    model.set_output_embeddings(nn.Linear(16, 40, bias=True))
    second = output_head(model)
    assert second.weight is model.lm_head.weight is not first.weight
    agree(model, batch)


def _lora_on_head(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def _trained_head(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))


def _quantized_like(model):
    class Linear8bit(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).round(decimals=1)

    head = Linear8bit(16, 40, bias=False)
    model.set_output_embeddings(head)
    return model


def _hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    return model


def _packed(model):
    class Packed(torch.Tensor):
        pass

    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Packed))
    return model


def _offloaded(model):
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden)
    return model


def _forward_adds(change):
    def apply(model):
        plain = type(model).forward

        class Changed(type(model)):
            def forward(self, *args, **kwargs):
                output = plain(self, *args, **kwargs)
                output.logits = change(self, output.logits)
                return output

        model.__class__ = Changed
        return model

    return apply


def _learned_temperature(model):
    model.temperature = nn.Parameter(torch.tensor(2.0))
    return _forward_adds(lambda self, logits: logits * self.temperature)(model)


def _two_heads(model):
    plain = type(model).forward

    class Twice(type(model)):
        def forward(self, *args, **kwargs):
            output = plain(self, *args, **kwargs)
            self.lm_head(torch.zeros(1, 3, 16))
            return output

    model.__class__ = Twice
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_lora_on_head, "its head is Linear, not a plain"),
        (_trained_head, "its head is ModulesToSaveWrapper"),
        (_quantized_like, "its head is Linear8bit"),
        (_packed, "its head is quantized, sharded or offloaded"),
        (_hooked, "its head has hooks"),
        (_offloaded, "its head has hooks"),
        (_learned_temperature, "parameters behind its head"),
        (_two_heads, "does not call its head once"),
        (_forward_adds(lambda self, logits: logits[..., :-3]), "shape differs"),
        (_forward_adds(lambda self, logits: logits + 0.5), "nor those times a factor"),
        (_forward_adds(lambda self, logits: logits.clamp(-20, 20)), "nor those times a factor"),
        (
            _forward_adds(lambda self, logits: logits.index_fill(-1, torch.tensor([7]), -1e9)),
            "nor those times",
        ),
        (_forward_adds(lambda self, logits: logits.view(3, 7, 40)), "did not take chosen scores"),
    ],
)
def test_other_heads_fall_back_to_full_logits_and_say_so_once(change, reason, batch, caplog):
    model = change(make())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert output_head(model) is None
            states = agree(model, batch)
    assert states.head.weight is None
    [line] = caplog.messages
    assert "full logits are computed" in line
    assert reason in line


def test_what_is_no_transformers_model_falls_back(batch, caplog):
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Embedding(40, 40)

        def forward(self, input_ids, **ignored):
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(logits=self.scores(input_ids))

    assert agree(Toy(), batch).head.weight is None
    assert "Toy is no transformers model" in caplog.text


# ------------------------------------------------------------------ wrappers and precision


def test_adapters_below_the_head_use_it(batch):
    from peft import LoraConfig, get_peft_model

    base = make()
    plain = completion_hidden(base, batch).logps()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    states = agree(model, batch)
    assert states.head.weight is base.lm_head.weight
    with model.disable_adapter():
        reference = completion_hidden(model, batch)
    assert torch.equal(reference.logps(), plain)
    assert states.kl(reference).kl.max() > 0.1


def test_a_model_whose_logits_are_of_no_known_form_is_let_go():
    model = make()
    forward = type(model).forward

    def cubed(self, *args, **options):
        output = forward(self, *args, **options)
        output.logits = output.logits**3
        return output

    model.forward = MethodType(cubed, model)
    for _ in range(3):
        assert output_head(model) is None
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_compiled_models(batch):
    model = make()
    compiled = torch.compile(model, backend="eager")
    completion_logits(compiled, batch)  # compiled with its own head first
    assert completion_hidden(compiled, batch).head.weight is model.lm_head.weight
    agree(compiled, batch)


def test_gradient_checkpointing(batch):
    model = make().train()
    model.gradient_checkpointing_enable()
    assert agree(model, batch).head.weight is model.lm_head.weight


def test_autocast_inside_the_model_is_autocast_of_its_head(batch):
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, targets = completion_logits(model, batch)
        states = completion_hidden(model, batch)
    found = states.logps()  # outside, as after a forward that a trainer wrapped
    assert found.dtype == torch.float32
    close(found, gather_logps(logits, targets))
    expected, actual = (gradients(model, each.sum()) for each in (gather_logps(logits, targets), found))
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 0.02 * gradient.norm()


def test_a_model_in_bf16(batch):
    model = make("Granite", logits_scaling=8.0).bfloat16()
    states = completion_hidden(model, batch)
    assert states.head == (model.lm_head.weight, None, 0.125, None)
    assert states.hidden.dtype == torch.bfloat16
    close(states.logps(), gather_logps(*completion_logits(model, batch)))


TWO_PROCESSES = """
import sys
import torch
from softpref.lm.head import completion_hidden
from softpref.lm.padding import pad_sequences

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
for case in torch.load(f"{folder}/cases.pt", weights_only=False):
    model, reference = case["models"]
    model = torch.nn.parallel.DistributedDataParallel(model, **case["options"])
    for step in range(2):  # the second step is after buckets were rebuilt
        model.zero_grad()
        pairs, samples = (pad_sequences(each, 0) for each in case["batches"][rank])
        with torch.no_grad():
            theirs = completion_hidden(reference, samples)
        logps = completion_hidden(model, pairs).logps()
        (logps.sum() + completion_hidden(model, samples).kl(theirs).kl.sum()).backward()
        name = f"{folder}/{case['name']}-{rank}-{step}.pt"
        torch.save({n: p.grad for n, p in model.module.named_parameters()}, name)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Gradients that DistributedDataParallel leaves on each of two processes, with what they were given."""
    folder = tmp_path_factory.mktemp("processes")
    batches = [
        ([([5, 6, 7], [8, 9, 2]), ([5, 6], [7, 8])], [([5], [8, 12, 13])]),
        ([([21, 22], [23, 24, 25, 2])], [([5, 9], [30, 31, 2]), ([4], [2])]),
    ]
    cases = [
        {
            "name": f"tied {tied}, {options}",
            "models": (make(tie_word_embeddings=tied), make(seed=1, tie_word_embeddings=tied)),
            "batches": batches,
            "options": options,
        }
        for tied in (True, False)
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True})
    ]
    torch.save(cases, folder / "cases.pt")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    return folder, {case["name"]: case for case in cases}


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.parametrize("tied", [True, False])
def test_two_processes_reduce_the_gradients_of_the_head_too(two_processes, tied, options):
    folder, cases = two_processes
    case = cases[f"tied {tied}, {options}"]
    model, reference = case["models"]
    model = copy.deepcopy(model)
    for pairs, samples in case["batches"]:
        logits = completion_logits(model, pad_sequences(pairs, 0))
        both = [completion_logits(each, pad_sequences(samples, 0)).logits for each in (model, reference)]
        loss = gather_logps(*logits).sum() + kl_per_token(*both).sum()
        (loss / 2).backward()  # DistributedDataParallel takes the mean
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ("lm_head.weight" in expected) is not tied
    for rank in range(2):
        for step in range(2):
            found = torch.load(folder / f"{case['name']}-{rank}-{step}.pt")
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                close(found[name], gradient)
