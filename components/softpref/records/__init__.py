"""What the stages leave on disk for one another: file names, typed records, and how to tell what is complete.

The file that identifies a folder is written last, so a folder that has it is complete:

| folder | identified by | beside it |
| :-- | :-- | :-- |
| dataset | `stats.json` | splits, `sft/`, `prompts/`, `rejected.jsonl`, `page.html`, what experts know |
| model | `softpref.json` | safetensors, tokenizer, model card, `extrapolated-W/`, `round-N/` |
| evaluation | `evaluation.json` | `samples.jsonl`, `report.html`, `extrapolated-W/`, `round-N/` |
| comparison | `comparison.json` | `report.html`, `frontier.png`, `chosen/evaluation.json` |
| registration | `registration.json` | |

Each also has `parameters.yaml`, which `--config` accepts, and `timings.json` where the stage takes long;
models and evaluations have `result.json`, for a stage that has finished and is called again.
"""
