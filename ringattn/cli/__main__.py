"""`python -m ringattn.cli`, as torchrun starts it on every rank: torchrun --nproc-per-node 4 -m ringattn.cli verify."""

from ringattn.cli import main

if __name__ == "__main__":
    main()
