"""Expert streaming: a model's routed experts stay on disk, and banks of slots hold some of them.

anatomy.py says where a layer's experts lie in the model's files, store.py reads them, bank.py keeps a layer's slots,
policy.py decides who leaves, layer.py stands in for mlx-lm's switch layers, streaming.py holds it all together.
"""
