"""Training: models from nothing (`pretrain`), and what their methods share: operations, folders, logs and plots."""
