"""Small kernels, each with one real mistake and its correction, for test_emulator_planted.py."""
