"""The examples run, and end where theory says."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from scipy.optimize import minimize

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def optimum(rewards, alpha, beta):
    """The objective of pairs with its KL term to a uniform reference, minimised over a table of outputs."""
    rewards = np.array(rewards)
    pairs = np.array(list(itertools.permutations(range(len(rewards)), 2)))
    prefers = 1 / (1 + np.exp(np.diff(rewards[pairs])[:, 0]))

    def objective(logits):
        logps = logits - np.logaddexp.reduce(logits)
        margins = -np.diff(logps[pairs])[:, 0]
        losses = np.logaddexp(0, -alpha * margins) * prefers + np.logaddexp(0, alpha * margins) * (
            1 - prefers
        )
        return losses.mean() / alpha + beta * np.exp(logps) @ (logps + np.log(len(rewards)))

    logits = minimize(objective, np.zeros(len(rewards)), options={"gtol": 1e-9}).x
    return np.exp(logits - np.logaddexp.reduce(logits))


def test_the_script_ends_at_the_optimum():
    script = EXAMPLES / "align_in_thirty_lines.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=600)
    rows = dict(re.findall(r"^(\w+) +(\d\.\d+ +\d\.\d+)$", run.stdout, re.MULTILINE))
    trained, theory = np.array([[float(value) for value in row.split()] for row in rows.values()]).T
    right = optimum([1.0, 0.7, 0.3, 0.0, -0.4, -1.0], alpha=0.5, beta=0.05)
    assert theory == pytest.approx(right, abs=0.002)
    assert trained == pytest.approx(right, abs=0.01)


def test_the_notebook_shows_softness_beside_theory():
    notebook = nbformat.read(EXAMPLES / "softness.ipynb", as_version=4)
    values = "print(json.dumps([results, results_without_kl, rewards.tolist(), BETA]))"
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\n{values}"))
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    results, without_kl, rewards, beta = json.loads(notebook.cells[-1].outputs[0]["text"])
    for alpha, trained in results.items():
        right = optimum(rewards, float(alpha), beta)
        assert trained["reward"] == pytest.approx(right @ np.array(rewards), abs=0.1)
        assert trained["entropy"] == pytest.approx(-right @ np.log(right), abs=0.1)
        assert trained["mass"] > 0.97
    assert without_kl["mass"] < 0.7
    assert any(
        "image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    )
