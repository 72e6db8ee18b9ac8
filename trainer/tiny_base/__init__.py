"""The tiny base models that a new machine, which has no model hub, trains for itself.

    python -m trainer.tiny_base --out artifacts/tiny
    python -m trainer.tiny_base --task chains --out artifacts/chains

The first writes, after about two minutes on two CPU cores:

    artifacts/tiny/actor/    a 98,752-parameter Qwen3, an ordinary Hugging Face directory
    artifacts/tiny/critic/   its 37,152-parameter sibling, pretrained on the same text: the mini-critics start from it
    artifacts/tiny/data/     train.jsonl, eval_6.jsonl, eval_8.jsonl
    artifacts/tiny/base.json the recipe and its hash, versions, how good the models are, what they cost

The task is `asyncppo.tiny_task`. The models are pretrained in two stages on its noisy solutions: the first teaches
them to calculate, the short second makes the unreliable direct style the most common one. The actor then gets about
a quarter of the held-out problems right when it samples, two thirds in one of four tries, and, as direct answers and
written-out ones are about equally likely, anything from a sixth to two fifths (by seed) when it decodes greedily.

The second is the base of `asyncppo.chains_task`, on which mini-critics learn (docs/measurements.md).

Nothing here is specific to reinforcement learning, and nothing else in the trainer depends on these models: it takes
any Hugging Face directory.

    recipes  what is made for each task    pretrain  models and their training    jobs  one process each, progress bars
    tokens   tokenizer and documents       scores    how good a model is          base  the directory as a whole
"""
