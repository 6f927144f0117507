"""The table of all parameters of the pipelines. `preflight.stage` checks their values.

The pipelines' signatures and docstrings, the face of their first step, the arguments of each stage, the
command line and `docs/parameters.md` are made from it. To add a parameter: an entry here, an argument of the
stage's `component.py`, and `make packages`.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, List  # noqa: UP035  # KFP reads the element type from typing.List

Struct = dict[str, Any]  # a JSON object; KFP knows it as dict
STAGES = ("data", "sft", "train", "evaluate", "compare", "register")


@dataclass(frozen=True)
class Parameter:
    """One parameter of the pipelines.

    Attributes:
        default: may be replaced by a recipe or a cluster profile.
        reaches: the stages that take it: `STAGE`, or `STAGE.KEY` if its name there is another; `*`: every
            step. Those of `plan` alone define the models.
        text: its description in help, forms and documentation.
        type: as KFP reads it; `dict` is a JSON object.
        pipelines: those that have it.
        optional: empty (in a form "", 0 or {}) means the stage's own default.
        shown: also named in the package's description, because KFP's form shows no texts.
    """

    default: Any
    reaches: str
    text: str
    pipelines: tuple[str, ...] = ("sweep", "single")
    optional: bool = False
    shown: bool = False
    name: str = ""
    type: Any = None

    def key(self, stage: str) -> str | None:
        """Its name in a stage's configuration; None if it does not reach the stage."""
        for place in self.reaches.split():
            name, _, key = place.partition(".")
            if name in (stage, "*"):
                return key or self.name
        return None

    def given(self, value: Any) -> bool:
        """Whether a stage's configuration gets the value."""
        return value is not None and self.reaches != "*" and bool(value or not self.optional)


def _parameter(default: Any, reaches: str, text: str, **more: Any) -> Any:
    return Parameter(default, reaches, text, **more)


def _overrides(stage: str, reaches: str) -> Any:
    return _parameter({}, reaches, f"Any other parameter of the {stage} stage.", optional=True)


class _Table:
    source: str = _parameter(
        "story",
        "data",
        '"story" or "storyteller" (embedded, no download), a Hub dataset id, a URL (s3://, gs://, https://), '
        "the address of a KFP artifact (minio://) or a path (JSONL, CSV, Parquet).",
        shown=True,
    )
    columns: Struct = _parameter(
        {},
        "data",
        "From role to column of the source; empty uses columns named like the roles.",
        optional=True,
        shown=True,
    )
    prompt_template: str = _parameter(
        "",
        "data",
        r'Builds the prompt from columns, such as "Debate: {debate}\nArgument:".',
        optional=True,
    )
    rows: int = _parameter(
        0, "data", "Preference rows to draw or to sample; 0 takes the default or all.", optional=True
    )
    data_overrides: Struct = _overrides("data", "data.overrides")

    base_model: str = _parameter(
        "",
        "sft",
        "Hub id, URL, registered model (models:/NAME@champion), checkpoint folder or .gguf file; empty "
        "trains a model from nothing.",
        optional=True,
        shown=True,
    )
    sft_learning_rate: float = _parameter(2e-5, "sft.learning_rate", "Peak learning rate of the reference.")
    sft_num_train_epochs: float = _parameter(
        1.0,
        "sft.num_train_epochs",
        "Passes over the demonstrations; 0 takes the base model as the reference.",
    )
    sft_overrides: Struct = _overrides("SFT", "sft.overrides")

    alpha: float = _parameter(
        1.0,
        "plan",
        "Softness. 1 is the experts' own distribution, towards 0 their favourite.",
        pipelines=("single",),
        shown=True,
    )
    alphas: List[float] = _parameter(  # noqa: UP006
        [0.5, 1.0, 2.0],
        "plan",
        "Softness values, one model each. 1: the experts' own distribution, towards 0: their favourite.",
        pipelines=("sweep",),
        shown=True,
    )
    anchor: float = _parameter(
        0.0,
        "plan",
        "What softness is relative to: 0, nothing, as published; 1, the reference, which natural text needs. "
        "The optimum is reference^anchor * exp(reward / alpha).",
        shown=True,
    )
    baselines: List[str] = _parameter(  # noqa: UP006
        ["dpo:0.1"],
        "plan",
        "Further models on the same rows, METHOD[:BETA][,OPTION=VALUE...]: dpo, rdpo, ipo, slic, ropo, "
        "apo_zero, apo_down, tdpo, tdpo1, simpo, cpo, orpo, kto, sppo (or spo), with options of the "
        "training stage for this model only and optionally its name, such as "
        '"sppo:1,train_on=samples,rounds=3".',
        pipelines=("sweep",),
        shown=True,
    )
    beta: float = _parameter(
        0.05, "plan", "Strength of the KL regulariser over the whole output distribution.", shown=True
    )
    learning_rate: float = _parameter(1e-6, "train", "Peak learning rate of SPO training.", shown=True)
    num_train_epochs: float = _parameter(1.0, "train", "Passes over the preferences.", shown=True)
    samples_per_refresh: int = _parameter(64, "train", "Completions drawn from the policy at each refresh.")
    sampling_interval: int = _parameter(8, "train", "Optimizer steps between refreshes.")
    train_overrides: Struct = _overrides("training", "train.overrides")

    judge: str = _parameter(
        "auto",
        "evaluate",
        '"auto", "expert" (known reward), "bradley-terry" (learned from the preferences set apart for it, or '
        'from the training preferences), "reward-model" (a checkpoint), "llm" (a language model behind an '
        "endpoint, whose address is in judge_options of evaluation_overrides), or a judge of your own.",
    )
    judge_model: str = _parameter(
        "",
        "evaluate",
        "Of the judge reward-model its checkpoint, of llm the model's name at its endpoint.",
        optional=True,
    )
    max_prompts: int = _parameter(100, "evaluate", "Held-out prompts that models are measured on; 0: all.")
    samples_per_prompt: int = _parameter(
        32, "evaluate", "Completions drawn per held-out prompt, from policy and reference."
    )
    evaluation_overrides: Struct = _overrides("evaluation", "evaluate.overrides")

    selection_rule: str = _parameter(
        "expected_reward",
        "compare",
        '"expected_reward" or "win_rate": what ranks the models. Of the healthy ones that keep nine tenths '
        "of the best one's gain over the reference, the softest is chosen. If it does not pass the gate, the "
        "next that does is chosen; if none does, the run fails.",
        pipelines=("sweep",),
    )
    max_kl: float = _parameter(
        0.0,
        "compare",
        "Models further than this from the reference (nats per completion) are not chosen; 0: no limit.",
        pipelines=("sweep",),
        optional=True,
    )
    registered_model_name: str = _parameter(
        "softpref",
        "compare register",
        "Name in the MLflow model registry; empty registers nothing, and asks for no gate.",
        optional=True,
        shown=True,
    )
    min_win_rate: float = _parameter(
        0.5,
        "compare register",
        "Gate: the low end of the win rate's interval must be above this, or the model is not registered. "
        "0.5 means that it must beat its reference; 0 asks for no win rate.",
    )
    registry_overrides: Struct = _overrides("registration", "compare register.overrides")

    gpus: str = _parameter(
        "",
        "sft train",
        "GPUs that the training stages ask for; empty asks for none.",
        optional=True,
        shown=True,
    )
    trust_remote_code: bool = _parameter(
        False,
        "sft train evaluate register",
        "Run model code that comes with the base model, in every stage, and wherever the registered model is "
        "served.",
    )
    seed: int = _parameter(0, "data sft train evaluate", "Seed of data, training and sampling.")
    experiment: str = _parameter("softpref", "*", "MLflow experiment.")
    tracking_uri: str = _parameter("", "*", "MLflow server; empty takes the environment's.")


TABLE: dict[str, Parameter] = {
    name: replace(vars(_Table)[name], name=name, type=dict if kind == Struct else kind)
    for name, kind in _Table.__annotations__.items()
}
SWEEP, SINGLE = (
    {name: one for name, one in TABLE.items() if pipeline in one.pipelines}
    for pipeline in ("sweep", "single")
)
# what tells the models of the training stage from one another, and the parameters that they are planned from
PLANNED = {"method": ["baselines"], "alpha": ["alpha", "alphas"], "beta": ["beta"], "anchor": ["anchor"]}


def of_stage(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that reach a stage, by their names there."""
    return {key: values[one.name] for one in TABLE.values() if one.name in values and (key := one.key(stage))}


def signature(
    parameters: Iterable[Parameter], *, required: bool = False, **further: Any
) -> inspect.Signature:
    """A signature of the parameters, with their defaults unless they are `required`.

    Args:
        further: types of arguments that come first.
    """
    none, either = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [inspect.Parameter(name, either, annotation=kind) for name, kind in further.items()]
    known = [
        inspect.Parameter(one.name, either, annotation=one.type, default=none if required else one.default)
        for one in parameters
    ]
    return inspect.Signature([*first, *known])


def declared(
    summary: str, parameters: Iterable[Parameter], **arguments: Any
) -> Callable[[Callable[[Mapping[str, Any]], None]], Callable[..., None]]:
    """Makes a function of one mapping take the parameters one by one, so that KFP can trace it.

    Args:
        arguments: of `signature`.
    """
    parameters = list(parameters)
    shown = signature(parameters, **arguments)

    def decorate(function: Callable[[Mapping[str, Any]], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def traced(*given: object, **named: object) -> None:
            function(shown.bind(*given, **named).arguments)

        traced.__signature__ = shown  # type: ignore[attr-defined]
        traced.__doc__ = docstring(summary, parameters)
        return traced

    return decorate


def docstring(summary: str, parameters: Iterable[Parameter]) -> str:
    """A docstring of the parameters, in KFP's format."""
    return "\n".join([f"{summary}\n\nArgs:", *(f"    {one.name}: {one.text}" for one in parameters)])


def reference() -> str:
    """The page `docs/parameters.md`."""
    lines = [
        "# Parameters of the pipelines",
        "",
        "Recipes and cluster profiles override these defaults. `make packages` writes this page.",
        "",
        "| parameter | type | default | description | pipelines | stages |",
        "| :-- | :-- | :-- | :-- | :-- | :-- |",
    ]
    for one in TABLE.values():
        kind, default = inspect.formatannotation(one.type), json.dumps(one.default)
        stages = [stage for stage in ("plan", *STAGES) if one.key(stage)]
        places = f"{', '.join(one.pipelines)} | {', '.join(stages)}"
        lines.append(f"| `{one.name}` | {kind} | `{default}` | {one.text} | {places} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(reference(), end="")
