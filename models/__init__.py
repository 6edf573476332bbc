"""Networks: tensors to features and logits. They know tokens and times, not losses or datasets."""
