"""Three tasks of the standard harness, made of local files: answers, choices, perplexity."""

import json

QUESTIONS = [
    {"question": f"what is {n} + {n}? " * (1 + n % 3), "answer": str(2 * n)} for n in range(6)
]
CHOICES = [
    {"question": f"the number {n} is", "choices": ["odd", "even", "a prime one"], "label": n % 2}
    for n in range(6)
]
TEXTS = [{"text": "the quick brown fox jumps over " * count} for count in (1, 2, 5)]

_HEAD = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
"""
_TASKS = {
    "own_answers": (
        QUESTIONS,
        """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\u0014", "q"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    ),
    "own_choices": (
        CHOICES,
        """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    ),
    "own_texts": (
        TEXTS,
        """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    ),
}
NAMES = list(_TASKS)


def write_tasks(folder):
    """The yaml files and their data, in one folder."""
    for name, (rows, task) in _TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(_HEAD.format(name=name, folder=folder) + task)
    return folder
