"""`python -m t2i`, which a launcher of several processes starts: torchrun -m t2i eval quality ..."""

from t2i.cli import main

main()
