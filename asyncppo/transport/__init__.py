"""How messages travel: Protocols in `base`, ZeroMQ in `zmq`, and the in-process twin for tests in `memory`."""
