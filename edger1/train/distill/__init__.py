"""Distillation of reasoning: a teacher's traces, verified, become a data set to train on."""
