"""`python -m mas_hpc`, which torchrun starts on every rank."""

from mas_hpc.cli import main

if __name__ == "__main__":
    main()
