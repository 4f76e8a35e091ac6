"""Iterative learning: choose, distort, label, keep the data set, finetune (Secs. III A and IV A of
the paper)."""
