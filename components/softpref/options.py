"""The options of each stage's configuration, read from its source without importing it.

The configurations of `sft` and `train` extend `transformers.TrainingArguments`, whose import takes five
seconds of CPU. From the source, all options are listed and checked in a fraction of a second.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib.util
import inspect
import re
import typing
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from softpref.config import REFUSED, nearest

REQUIRED = dataclasses.MISSING  # the default of an option that has none
CONFIGURATIONS = {  # module and class by stage
    "data": ("softpref.data.config", "DataConfig"),
    "sft": ("softpref.sft.config", "SFTConfig"),
    "train": ("softpref.spo.config", "SPOConfig"),
    "judge": ("softpref.reward_model.config", "RewardModelConfig"),
    "evaluate": ("softpref.evaluation.config", "EvaluationConfig"),
    "register": ("softpref.registry.config", "RegistryConfig"),
    "benchmark": ("softpref.evaluation.config", "BenchmarkConfig"),
}
HIDDEN = {  # options of transformers that the console does not offer, and what to do instead
    "output_dir": "--output names the folder to write",
    **REFUSED,
}


class Option(typing.NamedTuple):
    """One field of a configuration.

    Args:
        hint: its type; `Any` for a class that only an import would give.
        kind: its type in words.
        default: its value, or `REQUIRED`.
        text: what it is for.
        inherited: whether it comes unchanged from transformers.
    """

    name: str
    hint: Any
    kind: str
    default: Any
    text: str
    inherited: bool = False


def instead(
    name: str,
    exact: str,
    own: Iterable[str],
    inherited: Iterable[str],
    written: Callable[[str], Iterable[str]],
) -> str:
    """What to write instead of an unknown option, as the end of the sentence that refuses it.

    Args:
        exact: the answer where something else has an option of exactly this name; else empty.
        own, inherited: the names that may be meant; see `closest`.
        written: how to write one of them; nothing if it is of no use here.
    """
    if name in HIDDEN:
        return f"; {HIDDEN[name]}"
    near = [text for one in nearest(name, own, inherited) for text in written(one)]
    return exact or (near and f"; did you mean {' or '.join(near)}?") or "; --help lists all"


@cache
def read_options(module: str, name: str) -> dict[str, Option]:
    """The options of a configuration by name, its own before those that it inherits from transformers.

    Args:
        module, name: of its dataclass, such as `softpref.spo.config`, `SPOConfig`.
    """
    package, *path = module.split(".")
    found = importlib.util.find_spec(package)  # imports nothing for a top-level package
    if found is None or not found.submodule_search_locations:
        return {}  # the data stage's image has no transformers
    file = Path(found.submodule_search_locations[0], *path).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    inherited: dict[str, Option] = {}
    if "TrainingArguments" in map(ast.unparse, node.bases):
        inherited = read_options("transformers.training_args", "TrainingArguments")
    known, texts = _Names(tree, node), _texts(ast.get_docstring(node) or "")
    own = {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            key = field.target.id
            default, text = _default(field.value, known)
            text = texts.get(key) or text or (inherited[key].text if key in inherited else "")
            own[key] = Option(
                key, known.value(field.annotation), _kind(field.annotation, known), default, text
            )
    return own | {key: one._replace(inherited=True) for key, one in inherited.items() if key not in own}


class _Names(dict[str, Any]):
    """The names that a class's expressions may use: builtins, typing's, and the module's and class's own."""

    def __init__(self, module: ast.Module, class_: ast.ClassDef) -> None:
        super().__init__({**vars(builtins), **vars(typing)})
        conditional = [node for line in class_.body if isinstance(line, ast.If) for node in ast.walk(line)]
        self._assigned = {
            target.id: line.value
            for line in [*module.body, *class_.body, *conditional]
            if isinstance(line, ast.Assign)
            for target in line.targets
            if isinstance(target, ast.Name)
        }

    def __missing__(self, name: str) -> Any:
        return self.value(self._assigned[name]) if name in self._assigned else Any

    def value(self, node: ast.expr) -> Any:
        """The value of an expression; `Any` where only an import could tell."""
        try:
            return eval(compile(ast.Expression(node), "", "eval"), {}, self)
        except Exception:
            return Any


def _default(node: ast.expr | None, known: _Names) -> tuple[Any, str]:
    """The default of a field, and the help that it carries."""
    help = ""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("field"):
        given = {one.arg: one.value for one in node.keywords}
        node = given.get("default")
        if factory := given.get("default_factory"):
            node = ast.fix_missing_locations(ast.Call(factory, [], []))
        if isinstance(metadata := given.get("metadata"), ast.Dict):
            texts = dict(zip(map(ast.unparse, filter(None, metadata.keys)), metadata.values, strict=True))
            help = str(known.value(texts["'help'"])).replace("%%", "%") if "'help'" in texts else ""
    if node is None:
        return REQUIRED, help
    default = known.value(node)
    return ast.unparse(node) if default is Any else default, help


def _kind(node: ast.expr, known: _Names) -> str:
    """A type in words: choices as they are written, without None."""
    if isinstance(node, ast.BinOp):
        return " | ".join(filter(None, (_kind(node.left, known), _kind(node.right, known))))
    hint = known.value(node)
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    return "" if hint is None else ast.unparse(node).removesuffix("[str, Any]")


def _texts(docstring: str) -> dict[str, str]:
    """The entries of a docstring's `Args:` by name; `a, b: …` is one of both."""
    arguments = inspect.cleandoc(docstring).partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w[\w, ]*?)(?: \(.*?\))?: (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
