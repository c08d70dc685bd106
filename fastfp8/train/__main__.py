"""Train a model of :mod:`fastfp8.models` on real text.

    python -m fastfp8.train --config tiny --compare bf16,fp8 --out train-output
    torchrun --nproc_per_node 4 -m fastfp8.train --config tiny --precision fp8

Prints progress, keeps checkpoints, and draws the loss. With ``--compare``, runs one precision after the other on the
same data from the same weights, and prints how far each smoothed loss is from the first.
"""

from .command import main

if __name__ == "__main__":
    main()
