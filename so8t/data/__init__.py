"""Records, sources, splits, tokenisation and the LightningDataModule."""
