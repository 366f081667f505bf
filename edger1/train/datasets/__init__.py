"""Data for fine-tuning: files become rows, rows become conversations, conversations become tokens in batches."""
