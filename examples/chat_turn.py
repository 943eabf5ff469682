"""One turn of a chat, by the chat template that the model came with.

python examples/chat_turn.py BUNDLE "What is a tuple?"
"""

import sys

import fmedge

bundle, question = sys.argv[1:3]
messages = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": question},
]

with fmedge.load(bundle) as model:
    try:
        prompt = model.chat_prompt(messages)
    except fmedge.RequestError as error:
        sys.exit(f"this model cannot chat: {error}")
    (reply,) = model.generate(prompt, fmedge.Sampling(max_new_tokens=64, stop=("\n\n",)))
    print(reply.text)
