"""One script a stage: `accelerate launch training/train_X.py [configs/.../X.yaml] [key=value ...]`."""
