"""Public and private collections of images -> rows; splits, leakage audit, dataset in the store."""
