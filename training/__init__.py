"""One script a stage: `accelerate launch training/train_X.py [configs/.../X.yaml] [key=value ...]`."""

if __name__ == "training":  # imported from a checkout's root
    from t2i.aliases import alias_package

    alias_package("training", "t2i.training")
