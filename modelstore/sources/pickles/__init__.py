"""Files of `torch.save`, whose pickles are read and never run."""
