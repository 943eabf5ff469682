"""Print a completion while it is generated, then what it took.

python examples/stream.py BUNDLE "Once upon a time"
"""

import sys

import fmedge

bundle, prompt = sys.argv[1:3]

with fmedge.load(bundle) as model:
    for delta in model.stream(prompt, fmedge.Sampling(max_new_tokens=64)):
        print(delta.text, end="", flush=True)
        if delta.completion is not None:
            stats = delta.completion.stats
            print(f"\n({stats.new_tokens} tokens, {stats.decode_tokens_per_second:.0f} tokens/s)", file=sys.stderr)
