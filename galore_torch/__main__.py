"""``python -m galore_torch`` is the console command ``galore``."""

from galore_torch.cli import main

if __name__ == "__main__":
    main()
