"""AsyncPPO: asynchronous off-policy PPO for LLM reasoning with AsyPPO's mini-critics.

What both ends must agree on, the mathematics, and the tools people run. Importing this package loads no torch.
"""

__version__ = "0.1.0"
