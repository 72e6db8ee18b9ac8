"""The chaos harness: real processes, a schedule of faults from a seed, and an audit of the files that the run leaves.

    proxy       between each rollout server and the trainer: drops, delays, repeats, reorders, corrupts, cuts
    server      `python -m rollout_server` with a scripted engine; rewards: what it grades by
    cluster     the processes: started, found, killed, started again by the same command
    faults      what can happen, and when, drawn from the seed
    harness     does it, live on the terminal
    audit       what the files say: lost, duplicated, over the bound
    soak        no faults, for long: memory, files, disk

`scripts/chaos.sh` and `scripts/soak.sh` start it.
"""
