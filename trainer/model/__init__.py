"""What is trained: the actor and the critics, each on a trainable engine (DeepSpeed, or its plain PyTorch twin)."""
