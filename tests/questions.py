"""A task of the language model evaluation harness that nothing has to be fetched for."""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = [
    {"query": "The ship went down in the", "choices": ["sea", "captain's own cabin"], "gold": 0},
    {"query": "He had", "choices": ["never seen it", "a"], "gold": 0},
    {"query": "It was the", "choices": ["time", "whale of the south"], "gold": 1},
    {"query": "She said that", "choices": ["he would", "the moon"], "gold": 1},
    {"query": "On the road", "choices": ["to town", "of the men"], "gold": 0},
]


def save_task(folder: Path) -> None:
    """Write the task `questions` to a folder."""
    data = folder / "questions.jsonl"
    data.write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS), encoding="utf-8")
    task = f"""
task: questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
"""
    (folder / "questions.yaml").write_text(task, encoding="utf-8")
