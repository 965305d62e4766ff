"""Images from plain WebDataset tars: index, order, decoding, views, batches."""
