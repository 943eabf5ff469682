"""Complete every prompt of a text file in one batch, and write the completions as JSON lines.

python examples/batch.py BUNDLE prompts.txt completions.jsonl
"""

import json
import sys
from pathlib import Path

import fmedge

bundle, source, target = sys.argv[1:4]
prompts = [line for line in Path(source).read_text("utf-8").splitlines() if line.strip()]
sampling = fmedge.Sampling(max_new_tokens=48, temperature=0.7, top_p=0.9, seed=1)

with fmedge.load(bundle) as model, Path(target).open("w", encoding="utf-8") as file:
    for completion in model.generate(prompts, sampling):
        if completion.error is not None:
            print(f"{prompts[completion.prompt_index]!r}: {completion.error}", file=sys.stderr)
            continue
        record = {"prompt": prompts[completion.prompt_index], "completion": completion.text}
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
