"""The trainer: groups in, weights out. One process per device, each role a torch.distributed world of its own."""
