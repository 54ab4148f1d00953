"""What the training in ``train_gpt.py`` needs besides optfn: text, network, checkpoints, the torch.optim twin, the report."""
