"""One rollout server: generates groups with SGLang, grades them, streams them to the trainer, takes new weights.

    loop            the server: hello, leases, heartbeats, swaps, the engine's watch
    engine          what a generation engine has to do, and its scripted twin for tests
    sglang_engine   the real one: a child SGLang, or one that runs already
    sglang_process  what runs inside that child; the only importer of sglang
    hot_swap        a published version of the weights, into the engine, while it generates
    reward          grading in killable processes

Imports asyncppo, never trainer, and never torch.
"""
