"""The CPU implementation of every op, in plain PyTorch. It is the oracle of the other backends."""
